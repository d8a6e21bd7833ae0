"""The operator as the process that runs in its pod."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from autoscaler.cluster.face import LEASES, QUEUE_AUTOSCALERS
from autoscaler.main import cli
from tests.autoscaler.api_under_test import definition
from tests.autoscaler.controller.clock import until
from tests.autoscaler.controller.scene import ACCOUNT, NAME, grant, scaler, workload
from tests.autoscaler.fake_api import FakeApi

COMMAND = Path(sys.executable).parent / "nemoserve-autoscaler"
LOOPBACK = ("--metrics-host", "127.0.0.1", "--metrics-port", "0", "--pod-name", "operator-0", "--log-json")


class Running:
    """Attributes:
    lines: what it has logged so far.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(line.decode())

    @property
    def log(self) -> str:
        return "".join(self.lines)

    async def port(self) -> int:
        await until(lambda: '"metrics_port"' in self.log or self.process.returncode is not None, 60)
        found = re.search(r'"metrics_port": (\d+)', self.log)
        assert found, self.log
        return int(found[1])

    async def end(self) -> int:
        """By itself, within a minute."""
        async with asyncio.timeout(60):
            code = await self.process.wait()
            await self._reading
        return code


@asynccontextmanager
async def operator(*args: str) -> AsyncIterator[Running]:
    environment = {name: value for name, value in os.environ.items() if name not in ("KUBECONFIG", "POD_NAMESPACE")}
    process = await asyncio.create_subprocess_exec(str(COMMAND), *args, stderr=asyncio.subprocess.PIPE, env=environment)
    running = Running(process)
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_it_leads_tells_and_gives_the_lease_back_at_its_end(tmp_path: Path) -> None:
    async with FakeApi() as api:
        api.apply(copy.deepcopy(definition()))
        api.apply(workload("Deployment", 1), scaler(), scaler(name="other"))
        grant(api, "operator")
        config = str(api.kubeconfig(tmp_path, f"{ACCOUNT}operator"))
        async with operator("--kubeconfig", config, "--name", NAME, *LOOPBACK) as running, httpx.AsyncClient() as http:
            url = f"http://127.0.0.1:{await running.port()}"
            await until(lambda: "status" in api.get(QUEUE_AUTOSCALERS, NAME), 60)
            assert api.get(QUEUE_AUTOSCALERS, NAME)["status"]["desired"] == 1
            assert (await http.get(f"{url}/healthz")).text == "ok\n"
            assert (await http.get(f"{url}/readyz")).text == "ok, leads\n"
            shown = (await http.get(f"{url}/metrics")).text
            assert "nemoserve_autoscaler_leader 1.0" in shown
            assert 'nemoserve_autoscaler_desired_replicas{autoscaler="nemo"} 1.0' in shown
            assert 'type="Ready"' in shown
            assert api.get(LEASES, "nemoserve-autoscaler")["spec"]["holderIdentity"].startswith("operator-0_")
            running.process.terminate()
            assert await running.end() == 0, running.log
        assert api.get(LEASES, "nemoserve-autoscaler")["spec"]["holderIdentity"] == ""
        assert "status" not in api.get(QUEUE_AUTOSCALERS, "other")  # which --name leaves out


async def test_a_process_that_finds_no_cluster_ends_with_one_line_that_says_why() -> None:
    async with operator("--kubeconfig", "/no/such/file") as running:
        assert await running.end() == 1
        assert running.lines[-1].startswith("Error: 0 InvalidConfiguration: cannot use /no/such/file")
        assert "Traceback" not in running.log


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.mark.usefixtures("logs_as_before")
@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 1, "cannot use this pod's service account"),
        (["--name", "a", "--activate", "b"], 2, "--activate b is none of --name a"),
        (["--metrics-port", "99999"], 2, "99999 is not in the range"),
        (["--tls-server-name", "nemo"], 2, "no file of authorities"),
        (["--activate", "a", "--tls-ca", __file__, "--tls-server-name", "nemo"], 2, "needs --tls-cert and --tls-key"),
        (["--hold-seconds", "0"], 2, "0.0 is not in the range x>0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(args: list[str], code: int, said: str) -> None:
    found = CliRunner(env={"KUBECONFIG": None, "POD_NAMESPACE": None}).invoke(cli, args)
    assert found.exit_code == code
    assert said in found.output
