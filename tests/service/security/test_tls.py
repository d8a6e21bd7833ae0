"""Certificates: what is refused at the start and in which words, and how renewed files are taken."""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
from pathlib import Path

import pytest

from service.security.errors import SecurityError
from service.security.tls import Tls, TlsFiles, certificate_name
from tests.service.security.certificates import Authority, Signed


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def files(signed: Signed, key: Path | None = None, client_ca: Path | None = None) -> TlsFiles:
    return TlsFiles(certificate=signed.certificate, key=key or signed.key, client_ca=client_ca)


def test_good_files_are_taken(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert not Tls(files(authority.server("good", days=90))).client_certificates
    [record] = caplog.records
    assert (record.levelname, record.__dict__["days_left"]) == ("INFO", 89)
    assert Tls(files(authority.server(), client_ca=authority.path)).client_certificates


def test_a_certificate_that_ends_soon_is_warned_of(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    Tls(files(authority.server()))
    [record] = caplog.records
    assert (record.levelname, record.__dict__["days_left"]) == ("WARNING", 1)


def test_what_cannot_be_used_is_named(authority: Authority, tmp_path: Path) -> None:
    good, ended, client = authority.server(), authority.server("ended", days=-1), authority.client("/CN=c")
    locked, text = tmp_path / "locked.key", tmp_path / "text"
    locked.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    text.write_text("hello")
    other_ca = Authority(tmp_path / "other").path
    wrong = [
        (files(ended), f"{ended.certificate}: certificate has expired"),
        (files(client), f"{client.certificate}: unsupported certificate purpose|{client.certificate}: unsuitable"),
        (files(good, key=ended.key), f"{ended.key}: is not the key of {good.certificate}"),
        (files(good, key=good.certificate), "holds no private key in PEM form"),
        (files(Signed(good.key, good.key)), "holds no certificate in PEM form"),
        (files(good, key=locked), f"{locked}: is encrypted"),
        (files(good, key=tmp_path / "none"), f"{tmp_path / 'none'}: No such file"),
        (files(good, client_ca=text), f"{text}: holds no certificate in PEM form"),
        (files(good, client_ca=good.certificate), "holds no CA certificate that may be used now"),
    ]
    for each, complaint in wrong:
        with pytest.raises(SecurityError, match=complaint):
            Tls(each)
    assert Tls(files(good, client_ca=other_ca)).client_certificates


def test_renewed_files_are_taken_and_broken_ones_told_of_once(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    current = authority.server("current")
    tls = Tls(files(current))
    first = tls._current
    tls.refresh()
    assert tls._current is first
    caplog.clear()
    os.replace(authority.server("half").certificate, current.certificate)  # its key comes later
    for _ in range(3):
        tls.refresh()
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == ("ERROR", "certificates stay as they were")
    assert tls._current is first
    authority.server("next").copy_to(current)
    tls.refresh()
    assert tls._current.chain == current.certificate.read_bytes() != first.chain


def connect(server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLObject:
    """The client's end of a connection in memory, and all that the server has said by itself."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, session=session)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, theirs, ours, theirs):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    with contextlib.suppress(ssl.SSLWantReadError):
        ours.read(1)
    return ours


@pytest.mark.parametrize("mutual", [False, True])
def test_with_client_certificates_each_connection_is_verified_anew(authority: Authority, mutual: bool) -> None:
    tls = Tls(files(authority.server(), client_ca=authority.path if mutual else None))
    client, own = ssl.create_default_context(cafile=authority.path), authority.client("/CN=search")
    client.check_hostname = False
    client.load_cert_chain(own.certificate, own.key)
    first = connect(tls.context, client)
    assert connect(tls.context, client, first.session).session_reused is not mutual


@pytest.mark.parametrize(
    ("common", "alternative", "name"),
    [(["a"], ["b", "c"], "a"), ([], ["b", "c"], "b"), ([], [], None), (["a", "z"], [], "a"), ([""], ["b"], "b")],
)
def test_a_client_is_called_by_its_common_name_or_else_its_first_alternative(
    common: list[str], alternative: list[str], name: str | None
) -> None:
    assert certificate_name(common, alternative) == name
