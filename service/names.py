"""Names that clients give, of models and of their own requests, over every protocol."""

from __future__ import annotations

from service.errors import Code, ServiceError, invalid
from service.host import Host, Phase

MAX_REQUEST_ID = 256  # characters; it travels in headers and stands in logs


def adapter_of(host: Host, model: str, adapter: str = "") -> str | None:
    """The LoRA adapter that is meant, None for the model as it is, which "" means too.

    Args:
        adapter: one that the client names beside the model.

    Raises:
        ServiceError: NOT_FOUND; UNAVAILABLE while loading, when nobody knows yet which adapters there will be;
            INVALID_ARGUMENT for two adapters.
    """
    known = (host.model_name, *host.model_aliases)
    if not model or model in known:
        return adapter or None
    loras = {} if host.loras is None else host.loras.loaded
    if model not in loras:
        if host.status.phase is Phase.LOADING and host.loras is not None:
            raise ServiceError(Code.UNAVAILABLE, f"model: {model!r} may be served when loading has ended; retry later")
        served = ", ".join((*known, *loras))
        raise ServiceError(Code.NOT_FOUND, f"model: {model!r} is not served here; served are {served}", field="model")
    if adapter not in ("", model):
        raise invalid("adapter", f"{adapter!r} does not go with model {model!r}, which is another adapter")
    return model


def is_request_id(text: str) -> bool:
    """Whether it can be sent back in a header, and stand in a line of a log."""
    return 0 < len(text) <= MAX_REQUEST_ID and text.isascii() and text.isprintable()
