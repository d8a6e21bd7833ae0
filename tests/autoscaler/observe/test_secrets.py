"""With what the operator shows servers who it is, and knows them."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest

from autoscaler.observe import Observer, Secrets
from service.security.access import Access
from service.security.keys import KeysFile
from tests.autoscaler.observe.replicas import VLLM, Spec, Web, fleet, free_port, patient, pod
from tests.service.fake_engine import FakeEngine
from tests.service.grpc.ports import served, serving
from tests.service.security.certificates import Authority

KEY = "nms-0123456789abcdef"


async def test_the_key_is_shown_and_a_new_one_holds_from_the_next_look(tmp_path: Path) -> None:
    (path := tmp_path / "key").write_text(f"{KEY}\n")
    async with fleet(1) as here:
        observer = patient(Secrets(api_key=path))
        await observer.look(here.pods, here.spec, 1.0)
        path.write_text("another key")
        await observer.look(here.pods, here.spec, 2.0)
        path.unlink()
        await observer.look(here.pods, here.spec, 3.0)  # the one before holds
        shown = [each["authorization"] for each in here.replicas[0].asked]
        assert shown == [f"Bearer {KEY}", "Bearer another key", "Bearer another key"]
        await observer.close()


async def test_a_real_server_answers_the_operator_with_any_tenants_key(tmp_path: Path) -> None:
    (keys := tmp_path / "keys.yaml").write_text(f"- name: operator\n  key: {KEY}\n")
    (path := tmp_path / "key").write_text(KEY)
    async with serving(served(FakeEngine()), access=Access(keys=KeysFile(keys), trusted=False)) as port:
        ip, _, number = port.address.rpartition(":")
        pods, spec = [pod("p", ip=ip)], Spec(int(number), 1)
        allowed, stranger = patient(Secrets(api_key=path)), patient()
        [seen], [unseen] = await allowed.look(pods, spec, 1.0), await stranger.look(pods, spec, 1.0)
        assert seen.load is not None
        assert (seen.load.capacity, seen.load.kv_page_tokens, seen.load.max_step_tokens) == (8, 16, 64)
        assert unseen.load is None
        await allowed.close()
        await stranger.close()


async def test_certificates_are_shown_and_looked_at(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, client = authority.server(), authority.client("/CN=operator")
    files: dict[str, Any] = {"ca": authority.path, "server_name": "localhost"}
    credentials = grpc.ssl_server_credentials(
        [(server.key.read_bytes(), server.certificate.read_bytes())],
        root_certificates=authority.path.read_bytes(),
        require_client_auth=True,
    )
    async with fleet(1, credentials) as here:  # at an address that is not in the certificate
        for secrets, answers in (
            (Secrets(**files, certificate=client.certificate, key=client.key), True),
            (Secrets(**files), False),
            (Secrets(**files | {"server_name": "elsewhere"}, certificate=client.certificate, key=client.key), False),
            (None, False),
        ):
            observer = Observer(secrets, seconds=5.0)
            [seen] = await observer.look(here.pods, here.spec, 1.0)
            assert (seen.load is not None) == answers
            await observer.close()


async def test_metrics_are_asked_for_with_the_same_key_and_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, client = authority.server(), authority.client("/CN=operator")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.path))
    context.load_cert_chain(server.certificate, server.key)
    context.verify_mode = ssl.CERT_REQUIRED
    (key := tmp_path / "key").write_text(KEY)
    shown: dict[str, Any] = {"certificate": client.certificate, "key": client.key}
    pods, spec = [pod("p", ip="127.0.9.2")], Spec(free_port(), free_port())
    async with Web(VLLM).at("127.0.9.2", spec.metrics_port, ssl=context) as web:
        for name, files, answers in (("localhost", shown, True), ("localhost", {}, False), ("elsewhere", shown, False)):
            secrets = Secrets(api_key=key, ca=authority.path, server_name=name, **files)
            observer = Observer(secrets, seconds=5.0)
            [seen] = await observer.look(pods, spec, 1.0)
            assert (seen.load is not None) == answers
            assert KEY not in repr(secrets.read())
            await observer.close()
    [head] = web.requests
    assert f"Bearer {KEY}" in head


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"ca": "ca.pem"}, "server_name"),
        ({"server_name": "a"}, "ca"),
        ({"ca": "ca.pem", "server_name": "a", "key": "k"}, "together"),
    ],
)
def test_half_of_what_certificates_need_is_refused(fields: dict[str, Any], word: str) -> None:
    paths: dict[str, Any] = {name: value if name == "server_name" else Path(value) for name, value in fields.items()}
    with pytest.raises(ValueError, match=word):
        Secrets(**paths)


def test_files_that_are_not_there_or_no_key_end_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Observer(Secrets(api_key=tmp_path / "nowhere"))
    (path := tmp_path / "key").write_text("two\nlines")
    with pytest.raises(ValueError, match="one line"):
        Observer(Secrets(api_key=path))
