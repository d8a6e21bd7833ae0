"""Whatever a client sends: an answer in the right shape, never a 500, and the port goes on."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message

from service.http.app import create_app
from service.http.openai.chat import ChatBody
from service.http.openai.completions import CompletionBody
from service.http.openai.parameters import IGNORED, UNSERVED
from service.http.openai.tokenize import DetokenizeBody, TokenizeBody
from tests.service.fake_engine import FakeEngine
from tests.service.grpc.ports import served

PATHS: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
NAMES = sorted({name for kind in PATHS.values() for name in kind.__struct_encode_fields__} | set(UNSERVED) | IGNORED)
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["text", "function", "auto", "user", "assistant", "tool", "json_schema", "regex"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["role", "content", "type", "function", "name", "schema"]), inner
        )
    ),
    max_leaves=12,
)
VALID: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "tokens": [72]}


@functools.cache
def app() -> ASGIApp:
    return create_app(served(FakeEngine(b"Hey")))


async def exchange(path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer of the application itself."""
    sent: list[Message] = []
    given = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        for message in given:
            return message
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await app()(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def check(status: int, body: bytes) -> None:
    assert status in (200, 400, 404), body
    if status != 200:
        assert list(json.loads(body)["error"]) == ["message", "type", "param", "code"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(sorted(PATHS)), fields=st.dictionaries(st.sampled_from(NAMES), ANY, max_size=4))
async def test_any_json_under_known_names_is_answered(path: str, fields: dict[str, Any]) -> None:
    needed = {name: VALID[name] for name in PATHS[path].__struct_encode_fields__ if name in VALID}
    if path == "/tokenize":
        del needed["prompt"]
    check(*await exchange(path, json.dumps({"max_tokens": 3} | needed | fields).encode()))


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(sorted(PATHS)), body=st.binary(max_size=200) | ANY.map(lambda v: json.dumps(v).encode()))
async def test_any_bytes_are_answered(path: str, body: bytes) -> None:
    check(*await exchange(path, body))


@pytest.mark.parametrize(
    "fields",
    [
        b'"tools": [{"type": "function", "function": {"name": "now", "parameters": {"\xc5_": 1}}}]',
        b'"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"\xc5_": 1}}}',
        b'"guided_json": {"\xc5_": 1}',
        b'"user": "\xc5_"',
    ],
    ids=["a tool", "response_format", "guided_json", "what has no effect"],
)
async def test_bytes_that_are_no_text_are_refused_also_where_values_are_kept_as_they_came(fields: bytes) -> None:
    body = b'{"messages": [{"role": "user", "content": "Hi"}], %b}' % fields
    status, answer = await exchange("/v1/chat/completions", body)
    assert status == 400, answer
    assert json.loads(answer)["error"]["message"] == "body: must be JSON: not valid UTF-8"
