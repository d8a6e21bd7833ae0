"""The gRPC port's door: every method of every service, by everybody, and TLS around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from tritonclient.grpc import service_pb2 as triton
from tritonclient.grpc import service_pb2_grpc as triton_rpc

from service.grpc.server import OPTIONS, SERVICES
from service.security.access import RPCS, Access, Level
from service.security.keys import KeysFile
from service.security.tls import Tls, TlsFiles
from tests.service.fake_engine import FakeEngine
from tests.service.fakes import FakeHost, Gate
from tests.service.grpc.ports import Port, drained, refusal, served, serving
from tests.service.security.certificates import Authority, Signed

KEY, ADMIN = "nms-0123456789abcdef", "nms-fedcba9876543210"
BUILT_IN = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
OPEN = {
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/List",
    "/grpc.health.v1.Health/Watch",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
}
FOR_ADMINS = {
    f"/inference.GRPCInferenceService/{name}"
    for name in ("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings")
}
BEARER = (("authorization", f"Bearer {KEY}"),)
THREE = pb.SamplingParameters(max_tokens=3)
DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def methods() -> list[Any]:
    """Descriptors of every method that the port serves."""
    pool = descriptor_pool.Default()
    return [method for name in (*SERVICES, *BUILT_IN) for method in pool.FindServiceByName(name).methods]


def path(method: Any) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


async def code_of(port: Port, name: str, metadata: Any = (), *, streams: bool = False, host: str | None = None) -> Any:
    """How a call with an empty message ends; OK also if it would go on."""
    kind = port.channel.stream_stream if streams else port.channel.unary_stream
    call = kind(name)(iter([b""]) if streams else b"", metadata=metadata, timeout=10)
    try:
        async for _ in call:
            call.cancel()
            return grpc.StatusCode.OK
        return grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        return error.code()


@pytest.fixture
def keys(tmp_path: Path) -> KeysFile:
    file = tmp_path / "keys.yaml"
    file.write_text(
        f"- {{name: ann, key: {KEY}}}\n- {{name: ops, key: {ADMIN}, admin: true}}\n- {{name: bob, certificate: true}}\n"
    )
    return KeysFile(file)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(b"abc")


@pytest.fixture
async def port(engine: FakeEngine, keys: KeysFile) -> AsyncIterator[Port]:
    async with serving(served(engine), access=Access(keys=keys)) as running:
        yield running


def test_every_method_has_its_level_and_none_is_left_of_methods_that_are_gone() -> None:
    served_now = {path(method) for method in methods()}
    assert served_now - RPCS.keys() == set()
    assert RPCS.keys() - served_now <= {"/grpc.health.v1.Health/List"}  # newer versions of the service have it
    assert {name for name, level in RPCS.items() if level is Level.OPEN} == OPEN
    assert {name for name, level in RPCS.items() if level is Level.ADMIN} == FOR_ADMINS


async def test_every_method_by_everybody(port: Port) -> None:
    callers = {
        "nobody": (),
        "a wrong key": (("authorization", "Bearer nms-wrong-0123456789"),),
        "a key of the wrong case": (("x-api-key", KEY.upper()),),
        "another scheme": (("authorization", f"Basic {KEY}"),),
        "a tenant's name": (("x-tenant", "ops"),),
    }
    for method in methods():
        name = path(method)
        for who, metadata in callers.items():
            code = await code_of(port, name, metadata, streams=method.client_streaming)
            assert (code is grpc.StatusCode.UNAUTHENTICATED) == (name not in OPEN), (name, who, code)
        code = await code_of(port, name, BEARER, streams=method.client_streaming)
        assert (code is grpc.StatusCode.PERMISSION_DENIED) == (name in FOR_ADMINS), (name, code)
        assert code is not grpc.StatusCode.UNAUTHENTICATED
        code = await code_of(port, name, (("x-api-key", ADMIN),), streams=method.client_streaming)
        assert code not in DENIED, (name, code)


async def test_no_spelling_of_a_method_opens_it(port: Port) -> None:
    for name in (*OPEN, "/nemoserve.v1.GenerationService/Generate"):
        package, method = name.rsplit("/", 1)
        for spelling in (
            *(name + "/", name + "?x", name + "%2f", "/" + name, f"{package}//{method}", f"{package}/./{method}"),
            *(f"{package}/{method.lower()}", f"{package.upper()}/{method}", f"/grpc.health.v1.Health/Check/..{name}"),
        ):
            assert await code_of(port, spelling) is grpc.StatusCode.UNAUTHENTICATED, spelling
            assert await code_of(port, spelling, (("x-api-key", ADMIN),)) is grpc.StatusCode.UNIMPLEMENTED, spelling


@pytest.mark.parametrize("authority", ["grpc.health.v1.Health", "localhost/grpc.health.v1.Health/Check?", "admin"])
async def test_no_authority_opens_anything(engine: FakeEngine, keys: KeysFile, authority: str) -> None:
    options = [("grpc.default_authority", authority)]
    async with serving(served(engine), options=options, access=Access(keys=keys)) as port:
        assert await code_of(port, "/nemoserve.v1.GenerationService/GetLoad") in (
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.UNAVAILABLE,  # gRPC itself refuses some of these
        )


async def test_a_stranger_cannot_make_the_server_read_his_message(engine: FakeEngine, keys: KeysFile) -> None:
    """Refused by the key, though the message is too large and malformed too."""
    async with serving(served(engine), access=Access(keys=keys), max_request_bytes=1000) as port:
        call = port.channel.unary_unary("/nemoserve.v1.GenerationService/Tokenize")
        error = await refusal(call(b"\xff" * 5000, timeout=10))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        error = await refusal(call(b"\xff" * 5000, timeout=10, metadata=BEARER))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_headers_above_the_limit_are_refused_and_the_connection_goes_on(port: Port) -> None:
    name = "/nemoserve.v1.GenerationService/GetLoad"
    for _ in range(8):  # by default it is a matter of chance
        assert await code_of(port, name, (*BEARER, ("x", "y" * 15_000))) is grpc.StatusCode.OK
        assert await code_of(port, name, (*BEARER, ("x", "y" * 17_000))) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await code_of(port, name, BEARER) is grpc.StatusCode.OK


@pytest.mark.parametrize("says", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n"])
async def test_who_connects_and_does_not_go_on_is_cut_off(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, says: bytes
) -> None:
    name = "grpc.server_handshake_timeout_ms"
    assert (name, 15_000) in OPTIONS
    soon = [(name, 100) if option == name else (option, value) for option, value in OPTIONS]
    monkeypatch.setattr("service.grpc.server.OPTIONS", soon)
    async with serving(served(engine)) as port:
        reader, writer = await asyncio.open_connection(*port.address.split(":"))
        writer.write(says)
        async with asyncio.timeout(30):
            while await reader.read(1000):
                pass
        writer.close()


# -- tenants -------------------------------------------------------------------------------------------------------


async def generate(port: Port, key: str, salt: str = "") -> None:
    request = pb.GenerateRequest(prompt="Hi", cache_salt=salt, sampling=pb.SamplingParameters(max_tokens=1))
    metadata = (("x-api-key", key), ("x-tenant", "somebody"))
    await drained(port.typed.Generate(request, metadata=metadata, timeout=10))


def infer_request(model: str, **parameters: Any) -> triton.ModelInferRequest:
    request = triton.ModelInferRequest(model_name=model)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"Hi")
    for name, value in parameters.items():
        setattr(request.parameters[name], f"{'int64' if isinstance(value, int) else 'string'}_param", value)
    if model == "ensemble":
        request.inputs.add(name="max_tokens", datatype="INT32", shape=[1]).contents.int_contents.append(1)
    return request


@pytest.mark.parametrize("model", ["toy", "ensemble"])
async def test_no_tenant_shares_its_prefix_cache_with_another(engine: FakeEngine, port: Port, model: str) -> None:
    kserve = triton_rpc.GRPCInferenceServiceStub(port.channel)
    for key in (KEY, KEY, ADMIN):
        await generate(port, key)
        await kserve.ModelInfer(infer_request(model), metadata=(("x-api-key", key),), timeout=10)

        async def stream(key: str = key) -> None:
            stream = kserve.ModelStreamInfer(iter([infer_request(model)]), metadata=(("x-api-key", key),), timeout=10)
            assert not (await drained(stream))[0].error_message

        await stream()
    ann, again, ops = (engine.requests[at : at + 3] for at in (0, 3, 6))
    [salt] = {request.cache_salt for request in (*ann, *again)}
    [other] = {request.cache_salt for request in ops}
    assert "" != salt != other != ""


async def test_a_salt_of_the_clients_own_keeps_apart_within_its_tenant(engine: FakeEngine, port: Port) -> None:
    for key, salt in ((KEY, "x"), (ADMIN, "x"), (KEY, "y"), (KEY, "x"), (KEY, "")):
        await generate(port, key, salt)
    salts = [request.cache_salt for request in engine.requests]
    assert salts[0] == salts[3]
    assert len(set(salts)) == 4
    long = pb.GenerateRequest(prompt="Hi", cache_salt="x" * 257)
    error = await refusal(port.typed.Generate(long, metadata=BEARER, timeout=10))
    assert error.details().startswith("cache_salt: 257 characters")


# -- TLS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def channel_to(port: Port, ca: Path, client: Signed | None = None) -> grpc.aio.Channel:
    """Encrypted; a new connection each time."""
    pair = (None, None) if client is None else (client.key.read_bytes(), client.certificate.read_bytes())
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), *pair)
    return grpc.aio.secure_channel(port.address, credentials, options=[("grpc.use_local_subchannel_pool", 1)])


async def load_over(channel: grpc.aio.Channel, metadata: Any = ()) -> grpc.StatusCode:
    """How a call ends over a connection of its own."""
    async with channel:
        try:
            await rpc.GenerationServiceStub(channel).GetLoad(pb.GetLoadRequest(), metadata=metadata, timeout=10)  # type: ignore[misc]
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


async def test_tls_lets_in_who_trusts_the_authority_and_nobody_in_plain_text(
    engine: FakeEngine, authority: Authority, tmp_path: Path
) -> None:
    signed = authority.server()
    tls = Tls(TlsFiles(certificate=signed.certificate, key=signed.key))
    async with serving(served(engine), tls=tls) as port:
        assert await load_over(channel_to(port, authority.path)) is grpc.StatusCode.OK
        assert await load_over(channel_to(port, Authority(tmp_path).path)) is grpc.StatusCode.UNAVAILABLE
        assert await load_over(grpc.aio.insecure_channel(port.address)) is grpc.StatusCode.UNAVAILABLE


async def test_a_renewed_certificate_is_for_new_connections_and_drops_none(
    engine: FakeEngine, authority: Authority, tmp_path: Path
) -> None:
    current, other = authority.server("current"), Authority(tmp_path)
    tls = Tls(TlsFiles(certificate=current.certificate, key=current.key))
    engine.gate = Gate()
    async with serving(served(engine), tls=tls) as port, channel_to(port, authority.path) as old:
        call = rpc.GenerationServiceStub(old).Generate(pb.GenerateRequest(prompt="Hi", sampling=THREE), timeout=30)
        engine.gate.allow()
        await anext(aiter(call))
        assert await load_over(channel_to(port, other.path)) is grpc.StatusCode.UNAVAILABLE
        other.server().copy_to(current)
        tls.refresh()
        assert await load_over(channel_to(port, other.path)) is grpc.StatusCode.OK
        assert await load_over(channel_to(port, authority.path)) is grpc.StatusCode.UNAVAILABLE
        engine.gate.allow(2)
        assert (await drained(call))[-1].finished.usage.completion_tokens == 3


async def test_with_mutual_tls_the_certificate_names_the_tenant(authority: Authority, tmp_path: Path) -> None:
    signed = authority.server()
    tls = Tls(TlsFiles(certificate=signed.certificate, key=signed.key, client_ca=authority.path))
    stranger = Authority(tmp_path).client("/CN=search")
    host = FakeHost()
    async with serving(host, tls=tls, access=Access(client_certificates=True)) as port:
        for client in (None, stranger):
            assert await load_over(channel_to(port, authority.path, client)) is grpc.StatusCode.UNAVAILABLE
        for subject, names in (("/CN=search", "DNS:a"), ("/O=x", "URI:spiffe://c/ns/a/sa/b,DNS:a"), ("/O=x", "")):
            async with channel_to(port, authority.path, authority.client(subject, names)) as channel:
                call = rpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest(prompt="Hi", sampling=THREE))
                if not names:
                    assert (await refusal(call)).code() is grpc.StatusCode.UNAUTHENTICATED
                    continue
                await drained(call)
                kserve = triton_rpc.GRPCInferenceServiceStub(channel)
                await kserve.ServerLive(triton.ServerLiveRequest(), timeout=10)
                change = triton.RepositoryModelLoadRequest(model_name="a")
                denied = await refusal(kserve.RepositoryModelLoad(change, timeout=10))
                assert denied.code() is grpc.StatusCode.PERMISSION_DENIED
        assert [request.tenant for request in host.requests] == ["search", "spiffe://c/ns/a/sa/b"]


async def test_with_mutual_tls_and_keys_a_key_says_who_it_is_or_the_file_whose_certificate_it_is(
    authority: Authority, keys: KeysFile
) -> None:
    signed = authority.server()
    tls = Tls(TlsFiles(certificate=signed.certificate, key=signed.key, client_ca=authority.path))
    host = FakeHost()
    async with serving(host, tls=tls, access=Access(keys=keys, client_certificates=True)) as port:
        for name, metadata, tenant in (
            ("bob", (), "bob"),
            ("bob", BEARER, "ann"),
            ("ann", (), None),
            ("bob", (("x-api-key", "wrong"),), None),
        ):
            async with channel_to(port, authority.path, authority.client(f"/CN={name}")) as channel:
                request = pb.GenerateRequest(prompt="Hi", sampling=THREE)
                call = rpc.GenerationServiceStub(channel).Generate(request, metadata=metadata)
                if tenant is None:
                    assert (await refusal(call)).code() is grpc.StatusCode.UNAUTHENTICATED
                else:
                    await drained(call)
                    assert host.requests[-1].tenant == tenant
        assert len(host.requests) == 2
