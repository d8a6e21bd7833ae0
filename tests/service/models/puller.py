"""A process that pulls the toy model: `python -m tests.service.models.puller ROOT INDEX [--blind]`. Prints JSON.

`--blind`: free space is not looked at first, as if the disk filled up meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from service.models import catalog, download
from service.models.errors import StoreError
from service.models.store import ModelStore
from tests.service.models.package_index import toy

BEAT, STALE = 0.1, 2.0  # seconds; nobody waits for the lock of a dead process longer than for the rest of the test


def main(root: str, url: str, *options: str) -> None:
    catalog.CATALOG["toy"] = toy()
    download.BACKOFF_SECONDS = 0.0
    if "--blind" in options:
        download.ensure_space = lambda *_: None
    store = ModelStore(Path(root), index=lambda: url, beat=BEAT, stale=STALE)
    try:
        content = store.pull("toy").path.read_bytes()
    except StoreError as error:
        found = store.find("toy")
        print(json.dumps({"error": str(error), "found": found and str(found.path)}))
        return
    print(json.dumps({"sha256": hashlib.sha256(content).hexdigest()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
