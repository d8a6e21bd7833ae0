"""Writes deploy/: the chart as plain manifests, for who manages a fleet with kubectl and kustomize. `make manifests`.

    deploy/base/                  the chart with its defaults, a file for each kind
    deploy/overlays/NAME/         values.yaml is what a person wrote; the rest follows from it: patches to what differs
                                  from the base, and resources.yaml with what the base does not have
    deploy/components/NAME/       the same, to be added to any overlay
    deploy/crds/                  what an administrator of the cluster applies, once

An overlay is exactly what the chart renders with its values: the tests let kustomize build it and compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from helm.chart import DEFINITION, Object, objects, render

DEPLOY = Path(__file__).parents[1] / "deploy"
HEADER = "# Written by `make manifests` from helm/nemoserve; edit that, or patch this from an overlay of your own.\n"
OF_HELM = ("helm.sh/chart", "helm.sh/resource-policy", "app.kubernetes.io/managed-by")


def overlays() -> list[str]:
    return _folders("overlays")


def components() -> list[str]:
    return _folders("components")


def _folders(kind: str) -> list[str]:
    return sorted(path.parent.name for path in (DEPLOY / kind).glob("*/values.yaml"))


def manifests(*values: Path) -> list[Object]:
    """What the chart renders, without what means something to helm alone; kubectl or kustomize says the namespace."""
    more = [argument for path in values for argument in ("--values", str(path))]
    found = objects(render("helm4", None, *more, "--no-hooks", "--skip-tests", release="nemoserve"))
    for each in found:
        for kept in ("labels", "annotations"):
            said = {key: value for key, value in each["metadata"].pop(kept, {}).items() if key not in OF_HELM}
            if said:
                each["metadata"][kept] = said
        for subject in each.get("subjects", ()):
            del subject["namespace"]
    return found


def files() -> dict[Path, str]:
    """Every file that follows from the chart and the overlays' values, with its contents."""
    base = manifests()
    written: dict[Path, str] = {}
    for kind in sorted({each["kind"] for each in base}):
        written[DEPLOY / "base" / f"{kind.lower()}.yaml"] = _dump([each for each in base if each["kind"] == kind])
    names = [path.name for path in written]
    written[DEPLOY / "base" / "kustomization.yaml"] = _dump([_kustomization({"resources": names}, "base")])
    for name in overlays():
        written |= _variant(DEPLOY / "overlays" / name, base, {"resources": ["../../base"]})
    for name in components():
        written |= _variant(DEPLOY / "components" / name, base, {})
    written[DEPLOY / "crds" / DEFINITION.name] = _dump(objects(DEFINITION.read_text()))
    return written


def _variant(folder: Path, base: list[Object], content: dict[str, list[Any]]) -> dict[Path, str]:
    """Its files: how the chart with the values of this folder differs from the base."""
    wanted = manifests(folder / "values.yaml")
    patches, more = list(_patches(base, wanted)), [each for each in wanted if _key(each) not in map(_key, base)]
    written = {}
    if more:
        written[folder / "resources.yaml"] = _dump(more)
        content = {"resources": [*content.get("resources", []), "resources.yaml"]}
    if patches:
        content = {**content, "patches": patches}
    written[folder / "kustomization.yaml"] = _dump([_kustomization(content, folder.parent.name)])
    return written


def _patches(base: list[Object], wanted: list[Object]) -> Iterator[dict[str, Any]]:
    by_key = {_key(each): each for each in wanted}
    for each in base:
        target = {"kind": each["kind"], "name": each["metadata"]["name"]}
        if _key(each) not in by_key:
            gone = {"apiVersion": each["apiVersion"], "kind": each["kind"], "metadata": {"name": target["name"]}}
            yield {"patch": _yaml([{**gone, "$patch": "delete"}])}
        elif steps := list(difference(each, by_key[_key(each)])):
            yield {"target": target, "patch": _yaml([steps])}


def difference(old: Any, new: Any, path: str = "") -> Iterator[dict[str, Any]]:
    """JSON patch (RFC 6902) that makes one of the other; lists of another length are replaced whole."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            here = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            if key not in new:
                yield {"op": "remove", "path": here}
            elif key not in old:
                yield {"op": "add", "path": here, "value": new[key]}
            else:
                yield from difference(old[key], new[key], here)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for position, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from difference(left, right, f"{path}/{position}")
    else:
        yield {"op": "replace", "path": path, "value": new}


def _key(each: Object) -> tuple[str, str]:
    return each["kind"], each["metadata"]["name"]


def _kustomization(content: dict[str, Any], kind: str) -> Object:
    if kind == "components":
        return {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component", **content}
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **content}


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, lists indented, nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(documents: list[Any]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def _dump(documents: list[Object]) -> str:
    return HEADER + _yaml(documents)


def main() -> None:
    written = files()
    for path in set(DEPLOY.rglob("*.yaml")) - set(written):
        if path.name != "values.yaml":
            path.unlink()
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
