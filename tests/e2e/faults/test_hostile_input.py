"""Messages that are wrong, huge or neither, raw on both ports: refused by name, and nobody else notices."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.message import Message
from nemoserve.v1 import generation_pb2 as pb
from tritonclient.grpc import service_pb2 as kserve

from tests.e2e.conftest import ServerProcess
from tests.e2e.faults.aftermath import metrics, value
from tests.e2e.faults.clients import HANG_SECONDS, MODEL
from tests.e2e.faults.conftest import POISON, Dose
from tests.e2e.faults.mutate import Mutator, empty
from tests.e2e.faults.test_clients import opened, undisturbed
from tests.service.grpc.kserve.calls import ask

MAX_BYTES = 16 * 2**20  # --max-request-bytes
HUGE = 100 * 2**20
WORKERS = 8
LONG_SECONDS = 20  # for an answer that comes whole; a small part of HANG_SECONDS
SHARE = {"grpc": 0.6, "http": 0.4}  # of the mutations
ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "FAILED_PRECONDITION"}
EXCUSES = ("Request timeout expired", "deadline", "explicit model load / unload is not allowed")  # Triton: UNAVAILABLE


def vllm_request(stream: bool) -> Message:
    inputs = {"text_input": "Hi", "stream": stream, "exclude_input_in_output": True}
    request: Message = ask(MODEL, id="1", sampling_parameters='{"max_tokens": 3, "stop": ["x"]}', **inputs)
    return request


def trtllm_request() -> Message:
    wishes = {"max_tokens": 3, "temperature": 0.5, "stop_words": ["x", "y"], "return_log_probs": True}
    request: Message = ask("ensemble", id="2", parameters={"priority": 1}, text_input="Hi", **wishes)
    return request


SEEDS: dict[str, list[Message]] = {
    "Generate": [
        pb.GenerateRequest(
            prompt="Hi",
            model=MODEL,
            request_id="1",
            sampling=pb.SamplingParameters(max_tokens=3, temperature=0.5, stop=["x"], logprobs=2, logit_bias={5: 1.0}),
        ),
        pb.GenerateRequest(
            chat=pb.Chat(
                messages=[pb.ChatMessage(role="system", content="Hey"), pb.ChatMessage(role="user", content="Hi")],
                tools=[pb.Tool(name="now", parameters_json='{"type": "object"}')],
            ),
            sampling=pb.SamplingParameters(max_tokens=3, n=2, seed=1),
            response_format=pb.ResponseFormat(regex="[a-z]+"),
        ),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 1100]), sampling=pb.SamplingParameters(max_tokens=3)),
    ],
    "Tokenize": [
        pb.TokenizeRequest(text="Hi"),
        pb.TokenizeRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user")])),
    ],
    "Detokenize": [pb.DetokenizeRequest(token_ids=[1100, 1101])],
    "ModelInfer": [vllm_request(stream=False), trtllm_request()],
    "ModelStreamInfer": [vllm_request(stream=True), trtllm_request()],
}
"""Right messages of methods that read more than a name; mutants for the others are made from nothing."""

BODIES: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": "Hey"},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            ],
            "max_tokens": 3,
            "stream": True,
            "temperature": 0.5,
            "stop": ["x"],
            "n": 2,
            "logit_bias": {"5": 1},
            "logprobs": True,
            "top_logprobs": 2,
            "response_format": {"type": "json_object"},
            "tools": [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}],
            "tool_choice": "auto",
        },
        {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    ],
    "/v1/completions": [
        {"model": MODEL, "prompt": "Hi", "max_tokens": 3, "echo": True, "logprobs": 1, "stream": True, "seed": 1},
        {"model": MODEL, "prompt": [[1, 1100], [1101]], "max_tokens": 3, "top_p": 0.5, "guided_regex": "[ab]+"},
    ],
    "/tokenize": [{"model": MODEL, "prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}],
    "/detokenize": [{"model": MODEL, "tokens": [1100]}],
}


def methods() -> dict[str, list[Message]]:
    """Every method of both services by its path, and right messages for it."""
    services = [
        pb.DESCRIPTOR.services_by_name["GenerationService"],
        kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    ]
    return {
        f"/{service.full_name}/{method.name}": SEEDS.get(method.name, [empty(method.input_type)])
        for service in services
        for method in service.methods
    }


async def test_no_mutant_of_a_message_is_our_fault_or_hangs(tiny: ServerProcess, dose: Dose) -> None:
    """Each mutant follows from its number, whichever of the workers sends it. What they are made of is right: a seed
    that is refused for one field would hide all that is read behind it."""
    known, codes = methods(), Counter[str]()
    read = [path for path in known if path.split("/")[-1] in SEEDS]
    mutants = iter(range(int(dose.mutations * SHARE["grpc"])))
    async with undisturbed(tiny), grpc.aio.insecure_channel(tiny.address) as channel:
        for path in read:
            for seed in known[path]:
                assert await call(channel, path, seed.SerializeToString(), "seed") == ("OK", ""), (path, seed)

        async def work() -> None:
            for number in mutants:
                draw = random.Random(number)
                mutator = Mutator(draw)
                path = draw.choice(read if draw.random() < 0.6 else list(known))  # more where there is more to read
                message = mutator.wire(draw.choice(known[path]))
                code, words = await call(channel, path, message, mutator.name())
                codes[code] += 1
                fine = code in ALLOWED or any(each in words for each in EXCUSES)
                assert fine, f"mutant {number}: {code} {words!r} for {path} {message.hex()}"
                assert "internal error" not in words, f"mutant {number}: {words!r} for {path} {message.hex()}"

        await asyncio.gather(*(work() for _ in range(WORKERS)))
    print(dict(codes))
    assert codes["OK"] > 0 < codes["INVALID_ARGUMENT"]


async def call(channel: grpc.aio.Channel, path: str, message: bytes, name: str) -> tuple[str, str]:
    """Status and words of an RPC that is left after its first response."""
    metadata = [("traceparent", name), ("x-request-id", name)]
    running = channel.unary_stream(path)(message, timeout=HANG_SECONDS, metadata=metadata)
    try:
        async for response in running:
            words = ""
            if path.endswith("ModelStreamInfer"):
                words = kserve.ModelStreamInferResponse.FromString(response).error_message
            return "OK", words
        return "OK", ""
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    finally:
        running.cancel()


async def test_no_mutant_of_a_body_is_our_fault_or_hangs(tiny: ServerProcess, dose: Dose) -> None:
    """Some ask for as many tokens as there is room for, in one answer: those may be 408."""
    codes = Counter[int]()
    mutants = iter(range(int(dose.mutations * SHARE["http"])))
    base = f"http://{tiny.http_address}"
    async with undisturbed(tiny), httpx.AsyncClient(base_url=base, timeout=HANG_SECONDS) as http:
        for path, body in ((path, body) for path, bodies in BODIES.items() for body in bodies):
            assert (await http.post(path, json=body)).status_code == 200, (path, body)

        async def work() -> None:
            for number in mutants:
                draw = random.Random(number)
                mutator = Mutator(draw)
                path = draw.choice(list(BODIES))
                body = mutator.body(draw.choice(BODIES[path]))
                headers = {"content-type": "application/json", "x-request-id": mutator.name(), "traceparent": "00-zz"}
                headers["x-request-timeout"] = str(LONG_SECONDS)
                try:
                    async with http.stream("POST", path, content=body, headers=headers) as response:
                        first = await anext(response.aiter_bytes(), b"")  # and leave
                except httpx.HTTPError as error:
                    raise AssertionError(f"mutant {number}: {error!r} for {path} {body[:2000]!r}") from error
                codes[response.status_code] += 1
                assert response.status_code in (200, 400, 404, 408, 413, 429), (
                    f"mutant {number}: {response} {first!r} for {path} {body[:2000]!r}"
                )
                assert b"internal error" not in first, f"mutant {number}: {first!r} for {path} {body!r}"
                if response.status_code != 200:
                    assert list(json.loads(first)["error"]) == ["message", "type", "param", "code"]

        await asyncio.gather(*(work() for _ in range(WORKERS)))
    print(dict(codes))
    assert codes[200] > 0 < codes[400]


# -- heads -------------------------------------------------------------------------------------------------------------

START = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1}).encode()
HEADS: dict[str, bytes] = {
    "20,000 headers": START + b"".join(b"x-%d: y\r\n" % number for number in range(20_000)) + b"\r\n",
    "a header of 1 MB": START + b"x: " + b"y" * 2**20 + b"\r\n\r\n",
    "a target of 1 MB": b"GET /" + b"y" * 2**20 + b" HTTP/1.1\r\n\r\n",
    "a length that is no number": START + b"Content-Length: -1\r\n\r\n" + BODY,
    "a length beyond all": START + b"Content-Length: 99999999999999999999\r\n\r\n" + BODY,
    "two lengths": START + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n" + BODY,
    "length and chunks": START + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk that is no number": START + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a chunk beyond all": START + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
    "an unknown encoding": START + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
    "a compressed bomb": START
    + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(gzip.compress(bytes(2**20)))
    + gzip.compress(bytes(2**20)),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": b"GET /none HTTP/9.9\r\n\r\n",
    "a zero byte": START + b"x: \0\r\n\r\n",
    "two requests, one of them smuggled": START + b"Content-Length: 0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\nx: ",
}


async def test_no_head_is_our_fault_or_is_waited_for_without_an_end(tiny: ServerProcess) -> None:
    async with undisturbed(tiny):
        asked = {name: asyncio.to_thread(status_of, tiny.http_address, head) for name, head in HEADS.items()}
        found = dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
    print(found)
    assert all(status is None or 400 <= status < 500 or status == 501 for status in found.values()), found


def status_of(address: str, data: bytes) -> int | None:
    """What is answered to these bytes, None if the connection is closed without an answer."""
    with opened(address) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has been refused before all of it was sent
        try:
            answer = connection.recv(65536)
        except ConnectionResetError:
            return None
        return int(answer.split()[1]) if answer else None


# -- sizes -------------------------------------------------------------------------------------------------------------


async def refused(
    server: ServerProcess, request: Message, compression: grpc.Compression | None = None
) -> grpc.aio.AioRpcError:
    async with grpc.aio.insecure_channel(server.address, compression=compression) as channel:
        running = channel.unary_stream("/nemoserve.v1.GenerationService/Generate")(
            request.SerializeToString(), timeout=HANG_SECONDS
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in running:
                pass
        return caught.value


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
async def test_a_message_of_100_mb_is_refused_unread(tiny: ServerProcess, compression: grpc.Compression | None) -> None:
    async with undisturbed(tiny):
        error = await refused(tiny, pb.GenerateRequest(prompt=" " * HUGE), compression)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_of_100_mb_is_refused_unread(tiny: ServerProcess, declared: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(HUGE // 2**20):
            yield b" " * 2**20

    headers = {"content-type": "application/json"} | ({"content-length": str(HUGE)} if declared else {})
    async with (
        undisturbed(tiny),
        httpx.AsyncClient(base_url=f"http://{tiny.http_address}", timeout=HANG_SECONDS) as http,
    ):
        try:
            response = await http.post("/v1/completions", content=chunks(), headers=headers)
            assert response.status_code == 413
        except (httpx.WriteError, httpx.ReadError):
            pass  # the connection was closed before the client had sent all of it, and it did not look


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (" " * 1_000_000, "4096"),
        ("a" * (MAX_BYTES - 100), "4096"),
        ("\U0001f686" * 500_000, "4096"),
        ("word " * 4096, "4096"),
    ],
    ids=["a million spaces", "16 MB", "emoji", "just too long"],
)
async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(
    tiny: ServerProcess, prompt: str, words: str
) -> None:
    async with undisturbed(tiny):
        error = await refused(tiny, pb.GenerateRequest(prompt=prompt))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in (error.details() or "")
        async with httpx.AsyncClient(base_url=f"http://{tiny.http_address}", timeout=HANG_SECONDS) as http:
            response = await http.post("/v1/completions", json={"model": MODEL, "prompt": prompt})
        assert response.status_code in (400, 413), response.text[:500]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "model", "prompt": "\\ud800"}',
        b'{"model": "model", "prompt": "\xff\xfe"}',
        b'{"model": "model", "prompt": "x", "temperature": 1e999}',
        b'{"model": "model", "prompt": "x", "temperature": NaN}',
        b'{"model": "model", "prompt": "x", "seed": 1' + b"0" * 5000 + b"}",
        b'{"model": "model", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "model", "prompt": "x", "prompt": ["x", 1]}',
        b'\xef\xbb\xbf{"model": "model", "prompt": "x"',
    ],
    ids=["lone surrogate", "not UTF-8", "infinite", "NaN", "5,000 digits", "100,000 deep", "twice", "cut short"],
)
async def test_texts_and_numbers_that_are_none_are_refused(tiny: ServerProcess, body: bytes) -> None:
    async with httpx.AsyncClient(base_url=f"http://{tiny.http_address}", timeout=HANG_SECONDS) as http:
        response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


# -- logits that are not numbers ---------------------------------------------------------------------------------------


async def test_logits_that_are_not_numbers_fail_their_request_alone(tiny: ServerProcess) -> None:
    async with undisturbed(tiny):
        before = value(await asyncio.to_thread(metrics, tiny), "nemoserve_corrupted_requests_total")
        async with grpc.aio.insecure_channel(tiny.address) as channel:
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 1100, POISON]))
            call = channel.unary_stream("/nemoserve.v1.GenerationService/Generate")(request.SerializeToString())
            events = [pb.GenerateResponse.FromString(event) async for event in call]
        assert events[-1].finished.reason == pb.FINISH_REASON_ERROR
        assert events[-1].finished.error == "the logits have no finite maximum"
        async with httpx.AsyncClient(base_url=f"http://{tiny.http_address}", timeout=HANG_SECONDS) as http:
            response = await http.post("/v1/completions", json={"model": MODEL, "prompt": [1, 1100, POISON]})
        assert response.status_code == 500, response.text
        after = value(await asyncio.to_thread(metrics, tiny), "nemoserve_corrupted_requests_total")
        assert after == before + 2
