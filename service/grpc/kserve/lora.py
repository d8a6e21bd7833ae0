"""LoRA adapters as models of the repository: each is the served model under the adapter's name, with the tensors of
Triton's vLLM backend, loaded and unloaded through Triton's repository API."""

from __future__ import annotations

from collections.abc import Mapping

from service.grpc.kserve.vllm import VllmModel
from service.host import Host, Loras


class LoraModels:
    """See `service.grpc.kserve.model.Repository`."""

    def __init__(self, host: Host, loras: Loras) -> None:
        self._host, self._loras = host, loras

    def find(self, name: str) -> VllmModel | None:
        return VllmModel(self._host, name, adapter=name) if name in self._loras.loaded else None

    def models(self) -> list[VllmModel]:
        return [VllmModel(self._host, name, adapter=name) for name in self._loras.loaded]

    def absent(self) -> Mapping[str, str]:
        return self._loras.absent

    async def load(self, name: str) -> None:
        await self._loras.load(name)

    async def unload(self, name: str) -> None:
        await self._loras.unload(name)
