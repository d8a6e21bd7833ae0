"""The program that renders one chat template in a process of its own. Its standard input is a socket.

A template comes with the checkpoint, so it is code of somebody else. Jinja's sandbox keeps it from Python's internals,
but a filter, a loop or a constant folded at compile time can ask for any time and memory (`'a' | center(10**9)`).
So the kernel sets the bounds: address space, processor time, no file to open. Who passes the time is killed; who
passes the memory gets a MemoryError like anybody else. Only `service.text.sandbox` talks to this program.

Frames are a 4-byte length (big endian) and that many bytes. The first from outside is JSON
`{"source", "max_seconds", "max_memory", "max_output"}`, every other one is JSON variables of a render. An answer is one
byte, OK or REFUSED, and text: nothing and the rendered text, or the reason.

Imports nothing of ours, so that it starts quickly and holds little. Texts of users never come here, only markers.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.debug  # the package itself imports it only for the first error
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

OK, REFUSED = b"\0", b"\1"
ENCODING, ERRORS = "utf-8", "surrogatepass"  # a template can write lone surrogates; who encodes the text refuses them
_LENGTH = struct.Struct("!I")

# Makes Python import and read what it puts off until it is needed, while files can still be opened.
_WARM_UP = "{{ 'a\\n' | wordwrap(1) }}{{ strftime_now('%c') }}{{ {'a': 1.5} | tojson | pprint }}"


def read_frame(receive: Callable[[int], bytes], limit: int) -> bytes:
    """The next frame.

    Args:
        receive: returns up to that many bytes, none at the end of the stream.

    Raises:
        EOFError: the stream has ended; ValueError: the frame is longer than `limit` bytes.
    """
    (length,) = _LENGTH.unpack(_read(receive, _LENGTH.size))
    if length > limit:
        raise ValueError(f"a frame of {length} bytes, more than {limit}")
    return _read(receive, length)


def frame(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _read(receive: Callable[[int], bytes], length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = receive(min(length - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def main() -> None:
    connection = socket.socket(fileno=sys.stdin.fileno())
    job = json.loads(read_frame(connection.recv, sys.maxsize))
    environment().from_string(_WARM_UP).render()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    if sys.platform == "linux":  # macOS does not know this limit
        resource.setrlimit(resource.RLIMIT_AS, (job["max_memory"], job["max_memory"]))

    def bounded(work: Callable[[], str]) -> bool:
        """Answer with what `work` returns or why it cannot; False if it cannot."""
        signal.setitimer(signal.ITIMER_PROF, job["max_seconds"])  # ends this process when it is over
        try:
            answer = OK + work().encode(ENCODING, ERRORS)
        except MemoryError:
            answer = REFUSED + f"it needs more than {job['max_memory'] >> 20} MiB of memory".encode()
        except Exception as error:  # a template can raise whatever Python's operators raise
            answer = REFUSED + _first_line(error).encode(ENCODING, "replace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(frame(answer))
        return answer.startswith(OK)

    template: jinja2.Template | None = None

    def compile_source() -> str:
        nonlocal template
        template = environment().from_string(job["source"])
        return ""

    def render() -> str:
        assert template is not None
        return _text(template, json.loads(variables), job["max_output"])

    if bounded(compile_source):
        while True:
            try:
                variables = read_frame(connection.recv, sys.maxsize)
            except EOFError:
                return
            bounded(render)


def _text(template: jinja2.Template, variables: dict[str, Any], max_output: int) -> str:
    parts, size = [], 0
    for part in template.generate(**variables):
        parts.append(part)
        size += len(part)
        if size > max_output:
            raise jinja2.TemplateError(f"its output is longer than {max_output} characters")
    return "".join(parts)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def environment() -> jinja2.Environment:
    """What Hugging Face's templates expect (transformers, utils/chat_template_utils.py)."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return made


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks assistant text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers defines it; Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    main()
