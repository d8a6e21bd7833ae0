"""A real server with keys and TLS, and the clients that people have: what they need, and what the log keeps of it."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import tritonclient.grpc as triton
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from tritonclient.utils import InferenceServerException

from tests.e2e.conftest import ServerProcess
from tests.e2e.test_tritonclient import text_of, vllm_inputs
from tests.server import NEMOSERVE
from tests.service.security.certificates import Authority

CANARY = "Xylophone quagmire zebra"
PROMPT = f"{CANARY}: " + "one two three four five six seven eight nine ten " * 20


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Keys by tenant, and the path of their file under "file"."""
    file = str(tmp_path_factory.mktemp("keys") / "keys.yaml")
    made = {"file": file}
    for name in ("ann", "bob"):
        command = [NEMOSERVE, "keys", "new", name, "--file", file]
        made[name] = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    return made


@pytest.fixture(scope="module")
def guarded(smollm2_path: Path, authority: Authority, keys: dict[str, str]) -> Iterator[ServerProcess]:
    signed = authority.server()
    tls = ("--tls-cert", signed.certificate, "--tls-key", signed.key)
    running = ServerProcess.start(
        smollm2_path,
        *("--served-model-name", "smollm2-135m-instruct", "--api-keys-file", keys["file"]),
        *(*tls, "--log-level", "debug"),
    )
    yield running
    assert running.stop() == 0, "".join(running.lines)


@pytest.fixture
def typed(guarded: ServerProcess, authority: Authority) -> Iterator[rpc.GenerationServiceStub]:
    credentials = grpc.ssl_channel_credentials(authority.path.read_bytes())
    with grpc.secure_channel(guarded.address, credentials) as channel:
        yield rpc.GenerationServiceStub(channel)


def cached_tokens(typed: rpc.GenerationServiceStub, key: str) -> int:
    request = pb.GenerateRequest(prompt=PROMPT, sampling=pb.SamplingParameters(max_tokens=1))
    responses = list(typed.Generate(request, metadata=(("authorization", f"Bearer {key}"),), timeout=60))
    return responses[-1].finished.usage.cached_tokens


def test_tritonclient_needs_its_key_and_the_authority(
    guarded: ServerProcess, authority: Authority, keys: dict[str, str]
) -> None:
    ca = str(authority.path)
    with triton.InferenceServerClient(guarded.address, ssl=True, root_certificates=ca) as client:
        assert client.is_server_live()
        result = client.infer(
            "vllm_model", vllm_inputs(stream=False), headers={"authorization": f"Bearer {keys['ann']}"}
        )
        assert "Paris" in text_of(result)
        for headers in ({}, {"authorization": "Bearer nms-wrong"}):
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                client.infer("vllm_model", vllm_inputs(stream=False), headers=headers)
        with pytest.raises(InferenceServerException, match="PERMISSION_DENIED"):
            client.load_model("vllm_model", headers={"x-api-key": keys["ann"]})
    with triton.InferenceServerClient(guarded.address) as client, pytest.raises(InferenceServerException):
        client.is_server_live(client_timeout=10)


def test_the_openai_client_needs_its_key_and_the_authority(
    guarded: ServerProcess, authority: Authority, keys: dict[str, str]
) -> None:
    context = ssl.create_default_context(cafile=authority.path)
    base = f"https://{guarded.http_address}/v1"
    with (
        openai.DefaultHttpxClient(verify=context) as transport,
        openai.OpenAI(base_url=base, api_key=keys["ann"], max_retries=0, timeout=60, http_client=transport) as client,
    ):
        answer = client.completions.create(model="smollm2-135m-instruct", prompt=CANARY, max_tokens=2)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="nms-wrong").models.list()
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="smollm2-135m-instruct", prompt=CANARY, temperature=-1)
        schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": CANARY}}}
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(
                model="smollm2-135m-instruct",
                messages=[{"role": "user", "content": CANARY}],
                response_format=schema,
            )
    with (
        openai.OpenAI(base_url=base, api_key=keys["ann"], max_retries=0, timeout=60) as client,
        pytest.raises(openai.APIConnectionError),
    ):
        client.models.list()


def test_a_tenant_finds_its_own_prompts_in_the_cache_and_nobody_elses(
    typed: rpc.GenerationServiceStub, keys: dict[str, str]
) -> None:
    assert cached_tokens(typed, keys["ann"]) == 0
    assert cached_tokens(typed, keys["ann"]) >= 64
    assert cached_tokens(typed, keys["bob"]) == 0


def test_chat_takes_key_and_authority(guarded: ServerProcess, authority: Authority, keys: dict[str, str]) -> None:
    command = [NEMOSERVE, "chat", "--address", guarded.address, "--once", "Say hello", "--max-tokens", "3"]
    with_ca = [*command, "--tls-ca", authority.path]
    environ = {**os.environ, "NEMOSERVE_API_KEY": keys["bob"]}
    done = subprocess.run(with_ca, env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, bool(done.stdout.strip())) == (0, True), done.stderr
    hints = {"give yours with --api-key": with_ca, "give --tls-ca": command}
    for hint, without in hints.items():
        done = subprocess.run(without, capture_output=True, text=True, timeout=60)
        assert (done.returncode, hint in done.stderr) == (1, True), done.stderr


def test_neither_prompts_nor_keys_are_in_the_log(
    guarded: ServerProcess, typed: rpc.GenerationServiceStub, keys: dict[str, str]
) -> None:
    """At the level that logs most. Also after requests that are refused."""
    metadata = (("authorization", f"Bearer {keys['bob']}"),)
    for request in (
        pb.GenerateRequest(prompt=CANARY, sampling=pb.SamplingParameters(temperature=-1)),
        pb.GenerateRequest(prompt=CANARY, model="nobody"),
        pb.GenerateRequest(prompt=CANARY, adapter="nobody"),
    ):
        with pytest.raises(grpc.RpcError):
            list(typed.Generate(request, metadata=metadata, timeout=60))
    with pytest.raises(grpc.RpcError):
        list(typed.Generate(request, metadata=(("x-api-key", CANARY),), timeout=60))
    cached_tokens(typed, keys["bob"])
    printed = "".join(guarded.lines)
    assert "ready" in printed
    for secret in (CANARY, "eight nine ten", "nms-", keys["ann"], keys["bob"]):
        assert secret not in printed, secret


def test_a_server_that_cannot_be_secured_does_not_start(
    smollm2_path: Path, authority: Authority, tmp_path: Path
) -> None:
    ended, keys = authority.server("ended", days=-1), tmp_path / "keys.yaml"
    keys.write_text("- {name: a, key: nms-short}\n")
    for flags, code, complaint in (
        (["--tls-cert", ended.certificate, "--tls-key", ended.key], 1, "certificate has expired"),
        (["--api-keys-file", keys], 1, f"{keys}: a: key must have 16 to 512"),
        (["--host", "0.0.0.0"], 2, "is reachable by others"),
    ):
        command = [NEMOSERVE, "serve", smollm2_path, "--grpc-port", "0", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, complaint in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr
        assert "nms-" not in done.stderr.replace(str(keys), "")
