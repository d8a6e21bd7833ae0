"""What has been measured of the recent past, older samples counting for exponentially less."""

from __future__ import annotations

SAMPLES = 32  # over which is averaged
FEW = 8  # of which nothing is concluded


class Mean:
    """A moving average, from a first guess."""

    def __init__(self, guess: float) -> None:
        self.value = guess

    def add(self, sample: float) -> None:
        self.value += (sample - self.value) / SAMPLES


class Pace:
    """How fast the queue moves: seconds between two requests that leave it for the engine, while it is never empty."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._mean: Mean | None = None
        self._count = 0

    def waiting(self, now: float) -> None:
        """Somebody waits."""
        if self._since is None:
            self._since = now

    def moved(self, now: float) -> None:
        """One of them has left for the engine."""
        if self._since is None:
            return
        sample, self._since, self._count = now - self._since, now, self._count + 1
        if self._mean is None:
            self._mean = Mean(sample)
        self._mean.add(sample)

    def pause(self) -> None:
        """Nobody waits, or nobody can move."""
        self._since = None

    @property
    def seconds(self) -> float | None:
        """None while too little is known."""
        return None if self._mean is None or self._count < FEW else self._mean.value
