"""How far the first replica has come, in words for people and in seconds for programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the first replica has come, for people.

    Attributes:
        eta: seconds from `at` on until it is ready.
    """

    text: str = ""
    eta: float | None = None
    at: float = 0.0

    def left(self, now: float) -> float | None:
        return None if self.eta is None else max(0.0, self.eta - (now - self.at))

    def words(self, now: float) -> str:
        """`starting a replica, loading the model, about 20 s`, on one line whatever the text has in it."""
        parts = ["starting a replica", " ".join(self.text.split())]
        if left := self.left(now):
            parts.append(f"about {left:.0f} s")
        return ", ".join(part for part in parts if part)
