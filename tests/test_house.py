"""The import rules of the house, asserted from the real imports of every module.

service ──► engine          service ──► nemoserve (the contract)          bench, tests ──► anything
core ──► scheduler, runner, sampler ──► model, kv ──► quant, ops          adapters never import one another
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("process", "engine", "service", "autoscaler", "bench", "helm", "proto")


def modules(*rooms: str) -> dict[str, Path]:
    """Dotted name -> file of every module in the given rooms."""
    found = {}
    for room in rooms:
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, at_import_time_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; `from a import b` yields both a and a.b."""
    tree = ast.parse(path.read_text())
    nodes = list(tree.body) if at_import_time_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offenders(rooms: dict[str, Path], *forbidden: str) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, path in rooms.items()
        for name in imports(path)
        if any(within(name, package) for package in forbidden)
    ]


def test_the_engine_knows_neither_service_nor_protocol_nor_network() -> None:
    forbidden = (
        "service",
        "autoscaler",
        "nemoserve",
        "grpc",
        "tritonclient",
        "httpx",
        "tiktoken",
        "tokenizers",
        "sentencepiece",
        "jinja2",
    )
    assert offenders(modules("engine"), *forbidden) == []


def test_one_room_knows_how_grammars_are_compiled_and_matched() -> None:
    elsewhere = {name: path for name, path in modules(*ROOMS).items() if not within(name, "engine.grammar")}
    assert offenders(elsewhere, "llguidance") == []


def test_the_service_never_touches_a_tensor() -> None:
    assert offenders(modules("service"), "torch", "engine.ops", "engine.model", "engine.kv", "engine.runner") == []


def test_the_autoscaler_stands_alone() -> None:
    assert offenders(modules("autoscaler"), "torch", "engine", "service") == []


def test_the_operator_runs_without_what_simulates_it() -> None:
    operator = {name: path for name, path in modules("autoscaler").items() if not within(name, "autoscaler.simulate")}
    assert offenders(operator, "autoscaler.simulate", "numpy", "numba") == []


def test_what_decides_in_the_operator_knows_no_cluster_no_clock_and_no_chance() -> None:
    pure = (
        "autoscaler.policy",
        "autoscaler.decision",
        "autoscaler.fleet",
        "autoscaler.settings",
        "autoscaler.controller.victims",
    )
    rooms = {name: path for name, path in modules("autoscaler").items() if any(within(name, each) for each in pure)}
    assert offenders(rooms, "autoscaler.cluster", "autoscaler.clock", "time", "random", "asyncio", "kubernetes") == []


def test_one_room_of_the_operator_knows_the_client_of_kubernetes() -> None:
    elsewhere = {name: path for name, path in modules("autoscaler").items() if not within(name, "autoscaler.cluster")}
    assert offenders(elsewhere, "kubernetes", "aiohttp") == []


def test_nobody_imports_bench_or_tests() -> None:
    assert offenders(modules("engine", "service", "autoscaler", "helm"), "bench", "tests") == []


def test_what_all_processes_share_is_the_ground_floor() -> None:
    assert (
        offenders(modules("process"), "engine", "service", "autoscaler", "nemoserve", "bench", "tests", "torch") == []
    )


def test_the_engine_shares_the_form_of_log_lines_alone() -> None:
    assert offenders(modules("engine"), "process.http_port") == []


def test_what_renders_the_chart_stands_alone() -> None:
    assert offenders(modules("helm"), "engine", "service", "autoscaler", "nemoserve") == []
    assert offenders(modules("engine", "service", "autoscaler", "bench"), "helm") == []


@pytest.mark.parametrize(
    ("lower", "uppers"),
    [
        (
            "engine.ops",
            ("engine.quant", "engine.model", "engine.kv", "engine.runner", "engine.scheduler", "engine.core"),
        ),
        (
            "engine.quant",
            ("engine.model", "engine.parallel", "engine.kv", "engine.runner", "engine.scheduler", "engine.core"),
        ),
        ("engine.grammar", ("torch", "engine.scheduler", "engine.runner", "engine.core", "engine.sampler")),
        ("engine.kv", ("engine.model", "engine.runner", "engine.scheduler", "engine.core")),
        ("engine.model", ("engine.parallel", "engine.runner", "engine.scheduler", "engine.sampler", "engine.core")),
        ("engine.checkpoint", ("engine.model", "engine.parallel", "engine.runner", "engine.scheduler", "engine.core")),
        ("engine.scheduler", ("engine.runner", "engine.core", "engine.model", "torch")),
        ("engine.sampler", ("engine.runner", "engine.core", "engine.scheduler")),
        ("engine.runner", ("engine.core", "engine.scheduler", "engine.local", "engine.remote")),
        ("engine.core", ("engine.local", "engine.remote")),
        ("service.text", ("service.grpc", "service.generation", "service.server", "service.cli")),
        ("service.text.tools", ("service.text.load", "service.text.answer", "service.text.template")),
        ("service.security", ("service.grpc", "service.http", "service.generation", "service.server", "service.cli")),
        ("service.grpc.auth", ("service.http", "service.server", "service.cli")),
        ("service.http.auth", ("service.grpc", "service.server", "service.cli")),
        ("service.models", ("service.grpc", "service.generation", "service.server", "service.cli")),
        (
            "service.management",
            ("service.grpc", "service.http", "service.generation", "service.server", "service.cli", "starlette"),
        ),
        (
            "service.settings.definitions",
            ("service.settings.resolve", "service.cli", "service.server"),
        ),
        ("service.settings", ("service.cli", "service.server")),
        ("service.cli.command", ("service.cli.main", "service.cli.models", "service.server")),
        (
            "service.names",
            ("service.grpc", "service.http", "service.telemetry", "service.served", "service.generation"),
        ),
        ("service.http.management", ("service.grpc", "service.generation", "service.server", "service.cli")),
        ("service.loading", ("service.grpc", "service.http", "service.generation", "service.served", "service.server")),
        ("service.supervisor", ("service.grpc", "service.http", "service.server", "service.cli")),
        ("service.generation", ("service.grpc", "service.server", "service.cli")),
        ("service.observer", ("service.telemetry", "service.served", "service.grpc", "service.server", "service.cli")),
        ("service.telemetry", ("service.served", "service.grpc", "service.http", "service.server", "service.cli")),
        (
            "service.admission",
            ("service.grpc", "service.http", "service.served", "service.host", "service.server", "service.cli"),
        ),
        ("service.grpc.kserve", ("service.grpc.generation", "service.server", "service.cli", "engine.core")),
        ("service.http", ("service.grpc", "service.ports", "service.server", "service.cli", "engine.core")),
        ("service.grpc", ("service.http", "service.ports")),
        ("service.grpc.generation", ("service.grpc.kserve", "service.server", "service.cli", "engine.core")),
    ],
)
def test_imports_point_down(lower: str, uppers: tuple[str, ...]) -> None:
    rooms = {name: path for name, path in modules("engine", "service").items() if within(name, lower)}
    assert rooms
    assert offenders(rooms, *uppers) == []


def test_there_is_no_import_cycle() -> None:
    known = modules(*ROOMS)
    graph = {
        name: {target for target in imports(path, at_import_time_only=True) if target in known and target != name}
        for name, path in known.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, (*trail, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_nothing_can_unpickle() -> None:
    assert offenders(modules(*ROOMS), "pickle", "cloudpickle", "dill", "marshal", "shelve", "torch.load") == []
    assert [name for name, path in modules(*ROOMS).items() if "torch.load(" in path.read_text()] == []


@pytest.mark.parametrize(
    "module",
    [
        "engine",
        "service.host",
        "service.server",
        "service.cli.main",
        "service.cli.doctor",
        "nemoserve.v1.generation_pb2_grpc",
    ],
)
def test_the_service_process_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_server_that_traces_nothing_loads_no_exporter() -> None:
    code = "import sys, service.server; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_the_base_install_pulls_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {name.split(">")[0] for name in project["dependencies"]} == {"grpcio", "protobuf"}
    assert any(name.startswith("torch") for name in project["optional-dependencies"]["server"])
