"""A running server looks at its keys and certificates again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from nemoserve.v1 import generation_pb2 as pb

from service.security.access import Access
from service.security.keys import KeysFile
from service.security.tls import Tls, TlsFiles
from tests.service.grpc.ports import drained
from tests.service.lives import Life, config, living
from tests.service.security.certificates import Authority

KEY, OTHER = "nms-0123456789abcdef", "nms-fedcba9876543210"


async def opens(life: Life, key: str) -> bool:
    try:
        await life.typed.GetLoad(pb.GetLoadRequest(), metadata=(("x-api-key", key),), timeout=10)
        return True
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            raise
        return False


async def test_a_new_keys_file_counts_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.security.keys.RELOAD_SECONDS", 0.01)
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{name: ann, key: {KEY}}}\n")
    async with living(config(tmp_path, access=Access(keys=KeysFile(path)))) as life:
        assert (await opens(life, KEY), await opens(life, OTHER)) == (True, False)
        path.write_text(f"- {{name: somebody, key: {OTHER}}}\n")
        async with asyncio.timeout(30):
            while not await opens(life, OTHER):
                pass
        assert not await opens(life, KEY)


async def test_limits_of_the_file_hold_and_change_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.security.keys.RELOAD_SECONDS", 0.01)
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{name: ann, key: {KEY}, tokens_per_minute: 1}}\n- {{name: bob, key: {OTHER}}}\n")

    async def is_served(life: Life, key: str) -> bool:
        request = pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParameters(max_tokens=3))
        try:
            await drained(life.typed.Generate(request, metadata=(("x-api-key", key),), timeout=10))
            return True
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return False

    async with living(config(tmp_path, access=Access(keys=KeysFile(path)))) as life:
        assert [await is_served(life, key) for key in (KEY, KEY, OTHER, OTHER)] == [True, False, True, True]
        path.write_text(f"- {{name: ann, key: {KEY}}}\n- {{name: bob, key: {OTHER}, tokens_per_minute: 1}}\n")
        async with asyncio.timeout(30):
            while not await is_served(life, KEY):
                pass


async def test_a_renewed_certificate_is_taken_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.security.tls.RELOAD_SECONDS", 0.01)
    authority, other = Authority(tmp_path / "one"), Authority(tmp_path / "other")
    current = authority.server()
    tls = Tls(TlsFiles(certificate=current.certificate, key=current.key))
    async with living(config(tmp_path, tls=tls)) as life:
        other.server().copy_to(current)
        credentials = grpc.ssl_channel_credentials(other.path.read_bytes())
        soon = [("grpc.max_reconnect_backoff_ms", 100), ("grpc.initial_reconnect_backoff_ms", 100)]
        channel = grpc.aio.secure_channel(life.address, credentials, options=soon)
        async with channel, asyncio.timeout(30):
            await channel.channel_ready()
