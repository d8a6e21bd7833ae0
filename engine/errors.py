"""Every way in which the engine refuses or fails, as types.

Callers map these to status codes once, at their own edge; nothing in `engine/` knows a protocol.
Messages are written for the person who sent the request: they name the field, the value and the limit.
"""

from __future__ import annotations

from collections.abc import Iterable


class EngineError(Exception):
    """Base of all errors that this package raises on purpose."""


class InvalidRequestError(EngineError):
    """The request itself is wrong and would be wrong on any engine.

    Args:
        field: name of the offending field as users write it, e.g. `temperature`.
        reason: what is wrong, with the value and the limit.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class AdapterNotFoundError(EngineError):
    """There is no LoRA adapter of this name, or no longer.

    Args:
        name: as the request has it.
        loaded: names that there are.
    """

    def __init__(self, name: str, loaded: Iterable[str]) -> None:
        super().__init__(f"adapter: {name!r} is not loaded; loaded are {', '.join(sorted(loaded)) or 'none'}")


class CheckpointError(EngineError):
    """A model file is missing, truncated, corrupt or not one that we run. The message names file and tensor."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is readable but describes a model that this decoder does not implement."""


class EngineConfigError(EngineError):
    """The engine cannot run this model with these settings on this machine (memory, device, limits)."""


class EngineDeadError(EngineError):
    """The engine process is gone or failed; every request in flight gets this."""


class AdapterLimitError(EngineError):
    """No further LoRA adapter can be loaded: their number, or the memory of the host, is at its limit."""


def error_of(kind: str, message: str) -> EngineError:
    """An error that has crossed the process border, as the type that it had there; EngineDeadError for our own faults.

    Args:
        kind: name of the type.
    """
    types = (CheckpointError, UnsupportedModelError, EngineConfigError, AdapterLimitError)
    kinds = {error.__name__: error for error in types}
    return kinds.get(kind, EngineDeadError)(message)
