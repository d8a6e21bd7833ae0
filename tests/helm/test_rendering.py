"""Both helms take every set of values, make the same of it, and Kubernetes would take that."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest

from helm.chart import CHART, Object, objects, of_kind, render
from helm.tools import HELMS, run
from tests.helm.conftest import SETS, rendered, rendering

KUBERNETES = ("1.31", "1.37")
CUSTOM = {"HTTPRoute", "GRPCRoute", "ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject", "QueueAutoscaler"}
GOLDEN = Path(__file__).parent / "golden"
IN_REVIEW = ("default", "h100", "keys-tls", "volume-per-server", "monitoring", "scale-to-zero")


def test_there_are_sets_for_the_common_scenarios() -> None:
    assert len(SETS) >= 15


@pytest.mark.parametrize("helm", HELMS)
def test_helm_finds_nothing_to_say(helm: str) -> None:
    files = [argument for path in SETS.values() if path for argument in ("--values", str(path))]
    assert files
    for path in SETS.values():
        done = run(helm, "lint", "--strict", "--quiet", CHART, *(["--values", path] if path else []))
        assert done.returncode == 0, f"{path}:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("name", SETS)
def test_both_helms_make_the_same(name: str) -> None:
    first, second = (objects(rendering(helm, name)) for helm in HELMS)
    assert first == second


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", SETS)
def test_objects_are_what_kubernetes_expects(name: str, version: str) -> None:
    for each in rendered(name):
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)


def test_a_wrong_object_would_be_found() -> None:
    found = of_kind(rendered("default"), "Service")[0]
    found["spec"]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found, KUBERNETES[0], strict=True)


@pytest.mark.parametrize("name", SETS)
def test_no_two_objects_have_a_name(name: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in rendered(name)]
    assert len(names) == len(set(names))


def test_long_names_stay_within_what_kubernetes_takes() -> None:
    found = objects(render(HELMS[-1], SETS["h100"], release="a" * 53))
    assert max(len(each["metadata"]["name"]) for each in found) <= 253
    assert all(len(each["metadata"]["name"]) <= 63 for each in of_kind(found, "Service"))
    for each in found:
        assert all(len(value) <= 63 for value in each["metadata"]["labels"].values())


def golden(name: str) -> str:
    """As it is kept: what helm says about files is left out, which is another with every chart's layout."""
    lines = rendering(HELMS[-1], name).splitlines()
    return "\n".join(line for line in lines if line.strip() and not line.startswith("# Source:")) + "\n"


@pytest.mark.parametrize("name", IN_REVIEW)
def test_what_changes_is_seen_in_review(name: str) -> None:
    """Written anew by `python -m tests.helm.test_rendering`."""
    assert (GOLDEN / f"{name}.yaml").read_text() == golden(name)


def immutable(found: list[Object]) -> dict[str, object]:
    """By object, what the API server lets nobody change."""
    fields: dict[str, object] = {}
    for each in found:
        key, spec = f"{each['kind']} {each['metadata']['name']}", each.get("spec", {})
        if each["kind"] in ("Deployment", "StatefulSet"):
            fields[key] = [spec.get(name) for name in ("selector", "serviceName", "volumeClaimTemplates")]
        elif each["kind"] in ("Job", "PersistentVolumeClaim"):
            fields[key] = spec
        elif each["kind"] == "Service":
            fields[key] = spec.get("clusterIP")
    return fields


@pytest.mark.parametrize("name", ["default", "h100", "volume-per-server", "autoscaling"])
def test_an_upgrade_changes_nothing_that_cannot_be_changed(name: str, tmp_path: Path) -> None:
    """Of chart, image, model and labels; a Job that would change is another Job."""
    later = tmp_path / "nemoserve"
    for path in CHART.rglob("*"):
        if path.is_file():
            (later / path.relative_to(CHART)).parent.mkdir(parents=True, exist_ok=True)
            (later / path.relative_to(CHART)).write_bytes(path.read_bytes())
    about = later / "Chart.yaml"
    about.write_text(about.read_text().replace("ersion: 0.1.0", "ersion: 0.2.0"))
    change = ("--set", "model.name=mistral-7b-instruct-v0.3,replicaCount=3,settings.max_batch_size=16,commonLabels.a=b")
    old, new = rendered(name), objects(render(HELMS[-1], SETS[name], *change, chart=later))
    assert ":0.2.0" in str(new)
    before, after = immutable(old), immutable(new)
    assert {key: before[key] for key in before.keys() & after.keys()} == {
        key: after[key] for key in before.keys() & after.keys()
    }
    assert {key.split()[0] for key in before.keys() ^ after.keys()} <= {"Job"}


if __name__ == "__main__":
    for each in IN_REVIEW:
        (GOLDEN / f"{each}.yaml").write_text(golden(each))
