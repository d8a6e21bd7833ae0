"""How a model writes calls of tools: found from its checkpoint, never from its name.

    one of Mistral's chat formats, or [TOOL_CALLS] in template and vocabulary        mistral
    <tool_call> and "arguments" in the template                                     hermes
    <|python_tag|> in the vocabulary, "parameters" in the template                  llama

The template decides where vocabulary and template differ: who tunes a model to another format keeps its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from service.text.chat import Tool, ToolCallDelta
from service.text.tools import hermes, llama, mistral
from service.text.tools.spoken import Spoken

# Tags of formats that have <tool_call> in common with Hermes', but not the JSON in it (Qwen3-Coder, GLM).
_NOT_HERMES = ("<function=", "<arg_key>")


class ToolParser(Protocol):
    """Parts what a model says into text and calls. One of them reads one completion."""

    @property
    def spoken(self) -> Spoken:
        """How many calls have begun, and whether the last one allowed has ended."""

    def push(self, token_id: int, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Text and calls that became certain with the next token.

        Args:
            text: what it adds to the text; nothing if it is a control token.
        """

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        """What was undecided, when no more tokens come."""


class ToolFormat(Protocol):
    @property
    def first_token(self) -> int | None:
        """The control token that begins every call, None if a call may begin without."""

    def parser(self, offered: Sequence[str], *, only_one: bool) -> ToolParser:
        """A parser for one completion.

        Args:
            offered: names of the tools that the model may call.
            only_one: the end of the first call ends the answer.
        """

    def grammar(self, tools: Sequence[Tool], *, only_one: bool) -> str:
        """A Lark grammar for answers that call some of `tools` and say nothing else."""


def find_format(
    template: str | None, control: Callable[[str], int | None], mistral_version: int | None
) -> ToolFormat | None:
    """The format that a checkpoint speaks, None if it is none that we know.

    Args:
        template: its chat template.
        control: id of a control token by its name.
        mistral_version: of the chat format, if it is one of Mistral's that is written out in `service.text.mistral`.
    """

    def known(*names: str) -> dict[str, int]:
        found = ((name, control(name)) for name in names)
        return {name: token_id for name, token_id in found if token_id is not None}

    controls = known(mistral.CALLS, mistral.CALL_ID, mistral.ARGS)
    if mistral_version is not None:
        if mistral.CALLS not in controls:
            return None
        return mistral.MistralTools(controls, listed=mistral_version < 11, with_ids=mistral_version == 11)
    if template is None:
        return None
    if hermes.OPEN in template and '"arguments' in template and not any(tag in template for tag in _NOT_HERMES):
        return hermes.HermesTools(known(hermes.OPEN, hermes.CLOSE))
    if mistral.CALLS in template and mistral.CALLS in controls:
        with_ids = mistral.CALL_ID in template and mistral.CALL_ID in controls
        return mistral.MistralTools(controls, listed=mistral.ARGS not in controls, with_ids=with_ids)
    if llama.TAG in (tags := known(llama.TAG)) and '"parameters' in template:
        return llama.LlamaTools(tags)
    return None
