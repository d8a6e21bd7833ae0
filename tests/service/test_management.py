"""What a server says of itself: NIM's shapes, readable profiles, and health that does not lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
import yaml
from starlette.applications import Starlette
from starlette.testclient import TestClient

from engine import EngineConfig
from service.host import Phase, Status
from service.http.management import management_routes
from service.management import Package
from service.models.profiles import settings_of
from service.models.store import ModelStore
from service.version import VERSION
from tests.service.fakes import INFO, FakeHost

LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"
PACKAGE = Package(
    name="mistral-nemo-12b-instruct",
    source="hf://mistralai/Mistral-Nemo-Instruct-2407@c0ffee",
    licence="Apache-2.0",
    licence_text=None,
    files=("config.json", "model.safetensors"),
    stored="bf16",
    options=EngineConfig(model_path="-"),
)


def client(host: FakeHost | None = None, package: Package = PACKAGE) -> TestClient:
    routes = management_routes(host or FakeHost(), lambda: package, "https://mirror.example")
    return TestClient(Starlette(routes=routes))


def test_metadata_has_what_nims_operator_reads() -> None:
    found = client().get("/v1/metadata").json()
    assert found["version"] == VERSION
    assert found["modelInfo"] == [{"shortName": PACKAGE.name, "modelUrl": PACKAGE.source}]
    assert found["selectedModelProfileId"] == "mistral-nemo-12b-instruct/cpu-bf16-tp1"
    assert found["assetInfo"][0] == "hf://mistralai/Mistral-Nemo-Instruct-2407@c0ffee/config.json"
    assert found["licenseInfo"]["sha"] == hashlib.sha256(LICENCE.read_bytes()).hexdigest()
    assert found["modelLicenseInfo"]["name"] == "Apache-2.0"
    assert found["repository_override"] == "https://mirror.example"


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.READY])
def test_without_a_loaded_model_nobody_knows_its_profile(phase: Phase) -> None:
    host = FakeHost(status=Status(phase))
    assert client(host).get("/v1/metadata").json()["selectedModelProfileId"] is None
    assert client(host).get("/v1/manifest").status_code == 200


@pytest.mark.parametrize(
    ("info", "options", "profile"),
    [
        ({}, {}, "mistral-nemo-12b-instruct/cpu-bf16-tp1"),
        ({}, {"precision": "int4", "kv_precision": "fp8"}, "mistral-nemo-12b-instruct/cpu-int4-kvfp8-tp1"),
        (
            {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "device_bytes": 79 * 2**30},
            {"precision": "fp8", "tensor_parallel_size": 2},
            "mistral-nemo-12b-instruct/h100-fp8-tp2",
        ),
        (
            {"device": "cuda", "device_name": "Some GPU", "device_bytes": 2**30},
            {},
            "mistral-nemo-12b-instruct/gpu-bf16-tp1",
        ),
    ],
)
def test_the_profile_that_runs_has_the_id_that_starts_it(
    info: dict[str, object], options: dict[str, object], profile: str
) -> None:
    package = changed(PACKAGE, options=msgspec.structs.replace(PACKAGE.options, **options))
    assert package.profile(msgspec.structs.replace(INFO, **info)) == profile
    assert settings_of(profile)["model"] == PACKAGE.name


def changed(package: Package, **changes: object) -> Package:
    import dataclasses

    return dataclasses.replace(package, **changes)  # type: ignore[arg-type]


def test_the_manifest_is_yaml_of_version_2_with_ids_that_serve_takes() -> None:
    answer = client().get("/v1/manifest")
    assert answer.headers["content-type"] == "application/yaml"
    found = yaml.safe_load(answer.text)
    assert (found["schema_version"], found["profile_selection_criteria"]) == ("2.0.0", "default")
    by_id = {profile["id"]: profile for profile in found["profiles"]}
    assert by_id["mistral-nemo-12b-instruct/h100-fp8-tp1"]["tags"] == {
        "llm_engine": "nemoserve",
        "gpu": "h100",
        "precision": "fp8",
        "kv_precision": "auto",
        "tp": "1",
        "pp": "1",
        "feat_lora": "false",
    }
    for name, profile in by_id.items():
        assert settings_of(name)["model"] == PACKAGE.name
        assert profile["workspace"]["files"]["config.json"]["uri"].startswith("hf://mistralai/")
    as_json = client().get("/v1/manifest", headers={"accept": "application/json"})
    assert as_json.json() == found


def test_a_profile_that_no_list_has_is_in_the_manifest_while_it_runs() -> None:
    package = changed(PACKAGE, options=EngineConfig(model_path="-", kv_precision="fp8", max_loras=2))
    found = client(package=package).get("/v1/manifest", headers={"accept": "application/json"}).json()
    last = found["profiles"][-1]
    assert last["id"] == "mistral-nemo-12b-instruct/cpu-bf16-kvfp8-tp1"
    assert (last["tags"]["kv_precision"], last["tags"]["feat_lora"]) == ("fp8", "true")


def test_version_and_licences() -> None:
    assert client().get("/v1/version").json() == {"release": VERSION, "api": "1.0.0"}
    package = changed(PACKAGE, licence_text="do as you like")
    found = client(package=package).get("/v1/license").json()
    assert found["content"] == LICENCE.read_text()
    assert found["size"] == LICENCE.stat().st_size
    assert found["model"] == {"shortName": PACKAGE.name, "name": "Apache-2.0", "content": "do as you like"}


@pytest.mark.parametrize(
    ("phase", "alive", "live", "ready"),
    [
        (Phase.LOADING, True, 200, 503),
        (Phase.LOADING, False, 503, 503),
        (Phase.READY, True, 200, 200),
        (Phase.READY, False, 503, 503),
        (Phase.DRAINING, True, 200, 503),
        (Phase.FAILED, False, 503, 503),
    ],
)
def test_live_is_a_heart_that_beats_and_ready_a_token_that_can_be_made(
    phase: Phase, alive: bool, live: int, ready: int
) -> None:
    found = client(FakeHost(status=Status(phase), alive=alive))
    assert found.get("/v1/health/live").status_code == live
    assert found.get("/v1/health/ready").status_code == ready


def test_who_is_ready_says_so_as_nim_does() -> None:
    assert client().get("/v1/health/ready").json() == {
        "object": "health.response",
        "message": "nemoserve is ready",
        "status": "ready",
    }


def test_who_is_not_says_how_far_it_is() -> None:
    host = FakeHost(status=Status(Phase.LOADING, "weights", 0.25, 30.0))
    body = client(host).get("/v1/health/ready").json()
    assert body["message"] == "nemoserve is not ready: loading (weights), 25%, about 30 s left"
    assert (body["status"], body["phase"], body["progress"], body["eta_seconds"]) == (
        "not ready",
        "loading",
        0.25,
        30.0,
    )


def test_why_an_engine_failed_is_for_the_log_alone() -> None:
    host = FakeHost(status=Status(Phase.FAILED, "/models/secret: truncated"), alive=False)
    answer = client(host).get("/v1/health/ready")
    assert "secret" not in answer.text
    assert answer.json()["message"] == "nemoserve is not ready: failed"


def test_a_path_of_this_machine_is_told_to_nobody(tmp_path: Path) -> None:
    model = tmp_path / "mine.gguf"
    model.touch()
    package = Package.of(ModelStore(tmp_path), EngineConfig(model_path=str(model)))
    for route in ("metadata", "manifest", "license"):
        assert str(tmp_path) not in client(package=package).get(f"/v1/{route}").text
    assert package.uri("mine.gguf") == "local://mine/mine.gguf"


def test_a_licence_beside_the_model_is_shown_unless_it_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    options = EngineConfig(model_path=str(tmp_path))
    for content, text in ((b"do as you like", "do as you like"), (b"\xff", None), (bytes(2**20 + 1), None)):
        (tmp_path / "LICENSE").write_bytes(content)
        assert Package.of(ModelStore(tmp_path), options).licence_text == text


@pytest.mark.parametrize(
    "reference", ["mistral-nemo-12b-instruct", "hf://org/Name", "hf://org/Name@refs/pr/1", "smollm2-135m-instruct"]
)
def test_where_a_model_came_from_is_told_by_where_it_lies(reference: str, tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    wanted = store.resolve(reference)
    assert store.resolve(store.reference_of(wanted.path)) == wanted
    loading = Package.of(store, EngineConfig(model_path=str(wanted.path)))
    assert (loading.name, loading.files, loading.source) == (wanted.name, (), store.source_of(reference))


def test_only_reading_is_possible() -> None:
    assert client().post("/v1/metadata").status_code == 405
