"""Streams over HTTP that are held begin with comments; and what the official client makes of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from autoscaler.activator import HoldLimits, Replica
from autoscaler.activator.http_request import GENERATION as STREAMS
from tests.autoscaler.activator.scene import FakeReplica, Scene, http_scene, until

SOON = HoldLimits(comment_after_seconds=0.01)
CHUNK = {
    "id": "1",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": None}],
}


async def streams(replica: FakeReplica, request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        yield b"data: %b\n\n" % json.dumps(CHUNK).encode()
        yield b"data: [DONE]\n\n"

    return StreamingResponse(parts(), media_type="text/event-stream")


def official(here: Scene) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{here.http_address}/v1", api_key="none", max_retries=0, timeout=20)


def chat(client: openai.AsyncOpenAI) -> Any:
    return client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}], stream=True)


@pytest.mark.parametrize("path", STREAMS)
async def test_a_held_stream_begins_with_how_far_the_replica_is(path: str) -> None:
    async with http_scene(SOON) as here:
        here.room.progress("loading the model")
        async with here.http.stream("POST", path, json={"stream": True}, headers={"x-request-id": "mine"}) as response:
            assert response.status_code == 200
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert response.headers["x-request-id"] == "mine"
            parts = response.aiter_raw()
            assert await anext(parts) == b": starting a replica, loading the model\n\n"
            async with here.replica(route=streams):
                assert b"".join([each async for each in parts]).endswith(b"data: [DONE]\n\n")


async def test_a_stream_that_is_passed_on_to_another_process_shows_what_that_one_says() -> None:
    async with http_scene(SOON) as leads, http_scene(SOON) as passes:
        leads.room.progress("pulling the image")
        port = int(leads.http_address.rpartition(":")[2])
        passes.room.serve([Replica("leads", "127.0.0.1", http_port=port)])
        chunks = passes.start(chat(official(passes)))
        await leads.held(1)
        async with passes.http.stream("POST", STREAMS[0], json={"stream": True}) as response:
            said = b""
            parts = response.aiter_raw()
            while b"pulling the image" not in said:
                said += await anext(parts)
            async with leads.replica(route=streams):
                assert b"".join([each async for each in parts]).endswith(b"data: [DONE]\n\n")
                assert [each.choices[0].delta.content async for each in await chunks] == ["Hi"]


async def test_whatever_is_no_stream_waits_for_its_own_status() -> None:
    async def refuses(replica: FakeReplica, request: Request) -> Response:
        return Response(status_code=418)

    bodies = (b'{"stream": false}', b'{"stream": "true"}', b"{}", b"[" * 100_000, b"\xff", b"")
    async with http_scene(HoldLimits(comment_after_seconds=0)) as here:
        asking = [here.start(here.http.post(STREAMS[0], content=body)) for body in bodies]
        asking.append(here.start(here.http.post("/tokenize", content=b'{"stream": true}')))
        await here.held(len(asking))
        async with here.replica(route=refuses):
            assert [answer.status_code for answer in await asyncio.gather(*asking)] == [418] * len(asking)


async def test_what_is_not_held_keeps_its_own_status_however_long_it_takes() -> None:
    async def slow(replica: FakeReplica, request: Request) -> Response:
        await asyncio.sleep(0.1)
        return JSONResponse({}, 418)

    async with http_scene(SOON) as here, here.replica(route=slow):
        assert (await here.http.post(STREAMS[0], json={"stream": True})).status_code == 418


async def test_the_official_client_ignores_comments_and_gets_the_answer() -> None:
    async with http_scene(SOON) as here, official(here) as client:
        stream = await chat(client)  # its head is there, before any replica is
        assert here.room.replicas == ()
        async with here.replica(route=streams):
            assert [chunk.choices[0].delta.content async for chunk in stream] == ["Hi"]


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (
            {"error": {"message": "no key", "type": "authentication_error", "param": None, "code": "unauthenticated"}},
            "no key",
            "unauthenticated",
        ),
        ({"detail": "strange"}, "the replica answered with status 401", "unavailable"),
    ],
)
async def test_an_error_after_comments_is_an_event_that_the_official_client_raises(
    body: object, message: str, code: str
) -> None:
    async def refuses(replica: FakeReplica, request: Request) -> Response:
        return JSONResponse(body, 401)

    async with http_scene(SOON) as here, official(here) as client:
        stream = await chat(client)
        async with here.replica(route=refuses):
            with pytest.raises(openai.APIError) as error:
                await anext(aiter(stream))
        assert (error.value.message, error.value.code) == (message, code)


async def test_the_end_of_the_wait_is_an_event_too() -> None:
    async with http_scene(HoldLimits(comment_after_seconds=0.01, hold_seconds=0.2)) as here:
        response = await here.http.post(STREAMS[0], json={"stream": True})
        comment, event, end = response.text.split("\n\n")
        assert (response.status_code, comment, end) == (200, ": starting a replica", "")
        assert json.loads(event.removeprefix("data: "))["error"] == {
            "message": "no replica took the request within 0.2 s; retry later",
            "type": "server_error",
            "param": None,
            "code": "unavailable",
        }


async def test_a_client_that_goes_away_after_comments_frees_its_place() -> None:
    async with http_scene(SOON) as here:
        async with here.http.stream("POST", STREAMS[0], json={"stream": True}) as response:
            await anext(response.aiter_raw())
        await here.held(0)
        await until(lambda: here.room.outcomes == {"cancelled": 1})


async def test_comments_can_be_switched_off() -> None:
    async with http_scene(HoldLimits(comment_after_seconds=None, hold_seconds=0.2)) as here:
        response: httpx.Response = await here.http.post(STREAMS[0], json={"stream": True})
        assert response.status_code == 503
