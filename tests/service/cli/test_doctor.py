"""`nemoserve doctor` and `nemoserve profiles` as a person or a script meets them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from engine.errors import CheckpointError, EngineConfigError, EngineDeadError
from engine.probe import Gpu, Machine, driver_version
from service.cli.main import main
from service.cli.tables import table
from service.models import machine as surroundings
from service.models.catalog import CATALOG
from service.models.fit import Place
from service.models.machine import check_disk, check_machine, check_port, check_store, look
from tests.tiny_models import write_hf

MACHINE = Machine(
    cpu="a processor",
    cores=2,
    instructions=("avx2",),
    free_bytes=8 * 2**30,
    limit_bytes=None,
    torch="2.11",
    compiler="/usr/bin/g++",
    kernels=True,
    triton_lacks=None,
    device="cpu",
    dtype="bfloat16",
    gpus=(),
)


def run(*arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(main, arguments, env=environ)


def answer(*arguments: str, **environ: str) -> Any:
    result = run(*arguments, "--json", **environ)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return json.loads(result.stdout)


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_this_machine_and_a_model_on_its_disk(tmp_path: Path) -> None:
    """A process of its own: neither it nor what it imports may load torch."""
    folder = write_hf(tmp_path / "tiny")
    program = "import sys; from service.cli.main import main; main(sys.argv[1:], standalone_mode=False)"
    program += "; sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", program, "doctor", str(folder), "--json", "--device", "cpu"]
    command += ["--grpc-port", "0", "--http-port", "0", "--http-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["model"]["name"] == "tiny"
    assert (found["fits"], found["device"]["kind"]) == (True, "cpu")
    names = [check["name"] for check in found["checks"]]
    assert names == ["processor", "memory", "kernels", "torch", "gRPC port", "HTTP port", "model store", "disk"]
    assert all(check["ok"] for check in found["checks"] if check["name"] != "kernels")
    rows = {(row["precision"], row["kv_precision"]): row for row in found["precisions"]}
    assert rows["int8", "auto"]["weight_bytes"] < rows["bf16", "auto"]["weight_bytes"]
    assert all(row["tokens"] > row["tokens_by_default"] > 0 for row in rows.values())


def test_what_does_not_fit_ends_with_1_and_says_what_would() -> None:
    result = run("doctor", "mistral-nemo-12b", "--gpu", "l4")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "does not fit on L4 24 GB: " in result.stderr
    assert "GiB short" in result.stderr
    assert result.stderr.endswith("; --precision fp8 fits\n")
    assert "->  as stored (bf16)" in result.stdout


def test_what_is_asked_for_is_what_is_judged() -> None:
    assert run("doctor", "mistral-nemo-12b", "--gpu", "l4", "--precision", "fp8").exit_code == 0
    assert run("doctor", "mistral-nemo-12b", "--gpu", "l4", NEMOSERVE_PRECISION="int4").exit_code == 0
    long = ("doctor", "mistral-nemo-12b", "--gpu", "l4", "--precision", "fp8", "--max-model-len", "60000")
    assert run(*long).stderr.endswith("; --kv-precision fp8 fits\n")
    found = answer(*long, "--kv-precision", "fp8")
    assert (found["fits"], found["asked"]) == (True, "fp8")
    assert {row["kv_precision"] for row in found["precisions"]} == {"fp8"}


def test_any_memory_can_be_planned_for_and_nothing_here_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.doctor.look", None)
    found = answer("doctor", "mistral-nemo-12b", "--memory", "48")
    assert (found["fits"], found["checks"]) == (True, [])
    assert found["device"]["free"] == 48 * 2**30 - 600 * 2**20
    assert not answer("doctor", "mistral-nemo-12b", "--memory", "0.1")["fits"]


def test_drafts_take_logits() -> None:
    def workspace(drafts: int) -> int:
        few = ("--max-batch-size", "1", "--max-batch-tokens", "64", "--max-draft-tokens", str(drafts))
        found = answer("doctor", "mistral-nemo-12b", "--gpu", "h100", *few)
        return int(found["precisions"][0]["workspace_bytes"])

    assert workspace(0) < workspace(63)


def test_fp32_takes_twice_the_cache() -> None:
    narrow, wide = (
        {row["kv_precision"]: row for row in answer("doctor", "mistral-nemo-12b", "--gpu", "h200", *more)["precisions"]}
        for more in ((), ("--dtype", "fp32"))
    )
    assert wide["auto"]["bytes_per_token"] == 2 * narrow["auto"]["bytes_per_token"]
    assert wide["fp8"]["bytes_per_token"] == narrow["fp8"]["bytes_per_token"]


def test_a_reason_says_which_keys_and_values_it_is_about() -> None:
    result = run("doctor", "mistral-nemo-12b", "--gpu", "l4", "--max-model-len", "100000")
    about = {line.partition(" does not fit: ")[0] for line in result.stdout.splitlines() if "does not fit: " in line}
    assert {f"{weights} with keys and values in {kv}" for weights in ("bf16", "fp8") for kv in ("bf16", "fp8")} <= about
    assert "int4 with keys and values in bf16" in about
    assert not about & {"int4", "int4 with keys and values in fp8"}  # which fits


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("doctor", "--gpu", "a100"), 2, "--gpu: 'a100' may be a100-40gb or a100-80gb"),
        (("doctor", "--gpu", "l4", "--memory", "3"), 2, "--memory: does not go with --gpu"),
        (("doctor", "--memory", "nan"), 2, "--memory: nan must be between 0.1 and 10000 GiB"),
        (("doctor", "--memory", "inf"), 2, "--memory: inf must be between 0.1 and 10000 GiB"),
        (("doctor", "--memory", "0"), 2, "--memory: 0 must be between 0.1 and 10000 GiB"),
        (("doctor", "hf://org/name", "--gpu", "h100"), 1, "hf://org/name: not in the store"),
        (("doctor", "mistral-nmeo-12b"), 1, "did you mean mistral-nemo-12b"),
        (("doctor", "mistral-nemo-12b", "--gpu", "h100", "--precision", "fp4"), 2, "must be one of auto, bf16"),
        (("doctor", "mistral-nemo-12b", "--gpu", "h100", "--tensor-parallel-size", "7"), 1, "7 must divide"),
        (("profiles", "--gpu", "mi300x"), 2, "--memory GiB plans for any other"),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_line(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    result = run(*arguments, NEMOSERVE_CACHE=str(tmp_path))
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


# -- the machine -------------------------------------------------------------------------------------------------------


def test_a_machine_without_a_compiler_is_told_what_to_install() -> None:
    bare = msgspec.structs.replace(MACHINE, compiler=None, kernels=False)
    [kernels] = [check for check in check_machine(bare) if check.name == "kernels"]
    assert not kernels.ok
    assert "install g++" in kernels.detail


def test_a_gpu_is_told_what_its_kernels_lack() -> None:
    gpu = Gpu(name="NVIDIA H100", capability=(9, 0), memory_bytes=80 * 2**30, free_bytes=79 * 2**30)
    with_gpu = msgspec.structs.replace(MACHINE, compiler=None, kernels=False, device="cuda", gpus=(gpu,))
    old = (msgspec.structs.replace(gpu, capability=(7, 5)),)
    for machine, lack in [
        (with_gpu, None),
        (msgspec.structs.replace(with_gpu, triton_lacks="Triton is not installed"), "Triton is not installed; the GPU"),
        (msgspec.structs.replace(with_gpu, gpus=old), "older than compute capability 8.0"),
    ]:
        checks = {check.name: check for check in check_machine(machine)}
        assert checks["kernels"].ok == (lack is None)
        assert (lack or "by Triton") in checks["kernels"].detail
        assert checks["GPU"].detail == "NVIDIA H100, 79.0 of 80.0 GiB free"
        assert Place.here(machine).kernels == (lack is None)


def test_ranks_need_a_gpu_each() -> None:
    gpu = Gpu(name="NVIDIA H100", capability=(9, 0), memory_bytes=80 * 2**30, free_bytes=79 * 2**30)
    machine = msgspec.structs.replace(MACHINE, device="cuda", gpus=(gpu, gpu))
    checks = {ranks: check_machine(machine, ranks)[-1] for ranks in (2, 4)}
    assert checks[2].ok
    assert (checks[4].ok, checks[4].detail) == (False, "4 ranks need a GPU each, 2 are here")
    assert check_machine(MACHINE, 2)[-1].name != "ranks"


def test_the_limit_of_a_container_is_told() -> None:
    limited = msgspec.structs.replace(MACHINE, limit_bytes=12 * 2**30)
    [memory] = [check for check in check_machine(limited) if check.name == "memory"]
    assert memory.detail == "8.0 GiB free, the container's limit is 12.0"


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not check_port("127.0.0.1", port).ok
        assert f"127.0.0.1:{port} cannot be opened" in check_port("127.0.0.1", port).detail
    assert check_port("127.0.0.1", port).ok
    assert not check_port("no.such.host.invalid", port).ok


def test_a_store_is_looked_at_where_its_folder_will_be(tmp_path: Path) -> None:
    assert check_store(tmp_path / "not" / "yet", 10).ok
    assert not check_store(tmp_path, 2**60).ok
    assert not (tmp_path / "not").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write to")
def test_a_store_that_cannot_be_written_is_told() -> None:
    found = check_store(Path("/proc/self/store"), 0)
    assert not found.ok
    assert "/proc/self/store cannot be written" in found.detail


def test_the_disk_is_read_and_its_rate_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(5_000_000))
    found = check_disk(tmp_path)
    assert found.ok
    assert "MB/s: 0.01 GB in " in found.detail
    monkeypatch.setattr(surroundings, "SAMPLE_BYTES", 10)
    assert check_disk(tmp_path).ok
    assert not check_disk(tmp_path.with_name("nothing")).ok


def test_errors_of_the_engine_keep_their_type(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a model is a \.gguf file"):
        look(Path(__file__))
    with pytest.raises(EngineConfigError, match="device: 'tpu' must be auto, cpu or cuda"):
        look(None, device="tpu")


def test_a_probe_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; print('first', file=sys.stderr); sys.exit('no torch here')"
    monkeypatch.setattr(surroundings, "PROBE", (sys.executable, "-c", program))
    with pytest.raises(EngineDeadError, match=r"the engine cannot look at this machine: no torch here$"):
        look()


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_profiles_of_every_known_gpu() -> None:
    found = answer("profiles", "mistral-nemo-12b", "--gpu", "all")
    ids = [row["profile"] for row in found]
    assert "mistral-nemo-12b-instruct/h100-fp8-tp1" in ids
    assert "mistral-nemo-12b-instruct/a100-80gb-fp8-weight-only-tp1" in ids
    assert len(ids) == len(set(ids)) == 4 * 7
    h100 = next(row for row in found if row["profile"].endswith("h100-fp8-tp1"))
    assert h100["sequences"] == h100["tokens"] // 131072 == 3


def test_profiles_of_every_model_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from engine.probe import Found

    monkeypatch.setattr("service.cli.doctor.look", lambda model, device, dtype: Found(machine=MACHINE, weights=None))
    text = run("profiles", NEMOSERVE_CACHE=str(tmp_path)).stdout
    assert all(f"{name}/cpu-" in text for name in CATALOG)
    marked = [line.split()[1] for line in text.splitlines() if line.startswith("->  ")]
    assert len(marked) == len(CATALOG)
    assert "mistral-nemo-12b-instruct/cpu-bf16-tp1" in marked
    assert "GiB short" in text
    assert text.startswith("On this machine's CPU, 8.00 GiB free.\n")


def test_a_table_is_as_wide_as_its_widest_cells() -> None:
    assert table([["a", "bc", "d"], ["long", "1", ""]]) == "a     bc  d\nlong   1"


def test_profiles_here_are_grouped_and_the_chosen_one_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from engine.probe import Found

    machine = msgspec.structs.replace(MACHINE, free_bytes=14 * 2**30)
    monkeypatch.setattr("service.cli.doctor.look", lambda *_: Found(machine=machine, weights=None))
    here = {"NEMOSERVE_CACHE": str(tmp_path)}
    text = run("profiles", "mistral-nemo-12b", **here).stdout
    assert text.index("\ntight\n") < text.index("cpu-int4-tp1") < text.index("\ndoes not fit\n")
    assert "tight: --max-model-len=" in text
    assert text.splitlines()[-1].startswith(
        "chosen here: mistral-nemo-12b-instruct/cpu-bf16-tp1, because its file is kept as it is unless --precision "
        "says otherwise; it does not fit: "
    )
    found = {row["precision"]: row for row in answer("profiles", "mistral-nemo-12b", **here)}
    assert {name: row["group"] for name, row in found.items()} == {
        "bf16": "does not fit",
        "fp8-weight-only": "tight",
        "int8": "tight",
        "int4": "tight",
    }
    longest = str(found["int4"]["longest_sequence"])
    few = ("--precision", "int4", "--grpc-port", "0", "--http-port", "0", "--max-model-len")
    assert run("doctor", "mistral-nemo-12b", *few, longest, **here).exit_code == 0
    assert run("doctor", "mistral-nemo-12b", *few, str(int(longest) + 1024), **here).exit_code == 1
    asked = answer("profiles", "mistral-nemo-12b", "--max-model-len", str(int(longest) + 1024), **here)
    assert [row["group"] for row in asked if row["profile"].endswith("cpu-int4-tp1")] == ["tight"]


def test_what_keeps_a_server_from_starting_ends_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from engine.probe import Found

    monkeypatch.setattr("service.cli.doctor.look", lambda *_: Found(machine=MACHINE, weights=None))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        taken = run("doctor", "--grpc-port", port, "--http-port", "0", NEMOSERVE_CACHE=str(tmp_path))
    assert (taken.exit_code, taken.stderr.count("\n")) == (1, 1)
    assert f"gRPC port: 127.0.0.1:{port} cannot be opened" in taken.stderr
    assert "HTTP port" not in run("doctor", "--grpc-port", port, "--http-port", "off").stdout
    assert run("doctor", "--grpc-port", "0", "--http-port", "0", NEMOSERVE_CACHE=str(tmp_path)).exit_code == 0


def test_versions_are_told_where_they_are() -> None:
    machine = msgspec.structs.replace(MACHINE, triton="3.6.0", cuda="12.8", driver="570.86.15")
    [torch] = [check for check in check_machine(machine) if check.name == "torch"]
    assert torch.detail == "2.11, computes in bf16 on cpu; Triton 3.6.0; CUDA 12.8; NVIDIA driver 570.86.15"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@x)\n",
            "570.86.15",
        ),
        ("something else\n", None),
    ],
)
def test_the_driver_tells_its_version(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "none") is None


def test_keys_and_certificates_are_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from engine.probe import Found
    from tests.service.security.certificates import Authority

    monkeypatch.setattr("service.cli.doctor.look", lambda *_: Found(machine=MACHINE, weights=None))
    authority = Authority(tmp_path / "authority")

    def doctor(days: int) -> Result:
        signed = authority.server(f"of-{days}", days=days)
        pair = ("--tls-cert", str(signed.certificate), "--tls-key", str(signed.key))
        return run("doctor", "--grpc-port", "0", "--http-port", "0", *pair, NEMOSERVE_CACHE=str(tmp_path))

    assert "ok  TLS" in doctor(90).stdout
    soon, ended = doctor(3), doctor(-1)
    assert (soon.exit_code, "!!  TLS" in soon.stdout) == (0, True)
    assert ended.exit_code == 1
    assert "certificate has expired" in ended.stderr
