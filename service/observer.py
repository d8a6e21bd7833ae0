"""Who watches requests: what metrics, traces and the access log are told by the one place that all protocols pass,
`service.served.ServedModel.generate`. An observer only looks: it never raises, waits or changes a request."""

from __future__ import annotations

from typing import Protocol

from service.generation import GenerationEvent, GenerationRequest


class Observation(Protocol):
    """One request, from its arrival to its end."""

    def event(self, event: GenerationEvent) -> None:
        """It is about to be handed to who asked."""

    def failed(self, error: Exception) -> None:
        """It was refused, or broke off: a ServiceError, or a fault of ours."""

    def close(self) -> None:
        """Nothing follows. Without the Finished of each completion and without an error the caller has gone away.
        Closing twice is closing once."""


class Observer(Protocol):
    """Belongs to the event loop of the served model."""

    def begin(self, request: GenerationRequest) -> Observation:
        """A request has arrived, in the task that serves it."""


class Unobserved:
    """Nobody watches: both an Observer and all its Observations."""

    def begin(self, request: GenerationRequest) -> Unobserved:
        return self

    def event(self, event: GenerationEvent) -> None:
        pass

    def failed(self, error: Exception) -> None:
        pass

    def close(self) -> None:
        pass
