"""Which model or adapter a name means."""

from __future__ import annotations

from service.errors import Code, ServiceError
from service.host import Host, Phase


def adapter_of(host: Host, model: str) -> str | None:
    """The LoRA adapter that is meant, None for the model as it is, which "" means too.

    Raises:
        ServiceError: NOT_FOUND; UNAVAILABLE while loading, when nobody knows yet which adapters there will be.
    """
    known = (host.model_name, *host.model_aliases)
    loras = {} if host.loras is None else host.loras.loaded
    if not model or model in known:
        return None
    if model in loras:
        return model
    if host.status.phase is Phase.LOADING and host.loras is not None:
        raise ServiceError(Code.UNAVAILABLE, f"model: {model!r} may be served when loading has ended; retry later")
    served = ", ".join((*known, *loras))
    raise ServiceError(Code.NOT_FOUND, f"model: {model!r} is not served here; served are {served}", field="model")
