"""`make cluster-test`, as far as it goes without a cluster."""

from __future__ import annotations

import pytest

from helm.chart import objects
from helm.tools import HELMS, run
from tests import cluster
from tests.helm.conftest import server
from tests.helm.test_operator import container


def test_without_a_cluster_it_claims_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main({}) == 0
    assert "nothing was tested" in capsys.readouterr().out


def test_a_cluster_that_differs_from_its_fake_gets_no_release(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "contract_holds", lambda: False)
    assert cluster.main({"KUBECONFIG": "/nowhere", "IMAGE": "registry.example.com/nemoserve:1"}) == 1
    assert "differ" in capsys.readouterr().out


def test_an_image_must_be_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "contract_holds", lambda: True)
    assert cluster.main({"KUBECONFIG": "/nowhere", "IMAGE": "registry.example.com:5000/nemoserve"}) == 2
    assert "IMAGE" in capsys.readouterr().out


@pytest.mark.parametrize("helm", HELMS)
def test_what_it_installs_is_rendered(helm: str) -> None:
    for command, *arguments in cluster.steps("somewhere", "registry.example.com:5000/nemoserve:1"):
        if command in ("install", "upgrade"):
            done = run(helm, "template", *(each for each in arguments if each not in cluster.READY))
            assert server(objects(done.stdout))["image"] == "registry.example.com:5000/nemoserve:1"


@pytest.mark.parametrize("helm", HELMS)
def test_the_operator_that_it_turns_on_is_rendered(helm: str) -> None:
    image, operator = "registry.example.com/nemoserve:1-cpu", "registry.example.com/nemoserve:1-autoscaler"
    apply, on, wait, off = cluster.operated("somewhere", image, operator)
    assert (apply[0], wait[0], off) == ("kubectl", "kubectl", on[:-2])
    done = run(helm, "template", *(each for each in on[2:] if each not in cluster.READY))
    assert container(objects(done.stdout))["image"] == operator
