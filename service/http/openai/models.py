"""GET /v1/models, /v1/models/{id}."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from service.errors import ServiceError
from service.host import Host
from service.names import adapter_of


class ModelCard(msgspec.Struct, kw_only=True):
    """A model or adapter by one of its names. `root`, `parent` and `max_model_len` are as in vLLM."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "nemoserve"
    root: str
    parent: str | None = None
    max_model_len: int | UnsetType = UNSET


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


def list_models(host: Host) -> ModelList:
    """The model first, then its aliases and adapters. It is served under its names while it still loads."""
    loras = [] if host.loras is None else sorted(host.loras.loaded)
    return ModelList(data=[_card(host, name) for name in (host.model_name, *host.model_aliases, *loras)])


def get_model(host: Host, name: str) -> ModelCard:
    """Raises ServiceError(NOT_FOUND)."""
    adapter_of(host, name or "/")
    return _card(host, name)


def _card(host: Host, name: str) -> ModelCard:
    is_adapter = name not in (host.model_name, *host.model_aliases)
    return ModelCard(
        id=name,
        created=int(host.started_at),
        root=name if is_adapter else host.model_name,
        parent=host.model_name if is_adapter else None,
        max_model_len=_max_model_len(host),
    )


def _max_model_len(host: Host) -> int | UnsetType:
    try:
        return host.info.max_model_len
    except ServiceError:  # it loads: the length depends on the memory that is left
        return UNSET
