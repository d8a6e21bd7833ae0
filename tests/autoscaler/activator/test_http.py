"""HTTP requests through the activator: held, handed over, and passed on as they come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from autoscaler.activator import HoldLimits
from tests.autoscaler.activator.scene import FakeReplica, Scene, http_scene, until

CHAT = "/v1/chat/completions"


def asks(here: Scene, path: str = CHAT, **body: Any) -> Any:
    return here.http.post(path, json=body)


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert list(body) == ["message", "type", "param", "code"]
    found: dict[str, Any] = body
    return found


def answers(status: int, body: object = "ok", **headers: str) -> Any:
    async def route(replica: FakeReplica, request: Request) -> Response:
        return JSONResponse(body, status, {name.replace("_", "-"): value for name, value in headers.items()})

    return route


async def test_a_request_is_held_until_there_is_a_replica_and_then_answered() -> None:
    async with http_scene() as here:
        answer = here.start(asks(here, n=1))
        await asyncio.wait_for(here.room.wake.wait(), 10)
        assert (here.room.held_requests, here.room.held_bytes) == (1, len('{"n":1}'))
        async with here.replica():
            response = await answer
        assert response.status_code == 200
        assert response.json() == {"replica": "r0", "path": CHAT, "body": '{"n":1}'}
        assert here.room.outcomes == {"answered": 1}


async def test_the_answer_ends_the_connection_so_that_the_next_request_goes_to_a_replica() -> None:
    async with http_scene() as here, here.replica():
        assert (await asks(here)).headers["connection"] == "close"


async def test_paths_queries_and_headers_arrive_as_they_were_sent() -> None:
    async with http_scene() as here, here.replica() as replica:
        sent = {
            "authorization": "Bearer key",
            "x-request-id": "mine",
            "x-forwarded-for": "203.0.113.7",
            "accept-encoding": "identity",
            "user-agent": "me",
            "accept": "x/y",
            "connection": "keep-alive, x-of-this-hop",
            "x-of-this-hop": "1",
            "te": "trailers",
            "host": "models.example.com",
        }
        await here.http.get("/v1/models/a%2Fb?x=%20&y=1&y=2", headers=sent)
        [request] = replica.requests
        assert request.scope["raw_path"] == b"/v1/models/a%2Fb"
        assert request.scope["query_string"] == b"x=%20&y=1&y=2"
        expected = {name: value for name, value in sent.items() if name not in ("connection", "x-of-this-hop", "te")}
        expected |= {"x-forwarded-for": "203.0.113.7, 127.0.0.1", "x-forwarded-proto": "http"}
        assert dict(request.headers) == expected


async def test_a_request_gets_an_id_if_it_has_none() -> None:
    async with http_scene() as here, here.replica() as replica:
        await asks(here)
        assert len(replica.requests[0].headers["x-request-id"]) == 16


async def test_answers_come_through_exactly() -> None:
    async def says(replica: FakeReplica, request: Request) -> Response:
        status = int((await request.body()).decode())
        return JSONResponse({"error": "é"}, status, {"x-mine": "1", "www-authenticate": "Bearer"})

    statuses = [200, 201, 400, 401, 404, 408, 413, 429, 500]
    async with http_scene() as here, here.replica(route=says) as replica:
        for status in statuses:
            response = await here.http.post(CHAT, json=status)
            assert (response.status_code, response.json()) == (status, {"error": "é"})
            assert (response.headers["x-mine"], response.headers["www-authenticate"]) == ("1", "Bearer")
            assert len(response.headers.get_list("date")) == 1
        assert len(replica.calls) == len(statuses)


async def test_a_client_that_goes_away_in_the_room_frees_its_place() -> None:
    async with http_scene() as here:
        asking = here.start(asks(here))
        await here.held(1)
        asking.cancel()
        await here.held(0)
        await until(lambda: here.room.held_bytes == 0)
        assert here.room.outcomes == {"cancelled": 1}


async def test_a_client_that_goes_away_later_cancels_at_the_replica() -> None:
    async def endless(replica: FakeReplica, request: Request) -> Response:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        replica.cancelled += 1
        return Response()

    async with http_scene() as here, here.replica(route=endless) as replica:
        asking = here.start(asks(here))
        await until(lambda: replica.running == 1)
        asking.cancel()
        await until(lambda: replica.cancelled == 1)


async def test_hold_seconds_ends_the_wait_with_503() -> None:
    async with http_scene(HoldLimits(hold_seconds=0.2)) as here:
        response = await asks(here)
        assert error(response, 503) == {
            "message": "no replica took the request within 0.2 s; retry later",
            "type": "server_error",
            "param": None,
            "code": "unavailable",
        }
        assert int(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 1000


@pytest.mark.parametrize("handed", [False, True])
async def test_a_clients_own_timeout_ends_the_wait_with_408(handed: bool) -> None:
    async def silent(replica: FakeReplica, request: Request) -> Response:
        await asyncio.Event().wait()
        return Response()

    seconds = 1 if handed else 0.1  # it is handed on before they are over, also where the machine is slow
    async with http_scene() as here, here.replica(route=silent, serve=handed) as replica:
        answers = asyncio.gather(
            here.http.post(CHAT, json={"timeout": seconds}),
            here.http.post(CHAT, json={}, headers={"x-request-timeout": str(seconds)}),
        )
        for response in await answers:
            assert error(response, 408)["code"] == "deadline_exceeded"
        assert len(replica.calls) == (2 if handed else 0)
        assert here.room.outcomes == {"deadline": 2}


async def test_an_answer_that_has_begun_in_time_is_not_cut_off() -> None:
    async def slow(replica: FakeReplica, request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first "
            await asyncio.sleep(1.1)
            yield b"last"

        return StreamingResponse(parts())

    async with http_scene() as here, here.replica(route=slow):
        assert (await here.http.post(CHAT, json={"timeout": 1})).text == "first last"


async def test_a_timeout_that_makes_no_sense_is_for_the_replica_to_refuse() -> None:
    async with http_scene() as here, here.replica():
        for timeout in (0, -1, "x", [], True, 1e400):
            assert (await here.http.post(CHAT, content=json.dumps({"timeout": timeout}))).status_code == 200


async def test_a_replica_that_takes_the_request_and_says_nothing_is_504() -> None:
    async def silent(replica: FakeReplica, request: Request) -> Response:
        await asyncio.sleep(5)
        return Response()

    async with http_scene(HoldLimits(hold_seconds=0.3)) as here, here.replica(route=silent) as replica:
        assert error(await asks(here), 504)["code"] == "timeout"
        assert len(replica.calls) == 1


async def test_a_full_room_is_429_with_the_time_that_the_replica_takes() -> None:
    async with http_scene(HoldLimits(max_requests=1)) as here:
        here.start(asks(here))
        await here.held(1)
        here.room.progress("loading the model", eta=20)
        response = await asks(here)
        assert error(response, 429)["type"] == "rate_limit_error"
        assert 20 <= int(response.headers["retry-after"]) <= 30
        assert here.room.held_requests == 1


async def test_bodies_are_bounded_each_and_together() -> None:
    async with http_scene(HoldLimits(max_request_bytes=1000, max_bytes=1500)) as here:
        assert error(await here.http.post(CHAT, content=b"x" * 1001), 413)["code"] == "body_too_large"

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b"x" * 100

        assert error(await here.http.post(CHAT, content=parts()), 413)["code"] == "body_too_large"
        here.start(here.http.post(CHAT, content=b"x" * 1000))
        await here.held(1)
        assert "there is no place for 501 more" in error(await here.http.post(CHAT, content=b"x" * 501), 429)["message"]


async def test_a_big_body_arrives_whole_also_in_chunks() -> None:
    async def size(replica: FakeReplica, request: Request) -> Response:
        return JSONResponse({"size": len(await request.body()), "length": request.headers["content-length"]})

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 2**20

    async with http_scene() as here, here.replica(route=size):
        response = await here.http.post(CHAT, content=parts())
        assert response.json() == {"size": 10 * 2**20, "length": str(10 * 2**20)}


async def test_a_stream_flows_as_it_is_made() -> None:
    more = asyncio.Event()

    async def streams(replica: FakeReplica, request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            await more.wait()
            yield b"data: 2\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    async with (
        http_scene() as here,
        here.replica(route=streams),
        here.http.stream("POST", CHAT, json={"stream": True}) as response,
    ):
        parts = response.aiter_raw()
        assert await anext(parts) == b"data: 1\n\n"
        more.set()
        assert await anext(parts) == b"data: 2\n\n"
        assert [each async for each in parts] == []


async def test_who_does_not_read_stops_who_writes() -> None:
    sent = 0

    async def floods(replica: FakeReplica, request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                yield b"x" * 2**16
                await asyncio.sleep(0)  # so that it ends when nobody is there any more
                sent += 1

        return StreamingResponse(parts())

    async with http_scene() as here, here.replica(route=floods), here.http.stream("GET", "/"):
        last = -1
        while sent != last:  # as long as it goes on by itself
            last = sent
            await asyncio.sleep(0.05)
        assert sent * 2**16 < 32 * 2**20  # what sockets hold


async def test_a_replica_that_is_full_gets_the_request_again_when_it_said() -> None:
    async def full_at_first(replica: FakeReplica, request: Request) -> Response:
        body = await request.body()
        if len(replica.calls) < 3:
            return JSONResponse({}, 429, {"retry-after": "1", "retry-after-ms": "20"})
        return Response(body)

    async with http_scene() as here, here.replica(route=full_at_first) as replica:
        assert (await asks(here, n=1)).json() == {"n": 1}
        assert len(replica.calls) == 3


async def test_a_replica_that_stays_full_is_quoted_at_the_end() -> None:
    route = answers(429, {"error": {"message": "full"}}, retry_after="1", retry_after_ms="20")
    async with http_scene(HoldLimits(hold_seconds=0.2)) as here, here.replica(route=route):
        response = await asks(here)
        assert (response.status_code, response.json()) == (429, {"error": {"message": "full"}})
        assert response.headers["retry-after-ms"] == "20"


@pytest.mark.parametrize("how", ["dies", "says 503", "was never there"])
async def test_a_replica_that_is_lost_before_it_answers_costs_nothing(how: str) -> None:
    async def waits(replica: FakeReplica, request: Request) -> Response:
        if how == "says 503":
            return JSONResponse({}, 503)
        await asyncio.Event().wait()
        return Response()

    async with http_scene() as here, here.replica(route=waits) as first, here.replica(serve=False) as second:
        if how == "was never there":
            await first.stop()
        here.serve(first)
        answer = here.start(asks(here, n=1))
        await until(lambda: here.room._windows[0].rests_until > 0 or first.running == 1)
        here.serve(first, second)
        if how == "dies":
            await first.stop()
        assert (await answer).json() == {"replica": "r1", "path": CHAT, "body": '{"n":1}'}


def breaks_off(*parts: bytes) -> Any:
    async def route(replica: FakeReplica, request: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            for part in parts:
                yield part
            raise ConnectionError("gone")

        return StreamingResponse(stream(), media_type="text/event-stream")

    return route


async def test_a_replica_that_is_lost_between_events_is_told_as_the_last_one() -> None:
    route = breaks_off(b"data: 1\n\n", b"data: 2\n\n")
    async with http_scene() as here, here.replica(route=route) as first, here.replica(serve=False) as second:
        here.serve(first, second)
        response = await asks(here, stream=True)
        first_one, other, last, end = response.text.split("\n\n")
        assert (first_one, other, end) == ("data: 1", "data: 2", "")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert second.calls == []


async def test_a_replica_that_is_lost_within_an_event_breaks_the_answer_off() -> None:
    async with http_scene() as here, here.replica(route=breaks_off(b'data: {"half')) as replica:
        with pytest.raises(httpx.RemoteProtocolError):
            await asks(here, stream=True)
        assert len(replica.calls) == 1


async def test_two_hundred_held_requests_are_each_answered_exactly_once() -> None:
    async with http_scene() as here:
        client = httpx.AsyncClient(base_url=here.http_address, limits=httpx.Limits(), timeout=20, verify=False)
        async with client:
            waiting = [here.start(client.post("/", json=number)) for number in range(200)]
            await here.held(200)
            async with here.replica(capacity=8) as replica:
                got = await asyncio.gather(*waiting)
        assert [json.loads(each.json()["body"]) for each in got] == list(range(200))
        assert len(replica.calls) == 200
        assert replica.most <= 16


async def test_closing_the_room_tells_who_waits_at_once() -> None:
    async with http_scene() as here:
        answer = here.start(asks(here))
        await here.held(1)
        here.room.close()
        assert error(await answer, 503)["message"] == "the activator is shutting down; retry"


async def test_a_target_that_is_no_path_is_refused() -> None:
    async with http_scene() as here, here.replica() as replica:
        for target in (b"*", b"http://elsewhere/v1/models"):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(here.http_address.rpartition(":")[2]))
            writer.write(b"OPTIONS %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % target)
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            writer.close()
        assert replica.calls == []


async def test_an_answer_that_the_activator_has_to_cut_off_is_seen_to_be_cut_off() -> None:
    async def endless(replica: FakeReplica, request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b'{"half'
            await asyncio.Event().wait()

        return StreamingResponse(parts(), media_type="application/json")

    async with (
        http_scene() as here,
        here.replica(route=endless) as replica,
        here.http.stream("POST", CHAT) as response,
    ):
        parts = response.aiter_raw()
        assert await anext(parts) == b'{"half'
        await replica.stop()
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(parts)
