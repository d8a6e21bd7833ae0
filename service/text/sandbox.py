"""The Jinja environment for chat templates: what Hugging Face's templates expect, inside bounds.

A template comes with the checkpoint, so it is code of somebody else. The sandbox keeps it from Python's internals;
source size, output size and time are bounded, so that a hostile one fails requests instead of the server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine import CheckpointError
from service.errors import invalid

MAX_SOURCE = 256 * 1024  # characters; the largest known templates have about 20,000
MAX_OUTPUT = 16 * 1024 * 1024  # characters, user text not counted
MAX_SECONDS = 2.0  # CPU time of the thread; ordinary templates take milliseconds
_MAX_REPEAT = 100_000  # characters or items that `*` may make


class CompiledTemplate:
    """A chat template, ready to render.

    Raises:
        CheckpointError: the source is too long or not Jinja.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"chat template: {len(source)} characters, more than {MAX_SOURCE}")
        self._environment = _Sandbox()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise CheckpointError(f"chat template: {error}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The rendered text.

        Raises:
            ServiceError: INVALID_ARGUMENT, the template refuses the conversation, or passes its bounds.
        """
        parts, size = [], 0
        token = self._environment.deadline.set(time.thread_time() + MAX_SECONDS)
        try:
            for part in self._template.generate(**variables):
                self._environment.check_time()
                parts.append(part)
                size += len(part)
                if size > MAX_OUTPUT:
                    raise jinja2.TemplateError(f"its output is longer than {MAX_OUTPUT} characters")
        except Exception as error:  # a template can raise whatever Python's operators raise
            line = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise invalid("messages", f"the model's chat template refuses this conversation: {line}") from None
        finally:
            self._environment.deadline.reset(token)
        return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Whatever a template looks up, calls or multiplies passes through here, and the clock is looked at."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.deadline: ContextVar[float] = ContextVar("deadline")
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)

    def check_time(self) -> None:
        if time.thread_time() > self.deadline.get():
            raise jinja2.TemplateError(f"it runs longer than {MAX_SECONDS} seconds")

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_time()
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.check_time()
        if operator == "**":
            raise jinja2.TemplateError("it uses **")
        for one, other in ((left, right), (right, left)):
            if isinstance(one, int) and not isinstance(other, int | float) and one * len(other) > _MAX_REPEAT:
                raise jinja2.TemplateError(f"it repeats to more than {_MAX_REPEAT}")
        return super().call_binop(context, operator, left, right)


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
