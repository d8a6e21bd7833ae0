"""Token ids in, token ids out: a continuous-batching engine for dense Llama/Mistral-family decoders.

This is the public face; it imports no torch, so that a protocol process stays light. `engine.local.LocalEngine`
runs the core in this process, `engine.remote.RemoteEngine` in its own.
"""

from engine.config import EngineConfig, ModelConfig
from engine.errors import (
    AdapterLimitError,
    AdapterNotFoundError,
    CheckpointError,
    EngineConfigError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    UnsupportedModelError,
)
from engine.face import Done, Engine, LoadProgress
from engine.request import (
    AdapterInfo,
    EngineInfo,
    EngineStats,
    FinishReason,
    Grammar,
    Request,
    SamplingParams,
    Timings,
    TokenEvent,
    TokenLogprob,
    Vocabulary,
)

__all__ = [
    "AdapterInfo",
    "AdapterLimitError",
    "AdapterNotFoundError",
    "CheckpointError",
    "Done",
    "Engine",
    "EngineConfig",
    "EngineConfigError",
    "EngineDeadError",
    "EngineError",
    "EngineInfo",
    "EngineStats",
    "FinishReason",
    "Grammar",
    "InvalidRequestError",
    "LoadProgress",
    "ModelConfig",
    "Request",
    "SamplingParams",
    "Timings",
    "TokenEvent",
    "TokenLogprob",
    "UnsupportedModelError",
    "Vocabulary",
]
