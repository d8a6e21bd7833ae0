"""A grammar's trial: it is compiled in a process of its own first, `python -m engine.grammar.trial`.

llguidance counts what it spends nearly everywhere. Where it does not, a schema of a kilobyte can take minutes and
gigabytes (a hundred patterns in an allOf), and what is nested deeply can take a stack. So what comes from outside is
compiled where that harms nobody: the process is killed when its time is over, and dies when its memory or its stack is
used up. What passes is compiled again in the engine, where both are larger.

Its time is that of the CPU. A machine whose cores all compute steps gives the process a tenth of one, and a verdict
must not depend on who else is served.

    engine ──Vocabulary──► trial        first, once
           ──Grammar─────►              then one after the other
           ◄──Verdict─────
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import select
import subprocess
import sys
import threading
import time
from typing import IO

import msgspec
from llguidance import LLTokenizer

from engine.grammar.language import compile_grammar, make_tokenizer
from engine.request import Grammar, Vocabulary

# -P: a folder named `engine` where the server is started must not be taken for ours.
TRIAL = (sys.executable, "-P", "-m", "engine.grammar.trial")
SECONDS = 5.0  # of the CPU; hard but honest grammars take less than one
MEMORY = 256 * 2**20  # bytes, beyond those of the vocabulary
STACK = 2**20  # bytes; masks are made in threads with twice as much
BUSY_SECONDS = 20.0  # of the clock: others wait for a compiler, and a busy machine has a twentieth of a core for it
START_SECONDS = 60.0  # of a busy machine, to import llguidance and to build the trie of a vocabulary
LOOK_SECONDS = 0.05  # between two looks at what it has used
NICENESS = 10  # steps go first
_HEADER = 4  # bytes of the length before each message, as in `engine.wire`


class Setting(msgspec.Struct, frozen=True):
    """What grammars are over."""

    vocabulary: Vocabulary
    vocab_size: int


class Verdict(msgspec.Struct, frozen=True):
    """`reason`: why the grammar cannot be served; None = it can, and takes `nbytes` of memory."""

    reason: str | None = None
    nbytes: int = 0


class Trial:
    """The process, from the side of the engine: started when it is needed. Belongs to one thread, but for `close`."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._starting = threading.Lock()

    def judge(self, grammar: Grammar, seconds: float = SECONDS) -> Verdict:
        """Whether a grammar can be served. One that ends the process cannot.

        Raises:
            OSError: the process does not start, or gets no time. That says nothing about the grammar.
        """
        process = self._process
        if (
            process is None or process.poll() is not None
        ):  # it was ended from outside, which is not this grammar's doing
            process = self._start()
        try:
            _write(process, msgspec.msgpack.encode(grammar))
            if not _answers(process, seconds, BUSY_SECONDS):
                self._end()
                return Verdict(f"it takes more than {seconds:g} s to compile")
            return msgspec.msgpack.decode(_receive(process), type=Verdict)
        except TimeoutError:
            self._end()
            raise
        except OSError:  # the process is gone
            self._end()
            return Verdict("it takes too much memory to compile, or is nested too deeply")

    def close(self) -> None:
        """End the process; there will be no other."""
        with self._starting:
            self._closed = True
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError), process:  # what it did not read stays unwritten
                pass

    def _start(self) -> subprocess.Popen[bytes]:
        self._end()
        with self._starting:
            if self._closed:
                raise ConnectionError("the engine is closed")
            process = subprocess.Popen(TRIAL, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self._process = process
        try:
            _write(process, msgspec.msgpack.encode(self._setting))
            _answers(process, math.inf, START_SECONDS)
            _receive(process)
        except OSError:
            self._end()
            raise
        return process


def _answers(process: subprocess.Popen[bytes], seconds: float, patience: float) -> bool:
    """Whether there is an answer, or the end of file, before the process has used so many seconds of the CPU.

    Raises:
        TimeoutError: it got so little of the CPU that `patience` seconds of the clock do not tell.
    """
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    used, until = _cpu_seconds(process.pid), time.monotonic() + patience
    while not poll.poll(1000 * LOOK_SECONDS):
        if _cpu_seconds(process.pid) - used > seconds:
            return False
        if time.monotonic() > until:
            raise TimeoutError("other work takes all of the CPU")
    return True


def _cpu_seconds(pid: int) -> float:
    """What a process of ours has used of the CPU."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _write(process: subprocess.Popen[bytes], body: bytes) -> None:
    assert process.stdin is not None
    _send(process.stdin, body)


def _receive(process: subprocess.Popen[bytes]) -> bytes:
    """Raises ConnectionError at the end of file."""
    assert process.stdout is not None
    if (body := _read(process.stdout)) is None:
        raise ConnectionError("the trial of grammars is gone")
    return body


def _send(target: IO[bytes], body: bytes) -> None:
    target.write(len(body).to_bytes(_HEADER, "big") + body)
    target.flush()


def _read(source: IO[bytes]) -> bytes | None:
    """The next message, None at the end of file."""
    header = source.read(_HEADER)
    return source.read(int.from_bytes(header, "big")) if len(header) == _HEADER else None


# -- the process -----------------------------------------------------------------------------------------------------


def _memory() -> tuple[int, int]:
    """Bytes of address space of this process, and of it in memory."""
    with open("/proc/self/statm") as file:
        size, resident, *_ = file.read().split()
    return int(size) * resource.getpagesize(), int(resident) * resource.getpagesize()


def _judge(tokenizer: LLTokenizer, grammar: Grammar) -> Verdict:
    _, before = _memory()
    try:
        matcher = compile_grammar(tokenizer, grammar)
    except ValueError as error:
        return Verdict(str(error))
    except RecursionError:
        return Verdict("it is nested too deeply")
    grown = _memory()[1] - before
    del matcher
    return Verdict(nbytes=max(0, grown))


def _limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _serve() -> None:
    """Judge grammars until the engine closes the pipe."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    if (first := _read(source)) is None:
        return
    setting = msgspec.msgpack.decode(first, type=Setting)
    tokenizer = make_tokenizer(setting.vocabulary, setting.vocab_size)
    _limit(resource.RLIMIT_AS, _memory()[0] + MEMORY)
    answer = Verdict()  # it is ready
    while True:
        _send(target, msgspec.msgpack.encode(answer))
        if (body := _read(source)) is None:
            return
        # Where the engine is gone meanwhile, nobody else ends this process.
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + SECONDS) + 2)
        answer = _judge(tokenizer, msgspec.msgpack.decode(body, type=Grammar))


def main() -> int:
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
