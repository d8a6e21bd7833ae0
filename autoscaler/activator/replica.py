"""A replica, and how much of what waits it is handed at once."""

from __future__ import annotations

from dataclasses import dataclass

USUAL_CAPACITY = 32  # rows of a server that did not tell: the default of ours on a CPU, which is the smaller one


@dataclass(frozen=True, slots=True)
class Replica:
    """One that takes requests.

    Attributes:
        capacity: most requests that it runs at the same time, as its Load says; 0: not known.
    """

    name: str
    host: str
    grpc_port: int = 8001
    http_port: int = 8000
    capacity: int = 0

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What makes it the same one, whatever else is known of it."""
        return self.name, self.host, self.grpc_port, self.http_port


class Window:
    """How much one replica is handed at once."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.size = self.most
        self.handed = 0  # without the beginning of an answer
        self.rests_until = 0.0

    @classmethod
    def of(cls, replica: Replica, known: Window | None) -> Window:
        """The one that it has, with what is known of it now."""
        if known is None:
            return cls(replica)
        before, known.replica = known.replica, replica
        if before.capacity != replica.capacity:
            known.size = known.most
        return known

    @property
    def most(self) -> int:
        return 2 * (self.replica.capacity or USUAL_CAPACITY)

    def takes(self, now: float) -> bool:
        return self.handed < self.size and now >= self.rests_until

    def started(self) -> None:
        self.size = min(self.most, self.size + 1)

    def refused(self) -> None:
        """It has what it can take."""
        self.size = max(1, min(self.size, self.handed))

    @property
    def share(self) -> float:
        """Of what it takes that it has."""
        return self.handed / self.size
