"""A model as a folder of its own: whole or refused, and served under its own name without a store."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from service.models.errors import StoreError
from service.models.export import export
from service.models.exported import MANIFEST, read_exported
from service.models.store import ModelStore
from tests.tiny_models import write_hf

REFERENCE = "hf://org/Toy-Instruct"


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """With one repository that was fetched."""
    folder = tmp_path / "store" / "models" / "org--Toy-Instruct@main"
    folder.parent.mkdir(parents=True)
    write_hf(folder)
    (folder / "LICENSE").write_text("do as you like")
    (folder / "notes.partial").write_text("")
    (folder / ".complete").write_text("c0ffee")
    return ModelStore(tmp_path / "store")


def test_a_stored_model_becomes_a_folder_that_says_what_it_is(store: ModelStore, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = export(store, REFERENCE, tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert (made.name, made.source, made.licence) == ("toy-instruct", "hf://org/Toy-Instruct@c0ffee", None)
    assert seen[-1] == (made.num_bytes, made.num_bytes)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {MANIFEST, *(file.name for file in made.files)}
    assert "LICENSE" in written
    for file in made.files:
        assert hashlib.sha256((tmp_path / "out" / file.name).read_bytes()).hexdigest() == file.sha256
    assert read_exported(tmp_path / "out") == made


def test_the_folder_is_served_under_its_own_name_without_the_store(store: ModelStore, tmp_path: Path) -> None:
    export(store, REFERENCE, tmp_path / "out")
    shutil.rmtree(store.root)
    elsewhere = ModelStore(tmp_path / "empty", forbidden_by="HF_HUB_OFFLINE")
    found = elsewhere.pull(str(tmp_path / "out"))
    assert (found.name, found.path) == ("toy-instruct", tmp_path / "out")
    assert elsewhere.source_of(str(tmp_path / "out")) == "hf://org/Toy-Instruct@c0ffee"


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    model = tmp_path / "mine.gguf"
    model.write_bytes(b"GGUF")
    store = ModelStore(tmp_path / "store")
    export(store, str(model), tmp_path / "out")
    found = store.pull(str(tmp_path / "out"))
    assert (found.name, found.path) == ("mine", tmp_path / "out" / "mine.gguf")
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "moved" / "mine.gguf").rename(tmp_path / "moved" / "a.gguf")
    with pytest.raises(StoreError, match=r"mine\.gguf has 0 of its 4 bytes"):
        store.resolve(str(tmp_path / "moved"))
    (tmp_path / "moved" / "a.gguf").rename(tmp_path / "moved" / "mine.gguf")
    (tmp_path / "moved").rename(tmp_path / "out")
    assert store.resolve(str(found.path)).name == "mine"
    (tmp_path / "out" / "other.gguf").touch()
    with pytest.raises(StoreError, match=r"neither config\.json nor params\.json"):
        store.resolve(str(tmp_path / "out"))


def test_a_folder_that_was_cut_short_on_the_way_is_refused(store: ModelStore, tmp_path: Path) -> None:
    export(store, REFERENCE, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"model.safetensors has 1 of its \d+ bytes; copy the folder again"):
        store.find(str(tmp_path / "out"))


def test_an_earlier_attempt_is_replaced_and_other_files_are_not(store: ModelStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors.partial").write_bytes(b"x")
    (out / "config.json").write_bytes(b"x")
    made = export(store, REFERENCE, out)
    assert export(store, REFERENCE, out) == made
    (out / "holiday.jpg").touch()
    with pytest.raises(StoreError, match=r"has holiday.jpg in it; name an empty folder"):
        export(store, REFERENCE, out)


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 7))
    with pytest.raises(StoreError, match=r"[\d,]+ more bytes are needed and 7 are free; make room or choose a larger"):
        export(store, REFERENCE, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_what_is_not_there_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not in the store; `nemoserve pull mistral-nemo-12b` fetches it"):
        export(ModelStore(tmp_path), "mistral-nemo-12b", tmp_path / "out")
    (tmp_path / "file").touch()
    (tmp_path / "m.gguf").touch()
    with pytest.raises(StoreError, match="is a file; name a folder"):
        export(ModelStore(tmp_path), str(tmp_path / "m.gguf"), tmp_path / "file")


@pytest.mark.parametrize("content", ["", "[]", '{"name": 1}', "x" * 2_000_000])
def test_a_description_that_is_not_ours_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(StoreError, match="not as `nemoserve store` writes it") as caught:
        read_exported(tmp_path)
    assert "\n" not in str(caught.value)
