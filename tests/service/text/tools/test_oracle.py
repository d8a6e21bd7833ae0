"""Calls that mistral-common writes into a conversation are the calls that we read out of its ids."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from service.text.answer import AnswerReader
from service.text.bpe import BpeTokenizer
from service.text.chat import Conversation, ToolCall
from service.text.load import load_text
from service.text.mistral import MistralChat
from service.text.stop import StopMatcher
from service.text.tokenizer import TextModel
from service.text.tools.format import find_format
from tests.service.text.conversations import conversation, modern, openai_messages, openai_tools


def test_calls_of_nemo_are_read_back(tekken: BpeTokenizer, mistral_tekken: MistralTokenizer) -> None:
    tools = find_format(None, tekken.control_id, 3)
    model = TextModel(tekken, MistralChat(tekken, 3), tools=tools)
    rng = random.Random(1)
    check(model, mistral_tekken, [conversation(rng, tools=True, hostile=True) for _ in range(120)], has_ids=False)


def test_calls_of_newer_models_are_read_back_with_the_ids_that_are_written(modern_tekken: Path) -> None:
    model = load_text(modern_tekken)
    oracle = MistralTokenizer.from_file(str(modern_tekken / "tekken.json"))
    rng = random.Random(2)
    sort = modern_tekken.name.startswith(("v11", "v13"))
    asked = [modern(rng, conversation(rng, tools=True), sort_results=sort) for _ in range(80)]
    check(model, oracle, asked, has_ids=modern_tekken.name.startswith("v11"))


def check(model: TextModel, oracle: MistralTokenizer, asked: list[Conversation], *, has_ids: bool) -> None:
    found = 0
    for each in asked:
        request = ChatCompletionRequest.from_openai(openai_messages(each), openai_tools(each))
        written = [call for message in each.messages for call in message.tool_calls]
        answers = [calls_of(model, ids) for ids in turns(model, oracle.encode_chat_completion(request).tokens)]
        read = list(itertools.chain.from_iterable(answers))
        assert [(call.name, json.loads(call.arguments)) for call in read] == [
            (call.name, json.loads(call.arguments or "{}")) for call in written
        ]
        if has_ids:
            assert [call.id for call in read] == [call.id for call in written]
        found += len(read)
    assert found > len(asked) // 2


def turns(model: TextModel, ids: list[int]) -> list[list[int]]:
    """What the assistant says in a conversation, turn by turn."""
    starts = {model.tokenizer.control_id(name) for name in ("[/INST]", "[/TOOL_RESULTS]", "[/SYSTEM_PROMPT]")}
    said: list[list[int]] = []
    start = 0
    for at, token in enumerate(ids):
        if token in starts:
            start = at + 1
        elif token == model.tokenizer.eos_id:
            said.append(ids[start:at])
    return said


def calls_of(model: TextModel, ids: list[int]) -> list[ToolCall]:
    assert model.tools is not None
    reader = AnswerReader(model.tokenizer, [], StopMatcher([]), model.tools.parser((), only_one=False))
    deltas = [*reader.push(ids, last=False)[2], *reader.push([], last=True)[2]]
    ours = itertools.groupby(deltas, key=lambda delta: delta.call)
    calls = []
    for _, group in ours:
        pieces = list(group)
        calls.append(ToolCall(id=pieces[0].id, name=pieces[0].name, arguments="".join(p.arguments for p in pieces)))
    return calls
