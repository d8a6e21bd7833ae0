"""A watch: what has changed since a version, then what changes, until its time is over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tests.autoscaler.fake_api import errors
from tests.autoscaler.fake_api.errors import ApiError, Json
from tests.autoscaler.fake_api.resources import Resource
from tests.autoscaler.fake_api.selectors import Match
from tests.autoscaler.fake_api.store import Change, Store


@dataclass(frozen=True, slots=True)
class Watch:
    """Attributes:
    version: from where; 0: whatever there is, as ADDED, and then on.
    seconds: after which it ends.
    bookmark_seconds: between two bookmarks; None: none are wanted.
    """

    resource: Resource
    namespace: str
    match: Match
    version: int
    seconds: float
    bookmark_seconds: float | None

    async def lines(self, store: Store) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        end = loop.time() + self.seconds
        bookmark = loop.time() + (self.bookmark_seconds or self.seconds)
        try:
            with store.changed() as changed:
                after = self.version or store.version
                if after > store.version:
                    raise errors.too_large(after, store.version)
                if not self.version:
                    for item in filter(self.match, store.list(self.resource, self.namespace)):
                        yield _line("ADDED", item)
                while (left := end - loop.time()) > 0:
                    changed.clear()
                    changes = store.changes(after)
                    after = max(after, store.version)
                    for change in changes:
                        if event := self._seen(change):
                            yield event
                    if loop.time() >= bookmark and self.bookmark_seconds is not None:
                        yield self._bookmark(after)
                        bookmark = loop.time() + self.bookmark_seconds
                    try:
                        await asyncio.wait_for(changed.wait(), min(left, max(0.0, bookmark - loop.time())))
                    except TimeoutError:
                        pass
                if self.bookmark_seconds is not None:
                    yield self._bookmark(after)
        except ApiError as error:  # what goes wrong after the first byte can be said only in the stream
            yield _line("ERROR", error.status())

    def _seen(self, change: Change) -> bytes | None:
        """A change as it looks through the selector: what comes to match is ADDED, what ceases to is DELETED."""
        namespace = change.last["metadata"].get("namespace", "")
        if change.resource.qualified != self.resource.qualified or self.namespace not in ("", namespace):
            return None
        before = change.old is not None and self.match(change.old)
        after = change.new is not None and self.match(change.new)
        if after:
            return _line("MODIFIED" if before else "ADDED", change.last)
        if not before:
            return None
        assert change.old is not None  # shown as it was when it last matched
        meta = change.old["metadata"] | {"resourceVersion": str(change.version)}
        return _line("DELETED", change.old | {"metadata": meta})

    def _bookmark(self, version: int) -> bytes:
        head = {"kind": self.resource.kind, "apiVersion": self.resource.api_version}
        return _line("BOOKMARK", head | {"metadata": {"resourceVersion": str(version), "creationTimestamp": None}})


def _line(kind: str, item: Json) -> bytes:
    return json.dumps({"type": kind, "object": item}, separators=(",", ":")).encode() + b"\n"
