"""KServe v2 with Triton's extensions, `inference.GRPCInferenceService`, over tritonclient's stubs.

`KServeServicer` serves any `Model`; `llm_models` makes the models that show one language model under the tensor names
of Triton's two LLM backends, `LoraModels` those of its LoRA adapters.
"""

from service.grpc.kserve.llm import LlmModel
from service.grpc.kserve.lora import LoraModels
from service.grpc.kserve.servicer import KServeServicer
from service.grpc.kserve.trtllm import TrtLlmModel
from service.grpc.kserve.vllm import VllmModel
from service.host import Host

__all__ = ["VIEW_NAMES", "KServeServicer", "LoraModels", "llm_models"]

TRTLLM_NAMES = ("ensemble", "tensorrt_llm_bls")
VLLM_NAMES = ("vllm_model",)
VIEW_NAMES = (*TRTLLM_NAMES, *VLLM_NAMES)


def llm_models(host: Host) -> list[LlmModel]:
    """The vLLM view under the served name, its aliases and `vllm_model`; the TensorRT-LLM view under `ensemble` and
    `tensorrt_llm_bls`."""
    names = dict.fromkeys((host.model_name, *host.model_aliases, *VLLM_NAMES))
    return [
        *(VllmModel(host, name) for name in names if name not in TRTLLM_NAMES),
        *(TrtLlmModel(host, name) for name in TRTLLM_NAMES),
    ]
