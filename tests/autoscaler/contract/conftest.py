"""The contract: what an API server does, as the operator depends on it, is the same of our fake and, with --cluster,
of a real one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.autoscaler import api_under_test
from tests.autoscaler.api_under_test import Api


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    servers = ["fake", "cluster"] if metafunc.config.getoption("--cluster") else ["fake"]
    metafunc.parametrize("server", servers)


@pytest.fixture
async def api(server: str, tmp_path: Path) -> AsyncIterator[Api]:
    async with api_under_test.fake(tmp_path) if server == "fake" else api_under_test.real() as ready:
        yield ready
