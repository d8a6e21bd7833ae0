"""The port itself: what every request gets, limits of size and time, disconnects, stopping."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from process import http_port as port_of
from service.host import Phase, Status
from service.http.server import HttpServer
from service.security.access import Access
from service.security.keys import KeysFile
from service.security.limits import MAX_JSON_VALUES
from service.telemetry.telemetry import Telemetry
from service.text.check import MAX_MESSAGES
from tests.service.fake_engine import FakeEngine
from tests.service.fakes import Answer, FakeHost, Gate
from tests.service.grpc.ports import served
from tests.service.http.ports import Port, error, events, serving

CHAT = b'{"messages":[{"role":"user","content":"Hi"}],"stream":true}'


def raw_request(body: bytes = CHAT, path: str = "/v1/chat/completions", *headers: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*head, *headers, "", ""]).encode() + body


async def test_a_request_id_is_echoed_or_made() -> None:
    host = FakeHost()
    async with serving(host) as port:
        response = await port.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, **{"x-request-id": "mine"}
        )
        made = await port.http.get("/v1/models")
        bad = await port.http.get("/v1/models", headers={"x-request-id": "x" * 257})
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["id"].startswith("chatcmpl-mine-")
    assert host.requests[0].request_id.startswith("mine-")
    assert len(made.headers["x-request-id"]) == 16
    assert error(bad, 400)["param"] == "x-request-id"


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_all_addresses_are_those_of_ipv6_too(host: str, address: str) -> None:
    """As gRPC takes them. In a cluster of IPv6 alone, kubelet would otherwise find half a server."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")

    async def who(request: Request) -> PlainTextResponse:
        assert request.client is not None
        return PlainTextResponse(request.client.host)

    port = port_of.HttpPort(Starlette(routes=[Route("/", who)]), max_head_bytes=4096)
    number = await port.start(f"{host}:0")
    try:
        reader, writer = await asyncio.open_connection(address, number)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
    finally:
        await port.stop(0)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(f"\r\n\r\n{address}".encode())


async def test_unknown_routes_and_methods_are_errors_in_the_same_shape() -> None:
    async with serving(FakeHost()) as port:
        assert error(await port.http.get("/nothing"), 404)["code"] == "route_not_found"
        assert error(await port.http.get("/v1/models/"), 404)["param"] == "model"
        wrong = await port.http.get("/v1/chat/completions")
        assert error(wrong, 405)["code"] == "method_not_allowed"
        assert wrong.headers["allow"] == "POST"
        embeddings = error(await port.post("/v1/embeddings", {"input": "x"}), 404)
        responses = error(await port.post("/v1/responses", {"input": "x"}), 404)
    assert "the model has no embeddings" in embeddings["message"]
    assert "/v1/chat/completions" in responses["message"]


@pytest.mark.parametrize(
    ("body", "headers", "param", "words"),
    [
        (b"{", {}, "body", "must be JSON"),
        (b"[]", {}, "body", "expected `object`, got `array`"),
        (b"", {}, "body", "must be JSON"),
        (b'{"model": "\xff"}', {}, "body", "must be JSON: not valid UTF-8"),
        (b"{}", {}, "messages", "is missing"),
        (b'{"x":' + b"[" * 10**5 + b"]" * 10**5 + b"}", {}, "body", "nested too deeply"),
        (b"{}", {"content-type": "text/plain"}, "content-type", "'text/plain' must be application/json"),
        (b"{}", {"content-encoding": "gzip"}, "content-encoding", "compressed"),
    ],
)
async def test_a_body_that_is_no_request_is_refused(body: bytes, headers: Any, param: str, words: str) -> None:
    async with serving(FakeHost()) as port:
        sent = {"content-type": "application/json"} | headers
        found = error(await port.http.post("/v1/chat/completions", content=body, headers=sent), 400)
    assert found["param"] == param
    assert words in found["message"]


async def test_a_body_that_is_too_large_is_refused_declared_or_not() -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 100

    async with serving(FakeHost(), max_request_bytes=1000) as port:
        headers = {"content-type": "application/json"}
        declared = await port.http.post("/v1/completions", content=b"x" * 1001, headers=headers)
        chunked = await port.http.post("/v1/completions", content=chunks(), headers=headers)
    assert error(declared, 413)["message"] == "the body has more than 1000 bytes"
    assert error(chunked, 413)["code"] == "body_too_large"


async def test_a_body_of_too_many_values_is_refused_before_they_are_made() -> None:
    """Two bytes of a body can be a hundred of memory, and hold up everybody while they are made."""
    headers = {"content-type": "application/json"}
    values = ",".join(["[1]"] * (MAX_JSON_VALUES // 2 + 1))
    async with serving(FakeHost()) as port:
        for body in (f'{{"prompt": [{values}]}}', f'{{"documents": [{values}]}}'):
            found = error(await port.http.post("/v1/completions", content=body, headers=headers), 400)
            assert found["message"] == f"body: has more than {MAX_JSON_VALUES} values, by its commas and brackets"
        many = [{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)
        found = error(await port.post("/v1/chat/completions", {"messages": many}), 400)
        assert (found["param"], found["message"]) == ("messages", TOO_MANY)
        calls = [{"function": {"name": "f"}}] * (MAX_MESSAGES + 1)
        message = {"role": "assistant", "tool_calls": calls}
        assert error(await port.post("/tokenize", {"messages": [message]}), 400)["param"] == "tool_calls"


TOO_MANY = f"messages: has {MAX_MESSAGES + 1} messages, must have at most {MAX_MESSAGES}"


async def test_what_is_no_http_is_refused_in_the_same_shape() -> None:
    async with serving(FakeHost()) as port:
        reader, writer = await asyncio.open_connection(*port.address.split(":"))
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"message":"this is not a valid HTTP request"' in answer


async def test_a_connection_that_sends_no_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_of, "HEAD_SECONDS", 0.05)
    async with serving(FakeHost()) as port:
        silent, first = await asyncio.open_connection(*port.address.split(":"))
        slow, second = await asyncio.open_connection(*port.address.split(":"))
        second.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await slow.readuntil(b"\r\n\r\n")
        second.write(b"GET /v1/mo")  # and never the rest
        async with asyncio.timeout(10):
            assert await silent.read() == b""
            assert head.startswith(b"HTTP/1.1 200 ")
            await slow.read()
        first.close()
        second.close()


async def test_a_mistake_of_ours_is_an_id_for_the_client_and_a_traceback_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(request: Request) -> Any:
        raise RuntimeError("the secret path /etc/x")

    async with serving(FakeHost(), routes=[Route("/broken", broken)]) as port:
        found = error(await port.http.get("/broken"), 500)
    assert "secret" not in found["message"]
    [record] = [each for each in caplog.records if each.message == "a request failed"]
    assert found["message"] == f"internal error {record.error_id}"  # type: ignore[attr-defined]
    assert "the secret path" in caplog.text


async def test_routes_that_are_handed_in_are_part_of_the_port() -> None:
    async def extra(request: Request) -> PlainTextResponse:
        return PlainTextResponse("extra")

    async with serving(FakeHost(), routes=[Route("/extra", extra)]) as port:
        assert (await port.http.get("/extra")).text == "extra"


async def test_with_keys_nobody_gets_further_without_one(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("- {name: search, key: this-is-a-key-of-search}\n")
    host = FakeHost()
    async with serving(host, access=Access(keys=KeysFile(keys))) as port:
        refused = error(await port.chat(), 401)
        health = await port.http.get("/v2/health/ready")
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        allowed = await port.post("/v1/chat/completions", body, authorization="Bearer this-is-a-key-of-search")
    assert (refused["type"], refused["code"]) == ("authentication_error", "unauthenticated")
    assert (health.status_code, allowed.status_code) == (200, 200)
    assert [each.tenant for each in host.requests] == ["search"]


async def test_telemetry_is_told_of_every_request_and_answers_scrapers() -> None:
    host = FakeHost()
    async with serving(host, telemetry=Telemetry(host)) as port:
        await port.chat()
        await port.http.get("/nothing")
        text = (await port.http.get("/metrics")).text
    assert "POST /v1/chat/completions" in text


@pytest.mark.parametrize("stream", [b"true", b"false"])
async def test_a_client_that_disconnects_frees_what_its_request_holds(stream: bytes) -> None:
    engine = FakeEngine()
    engine.gate = Gate()
    model = served(engine)
    async with serving(model) as port:
        _, writer = await asyncio.open_connection(*port.address.split(":"))
        writer.write(raw_request(CHAT.replace(b"true", stream)))
        await engine.until(lambda: len(engine.requests) == 1)
        engine.gate.allow(2)
        await engine.until(lambda: engine.produced == 2)
        writer.close()
        await engine.until(lambda: len(engine.cancelled) == 1)
        await asyncio.wait_for(model.idle.wait(), 10)


async def test_nothing_is_sent_before_the_first_token() -> None:
    engine = FakeEngine(b"ab")
    engine.gate = Gate()
    async with serving(served(engine)) as port:
        reader, writer = await asyncio.open_connection(*port.address.split(":"))
        writer.write(raw_request())
        await engine.until(lambda: len(engine.requests) == 1)
        read = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        await (await port.http.get("/v1/models")).aread()  # a whole exchange later
        assert not read.done()
        engine.gate.allow()
        assert (await asyncio.wait_for(read, 10)).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def stalled(port: Port, host: FakeHost) -> tuple[asyncio.StreamWriter, str]:
    """A client that reads nothing of a long stream, and the id of its request, which fills the buffers."""
    host.answers["big"] = Answer(pieces=("x" * 100_000,) * 400, gate=(gate := Gate()))
    gate.allow(390)
    _, writer = await asyncio.open_connection(*port.address.split(":"), limit=1024)
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(raw_request(b'{"prompt":"big","max_tokens":400,"stream":true}', "/v1/completions"))
    await host.until(lambda: host.running == 1)
    return writer, host.requests[0].request_id


async def test_a_slow_reader_slows_its_own_stream_alone() -> None:
    """The generator stops where the buffers are full; the engine merges what is not read."""
    host = FakeHost()
    async with serving(host) as port:
        writer, slow = await stalled(port, host)
        other = events(await port.complete("Hi", max_tokens=2, stream=True))
        assert len(other) == 3
        assert host.produced[slow] < 390
        writer.close()
        await host.until(lambda: host.cancelled == [slow])


async def test_a_reader_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_of, "STALL_SECONDS", 0.05)
    host = FakeHost()
    async with serving(host) as port:
        writer, slow = await stalled(port, host)
        await host.until(lambda: host.cancelled == [slow])
        writer.close()


async def test_stopping_lets_streams_end_and_refuses_connections() -> None:
    engine = FakeEngine(b"abc")
    engine.gate = Gate()
    engine.gate.allow()
    async with serving(served(engine)) as port:
        reader, writer = await asyncio.open_connection(*port.address.split(":"))
        writer.write(raw_request(CHAT[:-1] + b',"max_tokens":3}'))
        await reader.readuntil(b"\r\n\r\n")
        stopping = asyncio.create_task(port.server.stop(20))
        while True:  # until the listener is closed
            try:
                _, second = await asyncio.open_connection(*port.address.split(":"))
                second.close()
                await asyncio.sleep(0)
            except OSError:
                break
        engine.gate.allow(2)
        rest = await asyncio.wait_for(reader.read(), 10)
        await asyncio.wait_for(stopping, 10)
        writer.close()
    assert b"data: [DONE]" in rest


async def test_what_does_not_end_in_time_is_told_that_the_server_stops() -> None:
    engine = FakeEngine(b"abc")
    engine.gate = Gate()
    async with serving(served(engine)) as port:
        waiting = asyncio.create_task(port.chat(max_tokens=50))
        await engine.until(lambda: len(engine.requests) == 1)
        reader, writer = await asyncio.open_connection(*port.address.split(":"))
        writer.write(raw_request())
        await engine.until(lambda: len(engine.requests) == 2)
        engine.gate.allow(4)  # in turns
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        await port.server.stop(0)
        assert "shutting down" in error(await waiting, 503)["message"]
        rest = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert b'{"error":{"message":"the server is shutting down' in rest
    assert len(engine.cancelled) == 2


async def test_a_port_that_is_taken_is_one_clear_line() -> None:
    async with serving(FakeHost()) as port:
        with pytest.raises(OSError, match=f"cannot listen on {port.address}"):
            await HttpServer(FakeHost()).start(port.address)


async def test_health_as_kserve_asks_for_it_follows_the_phase() -> None:
    host = FakeHost()
    async with serving(host) as port:
        for path in ("/v2/health/live", "/v2/health/ready", "/health", "/v2/models/fake/ready"):
            assert (await port.http.get(path)).status_code == 200
        assert error(await port.http.get("/v2/models/other/ready"), 404)["param"] == "model"
        await host.set_status(Status(Phase.LOADING, "weights", 0.25))
        assert (await port.http.get("/v2/health/live")).status_code == 200
        assert "loading (25%)" in error(await port.http.get("/v2/health/ready"), 503)["message"]
        assert error(await port.chat(), 503)["code"] == "unavailable"
        host.alive = False
        assert error(await port.http.get("/v2/health/live"), 503)["type"] == "server_error"


# -- connections that grow old -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("age", "ends"), [(0.0, False), (3600.0, False), (1e-9, True)])
async def test_the_answer_says_when_a_connection_is_old_and_ends_with_it(age: float, ends: bool) -> None:
    async with serving(FakeHost(), max_connection_age=age) as port:
        for _ in range(2):
            response = await port.chat(stream=True, max_tokens=3)
            assert len(events(response)) > 3
            assert response.headers.get("connection") == ("close" if ends else None)
        reader, writer = await asyncio.open_connection(*port.address.split(":"))
        writer.write(raw_request())
        if ends:
            assert b"[DONE]" in await asyncio.wait_for(reader.read(), 20)  # to the end of the connection
        writer.close()
