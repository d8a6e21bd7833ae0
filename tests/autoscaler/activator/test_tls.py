"""Servers with TLS: the activator's ports have it too, and it verifies whom it hands requests to."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from autoscaler.activator import Activator, ActivatorSettings, Addresses, HoldLimits, Replica, TlsFiles
from service.ports import Ports
from service.security.tls import Tls
from service.security.tls import TlsFiles as ServerTlsFiles
from tests.autoscaler.activator.scene import until
from tests.service.fakes import FakeHost
from tests.service.security.certificates import Authority, Signed

REQUEST = pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParameters(max_tokens=3))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def signed(authority: Authority) -> Signed:
    return authority.server()


def files(signed: Signed, authority: Authority, server_name: str = "localhost") -> TlsFiles:
    return TlsFiles(certificate=signed.certificate, key=signed.key, ca=authority.path, server_name=server_name)


@asynccontextmanager
async def running(tls: TlsFiles, **limits: Any) -> AsyncIterator[tuple[Activator, Addresses]]:
    settings = ActivatorSettings(
        grpc_address="127.0.0.1:0", http_address="127.0.0.1:0", tls=tls, limits=HoldLimits(**limits)
    )
    activator = Activator(settings)
    addresses = await activator.start()
    try:
        yield activator, addresses
    finally:
        await activator.stop(0)


@asynccontextmanager
async def server(signed: Signed) -> AsyncIterator[Replica]:
    """Both ports of a server with TLS."""
    tls = Tls(ServerTlsFiles(certificate=signed.certificate, key=signed.key))
    ports = Ports(FakeHost(), "127.0.0.1:0", "127.0.0.1:0", tls=tls)
    await ports.start()
    numbers = [int(str(address).rpartition(":")[2]) for address in (ports.grpc_address, ports.http_address)]
    try:
        yield Replica("real", "127.0.0.1", *numbers)
    finally:
        await ports.stop(0)


async def generate(addresses: Addresses, authority: Authority) -> str:
    credentials = grpc.ssl_channel_credentials(authority.path.read_bytes())
    async with grpc.aio.secure_channel(f"localhost:{addresses.grpc_port}", credentials) as channel:
        stub: Any = rpc.GenerationServiceStub(channel)
        return "".join([each.delta.text async for each in stub.Generate(REQUEST, timeout=20)])


async def complete(addresses: Addresses, authority: Authority) -> httpx.Response:
    context = ssl.create_default_context(cafile=authority.path)
    async with httpx.AsyncClient(verify=context, timeout=20) as client:
        return await client.post(f"https://localhost:{addresses.http_port}/v1/completions", json={"prompt": "Hi"})


async def test_both_sides_of_both_ports_have_tls(authority: Authority, signed: Signed) -> None:
    async with running(files(signed, authority)) as (activator, addresses):
        answers = asyncio.gather(generate(addresses, authority), complete(addresses, authority))
        await until(lambda: activator.room.held_requests == 2)
        async with server(signed) as replica:
            activator.room.serve([replica])
            text, response = await answers
        assert text == " t0 t1 t2"
        assert response.status_code == 200


async def test_who_has_another_name_or_authority_is_no_replica(
    authority: Authority, signed: Signed, tmp_path: Path
) -> None:
    async with server(signed) as replica:
        for tls in (files(signed, authority, "elsewhere"), files(signed, Authority(tmp_path))):
            for ask in (generate, complete):
                async with running(tls) as (activator, addresses):
                    activator.room.serve([replica])
                    asking = asyncio.ensure_future(ask(addresses, authority))
                    await until(lambda: asking.done() or activator.room._windows[0].rests_until > 0)  # noqa: B023
                    assert not asking.done()
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)


async def test_renewed_certificates_are_those_of_the_next_connection(authority: Authority, tmp_path: Path) -> None:
    current, other = authority.server("current"), Authority(tmp_path)
    async with running(files(current, authority), hold_seconds=0.3) as (_, addresses):
        assert (await complete(addresses, authority)).status_code == 503
        other.server().copy_to(current)
        assert (await complete(addresses, other)).status_code == 503
        with pytest.raises(grpc.aio.AioRpcError, match="no replica took the request"):
            await generate(addresses, other)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await complete(addresses, authority)


async def test_a_renewed_authority_is_the_one_by_which_the_next_replica_is_known(
    authority: Authority, signed: Signed, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other, ca = Authority(tmp_path / "other"), tmp_path / "ca.crt"
    ca.write_bytes(authority.path.read_bytes())
    tls = TlsFiles(certificate=signed.certificate, key=signed.key, ca=ca, server_name="localhost")
    async with running(tls, hold_seconds=5.0) as (activator, addresses), server(other.server()) as replica:
        ca.write_bytes(other.path.read_bytes())
        activator.room.serve([replica])
        assert (await complete(addresses, authority)).status_code == 200
        assert await generate(addresses, authority) == " t0 t1 t2"
