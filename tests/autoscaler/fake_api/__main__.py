"""The fake as a process, to look at with kubectl: `python -m tests.autoscaler.fake_api FOLDER`.

It knows our custom resource, runs the pods of workloads as nothing at all, and writes FOLDER/kubeconfig.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

from helm.chart import DEFINITION
from tests.autoscaler.fake_api import FakeApi, Workloads
from tests.service.security.certificates import Authority


async def serve(folder: Path) -> None:
    authority = await asyncio.to_thread(Authority, folder)
    async with FakeApi(authority=authority) as api, Workloads(api):
        api.apply_file(DEFINITION)
        kubeconfig = api.kubeconfig(folder).rename(folder / "kubeconfig")
        print(f"{api.url}, KUBECONFIG={kubeconfig}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(Path(sys.argv[1])))
