"""The command line as a person or a script meets it: exit codes, one-line errors, data on stdout, settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine import EngineConfig
from service.cli.main import main
from service.ports import Ports
from service.server import ServerConfig
from service.settings.definitions import SECTIONS
from tests.server import NEMOSERVE
from tests.service.fakes import FakeHost


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("pull", "mistral-nmeo-12b"), 1, "did you mean mistral-nemo-12b"),
        (("serve", "--grpc-port", "70000", "--dry-run"), 2, "--grpc-port: '70000' must be between 0 and 65535"),
        (("serve", "--host", "0.0.0.0"), 2, "or --allow-anonymous"),
        (("serve", "a" * 300), 1, f"{'a' * 300}: File name too long"),
        (("chat", "--address", "127.0.0.1:1", "--once", "hello"), 1, "127.0.0.1:1: UNAVAILABLE"),
        (("keys", "new", "a/é"), 2, "NAME: 'a/é' is no name"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(arguments: tuple[str, ...], code: int, line: str) -> None:
    done = subprocess.run([NEMOSERVE, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_empty_question_is_wrong_usage() -> None:
    result = CliRunner().invoke(main, ["chat"], input="\n")
    assert result.exit_code == 2
    assert "the question is empty" in result.stderr


@pytest.mark.parametrize("address", ["http://localhost:8000", "localhost", "localhost:"])
def test_an_address_that_is_none_is_wrong_usage(address: str) -> None:
    result = CliRunner().invoke(main, ["chat", "--address", address, "--once", "hello"])
    assert result.exit_code == 2
    assert f"'{address}' must be HOST:PORT of the gRPC port" in result.stderr


@pytest.mark.parametrize("width", [60, 110])
def test_help_has_settings_under_their_headings_with_their_defaults(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = CliRunner().invoke(main, ["serve", "--help"], terminal_width=width).stdout.splitlines()
    assert [line[:-1] for line in lines if line[-1:] == ":" and line[0] != " "] == [*SECTIONS, "Options"]
    assert max(map(len, lines)) <= width
    told = " ".join(word for line in lines for word in line.split())
    for default in ("8001", "true", "0", "30"):
        assert f"[default: {default}]" in told


def test_a_switch_that_would_do_nothing_is_wrong_usage() -> None:
    result = CliRunner().invoke(main, ["serve", "--json"])
    assert result.exit_code == 2
    assert "--json goes with --dry-run" in result.stderr


@pytest.mark.parametrize("arguments", [["models"], ["profiles", "mistral-nemo-12b", "--gpu", "h100"]])
def test_a_disk_that_is_full_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [NEMOSERVE, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            env=os.environ | {"NEMOSERVE_CACHE": str(tmp_path)},
        )
    assert (done.returncode, done.stderr) == (1, "nemoserve: No space left on device\n")


def test_help_waits_for_nothing_heavy() -> None:
    heavy = "{'torch', 'grpc', 'httpx', 'rich', 'huggingface_hub', 'tritonclient'}"
    code = (
        f"import sys, service.cli.main; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


def test_models_tell_what_is_in_the_store(tmp_path: Path) -> None:
    stored = tmp_path / "models" / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    stored.parent.mkdir(parents=True)
    stored.touch()
    result = CliRunner().invoke(main, ["models", "--json"], env={"NEMOSERVE_CACHE": str(tmp_path)})
    assert [row["name"] for row in json.loads(result.stdout) if row["stored"]] == ["smollm2-135m-instruct"]
    lines = CliRunner().invoke(main, ["models"], env={"NEMOSERVE_CACHE": str(tmp_path)}).stdout.splitlines()
    assert len({line.index("Apache-2.0") for line in lines if "Apache-2.0" in line}) == 1  # columns, for all names
    assert [line.endswith("in store") for line in lines] == [False, True] + [False] * (len(lines) - 2)


def test_pull_prints_where_the_model_is(tmp_path: Path) -> None:
    model = tmp_path / "mine.gguf"
    model.touch()
    assert CliRunner().invoke(main, ["pull", str(model)]).stdout == f"{model}\n"
    printed = CliRunner().invoke(main, ["pull", str(model), "--json"]).stdout
    assert json.loads(printed) == {"name": "mine", "path": str(model)}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """Configurations that servers were started with; none of them runs."""
    configs: list[ServerConfig] = []

    class Recorder:
        def __init__(self, config: ServerConfig, **parts: object) -> None:
            configs.append(config)
            self.ports = Ports(FakeHost(), config.grpc_address, config.http_address)

        async def run(self, on_ready: Callable[[str], Awaitable[None]] | None) -> int:
            if on_ready is not None:
                await on_ready("127.0.0.1:8001")
            return 70

        def abandoned(self, patience: float) -> bool:
            return False

    monkeypatch.setattr("service.server.Server", Recorder)
    monkeypatch.setattr("service.logs.configure", lambda level, as_json: None)
    return configs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What may be a model, by the names of its files."""
    (tmp_path / "config.json").touch()
    return tmp_path


def test_every_setting_reaches_the_server(served: list[ServerConfig], folder: Path) -> None:
    flags = {
        "--host": "::1",
        "--grpc-port": "9000",
        "--http-port": "9001",
        "--served-model-name": "bob",
        "--precision": "fp8-weight-only",
        "--kv-precision": "fp8",
        "--dtype": "fp32",
        "--device": "cpu",
        "--max-model-len": "300",
        "--max-batch-size": "3",
        "--max-batch-tokens": "77",
        "--max-draft-tokens": "0",
        "--kv-memory": "2Mi",
        "--prefix-caching": "false",
        "--cuda-graphs": "false",
        "--threads": "1",
        "--lame-duck": "0.5",
        "--drain-timeout": "1.5",
        "--engine-restarts": "5",
        "--engine-timeout": "7",
        "--model-control": "explicit",
    }
    result = CliRunner().invoke(main, ["serve", str(folder), *(word for pair in flags.items() for word in pair)])
    engine = EngineConfig(
        model_path=str(folder),
        dtype="float32",
        precision="fp8-weight-only",
        kv_precision="fp8",
        device="cpu",
        max_model_len=300,
        max_batch_size=3,
        max_batch_tokens=77,
        max_draft_tokens=0,
        kv_memory_bytes=2 * 2**20,
        prefix_caching=False,
        cuda_graphs=False,
        threads=1,
    )
    life = {"lame_duck": 0.5, "drain_timeout": 1.5, "engine_restarts": 5, "engine_timeout": 7.0, "model_control": True}
    expected = ServerConfig(
        engine=engine, model_name="bob", grpc_address="[::1]:9000", http_address="[::1]:9001", **life
    )
    assert served == [expected]
    assert result.exit_code == 70


def test_defaults_are_those_of_the_engine(served: list[ServerConfig], folder: Path) -> None:
    CliRunner().invoke(main, ["serve", str(folder)])
    assert served == [ServerConfig(engine=EngineConfig(model_path=str(folder)), model_name=folder.name)]


@pytest.mark.parametrize(("host", "seconds"), [("127.0.0.1", 0.0), ("0.0.0.0", 5.0)])
def test_new_requests_are_taken_for_a_while_where_others_have_to_hear_of_the_end(
    served: list[ServerConfig], folder: Path, host: str, seconds: float
) -> None:
    CliRunner().invoke(main, ["serve", str(folder), "--host", host, "--allow-anonymous"])
    assert [config.lame_duck for config in served] == [seconds]


@pytest.mark.parametrize(
    ("args", "seconds"),
    [((), 0.0), (("--host", "0.0.0.0"), 60.0), (("--host", "0.0.0.0", "--max-connection-age", "0"), 0.0)],
)
def test_clients_make_new_connections_now_and_then_where_there_may_be_other_servers(
    served: list[ServerConfig], folder: Path, args: tuple[str, ...], seconds: float
) -> None:
    CliRunner().invoke(main, ["serve", str(folder), "--allow-anonymous", *args])
    assert [config.max_connection_age for config in served] == [seconds]


def test_people_are_greeted_and_log_collectors_are_not(served: list[ServerConfig], folder: Path) -> None:
    greeted = CliRunner().invoke(main, ["serve", str(folder)])
    ready = f"{folder.name} is ready at 127.0.0.1:8001 (gRPC)"
    assert f"{ready} and http://127.0.0.1:8000/v1 (OpenAI)\n" in greeted.stdout
    assert CliRunner().invoke(main, ["serve", str(folder), "--log-json"]).stdout == ""
    without = CliRunner().invoke(main, ["serve", str(folder), "--http-port", "off"])
    assert f"{ready}\n" in without.stdout
    assert [config.http_address for config in served] == ["127.0.0.1:8000", "127.0.0.1:8000", None]


def test_chat_answers_a_question_from_a_pipe_with_an_engine_of_its_own(smollm2_path: Path) -> None:
    done = subprocess.run(
        [NEMOSERVE, "chat", smollm2_path, "--temperature", "0", "--max-tokens", "14"],
        input="What is 2+2?",  # of its 14 tokens none is a near tie, which precisions would break differently
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "4" in done.stdout
