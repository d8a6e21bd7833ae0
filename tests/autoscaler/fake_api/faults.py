"""What goes wrong between a client and the fake, on demand."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(slots=True)
class Fault:
    """Befalls the next `times` requests that match; None: all of them, until it is taken away.

    Attributes:
        verb: get, list, watch, create, update, patch or delete; "": any.
        path: regular expression that is searched for in the path.
        delay: seconds before anything is done.
        code: answered in place of doing it; 0: it is done.
        retry_after: seconds, told with `code`.
        cut: the connection ends without an answer; a watch's, once it has begun.
        after: how a fault of `code` or `cut` differs: it is done first, and only its answer is lost.
        silent: a watch says nothing more, and does not end.
    """

    verb: str = ""
    path: str = ""
    times: int | None = 1
    delay: float = 0.0
    code: int = 0
    retry_after: int | None = None
    cut: bool = False
    after: bool = False
    silent: bool = False

    def befalls(self, verb: str, path: str) -> bool:
        """Counts as having happened where it does."""
        if self.times == 0 or self.verb not in ("", verb) or not re.search(self.path, path):
            return False
        if self.times is not None:
            self.times -= 1
        return True
