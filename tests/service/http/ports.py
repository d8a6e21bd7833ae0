"""The whole HTTP port over a fake, on loopback, and clients of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from service.host import Host
from service.http.server import HttpServer


@dataclass
class Port:
    """A server on a loopback port, a plain client of it, and the official one, which does not try again."""

    server: HttpServer
    address: str
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI

    async def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return await self.http.post(path, json=body, headers=headers)

    async def chat(self, content: object = "Hi", **fields: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]} | fields)

    async def complete(self, prompt: object = "Hi", **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"prompt": prompt} | fields)


@asynccontextmanager
async def serving(host: Host, **options: Any) -> AsyncIterator[Port]:
    """`options` are those of HttpServer."""
    server = HttpServer(host, **options)
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    base = f"http://{address}"
    try:
        async with (
            httpx.AsyncClient(base_url=base, timeout=20, verify=False) as http,  # certificates take long to read
            openai.DefaultAsyncHttpxClient(verify=False) as transport,
        ):
            client = openai.AsyncOpenAI(
                base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=20, http_client=transport
            )
            yield Port(server, address, http, client)
    finally:
        await server.stop(0)


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events; its last one, without "[DONE]"."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """What an answer that is no success says, in OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    found: dict[str, Any] = body["error"]
    return found
