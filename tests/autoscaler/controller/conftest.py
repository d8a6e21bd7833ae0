"""What most tests of looks begin with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.autoscaler.controller.scene import Scene, scene


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Scene]:
    """Three replicas that serve, looked at once."""
    async with scene(tmp_path, replicas=3) as here:
        await here.look()
        yield here
