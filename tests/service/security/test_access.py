"""Who may call what, without any protocol around it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from service.caller import Caller
from service.errors import Code, ServiceError
from service.security.access import EVERYBODY, METRICS, Access, Level, decide
from service.security.keys import KeysFile

KEY, ADMIN = "nms-0123456789abcdef", "nms-fedcba9876543210"
ANN, OPS, BILLING = (
    Caller(tenant="ann", admin=False),
    Caller(tenant="ops", admin=True),
    Caller(tenant="bill", admin=False),
)
NOBODY = Caller(admin=False)


@pytest.fixture
def keys(tmp_path: Path) -> KeysFile:
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"- {{name: ann, key: {KEY}}}\n"
        f"- {{name: ops, key: {ADMIN}, admin: true}}\n"
        "- {name: bill, certificate: true}\n"
    )
    return KeysFile(path)


def admitted(access: Access, level: Level, *headers: tuple[str, str], certificate: str | None = None) -> Caller | Code:
    try:
        return access.admit(level, headers, lambda: certificate)
    except ServiceError as error:
        return error.code


@pytest.mark.parametrize(
    ("level", "caller", "answer"),
    [
        (Level.TENANT, None, Code.UNAUTHENTICATED),
        (Level.TENANT, ANN, ANN),
        (Level.TENANT, OPS, OPS),
        (Level.ADMIN, None, Code.UNAUTHENTICATED),
        (Level.ADMIN, ANN, Code.PERMISSION_DENIED),
        (Level.ADMIN, OPS, OPS),
    ],
)
def test_the_decision_is_this_table(level: Level, caller: Caller | None, answer: Caller | Code) -> None:
    if isinstance(answer, Caller):
        assert decide(level, caller) == answer
    else:
        with pytest.raises(ServiceError) as caught:
            decide(level, caller)
        assert caught.value.code is answer


def test_without_keys_everybody_on_this_machine_may_do_everything() -> None:
    for level, headers in itertools.product(Level, ((), (("authorization", "Bearer EMPTY"),))):
        caller = admitted(EVERYBODY, level, *headers)
        assert caller == (NOBODY if level is Level.OPEN else Caller())


def test_strangers_on_a_network_may_ask_but_not_change_what_is_served() -> None:
    access = Access(trusted=False)
    assert admitted(access, Level.TENANT) == NOBODY
    assert admitted(access, Level.ADMIN) is Code.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        ([("authorization", f"Bearer {KEY}")], ANN),
        ([("authorization", f"bearer   {KEY}")], ANN),
        ([("authorization", f" BEARER {KEY} ")], ANN),
        ([("x-api-key", KEY)], ANN),
        ([("x-api-key", KEY), ("authorization", f"Bearer {KEY}")], ANN),
        ([("authorization", "Basic cHJveHk="), ("x-api-key", KEY)], ANN),
        ([("x-tenant", "ops"), ("x-api-key", KEY)], ANN),
        ([("x-api-key", ADMIN)], OPS),
        ([], Code.UNAUTHENTICATED),
        ([("x-tenant", "ann")], Code.UNAUTHENTICATED),
        ([("authorization", "")], Code.UNAUTHENTICATED),
        ([("authorization", "Bearer")], Code.UNAUTHENTICATED),
        ([("authorization", KEY)], Code.UNAUTHENTICATED),
        ([("authorization", f"Token {KEY}")], Code.UNAUTHENTICATED),
        ([("authorization", f"Bearer {KEY} {KEY}")], Code.UNAUTHENTICATED),
        ([("authorization", f"Bearer {KEY.upper()}")], Code.UNAUTHENTICATED),
        ([("authorization", f"Bearer {KEY[:-1]}")], Code.UNAUTHENTICATED),
        ([("x-api-key", f"{KEY}\x00")], Code.UNAUTHENTICATED),
        ([("x-api-key", "ключ")], Code.UNAUTHENTICATED),
        ([("x-api-key", "\udc80")], Code.UNAUTHENTICATED),
        ([("x-api-key", KEY), ("x-api-key", ADMIN)], Code.UNAUTHENTICATED),
        ([("authorization", f"Bearer {KEY}"), ("authorization", "Bearer wrong")], Code.UNAUTHENTICATED),
    ],
)
def test_a_key_is_taken_from_either_header_as_it_is_or_not_at_all(
    keys: KeysFile, headers: list[tuple[str, str]], answer: Caller | Code
) -> None:
    assert admitted(Access(keys=keys), Level.TENANT, *headers) == answer
    assert admitted(Access(keys=keys), Level.OPEN, *headers) == NOBODY


def test_an_admins_key_is_needed_to_change_what_is_served(keys: KeysFile) -> None:
    access = Access(keys=keys)
    assert admitted(access, Level.ADMIN, ("x-api-key", KEY)) is Code.PERMISSION_DENIED
    assert admitted(access, Level.ADMIN, ("x-api-key", ADMIN)) == OPS
    assert admitted(access, Level.ADMIN) is Code.UNAUTHENTICATED


def test_no_refusal_quotes_what_was_sent(keys: KeysFile) -> None:
    for headers in ([("x-api-key", "nms-wrong")], [("x-api-key", KEY), ("x-api-key", "nms-wrong")]):
        with pytest.raises(ServiceError) as caught:
            Access(keys=keys).admit(Level.TENANT, headers, lambda: None)
        assert "nms-" not in caught.value.message


@pytest.mark.parametrize("name", ["bill", "ann", "nobody", "bill\n", None])
def test_a_certificate_stands_for_a_key_only_where_the_keys_file_says_so(keys: KeysFile, name: str | None) -> None:
    access = Access(keys=keys, client_certificates=True)
    assert admitted(access, Level.TENANT, certificate=name) == (BILLING if name == "bill" else Code.UNAUTHENTICATED)
    assert admitted(access, Level.TENANT, ("x-api-key", KEY), certificate=name) == ANN
    assert admitted(access, Level.TENANT, ("x-api-key", "wrong"), certificate="bill") is Code.UNAUTHENTICATED


def test_a_certificate_is_not_asked_for_where_clients_need_none(keys: KeysFile) -> None:
    assert admitted(Access(keys=keys), Level.TENANT, certificate="bill") is Code.UNAUTHENTICATED


def test_without_keys_the_certificate_names_the_tenant_which_is_no_admin() -> None:
    access = Access(client_certificates=True)
    for name in ("search", "spiffe://cluster.local/ns/a/sa/b", "Search Team"):
        assert admitted(access, Level.TENANT, certificate=name) == Caller(tenant=name, admin=False)
        assert admitted(access, Level.ADMIN, certificate=name) is Code.PERMISSION_DENIED
    for name in (None, "", "a\nb", "x" * 129, "имя"):
        assert admitted(access, Level.TENANT, certificate=name) is Code.UNAUTHENTICATED


def test_what_stands_in_no_table_is_for_admins() -> None:
    access = Access()
    for name in ("/nemoserve.v1.GenerationService/generate", "/grpc.health.v1.Health/check", "/x/y", ""):
        assert access.level_of_rpc(name) is Level.ADMIN
    for name in ("GET /v1/health/live/", "POST /v1/health/live", "get /v1/health/live", "GET //v1/models", "GET /new"):
        assert access.level_of_route(name) is Level.ADMIN


def test_metrics_need_a_key_unless_their_owner_says_otherwise() -> None:
    for route in METRICS:
        assert Access().level_of_route(route) is Level.TENANT
        assert Access(open_routes=frozenset(METRICS)).level_of_route(route) is Level.OPEN


@pytest.mark.parametrize(
    ("origin", "served"),
    [
        (None, True),
        ("http://localhost:8000", True),
        ("https://127.0.0.1", True),
        ("http://[::1]:3000", True),
        ("http://evil.example:8000", False),
        ("http://localhost.evil.example", False),
        ("http://localhost@evil.example", False),
        ("http://[::1", False),
        ("null", False),
        ("", False),
    ],
)
def test_a_site_whose_name_leads_here_cannot_use_what_is_open_on_this_machine(
    keys: KeysFile, origin: str | None, served: bool
) -> None:
    if served:
        EVERYBODY.check_origin(origin)
    else:
        with pytest.raises(ServiceError, match="only pages of this machine"):
            EVERYBODY.check_origin(origin)
    for access in (Access(keys=keys), Access(client_certificates=True), Access(trusted=False)):
        access.check_origin(origin)
