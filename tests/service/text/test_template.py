"""Jinja chat templates: ids equal transformers' for ordinary text, and no text of a user becomes a control token."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from typing import Any

import pytest

from engine import CheckpointError
from service.errors import Code, ServiceError
from service.text.bpe import BpeTokenizer
from service.text.chat import Conversation, Message, Tool, ToolCall
from service.text.sandbox import MAX_SOURCE
from service.text.template import TemplateChat
from service.text.tokenizer import TextModel
from tests.service.text.conversations import CONTROL_STRINGS, conversation, openai_messages, openai_tools, text

TRIMMING = """{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}

{{ m['content'] | trim }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant

{% endif %}"""

# After Qwen2.5's: tools through tojson, calls in XML-like tags, results grouped into one user turn.
WITH_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- generation %}{{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}{%- endgeneration %}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def tokenizer(smollm2: TextModel) -> BpeTokenizer:
    assert isinstance(smollm2.tokenizer, BpeTokenizer)
    return smollm2.tokenizer


def template(source: str, tokenizer: BpeTokenizer) -> TemplateChat:
    variables = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return TemplateChat(source, controls=tokenizer.controls, encode=tokenizer.encode, variables=variables)


def reference(oracle: Any, asked: Conversation, source: str | None = None) -> list[int]:
    ids: list[int] = oracle.apply_chat_template(
        openai_messages(asked, parsed_arguments=True),
        tools=openai_tools(asked),
        chat_template=source,
        add_generation_prompt=not asked.continue_final_message,
        continue_final_message=asked.continue_final_message,
        return_dict=False,
    )
    return ids


def encode(smollm2: TextModel, asked: Conversation) -> list[int]:
    assert smollm2.chat is not None
    return smollm2.chat.encode(asked)


def test_smollm2_chat_ids_equal_transformers(smollm2: TextModel, smollm2_oracle: Any) -> None:
    rng = random.Random(8)
    for number in range(400):
        asked = conversation(rng, tools=False, repeats=number % 2 == 0)
        assert encode(smollm2, asked) == reference(smollm2_oracle, asked), asked


def test_a_continued_answer_equals_transformers(smollm2: TextModel, smollm2_oracle: Any) -> None:
    rng = random.Random(9)
    for _ in range(100):
        asked = conversation(rng, tools=False)
        begun = Message(role="assistant", content=text(rng) + " ")
        asked = replace(asked, messages=(*asked.messages, begun), continue_final_message=True)
        assert encode(smollm2, asked) == reference(smollm2_oracle, asked), asked


@pytest.mark.parametrize("source", [TRIMMING, WITH_TOOLS], ids=["trimming", "with_tools"])
def test_templates_that_trim_or_write_json_equal_transformers(
    tokenizer: BpeTokenizer, smollm2_oracle: Any, source: str
) -> None:
    chat = template(source, tokenizer)
    rng = random.Random(10)
    for _ in range(200):
        asked = conversation(rng, tools=source is WITH_TOOLS)
        assert chat.encode(asked) == reference(smollm2_oracle, asked, source), asked


def test_a_continued_answer_is_trimmed_as_the_template_trims(tokenizer: BpeTokenizer, smollm2_oracle: Any) -> None:
    messages = (Message(role="user", content=" a "), Message(role="assistant", content=" begun "))
    asked = Conversation(messages=messages, continue_final_message=True)
    assert template(TRIMMING, tokenizer).encode(asked) == reference(smollm2_oracle, asked, TRIMMING)


@pytest.mark.parametrize("hostile", CONTROL_STRINGS)
def test_control_strings_in_every_field_add_no_control_tokens(tokenizer: BpeTokenizer, hostile: str) -> None:
    def asked(word: str) -> Conversation:
        call = ToolCall(id=word, name="f", arguments=json.dumps({word: [word, {"k": word}]}))
        return Conversation(
            messages=(
                Message(role="system", content=word),
                Message(role="user", content=f"a {word}"),
                Message(role="assistant", content=f"{word} b", tool_calls=(call,)),
                Message(role="tool", content=word, tool_call_id=word),
                Message(role="assistant", content=word),
                Message(role="user", content=word),
            ),
            tools=(Tool(name="f", description=word, parameters=json.dumps({"properties": {word: {"enum": [word]}}})),),
        )

    chat, controls = template(WITH_TOOLS, tokenizer), set(tokenizer.controls.values())
    found, expected = ([i for i in chat.encode(asked(word)) if i in controls] for word in (hostile, "x"))
    assert found == expected
    shown = tokenizer.decode(chat.encode(asked(hostile)))
    assert shown.count(hostile.split("\n")[0]) >= 12  # nothing was lost either


def test_a_role_cannot_carry_control_text(smollm2: TextModel) -> None:
    with pytest.raises(ServiceError, match=r"messages\[0\].role"):
        encode(smollm2, Conversation(messages=(Message(role="user<|im_end|>", content="a"),)))


def test_text_that_looks_like_a_marker_is_text(smollm2: TextModel) -> None:
    content = '\u2000\ue000Mk1"\ue001\u2001 and \ue000'
    ids = encode(
        smollm2, Conversation(messages=(Message(role="user", content=content), Message(role="user", content="b")))
    )
    assert content in smollm2.tokenizer.decode(ids)


@pytest.mark.parametrize("content", ["", " ", "\n\n", "\n a", "a \n", "\u2000", "\u3000x\u2001"])
def test_white_space_around_content_is_kept_as_transformers_keeps_it(
    smollm2: TextModel, smollm2_oracle: Any, content: str
) -> None:
    asked = Conversation(messages=(Message(role="user", content=content),))
    assert encode(smollm2, asked) == reference(smollm2_oracle, asked)


@pytest.mark.parametrize(
    ("source", "field", "reason"),
    [
        ("{{ messages[0].role }}", "messages[0].content", "no place"),
        ("{{ messages[0].content | upper }}", "messages", "changes"),
        ("{{ messages[0].content[2:] }}", "messages", "changes"),
        ("{{ messages[0].content | tojson(ensure_ascii=true) }}", "messages[0].content", "no place"),
        ("{{ raise_exception('roles must alternate') }}", "messages", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "messages", "refuses"),
        ("{{ messages[7].content.x }}", "messages", "refuses"),
        ("{{ messages.append(1) }}", "messages", "refuses"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "messages", "refuses"),
        ("{{ messages[0].content" + " | tojson" * 5 + " }}", "messages[0].content", "JSON 5 times over"),
    ],
)
def test_a_template_that_loses_text_or_misbehaves_is_an_error(
    tokenizer: BpeTokenizer, source: str, field: str, reason: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        template(source, tokenizer).encode(Conversation(messages=(Message(role="user", content="hi"),)))
    assert (caught.value.code, caught.value.field) == (Code.INVALID_ARGUMENT, field)
    assert reason in caught.value.message


def test_a_template_cannot_multiply_the_text_of_a_user(tokenizer: BpeTokenizer) -> None:
    source = "{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}"
    asked = Conversation(messages=(Message(role="user", content="x" * 1_000_000),))
    with pytest.raises(ServiceError, match="repeats the texts of the conversation too often"):
        template(source, tokenizer).encode(asked)


def test_control_tokens_of_the_template_are_found_in_time_among_a_thousand(tekken: BpeTokenizer) -> None:
    source = "{{ '<SPECIAL_' * 20000 }}<SPECIAL_999>[INST][IMG{{ messages[0].content }}<unk><unk"
    start = time.process_time()
    ids = template(source, tekken).encode(Conversation(messages=(Message(role="user", content="<s>"),)))
    assert time.process_time() - start < 5
    assert [i for i in ids if i < 1000] == [999, 3, 0]
    assert tekken.decode(ids) == "<SPECIAL_" * 20000 + "[IMG<s><unk"


def test_tools_are_refused_where_the_template_has_no_place_for_them(smollm2: TextModel) -> None:
    asked = Conversation(messages=(Message(role="user", content="a"),), tools=(Tool(name="f"),))
    with pytest.raises(ServiceError, match=r"tools\[0\].name: the model's chat template has no place for it"):
        encode(smollm2, asked)


def test_no_messages_are_refused(smollm2: TextModel) -> None:
    with pytest.raises(ServiceError, match="messages: is empty"):
        encode(smollm2, Conversation(messages=()))


def test_lone_surrogates_hidden_in_json_are_refused_by_field(tokenizer: BpeTokenizer) -> None:
    call = ToolCall(id="1", name="f", arguments='{"a": "\\udc00"}')
    messages = (Message(role="user", content="a"), Message(role="assistant", tool_calls=(call,)))
    with pytest.raises(ServiceError) as caught:
        template(WITH_TOOLS, tokenizer).encode(Conversation(messages=messages))
    assert caught.value.field == "messages[1].tool_calls[0].arguments"


@pytest.mark.parametrize("source", ["{% for %}", "{{ '", "x" * (MAX_SOURCE + 1), "\ue000", "{% if " + "(" * 5000])
def test_a_template_that_cannot_be_used_is_refused_at_load(tokenizer: BpeTokenizer, source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        template(source, tokenizer)
