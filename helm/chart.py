"""The chart as its users get it: rendered by a real helm, and its value sets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from helm.tools import run

CHART = Path(__file__).parent / "nemoserve"
VALUES, SCHEMA = CHART / "values.yaml", CHART / "values.schema.json"
CI = CHART / "ci"
DEFINITION = CHART / "charts" / "crds" / "crds" / "queueautoscaler.yaml"
"""Of the custom resource QueueAutoscaler."""

Object = dict[str, Any]
"""A Kubernetes object."""


class RenderError(Exception):
    """Helm refused, in its own words."""


def value_sets() -> dict[str, Path | None]:
    """By name; `default` is none at all."""
    return {"default": None, **{path.name.removesuffix("-values.yaml"): path for path in sorted(CI.glob("*.yaml"))}}


def render(helm: str, values: Path | None = None, *args: str, chart: Path = CHART, release: str = "nemo") -> str:
    """What `helm template` prints.

    Raises:
        RenderError: the values are refused.
    """
    files = ["--values", str(values)] if values else []
    done = run(helm, "template", release, chart, "--namespace", "serving", *files, *args)
    if done.returncode:
        raise RenderError(done.stderr)
    return done.stdout


def objects(text: str) -> list[Object]:
    """Of a rendering, those of the same kind by name."""
    found = [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]
    return sorted(found, key=lambda each: (each["kind"], each["metadata"]["name"]))


def of_kind(found: Iterable[Object], kind: str) -> list[Object]:
    return [each for each in found if each["kind"] == kind]
