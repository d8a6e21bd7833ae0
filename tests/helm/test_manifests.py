"""deploy/ is what the chart renders today, and kustomize makes of an overlay what helm makes of its values."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helm.chart import DEFINITION, objects, of_kind
from helm.manifests import DEPLOY, components, difference, files, manifests, overlays
from helm.tools import run


def test_deploy_is_current() -> None:
    """Written anew by `make manifests`."""
    wanted = files()
    there = {path for path in DEPLOY.rglob("*.yaml") if path.name != "values.yaml"}
    assert there == set(wanted)
    assert [str(path) for path, text in wanted.items() if path.read_text() != text] == []


@pytest.mark.parametrize("name", overlays())
def test_kustomize_makes_of_an_overlay_what_the_chart_does(name: str) -> None:
    folder = DEPLOY / "overlays" / name
    done = run("kubectl", "kustomize", folder)
    assert done.returncode == 0, done.stderr
    assert objects(done.stdout) == manifests(folder / "values.yaml")


@pytest.mark.parametrize("component", components())
@pytest.mark.parametrize("overlay", overlays())
def test_a_component_goes_with_every_overlay(overlay: str, component: str, tmp_path: Path) -> None:
    (tmp_path / "deploy").symlink_to(DEPLOY)
    chosen = {"resources": [f"deploy/overlays/{overlay}"], "components": [f"deploy/components/{component}"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(chosen))
    done = run("kubectl", "kustomize", tmp_path, "--load-restrictor=LoadRestrictionsNone")
    assert done.returncode == 0, done.stderr
    values = DEPLOY / "overlays" / overlay / "values.yaml", DEPLOY / "components" / component / "values.yaml"
    assert objects(done.stdout) == manifests(*values)


def test_who_has_the_rights_is_of_the_namespace_that_kustomize_says(tmp_path: Path) -> None:
    """kubectl's --namespace does not reach into a RoleBinding."""
    (tmp_path / "deploy").symlink_to(DEPLOY)
    chosen = {"namespace": "prod", "resources": ["deploy/base"], "components": ["deploy/components/autoscaler"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(chosen))
    done = run("kubectl", "kustomize", tmp_path, "--load-restrictor=LoadRestrictionsNone")
    [binding] = of_kind(objects(done.stdout), "RoleBinding")
    assert [subject["namespace"] for subject in binding["subjects"]] == ["prod"]


def test_the_definition_is_that_of_the_chart() -> None:
    [definition] = objects((DEPLOY / "crds" / "queueautoscaler.yaml").read_text())
    assert definition == yaml.safe_load(DEFINITION.read_text())


def test_the_base_builds() -> None:
    done = run("kubectl", "kustomize", DEPLOY / "base")
    assert objects(done.stdout) == manifests()


def test_nothing_is_left_of_helm() -> None:
    assert not any("helm" in text.partition("\n")[2].lower() for text in files().values())


def test_a_difference_is_said_as_a_json_patch() -> None:
    old = {"kept": 1, "gone": 2, "a/b~c": {"x": 1}, "list": [1, {"y": 2}], "shorter": [1, 2]}
    new = {"kept": 1, "a/b~c": {"x": 3}, "list": [1, {"y": 4}], "shorter": [1], "more": []}
    assert list(difference(old, new)) == [
        {"op": "replace", "path": "/a~1b~0c/x", "value": 3},
        {"op": "remove", "path": "/gone"},
        {"op": "replace", "path": "/list/1/y", "value": 4},
        {"op": "add", "path": "/more", "value": []},
        {"op": "replace", "path": "/shorter", "value": [1]},
    ]
