"""The folder of LoRA adapters: what is loaded, what is not and why, and that nothing outside it is ever opened."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from engine import AdapterLimitError, CheckpointError, EngineConfigError, EngineDeadError
from service.errors import Code, ServiceError
from service.lora import LoraFolder
from tests.service.fake_engine import FakeEngine


def write(folder: Path, name: str, weights: bytes = b"weights") -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "adapter_config.json").write_text("{}")
    (folder / name / "adapter_model.safetensors").write_bytes(weights)
    return folder / name


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


async def opened(folder: Path, engine: FakeEngine, *taken: str) -> LoraFolder:
    loras = LoraFolder(folder, taken)
    await loras.open(engine, lambda phase, done: None)
    return loras


async def refusal(call: object) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await call  # type: ignore[misc]
    return caught.value


async def test_all_adapters_are_loaded_at_the_start_and_other_things_are_left_alone(
    tmp_path: Path, engine: FakeEngine
) -> None:
    for name in ("billing", "law-v2", ".hidden"):
        write(tmp_path, name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").write_text("adapters")
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral" / "lora.safetensors").write_bytes(b"weights")
    os.symlink(write(tmp_path.parent, "elsewhere"), tmp_path / "linked")  # its owner's wish, as in Kubernetes' volumes

    seen: list[str] = []
    loras = LoraFolder(tmp_path)
    assert loras.loaded == {}
    await loras.open(engine, lambda phase, done: seen.append(phase))
    assert list(loras.loaded) == ["billing", "law-v2", "linked", "mistral"]
    assert engine.lora_paths["billing"] == str(tmp_path / "billing")
    assert loras.absent == {}
    assert seen == ["load adapters"] * 4


async def test_one_that_cannot_be_loaded_is_told_of_and_does_not_stop_the_others(
    tmp_path: Path, engine: FakeEngine
) -> None:
    for name in ("a", "broken", "ensemble", "z"):
        write(tmp_path, name)
    engine.lora_errors["broken"] = CheckpointError(f"{tmp_path}/broken/adapter_config.json: not valid JSON")
    loras = await opened(tmp_path, engine, "ensemble")
    assert list(loras.loaded) == ["a", "z"]
    assert loras.absent == {
        "broken": "broken/adapter_config.json: not valid JSON",
        "ensemble": "model_name: 'ensemble' is a name of the model itself; an adapter needs one of its own",
    }


async def test_an_adapter_whose_folder_has_no_proper_name_is_told_of_in_the_log(
    tmp_path: Path, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "not a name"):
        write(tmp_path, name)
    loras = await opened(tmp_path, engine)
    await loras.refresh()
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "'not a name' must be the name of a folder of adapters" in vars(record)["reason"]
    assert (list(loras.loaded), loras.absent) == (["a"], {})  # no client could ask for it


async def test_a_folder_of_links_in_a_circle_does_not_stop_the_others(tmp_path: Path, engine: FakeEngine) -> None:
    for name in ("a", "z"):
        write(tmp_path, name)
    os.symlink("circle", tmp_path / "circle")
    engine.lora_errors["circle"] = CheckpointError("circle: cannot be read")
    loras = await opened(tmp_path, engine)
    assert list(loras.loaded) == ["a", "z"]
    assert loras.absent == {"circle": "circle: cannot be read"}
    assert (await refusal(loras.load("circle"))).code is Code.FAILED_PRECONDITION


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../secret", "a/b", "/etc", "a\\b", "a\0b", ".hidden", "a b", "é", "a" * 129, "a\n"]
)
async def test_what_is_no_plain_name_is_refused_before_a_file_is_looked_at(
    tmp_path: Path, engine: FakeEngine, name: str
) -> None:
    write(tmp_path, "secret")
    loras = await opened(tmp_path / "secret", engine)
    error = await refusal(loras.load(name))
    assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "model_name")
    assert engine.lora_paths == {}


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (CheckpointError("{folder}/a: tensor x has rank 64"), Code.FAILED_PRECONDITION, "a: tensor x has rank 64"),
        (EngineConfigError("max_loras: 0"), Code.FAILED_PRECONDITION, "max_loras: 0"),
        (AdapterLimitError("max_cpu_loras: 64"), Code.RESOURCE_EXHAUSTED, "max_cpu_loras: 64"),
        (EngineDeadError("killed"), Code.UNAVAILABLE, "the engine is down; retry later"),
    ],
)
async def test_a_load_that_fails_says_why_by_its_code(
    tmp_path: Path, engine: FakeEngine, raised: Exception, code: Code, message: str
) -> None:
    loras = await opened(tmp_path, engine)
    write(tmp_path, "a")
    engine.lora_errors["a"] = type(raised)(str(raised).format(folder=tmp_path))
    error = await refusal(loras.load("a"))
    assert (error.code, error.message) == (code, message)
    assert loras.absent == {"a": message}
    engine.lora_errors.clear()
    await loras.load("a")
    assert (list(loras.loaded), loras.absent) == (["a"], {})


async def test_only_what_is_there_can_be_loaded_and_only_what_is_loaded_can_be_unloaded(
    tmp_path: Path, engine: FakeEngine
) -> None:
    write(tmp_path, "a")
    early = LoraFolder(tmp_path)
    for call in (early.load("a"), early.unload("a")):
        assert (await refusal(call)).code is Code.UNAVAILABLE
    loras = await opened(tmp_path, engine)
    assert (await refusal(loras.load("b"))).code is Code.NOT_FOUND
    assert (await refusal(loras.unload("b"))).code is Code.NOT_FOUND
    await loras.unload("a")
    assert (dict(loras.loaded), loras.absent) == ({}, {"a": "unloaded"})
    assert (await refusal(loras.unload("a"))).code is Code.NOT_FOUND


async def test_a_refresh_loads_what_is_new_or_changed_and_unloads_what_is_gone(
    tmp_path: Path, engine: FakeEngine
) -> None:
    for name in ("stays", "goes", "unloaded", "broken", "changes"):
        write(tmp_path, name)
    engine.lora_errors["broken"] = CheckpointError("half a file")
    loras = await opened(tmp_path, engine)
    await loras.unload("unloaded")
    calls: list[str] = []
    load = engine.load_adapter

    async def recorded(name: str, path: str) -> object:
        calls.append(name)
        return await load(name, path)

    engine.load_adapter = recorded  # type: ignore[method-assign,assignment]
    await loras.refresh()
    assert calls == []  # nothing has changed: neither the broken one nor the unloaded one is tried again

    write(tmp_path, "new")
    write(tmp_path, "changes", b"other weights")
    write(tmp_path, "broken", b"the whole file")
    engine.lora_errors.clear()
    for file in (tmp_path / "goes").iterdir():
        file.unlink()
    (tmp_path / "goes").rmdir()
    await loras.refresh()
    assert calls == ["broken", "changes", "new"]
    assert list(loras.loaded) == ["broken", "changes", "new", "stays"]
    assert loras.absent == {"unloaded": "unloaded"}


async def test_an_older_version_serves_on_when_a_newer_one_is_broken(tmp_path: Path, engine: FakeEngine) -> None:
    write(tmp_path, "a")
    loras = await opened(tmp_path, engine)
    write(tmp_path, "a", b"half")
    engine.lora_errors["a"] = CheckpointError("half a file")
    await loras.refresh()
    assert (list(loras.loaded), loras.absent) == (["a"], {})


async def test_watching_goes_on_when_the_folder_cannot_be_read(
    tmp_path: Path, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "adapters"
    write(folder, "a")
    loras = await opened(folder, engine)
    folder.rename(tmp_path / "away")
    watching = asyncio.create_task(loras.watch(0.01))
    try:
        async with asyncio.timeout(10):
            while "cannot be read" not in caplog.text:  # noqa: ASYNC110 - nothing tells of it but the log
                await asyncio.sleep(0.01)
            assert list(loras.loaded) == ["a"]
            write(tmp_path / "away", "b")
            (tmp_path / "away").rename(folder)
            while list(loras.loaded) != ["a", "b"]:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
    finally:
        watching.cancel()
