"""The chart says of the server what the server says of itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from grpc_health.v1 import health_pb2  # noqa: F401  (the probes' protocol is a dependency of the server)

from autoscaler.controller.metrics import Metrics
from helm.chart import CHART, SCHEMA, of_kind
from helm.readme import PAGE, current, values
from service.models.catalog import CATALOG
from service.models.gpus import KNOWN_GPUS
from service.settings.definitions import SETTINGS
from service.settings.resolve import resolve, unknown_variables
from service.version import VERSION
from tests.helm.conftest import SETS, one, rendered, server, workload

ROOT = Path(__file__).resolve().parents[2]
OF_THE_CHART = {
    *("model", "served_model_name", "profile", "config", "host", "http_port", "grpc_port", "allow_anonymous"),
    *("api_keys_file", "metrics_without_key", "tls_mode", "tls_cert", "tls_key", "tls_client_ca", "precision"),
    *("kv_precision", "device", "tensor_parallel_size", "lora_dir", "lora_refresh", "lame_duck", "drain_timeout"),
    *("log_level", "log_json", "otlp_endpoint"),
}


def config(name: str) -> str:
    found = rendered(name)
    return str(one(found, "ConfigMap", workload(found)["metadata"]["name"])["data"]["nemoserve.yaml"])


@pytest.mark.parametrize("name", SETS)
def test_the_server_understands_its_configuration(name: str, tmp_path: Path) -> None:
    text = config(name)
    for mounted in (
        "/etc/nemoserve/keys/keys.yaml",
        "/etc/nemoserve/tls/tls.crt",
        "/etc/nemoserve/tls/tls.key",
        "/lora",
    ):
        here = tmp_path / mounted.replace("/", "_")
        here.mkdir() if mounted == "/lora" else here.touch()
        text = text.replace(f'"{mounted}"', json.dumps(str(here)))
    (tmp_path / "nemoserve.yaml").write_text(text)
    found = resolve({"config": str(tmp_path / "nemoserve.yaml")}, {})
    ports = {port["name"]: port["containerPort"] for port in server(rendered(name))["ports"]}
    assert (found["http_port"].value, found["grpc_port"].value) == (ports["http-openai"], ports["grpc"])
    assert all(
        each.source == "default" or each.source.startswith("file ") for key, each in found.items() if key != "config"
    )


@pytest.mark.parametrize(
    ("name", "precision"), [("h100", "fp8"), ("a100", "fp8-weight-only"), ("h200-bf16", "bf16"), ("default", "auto")]
)
def test_precision_follows_the_node(name: str, precision: str) -> None:
    assert f'precision: "{precision}"' in config(name).splitlines()


def test_fp8_is_asked_for_where_cards_multiply_it() -> None:
    cards = {gpu.slug.split("-")[0]: gpu.multiplies_fp8 for gpu in KNOWN_GPUS}
    assert {name: cards[name] for name in yaml.safe_load((CHART / "files/gpus.yaml").read_text())} == {
        "a100": False,
        "h100": True,
        "h200": True,
    }


def test_large_numbers_stay_numbers() -> None:
    assert 'max_request_bytes: "33554432"' in config("h100").splitlines()


def test_every_setting_has_one_place_in_the_values() -> None:
    free = set(json.loads(SCHEMA.read_text())["properties"]["settings"]["properties"])
    assert free | OF_THE_CHART == {setting.name for setting in SETTINGS}
    assert free & OF_THE_CHART == set()


def test_sizes_and_names_are_those_of_the_catalogue() -> None:
    models = yaml.safe_load((CHART / "files/models.yaml").read_text())
    assert models == {
        "mebibytes": {entry.name: -(-entry.num_bytes // 2**20) for entry in CATALOG.values()},
        "short": {short: entry.name for entry in CATALOG.values() for short in entry.short_names},
    }


@pytest.mark.parametrize("name", ["default", "cpu"])
def test_the_default_models_are_in_the_catalogue(name: str) -> None:
    assert yaml.safe_load(config(name))["model"] in CATALOG


@pytest.mark.parametrize("name", SETS)
def test_the_server_knows_its_variables(name: str) -> None:
    assert unknown_variables(each["name"] for each in server(rendered(name))["env"]) == {}


def test_the_version_is_the_packages() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["appVersion"] == VERSION


def test_every_metric_that_is_used_exists() -> None:
    """docs/observability.md has every metric of servers; other tests hold it to what one exposes."""
    page = (ROOT / "docs" / "observability.md").read_text()
    known = set(re.findall(r"\bnemoserve_[a-z_]+", page)) | {each.name for each in Metrics().registry.collect()}
    found = rendered("monitoring")
    texts = [
        json.dumps(one(rendered("scale-to-zero"), "PrometheusRule")),
        str(one(found, "ConfigMap", "nemo-nemoserve-dashboard")["data"]),
        json.dumps(one(rendered("hpa"), "HorizontalPodAutoscaler")),
        json.dumps(one(rendered("keda"), "ScaledObject")),
    ]
    for text in texts:
        used = set(re.findall(r"\bnemoserve_[a-z_]+", text))
        assert used
        assert {re.sub("_(bucket|sum|count)$", "", name) for name in used} - known - {
            f"{name}_total"
            for name in known  # a counter's name, as it is exposed
        } == set()


def test_the_dashboard_is_what_grafana_reads() -> None:
    board = json.loads(
        one(rendered("monitoring"), "ConfigMap", "nemo-nemoserve-dashboard")["data"]["nemo-nemoserve.json"]
    )
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["type"] == "row" or panel["targets"] for panel in board["panels"])


def test_alerts_say_what_to_do() -> None:
    [group] = one(rendered("scale-to-zero"), "PrometheusRule")["spec"]["groups"]
    assert len(group["rules"]) > len(one(rendered("monitoring"), "PrometheusRule")["spec"]["groups"][0]["rules"])
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_the_service_monitor_selects_one_service() -> None:
    found = rendered("monitoring")
    wanted = one(found, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
    assert len([each for each in of_kind(found, "Service") if wanted <= each["metadata"]["labels"].items()]) == 1


def test_the_table_of_values_is_current() -> None:
    assert PAGE.read_text() == current()


def test_every_value_is_explained() -> None:
    assert [each.path for each in values() if not each.comment] == []
