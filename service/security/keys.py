"""The keys file: who may call the server, and how much of it is theirs. YAML, a list with an entry for each tenant:

    - name: search                   # the tenant, as logs, metrics and fair sharing know it
      sha256: 5f0c…                  # of its key, in hex; a list of them while one replaces another
      weight: 2                      # its share of the engine beside others; 1 if not said
      max_running: 8                 # requests at once; further ones wait
      max_queued: 64                 # requests waiting; further ones are refused
      tokens_per_minute: 600000      # of prompts and answers together
      best_priority: -1              # the best class that it may ask for, lower being better; 0 if not said
    - name: operations
      sha256: c1d2…
      admin: true                    # may also change what is served, and ask for any class
    - name: billing
      certificate: true              # no key: the client certificate of this name is enough (mTLS)

`nemoserve keys new NAME` makes a key and its entry. The file holds digests, so that who reads it cannot call the
server; a key has 256 random bits, so that a plain SHA-256 cannot be turned back. `key: TEXT` in place of the digest is
understood too. The file is looked at again every second: what is added or removed counts for the next request. One that
cannot be read or understood changes nothing and is told of once.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from service.caller import TenantLimits
from service.security.errors import SecurityError
from service.security.files import read_file, version_of

log = logging.getLogger(__name__)

RELOAD_SECONDS = 1.0  # how long a key that was taken away still opens; a look at the file takes microseconds
MAX_KEYS = 1000  # each request is compared with all of them, which takes 0.1 ms for so many
MIN_KEY, MAX_KEY = 16, 512  # characters; shorter ones can be guessed, longer ones do not fit into a header with others
KEY_PREFIX = "nms-"  # lets people and secret scanners tell what it is
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._:/@+-]{0,126}[A-Za-z0-9])?")
"""Of a tenant, and so of a client certificate: a host name, a SPIFFE id and "Search Team" are some."""
NO_LIMITS = TenantLimits(best_priority=0)  # of its own: classes are strict, so none but normal is for the asking


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One entry of the file."""

    name: str
    digests: tuple[bytes, ...] = ()
    certificate: bool = False
    admin: bool = False
    limits: TenantLimits = NO_LIMITS


class Keys:
    """The tenants of one version of the file, in which each name and each key stands once."""

    def __init__(self, tenants: tuple[Tenant, ...]) -> None:
        self._tenants = {tenant.name: tenant for tenant in tenants}
        self._by_digest = tuple((digest, tenant) for tenant in tenants for digest in tenant.digests)

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        return self._tenants

    def of_key(self, key: str) -> Tenant | None:
        """Whose key it is. Takes as long for a right one as for a wrong one."""
        digest, found = digest_of(key), None
        for known, tenant in self._by_digest:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def of_certificate(self, name: str) -> Tenant | None:
        """Who is called so by client certificates."""
        tenant = self._tenants.get(name)
        return tenant if tenant is not None and tenant.certificate else None


class KeysFile:
    """A keys file and its newest version that can be used.

    Raises:
        SecurityError: the file cannot be used. Only at the start: later the keys stay as they were.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = version_of(path)
        self.keys = read_keys(path)

    def refresh(self) -> None:
        """Read the file again if it is another one than last time."""
        if (version := version_of(self._path)) == self._seen:
            return
        self._seen = version
        try:
            self.keys = read_keys(self._path)
        except SecurityError as error:
            log.error("keys stay as they were", extra={"reason": str(error)})
        else:
            log.info("keys read again", extra={"tenants": len(self.keys.tenants)})

    async def watch(self) -> None:
        """Refresh every RELOAD_SECONDS, in a thread: the file may lie on a network."""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            await asyncio.to_thread(self.refresh)

    def limits(self, tenant: str) -> TenantLimits:
        """What the file says of it; nothing special for who is not in it."""
        found = self.keys.tenants.get(tenant)
        return NO_LIMITS if found is None else found.limits


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def new_key() -> str:
    """A key that nobody can guess."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def entry_of(name: str, key: str, *, admin: bool) -> str:
    """The lines of the file for a tenant with this key.

    Raises:
        SecurityError: this cannot be a name.
    """
    check_name(name)
    lines = [f'- name: "{name}"', f'  sha256: "{digest_of(key).hex()}"', *(["  admin: true"] if admin else [])]
    return "\n".join(lines) + "\n"


def add_entry(path: Path, entry: str) -> None:
    """Append to the file, or make it: as a whole or not at all, and only if what comes out can be used.

    Raises:
        SecurityError: it cannot, or the file could not be used before.
        OSError: it cannot be written.
    """
    path = path.resolve()  # a link stays one
    before = read_file(path) if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    try:
        parse_keys(before + entry.encode())
    except SecurityError as error:
        raise SecurityError(f"{path}: {error}") from None
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(before + entry.encode())
            os.fchmod(file.fileno(), mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_keys(path: Path) -> Keys:
    """Raises SecurityError."""
    data = read_file(path)
    try:
        return parse_keys(data)
    except SecurityError as error:
        raise SecurityError(f"{path}: {error}") from None


def parse_keys(data: bytes) -> Keys:
    """Raises SecurityError: in words that quote no key, nor anything that may be one in the wrong place."""
    try:
        entries = yaml.load(data, yaml.BaseLoader)  # makes text, lists and mappings, nothing else
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SecurityError(f"no YAML{where}") from None
    except (yaml.YAMLError, RecursionError):
        raise SecurityError("no YAML") from None
    if not isinstance(entries, list) or not entries:
        raise SecurityError("must be a list with an entry for each tenant")
    tenants = tuple(_tenant(entry, number) for number, entry in enumerate(entries, start=1))
    digests = [digest for tenant in tenants for digest in tenant.digests]
    if len(digests) > MAX_KEYS:
        raise SecurityError(f"{len(digests)} keys must be at most {MAX_KEYS}")
    names: set[str] = set()
    for tenant in tenants:
        if tenant.name in names:
            raise SecurityError(f"two entries for {tenant.name}; give one of them a list of digests")
        names.add(tenant.name)
    if len(set(digests)) < len(digests):
        raise SecurityError("the same key stands there twice")
    return Keys(tenants)


def _tenant(entry: Any, number: int) -> Tenant:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise SecurityError(f"entry {number} must have a name")
    name = check_name(entry.pop("name"))
    try:
        unknown = sorted(entry.keys() - _FIELDS.keys())
        if unknown:
            raise ValueError(f"knows only name, {', '.join(_FIELDS)}")
        values = {field: _parsed(field, text) for field, text in entry.items()}
    except ValueError as error:
        raise SecurityError(f"{name}: {error}") from None
    digests = (*values.pop("sha256", ()), *values.pop("key", ()))
    certificate, admin = values.pop("certificate", False), values.pop("admin", False)
    if not digests and not certificate:
        raise SecurityError(f"{name}: needs sha256, key or certificate")
    limits = TenantLimits(**{"best_priority": None if admin else 0} | values)
    return Tenant(name=name, digests=digests, certificate=certificate, admin=admin, limits=limits)


def check_name(name: str) -> str:
    """Raises SecurityError: this cannot be the name of a tenant."""
    if not NAME.fullmatch(name):
        raise SecurityError(f"{name[:200]!r} is no name: letters, digits and ._:/@+- inside, at most 128 characters")
    return name


def _parsed(field: str, text: Any) -> Any:
    try:
        return _FIELDS[field](text)
    except ValueError as error:
        raise ValueError(f"{field} {error}") from None


def _each(parse: Callable[[str], bytes]) -> Callable[[Any], tuple[bytes, ...]]:
    """One or a list of them."""

    def parse_each(value: Any) -> tuple[bytes, ...]:
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("must be text or a list of texts")
        return tuple(parse(text) for text in texts)

    return parse_each


def _digest(text: str) -> bytes:
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise ValueError("must have 64 hexadecimal digits")
    return bytes.fromhex(text)


def _plain_key(text: str) -> bytes:
    if not MIN_KEY <= len(text) <= MAX_KEY or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"must have {MIN_KEY} to {MAX_KEY} visible ASCII characters")
    return digest_of(text)


def _switch(text: Any) -> bool:
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return bool(text == "true")


def _count(text: Any) -> int:
    if not isinstance(text, str) or not re.fullmatch("[1-9][0-9]{0,11}", text):
        raise ValueError("must be a whole number from 1 to 999999999999")
    return int(text)


def _class(text: Any) -> int:
    if not isinstance(text, str) or not re.fullmatch("-?[0-9]{1,9}", text):
        raise ValueError("must be a whole number from -999999999 to 999999999")
    return int(text)


def _weight(text: Any) -> float:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4})?", text) or float(text) == 0:
        raise ValueError("must be a number above 0 and below 10000")
    return float(text)


_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "sha256": _each(_digest),
    "key": _each(_plain_key),
    "certificate": _switch,
    "admin": _switch,
    "weight": _weight,
    "max_running": _count,
    "max_queued": _count,
    "tokens_per_minute": _count,
    "best_priority": _class,
}
