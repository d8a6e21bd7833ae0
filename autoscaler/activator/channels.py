"""Connections to replicas: one channel for each address, made when first used; a few stay open without a user."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import grpc

from autoscaler.activator.replica import Replica
from autoscaler.activator.settings import TlsFiles
from autoscaler.activator.tls import channel_credentials

CONNECT_SECONDS = 2.0  # within a cluster a round trip takes a millisecond
IDLE_CHANNELS = 4  # kept open for who comes next
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.http2.bdp_probe", 0),  # else windows grow to many MiB for who does not read
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # one replica's connection is never that of an earlier one at its address
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A node that has gone says nothing: within 15 s its requests learn of it.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(slots=True)
class _Used:
    channel: grpc.aio.Channel
    users: int = 0


class Channels:
    """Belongs to one event loop."""

    def __init__(self, tls: TlsFiles | None = None) -> None:
        self._tls = tls
        self._open: dict[str, _Used] = {}  # by address

    @asynccontextmanager
    async def to(self, replica: Replica) -> AsyncIterator[grpc.aio.Channel | None]:
        """A channel that is connected; None: the replica was not reached."""
        address = f"{bracketed(replica.host)}:{replica.grpc_port}"
        used = self._open.pop(address) if address in self._open else _Used(self._make(address))
        self._open[address] = used  # the last one last
        used.users += 1
        channel = used.channel
        try:
            yield channel if await _is_connected(channel) else None
        finally:
            used.users -= 1
            await self._tidy()

    async def close(self) -> None:
        for address in tuple(self._open):
            await self._open.pop(address).channel.close()

    async def _tidy(self) -> None:
        idle = [address for address, used in self._open.items() if not used.users]
        for address in idle[:-IDLE_CHANNELS]:
            await self._open.pop(address).channel.close()

    def _make(self, address: str) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=OPTIONS)
        name = ("grpc.ssl_target_name_override", self._tls.server_name)
        return grpc.aio.secure_channel(address, channel_credentials(self._tls), options=[*OPTIONS, name])


async def _is_connected(channel: grpc.aio.Channel) -> bool:
    """Whether it is, or comes to be in time. One that was refused is not tried until its own pause is over."""
    with suppress(TimeoutError):
        async with asyncio.timeout(CONNECT_SECONDS):
            while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                    return False
                await channel.wait_for_state_change(state)
            return True
    return False


def bracketed(host: str) -> str:
    """As it stands in an address with a port: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host
