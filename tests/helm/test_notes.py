"""NOTES.txt: what who installs is told. Helm 4 tells without a cluster, with --dry-run=client."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from helm.chart import CHART
from helm.tools import run
from service.models.store import ModelStore
from tests.helm.conftest import SETS, one, rendered


def notes(name: str, *args: str) -> str:
    values = ["--values", str(path)] if (path := SETS[name]) else []
    done = run("helm4", "install", "nemo", CHART, "--namespace=serving", "--dry-run=client", *values, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:")[2]


@pytest.mark.parametrize("name", SETS)
def test_the_request_that_is_shown_is_whole(name: str) -> None:
    text = notes(name)
    [command] = re.findall(r"  (curl (?:.*\\\n)*.*)\n", text)
    words = shlex.split(command.replace("\\\n", " "))
    body = yaml.safe_load(words[words.index("-d") + 1])
    assert body["messages"]
    keys = name in ("keys-tls", "gateway", "pod-monitor", "scale-to-zero")
    assert ("authorization: Bearer $NEMOSERVE_API_KEY" in words) == keys
    service = one([each for each in rendered(name) if "headless" not in each["metadata"]["name"]], "Service")
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert f"port-forward service/{service['metadata']['name']} 8000:{ports['http-openai']} &" in text
    assert f"{service['metadata']['name']}.serving:{ports['grpc']}\n" in text
    tested = any(each["kind"] == "Pod" for each in rendered(name))
    assert ("helm -n serving test nemo" in text) == tested


@pytest.mark.parametrize("model", ["mistral-nemo-12b", "llama-3.1-8b-instruct", "hf://Org/Name-7B@main", "hf://org/n"])
def test_the_model_is_asked_by_the_name_that_the_server_gives_it(model: str, tmp_path: Path) -> None:
    wanted = ModelStore(tmp_path).resolve(model)
    assert f'"model": "{wanted.name}"' in notes("default", "--set", f"model.name={model}")


def test_names_of_ones_own_go_first() -> None:
    assert '"model": "mine"' in notes("default", "--set", r"model.servedName=mine\,other")


def test_what_is_easily_overlooked_is_told() -> None:
    assert "fetches the model again" in notes("default")
    assert "fetches the model again" not in notes("h100")
    assert "Nobody is asked for a key" in notes("default")
    assert "Nobody is asked for a key" not in notes("keys-tls")
    assert "networkPolicy.from" in notes("pod-monitor")
    assert "networkPolicy.from" not in notes("monitoring")
    assert "networkPolicy.from" in notes("default", "--set=service.type=NodePort,security.allowAnonymous=true")


def test_who_has_the_operator_is_told_what_to_look_at() -> None:
    assert "kubectl -n serving get qas nemo-nemoserve\n" in notes("autoscaling")
    assert "qas" not in notes("hpa")
    assert "only says how many" in notes("autoscaling-volumes")
