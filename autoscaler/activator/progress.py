"""How far the first replica has come, in words for people and in seconds for programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the first replica has come, for people.

    Attributes:
        share: of what `text` says, between 0 and 1.
        eta: seconds from `at` on until it is ready.
    """

    text: str = ""
    share: float | None = None
    eta: float | None = None
    at: float = 0.0

    def left(self, now: float) -> float | None:
        return None if self.eta is None else max(0.0, self.eta - (now - self.at))

    def words(self, now: float) -> str:
        """`starting a replica, reading weights 43 %, about 20 s`, on one line whatever the text has in it."""
        parts = ["starting a replica", " ".join(self.text.split())]
        if self.share is not None:
            parts[1] = f"{parts[1]} {self.share:.0%}".replace("%", " %").strip()
        if left := self.left(now):
            parts.append(f"about {left:.0f} s")
        return ", ".join(part for part in parts if part)
