"""How servers are asked: GetLoad over one channel for each, which stays open, or else the text of /metrics.

Nothing here waits longer than it was told, and no answer is larger than its bound: what does not fit, does not end, or
is packed, is refused before it is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from autoscaler.observe.answers import Answer, BrokenAnswerError, read_load
from autoscaler.observe.secrets import Secrets
from autoscaler.observe.text import read_text

MAX_LOAD_BYTES = 64 * 1024  # a Load has some 600
MAX_TEXT_BYTES = 4 << 20  # a server with 64 adapters has 1.5 MiB of metrics
TEXTS_AT_ONCE = 32  # bodies of metrics in memory: 128 MiB at most, however many servers there are
MAX_HEADER_BYTES = 16 * 1024
OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", MAX_LOAD_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_HEADER_BYTES),
    ("grpc.enable_http_proxy", 0),  # pods are near
    ("grpc.enable_retries", 0),  # the next look is one
    # A server that comes up is seen within seconds; by default a minute or two may go by between two tries.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # time for a connection, too
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


class SilentError(Exception):
    """There is no answer. The message says why."""


@dataclass(frozen=True, slots=True)
class Address:
    """Of a pod's server.

    Attributes:
        uid: of the pod: an address may become another one's.
    """

    uid: str
    ip: str
    grpc_port: int
    metrics_port: int

    @property
    def target(self) -> str:
        """Raises ValueError."""
        ip = ipaddress.ip_address(self.ip)
        return f"ipv4:{ip}:{self.grpc_port}" if ip.version == 4 else f"ipv6:[{ip}]:{self.grpc_port}"

    @property
    def host(self) -> str:
        return f"[{self.ip}]:{self.metrics_port}" if ":" in self.ip else f"{self.ip}:{self.metrics_port}"


class Servers:
    """Belongs to one event loop. `close` it."""

    def __init__(self, secrets: Secrets, seconds: float) -> None:
        self._secrets = secrets
        self._opened = secrets.read()
        self._seconds = seconds
        self._channels: dict[Address, grpc.aio.Channel] = {}
        self._http: httpx.AsyncClient | None = None
        self._texts = asyncio.Semaphore(TEXTS_AT_ONCE)

    async def prepare(self, addresses: Collection[Address]) -> None:
        """These are all that will be asked: forget the others. Secrets that have changed hold from now on; where they
        cannot be read, those before hold.

        Raises:
            OSError, ValueError: they cannot be read. All else is done.
        """
        gone = set(self._channels).difference(addresses)
        try:
            if (opened := self._secrets.read()) != self._opened:
                self._opened, gone = opened, set(self._channels)
                await self._close_http()
        finally:
            for address in gone:
                await self._channels.pop(address).close()

    async def ask(self, address: Address, *, text: bool) -> Answer:
        """Raises SilentError.

        Args:
            text: if GetLoad fails, ask for metrics.
        """
        try:
            return await self._get_load(address)
        except SilentError as error:
            if not text:
                raise
            try:
                return await self._get_text(address)
            except SilentError as second:
                raise SilentError(f"GetLoad: {error}; /metrics: {second}") from None

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        await self._close_http()

    async def _close_http(self) -> None:
        client, self._http = self._http, None
        if client is not None:
            await client.aclose()

    async def _get_load(self, address: Address) -> Answer:
        try:
            if (channel := self._channels.get(address)) is None:
                channel = self._channels[address] = self._opened.channel(address.target, OPTIONS)
            stub: Any = rpc.GenerationServiceStub(channel)  # the stubs' types say that it is synchronous
            request = stub.GetLoad(pb.GetLoadRequest(), timeout=self._seconds, metadata=self._opened.headers)
            return read_load((await request).load)
        except grpc.aio.AioRpcError as error:
            raise SilentError(f"{error.code().name}: {str(error.details())[:200]}") from None
        except (BrokenAnswerError, ValueError) as error:
            raise SilentError(str(error)) from None

    async def _get_text(self, address: Address) -> Answer:
        try:
            async with asyncio.timeout(self._seconds):
                return await self._fetch(address)
        except httpx.HTTPError as error:
            raise SilentError(f"{type(error).__name__}: {str(error)[:200]}") from None
        except TimeoutError:
            raise SilentError(f"no answer within {self._seconds:g} s") from None
        except (BrokenAnswerError, httpx.InvalidURL, OSError) as error:
            raise SilentError(str(error)) from None

    async def _fetch(self, address: Address) -> Answer:
        if self._http is None:
            tls = self._opened.tls()
            self._http = httpx.AsyncClient(
                verify=tls if tls is not None else False,
                trust_env=False,
                timeout=self._seconds,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=1_000),
                headers={"accept": "text/plain", "accept-encoding": "identity", **dict(self._opened.headers)},
            )
        scheme = "http" if self._opened.ca is None else "https"
        extensions = {"sni_hostname": self._secrets.server_name} if self._secrets.server_name else {}
        async with contextlib.AsyncExitStack() as stack:
            response = await stack.enter_async_context(
                self._http.stream("GET", f"{scheme}://{address.host}/metrics", extensions=extensions)
            )
            if response.status_code != httpx.codes.OK:
                raise BrokenAnswerError(f"status {response.status_code}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise BrokenAnswerError("the metrics are packed, though nobody asked for that")
            await stack.enter_async_context(self._texts)  # who does not answer takes no place
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_TEXT_BYTES:
                    raise BrokenAnswerError(f"the metrics have more than {MAX_TEXT_BYTES} bytes")
            return read_text(body.decode(errors="replace"))
