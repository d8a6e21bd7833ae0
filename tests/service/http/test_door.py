"""The HTTP port's door: every route by everybody, odd spellings, TLS, client certificates, and what the log keeps."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.routing import Route
from starlette.types import ASGIApp

from service.errors import Code, ServiceError
from service.http.auth import Authenticate
from service.security.access import ROUTES, Access, Level
from service.security.keys import KeysFile
from service.security.tls import Tls, TlsFiles
from tests.service.fakes import Answer, FakeHost
from tests.service.http.ports import Port, error, serving
from tests.service.lives import config, living
from tests.service.security.certificates import Authority, Signed
from tests.service.test_management import PACKAGE

KEY, ADMIN = "nms-0123456789abcdef", "nms-fedcba9876543210"
BEARER = {"authorization": f"Bearer {KEY}"}
STRANGERS: list[dict[str, str]] = [
    {},
    {"authorization": "Bearer nms-wrong-0123456789"},
    {"authorization": f"Basic {KEY}"},
    {"x-api-key": KEY.upper()},
    {"x-tenant": "ann"},
    {"host": "localhost/v1/health/live?"},
]
HEALTH = {"GET /v1/health/live", "GET /v1/health/ready", "GET /v2/health/live", "GET /v2/health/ready", "GET /health"}
OPEN = {*HEALTH, "GET /", "GET /playground/{name}"}


@pytest.fixture
def keys(tmp_path: Path) -> KeysFile:
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{name: ann, key: {KEY}}}\n- {{name: ops, key: {ADMIN}, admin: true}}\n")
    return KeysFile(file)


@pytest.fixture
async def port(keys: KeysFile) -> AsyncIterator[Port]:
    async with serving(FakeHost(), access=Access(keys=keys)) as running:
        yield running


async def test_every_route_by_everybody(keys: KeysFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the server as it is, whoever has added routes to it."""
    mounted: list[Route] = []

    class Spy(Authenticate):
        def __init__(self, app: ASGIApp, access: Access, routes: Sequence[Route]) -> None:
            mounted.extend(routes)
            super().__init__(app, access, routes)

    monkeypatch.setattr("service.http.app.Authenticate", Spy)
    settings = config(tmp_path, access=Access(keys=keys), http_address="127.0.0.1:0")
    async with living(settings, describe=lambda options: PACKAGE) as life, httpx.AsyncClient(timeout=20) as client:
        names = {f"{method} {route.path}" for route in mounted for method in (route.methods or set()) - {"HEAD"}}
        assert names >= {*HEALTH, "GET /v1/license", "GET /metrics", "POST /v1/chat/completions"}
        assert names - ROUTES.keys() == set(), "these have no level in service.security.access"
        for name in names:
            method, path = name.split(" ")
            url = f"http://{life.server.ports.http_address}{re.sub(r'{[^}]*}', 'toy', path)}"
            for headers in STRANGERS:
                answer = await client.request(method, url, headers=headers)
                assert (answer.status_code == 401) == (name not in OPEN), (name, headers, answer.text)
            for headers in (BEARER, {"x-api-key": KEY}):
                answer = await client.request(method, url, headers=headers)
                assert answer.status_code not in (401, 403), name


def test_only_health_and_the_page_are_open() -> None:
    assert {name for name, level in ROUTES.items() if level is Level.OPEN} == OPEN
    assert {name for name, level in ROUTES.items() if level is Level.ADMIN} == set()


async def test_the_refusal_has_openais_shape_and_says_what_to_do(port: Port) -> None:
    missing = await port.http.get("/v1/models")
    assert missing.headers["www-authenticate"] == "Bearer"
    told = error(missing, 401)
    assert (told["type"], told["code"]) == ("authentication_error", "unauthenticated")
    assert "authorization: Bearer KEY" in told["message"]
    for key, kind in (("nms-wrong", openai.AuthenticationError), (KEY, None)):
        client = port.openai.with_options(api_key=key)
        if kind is None:
            assert (await client.models.list()).data
        else:
            with pytest.raises(kind):
                await client.models.list()


async def test_no_spelling_gets_past(port: Port) -> None:
    hosts = ("localhost", "localhost/v1/health/live?", "x:80/v1/health/live", "", "[::1]#")
    forms = ("{0}", "/{0}", "{0}/", "http://x{0}", "/v1/health/live/..{0}", "{0}?/v1/health/live", "{0}%0a")
    for target, host, form in itertools.product(("/v1/models", "/v1/chat/completions", "/nothing"), hosts, forms):
        status = await raw(port, f"GET {form.format(target)} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")
        assert status in (400, 401), (target, host, form)
    near = ("/v1/health/live/", "//v1/health/live", "/v1//health/live", "/V1/health/live", "/v1/health/live%0a")
    for target in (*near, "/v1/health", "/v2/health/live;x", "/v1/%2e/health/live", "%2fv1/health/live"):
        assert await raw(port, f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n") in (400, 401), target
    assert await raw(port, "GET /v2/health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n") == 200


async def raw(port: Port, request: str) -> int:
    """The status of an answer to just these bytes."""
    reader, writer = await asyncio.open_connection(*port.address.split(":"))
    writer.write(request.encode())
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return int(answer.split(b" ", 2)[1])


async def test_a_stranger_cannot_make_the_server_read_his_body(port: Port) -> None:
    """The answer comes before the body does."""
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n"
    reader, writer = await asyncio.open_connection(*port.address.split(":"))
    writer.write(f"{head}\r\n".encode())
    assert (await asyncio.wait_for(reader.readline(), 20)).split(b" ")[1] == b"401"
    writer.close()


async def test_a_head_that_does_not_end_is_given_up(port: Port) -> None:
    """As one large header and as many small ones; the server goes on."""
    for filler in ("x: " + "y" * 2**20, "".join(f"x{number}: y\r\n" for number in range(50_000))):
        reader, writer = await asyncio.open_connection(*port.address.split(":"))
        writer.write(f"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n{filler}".encode())
        with suppress(ConnectionResetError):  # by a server that closes on what it has not read
            assert (await asyncio.wait_for(reader.readline(), 20)).split(b" ")[1] == b"400"
        writer.close()
    assert await raw(port, "GET /v2/health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n") == 200


async def test_each_request_of_a_connection_is_its_own_tenants(keys: KeysFile) -> None:
    """Pipelined: both are there before the first is answered."""
    host = FakeHost()
    body = '{"prompt":"Hi","max_tokens":1}'
    request = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    async with serving(host, access=Access(keys=keys)) as port:
        reader, writer = await asyncio.open_connection(*port.address.split(":"))
        for headers in (f"x-api-key: {ADMIN}\r\n", f"x-api-key: {KEY}\r\n", "connection: close\r\n"):
            writer.write(f"{request}{headers}content-length: {len(body)}\r\n\r\n{body}".encode())
        answers = await asyncio.wait_for(reader.read(), 20)
        writer.close()
    assert re.findall(rb"HTTP/1\.1 (\d+)", answers) == [b"200", b"200", b"401"]
    assert [each.tenant for each in host.requests] == ["ops", "ann"]


# -- TLS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def files(signed: Signed, client_ca: Path | None = None) -> Tls:
    return Tls(TlsFiles(certificate=signed.certificate, key=signed.key, client_ca=client_ca))


def client_of(port: Port, ca: Path, own: Signed | None = None) -> httpx.AsyncClient:
    context = ssl.create_default_context(cafile=ca)
    if own is not None:
        context.load_cert_chain(own.certificate, own.key)
    return httpx.AsyncClient(base_url=f"https://{port.address}", verify=context, timeout=20)


async def test_tls_lets_in_who_trusts_the_authority_and_nobody_in_plain_text(
    authority: Authority, tmp_path: Path
) -> None:
    async with serving(FakeHost(), tls=files(authority.server())) as port:
        async with client_of(port, authority.path) as client:
            assert (await client.get("/v1/models")).status_code == 200
        async with client_of(port, Authority(tmp_path).path) as client:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.get("/v1/models")
        with pytest.raises(httpx.RemoteProtocolError):
            await port.http.get("/v1/models")


async def test_a_renewed_certificate_is_for_new_connections_and_drops_none(
    authority: Authority, tmp_path: Path
) -> None:
    current, other = authority.server("current"), Authority(tmp_path)
    tls = files(current)
    async with serving(FakeHost(), tls=tls) as port, client_of(port, authority.path) as old:
        assert (await old.get("/v1/models")).status_code == 200
        other.server().copy_to(current)
        tls.refresh()
        async with client_of(port, other.path) as client:
            assert (await client.get("/v1/models")).status_code == 200
        assert (await old.get("/v1/models")).status_code == 200  # over the connection that it has
        async with client_of(port, authority.path) as client:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.get("/v1/models")


async def test_with_mutual_tls_the_certificate_names_the_tenant_as_over_grpc(
    authority: Authority, tmp_path: Path
) -> None:
    host = FakeHost()
    tls, stranger = files(authority.server(), authority.path), Authority(tmp_path).client("/CN=search")
    async with serving(host, tls=tls, access=Access(client_certificates=True)) as port:
        for own in (None, stranger):
            async with client_of(port, authority.path, own) as client:
                with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                    await client.get("/v1/models")
        for subject, names in (("/CN=search", "DNS:a"), ("/O=x", "URI:spiffe://c/ns/a/sa/b,DNS:a"), ("/O=x", "")):
            async with client_of(port, authority.path, authority.client(subject, names)) as client:
                answer = await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1})
                assert answer.status_code == (200 if names else 401)
    assert [request.tenant for request in host.requests] == ["search", "spiffe://c/ns/a/sa/b"]


async def test_a_client_authority_that_is_taken_away_counts_for_new_connections(
    authority: Authority, tmp_path: Path
) -> None:
    ca = tmp_path / "clients.pem"
    ca.write_bytes(authority.path.read_bytes())
    tls, own = files(authority.server(), ca), authority.client("/CN=search")
    async with serving(FakeHost(), tls=tls, access=Access(client_certificates=True)) as port:
        async with client_of(port, authority.path, own) as client:
            assert (await client.get("/v1/models")).status_code == 200
        ca.write_bytes(Authority(tmp_path / "other").path.read_bytes())
        tls.refresh()
        async with client_of(port, authority.path, own) as client:
            with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                await client.get("/v1/models")


# -- the log -------------------------------------------------------------------------------------------------------


async def test_neither_prompts_nor_keys_are_in_the_log(keys: KeysFile, caplog: pytest.LogCaptureFixture) -> None:
    canary, unavailable = "canary-prompt", ServiceError(Code.UNAVAILABLE, "down")
    answers = {f"{canary} 1": Answer(error=unavailable), f"{canary} 2": Answer(error=unavailable, error_after=1)}
    answers[f"{canary} 3"] = Answer(finished_error="broken", error_after=1)
    answers[f"{canary} 4"] = Answer(error=LookupError("a fault of ours"))  # type: ignore[arg-type]
    bodies: list[dict[str, Any]] = [
        *({"prompt": f"{canary} {number}", "stream": stream} for number in range(5) for stream in (False, True)),
        *({"prompt": canary, name: canary} for name in ("model", "temperature", "nothing", "response_format")),
        {"prompt": canary * 500},
        {"messages": [{"role": "user", "content": canary}]},
        {"messages": [{"role": canary, "content": canary}]},
    ]
    failed = 0
    with caplog.at_level(logging.DEBUG):
        async with serving(FakeHost(answers=answers), access=Access(keys=keys)) as port:
            for headers in (BEARER, {"x-api-key": "nms-wrong"}, {}):
                for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", f"/{canary}"):
                    for body in bodies:
                        answer = await port.http.post(path, json={"max_tokens": 2} | body, headers=headers)
                        failed += answer.status_code >= 400
                    await port.http.post(path, content=canary, headers={"content-type": "application/json"} | headers)
    assert failed > 100
    ours = [record for record in caplog.records if record.name.split(".")[0] in ("service", "uvicorn")]
    assert {record.getMessage() for record in ours} >= {"a request failed"}
    for record in ours:
        heard = caplog.handler.format(record) + str(vars(record))
        assert canary not in heard, heard
        assert "nms-" not in heard, heard
