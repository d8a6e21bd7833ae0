"""Which format a checkpoint speaks: by what is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import ServiceError
from service.text.chat import Conversation, Message, Tool
from service.text.load import load_text
from service.text.tokenizer import TextModel
from service.text.tools.format import find_format
from service.text.tools.hermes import HermesTools
from service.text.tools.llama import LlamaTools
from service.text.tools.mistral import MistralTools
from tests.service.text.test_load import INST_TEMPLATE, write_gguf

# The lines that tell the formats apart, as the published templates have them.
QWEN = (
    r'{{- "within <tool_call></tool_call> XML tags:\n{\"name\": <function-name>, \"arguments\": <args-json-object>}" }}'
)
QWEN_CODER = r"{{- '<tool_call>\n<function=' + tool_call.name + '>\n' }}{# no \"arguments\" in JSON #}"
GLM = r"{{ '<tool_call>' + tc.name }}{% for k, v in tc.arguments.items() %}<arg_key>{{ k }}</arg_key>{% endfor %}"
LLAMA = """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name}.' }}"""
MISTRAL = "[INST]{% if message.tool_calls %}[TOOL_CALLS]{{ call.name }}[ARGS]{{ call.arguments }}{% endif %}"
WITH_IDS = "[TOOL_CALLS]{{ call.name }}[CALL_ID]{{ call.id }}[ARGS]{{ call.arguments }}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def found(template: str | None, *controls: str, version: int | None = None) -> type | None:
    ids = {name: number for number, name in enumerate(controls)}
    format = find_format(template, ids.get, version)
    return None if format is None else type(format)


@pytest.mark.parametrize(
    ("template", "controls", "format"),
    [
        (QWEN, ("<tool_call>", "</tool_call>"), HermesTools),
        (QWEN, (), HermesTools),
        (QWEN, ("<|python_tag|>",), HermesTools),  # Hermes 3 on Llama 3.1
        (QWEN, ("[TOOL_CALLS]",), HermesTools),  # a NeMo that was tuned to ChatML
        (QWEN_CODER, ("<tool_call>",), None),
        (GLM, ("<tool_call>",), None),
        (LLAMA, ("<|python_tag|>",), LlamaTools),
        (LLAMA, (), None),
        (CHATML, ("<|python_tag|>", "[TOOL_CALLS]"), None),
        (MISTRAL, ("[TOOL_CALLS]", "[ARGS]"), MistralTools),
        (MISTRAL, (), None),
        (None, ("[TOOL_CALLS]",), None),
    ],
)
def test_template_and_vocabulary_tell_the_format(
    template: str | None, controls: tuple[str, ...], format: type | None
) -> None:
    assert found(template, *controls) is format


def test_mistrals_own_formats_need_no_template() -> None:
    assert found(None, "[TOOL_CALLS]", version=3) is MistralTools
    assert found("[INST]", version=1) is None


@pytest.mark.parametrize(
    ("template", "version", "begins"),
    [
        (None, 3, '<[0]> " "? "["'),
        (None, 7, '<[0]> " "? "["'),
        (None, 11, '<[0]> "f" <[1]> /[a-zA-Z0-9]{9}/ <[2]>'),
        (None, 13, '<[0]> "f" <[2]>'),
        (MISTRAL, None, '<[0]> "f" <[2]>'),
        (WITH_IDS, None, '<[0]> "f" <[1]> /[a-zA-Z0-9]{9}/ <[2]>'),
    ],
)
def test_mistrals_formats_differ_in_what_can_be_demanded(
    template: str | None, version: int | None, begins: str
) -> None:
    format = find_format(template, {"[TOOL_CALLS]": 0, "[CALL_ID]": 1, "[ARGS]": 2}.get, version)
    assert format is not None
    assert begins in format.grammar([Tool(name="f")], only_one=True)


def test_checkpoints_are_asked(tmp_path: Path, smollm2: TextModel, modern_tekken: Path) -> None:
    assert isinstance(load_text(write_gguf(tmp_path / "nemo.gguf", chat_template=INST_TEMPLATE)).tools, MistralTools)
    assert isinstance(load_text(modern_tekken).tools, MistralTools)
    assert isinstance(load_text(write_gguf(tmp_path / "qwen.gguf", chat_template=QWEN)).tools, HermesTools)
    assert smollm2.tools is None
    assert load_text(write_gguf(tmp_path / "base.gguf")).tools is None


def test_a_template_without_a_place_for_tools_refuses_them(smollm2: TextModel) -> None:
    assert smollm2.chat is not None
    asked = Conversation(messages=(Message(role="user", content="Hi"),), tools=(Tool(name="f"),))
    with pytest.raises(ServiceError, match=r"tools\[0\].name: the model's chat template has no place for it"):
        smollm2.chat.encode(asked)
