"""The render process: any template, however hostile, costs bounded time and memory, and the next request is served."""

from __future__ import annotations

import gc
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine import CheckpointError
from service.errors import Code, ServiceError
from service.text import sandbox
from service.text.sandbox import MAX_MEMORY, CompiledTemplate

MEMORY = "MiB of memory|runs longer than"  # which of the two comes first is the machine's business
SECONDS, OUTPUT = "runs longer than", "output is longer"

# `big` is 10**9 and `a` is "a": what a template writes out is folded when it is compiled, what it is given is not.
HOSTILE = [
    ("{{ a | center(big) }}", MEMORY),
    ("{{ a * big }}", MEMORY),
    ("{{ [a] * big }}", MEMORY),
    ("{{ a.ljust(big) }}", MEMORY),
    ("{{ '%1000000000d' | format(1) }}", MEMORY),
    ("{{ '%*d' | format(big, 1) }}", MEMORY),
    ("{{ '{:1000000000d}'.format(1) }}", MEMORY),
    ("{{ {'k': [a]} | tojson(indent=big) }}", MEMORY),
    ("{{ a | indent(big, first=true) }}", MEMORY),
    ("{% filter center(big) %}x{% endfilter %}", MEMORY),
    ("{{ (a * 100000) | replace(a, a * 100000) }}", MEMORY),
    ("{{ [1] | batch(big, 0) | list }}", MEMORY),
    ("{% set ns = namespace(s=a) %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", MEMORY),
    ("{% set ns = namespace(s=a) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", ""),
    ("{% set ns = namespace(s=a) %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}", MEMORY),
    ("{% set ns = namespace(s=[a]) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", MEMORY),
    ("{% set ns = namespace(s=a) %}{% for i in range(40) %}{% set ns.s = (a, ns.s, ns.s) %}{% endfor %}{{ ns.s }}", ""),
    ("{{ big ** big }}", ""),
    ("{% set l = range(90000) | list %}{% for x in l %}{% for y in l %}{% endfor %}{% endfor %}", SECONDS),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", SECONDS),
    ("{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}", SECONDS),
    ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
    ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursion"),
    ("{% for x in range(90000) %}{{ a * 90000 }}{% endfor %}", OUTPUT),
    ("{{ range(big) | list }}", "Range too big"),
    ("{{ lipsum(n=big) }}", ""),
    ("{{ [1] | slice(big) | list }}", ""),
    ("{{ (a * 1000000) | wordwrap(1) }}", ""),
    ("{{ ('<' * 1000000) | striptags | urlize }}", ""),
    ("{{ a.__class__.__mro__ }}", "unsafe"),
]
VALUES: dict[str, Any] = {"big": 10**9, "a": "a", "hostile": True}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a second is what a template may take."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.25)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("source", "reason"), HOSTILE)
def test_a_hostile_template_fails_its_request_and_nothing_else(source: str, reason: str) -> None:
    template = CompiledTemplate("{% if hostile %}" + source + "{% else %}fine{% endif %}")
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ServiceError) as caught:
        template.render(VALUES)
    assert (caught.value.code, caught.value.field) == (Code.INVALID_ARGUMENT, "messages")
    assert re.search(reason, caught.value.message)
    assert "\n" not in caught.value.message
    assert time.process_time() - start < 0.5  # here; what the other process takes is bounded by the kernel
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 * 1024  # KiB
    assert template.render({"hostile": False}) == "fine"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ('a' * 100000000) ~ ('a' * 100000000) ~ ('a' * 100000000) }}", MEMORY),
        ("{{ 9 ** 99999999 }}", SECONDS),
        ("{% if " + "(" * 5000, "recursion"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_a_template_that_is_hostile_to_its_compiler_is_refused_at_load(source: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match="chat template: ") as caught:
        CompiledTemplate(source)
    assert re.search(reason, str(caught.value))


def test_values_go_through_unchanged() -> None:
    template = CompiledTemplate("{{ x | tojson }}|{{ y }}|{{ messages[0].content }}")
    values = {
        "x": {"b": [1, 2.5, None, True, 10**30], "a": "é\U0001f642\ud800"},
        "y": None,
        "messages": [{"content": ""}],
    }
    assert template.render(values) == f'{{"b": [1, 2.5, null, true, {10**30}], "a": "é\U0001f642\ud800"}}|None|'


def test_a_process_that_was_killed_is_replaced() -> None:
    template = CompiledTemplate("{{ x }}")
    process = template._process._process
    process.kill()
    process.wait()
    assert template.render({"x": 1}) == "1"


def test_threads_share_one_process() -> None:
    template = CompiledTemplate("{% for i in range(100) %}{{ x }} {% endfor %}")
    with ThreadPoolExecutor(8) as pool:
        for number, shown in enumerate(pool.map(lambda x: template.render({"x": x}), range(100))):
            assert shown.split() == [str(number)] * 100


def test_the_process_has_no_file_to_open_little_memory_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOSERVE_TEST_SECRET", "hunter2")
    template = CompiledTemplate("{{ x }}")
    process = Path(f"/proc/{template._process._process.pid}")
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (process / "limits").read_text().splitlines()}
    assert limits["Max address space"] == [str(MAX_MEMORY)] * 2
    assert limits["Max open files"] == ["0", "0"]
    assert limits["Max core file size"] == ["0", "0"]
    assert b"hunter2" not in (process / "environ").read_bytes()


def test_the_process_ends_with_its_template() -> None:
    template = CompiledTemplate("x")
    process = template._process._process
    del template
    gc.collect()
    assert process.returncode == -signal.SIGKILL


def test_the_process_ends_with_the_server_however_that_ends() -> None:
    code = (
        "import os, signal; from service.text.sandbox import CompiledTemplate\n"
        "template = CompiledTemplate('x'); print(template._process._process.pid, flush=True); input()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None
    assert server.stdout is not None
    renderer = os.pidfd_open(int(server.stdout.readline()))
    try:
        server.communicate(b"\n", timeout=30)
        ended, _, _ = select.select([renderer], [], [], 30)
        assert ended
    finally:
        os.close(renderer)


def test_one_process_serves_all_chats() -> None:
    """Starting one takes a tenth of a second, asking it a fraction of a millisecond."""
    template = CompiledTemplate("{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}")
    process = template._process._process.pid
    for number in range(50):
        assert template.render({"messages": [{"role": "user", "content": f"{number}"}]}) == f"user\n{number}\n"
    assert template._process._process.pid == process
