"""Checkpoints from a hub on loopback: what is taken, what is refused, and what the person at the terminal reads."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.models.catalog import HubRepository
from service.models.errors import StoreError
from service.models.huggingface import HubFile, choose_files, pull_repository

COMMIT = "c" * 40
WEIGHTS = bytes(range(256)) * 3000
FILES = {
    "config.json": b'{"model_type": "mistral"}',
    "tekken.json": b"{}",
    "model.safetensors": WEIGHTS,
    "consolidated.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
    "onnx/config.json": b"{}",
}
SOURCE = HubRepository(repo="org/toy")


@dataclass
class Hub:
    """As much of huggingface.co as a pull uses. `announced` is what it says its files are, `files` what it sends."""

    files: dict[str, bytes]
    announced: dict[str, bytes]
    refusal: tuple[int, str] | None = None
    fetched: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    refused: int | None = None  # status of every file
    redirects: bool = False  # to the same files under another host's name
    written: int = 0
    go: threading.Event = field(default_factory=threading.Event)
    interrupts: bool = False  # the main thread, in the middle of the weights
    shown: list[tuple[str, str | None]] = field(default_factory=list)  # hosts, and the tokens that they were sent
    url: str = ""

    def entry(self, name: str) -> dict[str, object]:
        body = self.announced[name]
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        large = {"lfs": {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 1}}
        return {"size": len(body), "blobId": blob, **(large if name.endswith("safetensors") else {})}

    def info(self) -> object:
        siblings = [{"rfilename": name, **self.entry(name)} for name in self.announced]
        return {"id": SOURCE.repo, "sha": COMMIT, "siblings": siblings}

    def handler(hub) -> type[http.server.BaseHTTPRequestHandler]:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if hub.refusal:
                    self.reply(hub.refusal[0], b"{}", {"X-Error-Code": hub.refusal[1]})
                elif path.startswith(f"/api/models/{SOURCE.repo}"):
                    self.reply(200, json.dumps(hub.info()).encode())
                elif hub.redirects and self.headers["Host"].startswith("127."):
                    hub.shown.append(("hub", self.headers["Authorization"]))
                    self.reply(302, b"", {"Location": f"http://localhost:{self.server.server_port}{path}"})  # type: ignore[attr-defined]
                elif hub.redirects:
                    hub.shown.append(("elsewhere", self.headers["Authorization"]))
                    self.send_file(path.partition(f"/resolve/{COMMIT}/")[2])
                elif hub.refused:
                    self.reply(hub.refused, b"{}")
                else:
                    self.send_file(path.partition(f"/resolve/{COMMIT}/")[2])

            do_HEAD = do_GET

            def send_file(self, name: str) -> None:
                if self.command == "GET":
                    hub.fetched.append(name)
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
                hub.starts.append(start)
                if hub.interrupts and name == "model.safetensors":
                    self.interrupt(hub.files[name])
                else:
                    self.reply(206 if start else 200, hub.files[name][start:])

            def interrupt(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with suppress(ConnectionError):
                    self.wfile.write(body[:100_000])
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    for start in range(100_000, len(body), 100_000):
                        self.wfile.write(body[start : start + 100_000])
                        hub.written += 100_000
                        hub.go.wait(0.005)  # slower than who wants it would be

            def reply(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(code)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    made = Hub(files=dict(FILES), announced=dict(FILES))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), made.handler()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        made.url = f"http://127.0.0.1:{server.server_port}"
        yield made
        server.shutdown()
        thread.join()


def pull(hub: Hub, folder: Path) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    assert pull_repository(SOURCE, folder, lambda done, total: seen.append((done, total)), endpoint=hub.url) == COMMIT
    return seen


def test_one_form_of_the_weights_is_fetched_and_no_pickle(hub: Hub, tmp_path: Path) -> None:
    seen = pull(hub, tmp_path)
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tekken.json"]
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    total = sum(len(FILES[name]) for name in hub.fetched)
    assert seen[-1] == (total, total)


def test_a_second_pull_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    pull(hub, tmp_path)
    hub.fetched.clear()
    pull(hub, tmp_path)
    assert hub.fetched == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_not_the_announced_one_is_refused_and_removed(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.files[name] = FILES[name].replace(b"m", b"n")
    with pytest.raises(StoreError, match=rf"{name}.*the file was removed, try again"):
        pull(hub, tmp_path)
    assert not (tmp_path / name).exists()


def test_a_file_that_was_begun_goes_on_where_it_ended(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.partial").write_bytes(WEIGHTS[:500_000])
    pull(hub, tmp_path)
    assert sorted(hub.starts) == [0, 0, 500_000]
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("kept", ["model.safetensors", "model.safetensors.partial"])
def test_what_an_earlier_commit_left_is_fetched_anew(hub: Hub, tmp_path: Path, kept: str) -> None:
    (tmp_path / kept).write_bytes(WEIGHTS[::-1])
    pull(hub, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    assert not list(tmp_path.glob("*.partial"))


def test_the_first_file_that_fails_is_the_one_that_is_told_of(hub: Hub, tmp_path: Path) -> None:
    hub.refused = 404
    with pytest.raises(StoreError, match="the server answers 404"):
        pull(hub, tmp_path)


def test_a_token_is_shown_to_the_hub_and_to_nobody_it_sends_us_to(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirects = True
    pull(hub, tmp_path)
    assert set(hub.shown) == {("hub", "Bearer hf_secret"), ("elsewhere", None)}
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_ctrl_c_ends_a_pull_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = hub.announced["model.safetensors"] = bytes(100_000_000)
    hub.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        pull(hub, tmp_path)
    assert hub.written < 50_000_000
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_may_not_be_read_say_whose_leave_is_needed(hub: Hub, tmp_path: Path) -> None:
    hub.refused = 403
    with pytest.raises(StoreError, match=r"accept its licence on huggingface\.co, then set HF_TOKEN"):
        pull(hub, tmp_path)


def test_a_disk_that_is_too_small_is_refused_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(StoreError, match=r"[\d,]+ more bytes are needed and 1,000 are free; make room or set"):
        pull(hub, tmp_path)
    assert hub.fetched == []


def test_offline_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE is set"):
        pull(hub, tmp_path)
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("refusal", "advice"),
    [
        ((403, "GatedRepo"), "accept its licence on huggingface.co, then set HF_TOKEN"),
        ((404, "RepoNotFound"), "no such model on Hugging Face, or a private one and HF_TOKEN is not set"),
        ((404, "RevisionNotFound"), "no such revision"),
        ((403, ""), "answers 403; set HF_TOKEN"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    hub: Hub, tmp_path: Path, refusal: tuple[int, str], advice: str
) -> None:
    hub.refusal = refusal
    with pytest.raises(StoreError, match=advice) as caught:
        pull(hub, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_name_that_the_hub_cannot_have_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="a--b"):
        pull_repository(
            HubRepository(repo="org/a--b"), tmp_path, lambda done, total: None, endpoint="http://127.0.0.1:9"
        )


def test_mistrals_own_form_is_taken_where_it_is_the_only_one() -> None:
    names = ("params.json", "consolidated.safetensors", "tekken.json", "consolidated.00.pth")
    chosen = choose_files("x", [HubFile(name, 1, None, None) for name in names])
    assert [file.name for file in chosen] == ["params.json", "consolidated.safetensors", "tekken.json"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "Mistral-NeMo-12B-Instruct.nemo"])
def test_a_repository_without_safetensors_is_refused_with_what_to_use(name: str) -> None:
    with pytest.raises(StoreError, match=r"no safetensors.*; use a repository that has the model as \*.safetensors"):
        choose_files("x", [HubFile(name, 1, None, None), HubFile("config.json", 1, None, None)])
