"""Objects under one resourceVersion that counts every change, and the changes themselves, for those who watch.

What is stored is never mutated: each change puts a new object in place of the old, so that a reader may keep what it
got. Reads and writes take no time of the event loop's, so that each is one transaction.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.autoscaler.fake_api import errors
from tests.autoscaler.fake_api.errors import Json
from tests.autoscaler.fake_api.resources import Resource

MOST_CHANGES = 20_000  # that are kept
FIRST_VERSION = 1000  # nobody finds a cluster at its beginning


@dataclass(frozen=True, slots=True)
class Change:
    version: int
    resource: Resource
    old: Json | None
    new: Json | None

    @property
    def last(self) -> Json:
        """The object as it is, or was, with the version of this change."""
        item = self.new or self.old
        assert item is not None
        return item | {"metadata": item["metadata"] | {"resourceVersion": str(self.version)}}


class Store:
    """Attributes:
    version: of the newest change.
    compacted: changes up to this one are forgotten.
    unwatched: nobody watches any more.
    """

    def __init__(self) -> None:
        self.version = self.compacted = FIRST_VERSION
        self._items: dict[tuple[str, str], dict[tuple[str, str], Json]] = {}
        self._changes: deque[Change] = deque()
        self._watchers: set[asyncio.Event] = set()
        self.unwatched = asyncio.Event()

    def find(self, resource: Resource, namespace: str, name: str) -> Json | None:
        return self._of(resource).get((namespace, name))

    def get(self, resource: Resource, namespace: str, name: str) -> Json:
        found = self.find(resource, namespace, name)
        if found is None:
            raise errors.not_found(resource.qualified, name)
        return found

    def list(self, resource: Resource, namespace: str = "") -> list[Json]:
        """In the order of their keys. Namespace "": all."""
        return [item for (within, _), item in sorted(self._of(resource).items()) if namespace in ("", within)]

    def everything(self) -> Iterator[Json]:
        for items in self._items.values():
            yield from items.values()

    def put(self, resource: Resource, item: Json) -> Json:
        """A new object, or a new state of one."""
        self.version += 1
        meta = item["metadata"]
        item = item | {"metadata": meta | {"resourceVersion": str(self.version)}}
        key = meta.get("namespace", ""), meta["name"]
        old = self._of(resource).get(key)
        self._of(resource)[key] = item
        self._note(Change(self.version, resource, old, item))
        return item

    def remove(self, resource: Resource, item: Json) -> Json:
        self.version += 1
        old = self._of(resource).pop((item["metadata"].get("namespace", ""), item["metadata"]["name"]))
        change = Change(self.version, resource, old, None)
        self._note(change)
        return change.last

    def compact(self) -> None:
        """Forget all changes: who wants to go on from before now must list anew."""
        self.compacted = self.version
        self._changes.clear()

    def changes(self, after: int) -> Sequence[Change]:
        """Raises 410 where some of them are forgotten."""
        if after < self.compacted:
            raise errors.expired(after, self.compacted)
        found = []
        for change in reversed(self._changes):
            if change.version <= after:
                break
            found.append(change)
        return found[::-1]

    @contextmanager
    def changed(self) -> Iterator[asyncio.Event]:
        """An event that is set at each change, until it is cleared."""
        event = asyncio.Event()
        self._watchers.add(event)
        self.unwatched.clear()
        try:
            yield event
        finally:
            self._watchers.remove(event)
            if not self._watchers:
                self.unwatched.set()

    def _of(self, resource: Resource) -> dict[tuple[str, str], Json]:
        return self._items.setdefault((resource.group, resource.plural), {})

    def _note(self, change: Change) -> None:
        self._changes.append(change)
        if len(self._changes) > MOST_CHANGES:
            self.compacted = self._changes.popleft().version
        for event in self._watchers:
            event.set()
