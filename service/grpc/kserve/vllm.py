"""The tensors of Triton's vLLM backend. Rules as in its `src/utils/request.py`:

- Sampling parameters are JSON in `sampling_parameters`, or else the request's own parameters; values may be texts.
- A whole answer begins with the prompt unless `exclude_input_in_output`; a streamed one never does.
- Outputs beside the text come only where a `return_…` input asks for them. Tokens and logprobs are those since the
  last response; `finish_reason` is "None" until the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec.structs import replace

import service.grpc.kserve.guide as guide
import service.grpc.kserve.values as values
from engine import SamplingParams, TokenLogprob
from service.caller import CALLER
from service.errors import Code, ServiceError, invalid
from service.generation import GenerationRequest
from service.grpc.kserve.llm import Ask, Completion, LlmModel, count, priority
from service.grpc.kserve.model import Array, InferRequest, ModelSpec, TensorSpec
from service.grpc.kserve.tensors import text_array
from service.grpc.kserve.values import Convert, Inputs, shown
from service.host import Host

RETURNS = (
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
INPUTS = (
    TensorSpec("text_input", "BYTES", (1,), instead="messages"),
    TensorSpec("messages", "BYTES", (1,), optional=True),
    TensorSpec("image", "BYTES", (-1,), optional=True),
    TensorSpec("stream", "BOOL", (1,), optional=True),
    TensorSpec("sampling_parameters", "BYTES", (1,), optional=True),
    TensorSpec("exclude_input_in_output", "BOOL", (1,), optional=True),
    *(TensorSpec(name, "BOOL", (1,), optional=True) for name in RETURNS),
)
OUTPUTS = (
    TensorSpec("text_output", "BYTES", (-1,)),
    TensorSpec("finish_reason", "BYTES", (-1,)),
    TensorSpec("cumulative_logprob", "FP32", (-1,)),
    TensorSpec("logprobs", "BYTES", (-1,)),
    TensorSpec("num_input_tokens", "UINT32", (1,)),
    TensorSpec("num_output_tokens", "UINT32", (-1,)),
)
# Names of vLLM's SamplingParams that are ours too, and how their values are read.
SAMPLING: dict[str, Convert] = {
    "max_tokens": values.integer,
    "min_tokens": values.integer,
    "temperature": values.number,
    "top_k": values.integer,
    "top_p": values.number,
    "min_p": values.number,
    "repetition_penalty": values.number,
    "presence_penalty": values.number,
    "frequency_penalty": values.number,
    "seed": values.seed,
    "logit_bias": values.biases,
    "stop_token_ids": values.integers,
    "ignore_eos": values.boolean,
    "logprobs": values.integer,
}
BESIDE: dict[str, Convert] = {
    "n": values.integer,
    "stop": values.strings,
    "include_stop_str_in_output": values.boolean,
    "bad_words": values.strings,
    "lora_name": values.text,
    "cache_salt": values.text,
}
GUIDES: dict[str, Convert] = {
    "guided_decoding": guide.guide,
    "structured_outputs": guide.guide,
    "guided_json": guide.json_schema,
    "guided_regex": guide.regex,
    "guided_choice": guide.one_of,
    "guided_grammar": guide.lark,
}
# Accepted where they ask for nothing.
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "use_beam_search": False,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
}
NOT_SAMPLING = ("messages", "headers", "binary_data_output")  # request parameters with a meaning of their own
NO_PROMPT_IN_STREAM = "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."


class VllmModel(LlmModel):
    """Shapes without batch dimension; a leading 1 is accepted.

    Args:
        adapter: LoRA adapter that `name` stands for. Without one, a request may name it as `lora_name` among its
            sampling parameters.
    """

    def __init__(self, host: Host, name: str, adapter: str | None = None) -> None:
        spec = ModelSpec(name=name, inputs=INPUTS, outputs=OUTPUTS, decoupled=True, stream_input="stream", lenient=True)
        super().__init__(host, spec)
        self._adapter = adapter

    async def ask(self, request: InferRequest) -> Ask:
        """See `LlmModel.ask`."""
        inputs = Inputs(request.inputs)
        if "image" in inputs:
            raise invalid("image", "is not served: this model reads text only")
        stream = inputs.one("stream", False)
        exclude = inputs.one("exclude_input_in_output", stream)
        if stream and not exclude:
            raise ServiceError(Code.INVALID_ARGUMENT, NO_PROMPT_IN_STREAM)
        prompt = self.prompt(inputs, request.parameters)
        read = read_sampling(_given(inputs, request.parameters))
        wants = frozenset(name for name in RETURNS if inputs.one(name, False))
        sampling = SamplingParams(**{name: value for name, value in read.items() if name in SAMPLING})
        if sampling.logprobs is None and "return_cumulative_logprob" in wants:
            sampling = replace(sampling, logprobs=0)
        if sampling.top_k == -1:  # vLLM's other way to say: all
            sampling = replace(sampling, top_k=0)
        if grammar := guide.only("guided_decoding", [read[name] for name in GUIDES if name in read]):
            sampling = replace(sampling, grammar=grammar)
        if bad_words := read.get("bad_words"):
            banned = await self.banned_tokens("bad_words", bad_words, both_spacings=True)
            sampling = replace(sampling, logit_bias=sampling.logit_bias | banned)
        generation = GenerationRequest(
            request_id=self.request_id(request),
            prompt=prompt,
            sampling=sampling,
            n=count("n", read.get("n", 1)),
            stop=read.get("stop", ()),
            include_stop=read.get("include_stop_str_in_output", False),
            priority=priority(request.priority),
            deadline=request.deadline,
            adapter=self._lora(read.get("lora_name")),
            cache_salt=read.get("cache_salt", ""),
            tenant=CALLER.get().tenant,
        )
        return Ask(
            generation=generation,
            stream=stream,
            wants=wants,
            has_logprobs="logprobs" in read,
            prefix=prompt if isinstance(prompt, str) and not exclude else "",
        )

    def outputs(self, ask: Ask, completions: list[Completion], prompt_tokens: int) -> list[Mapping[str, Array]]:
        """One response with an element for each completion."""
        made = {"text_output": text_array([ask.prefix + completion.text for completion in completions])}
        if "return_finish_reason" in ask.wants:
            made["finish_reason"] = text_array([completion.reason or "None" for completion in completions])
        if "return_cumulative_logprob" in ask.wants:
            sums = [completion.cumulative_logprob for completion in completions]
            made["cumulative_logprob"] = np.array(sums, np.float32)
        if "return_logprobs" in ask.wants:
            made["logprobs"] = text_array(
                [self._logprobs(completion.logprobs) if ask.has_logprobs else "null" for completion in completions]
            )
        if "return_num_input_tokens" in ask.wants:
            made["num_input_tokens"] = np.array([prompt_tokens], np.uint32)
        if "return_num_output_tokens" in ask.wants:
            made["num_output_tokens"] = np.array([completion.tokens for completion in completions], np.uint32)
        return [made]

    def _lora(self, name: str | None) -> str | None:
        if self._adapter is not None and name not in (None, self._adapter):
            raise invalid("lora_name", f"{shown(name)} does not go with {self._adapter!r}, which is another adapter")
        return self._adapter or name or None

    def _logprobs(self, entries: list[TokenLogprob]) -> str:
        """JSON list with one object per token: the chosen token and the likeliest ones, by id."""
        tokens = []
        for entry in entries:
            ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top, start=1)}
            ranked = {entry.token_id: (entry.logprob, entry.rank)} | ranked
            tokens.append(
                {
                    token: {
                        "logprob": logprob,
                        "rank": rank,
                        "decoded_token": self._host.token_bytes(token).decode(errors="replace"),
                    }
                    for token, (logprob, rank) in ranked.items()
                }
            )
        return json.dumps(tokens)


def read_sampling(given: Mapping[str, object]) -> dict[str, Any]:
    """Sampling parameters by name, each of its type. A null is as good as absent.

    Raises:
        ServiceError: INVALID_ARGUMENT for a name that we do not serve, or a value that is not of its type.
    """
    read: dict[str, Any] = {}
    served = SAMPLING | BESIDE | GUIDES
    for name, value in given.items():
        if value is None:
            continue
        if name in served:
            read[name] = served[name](name, value)
        elif name not in NEUTRAL:
            raise invalid(name, f"is no sampling parameter of this server; there are {', '.join(sorted(served))}")
        elif not _equal(value, NEUTRAL[name]):
            raise invalid(name, f"{shown(value)} is not served; it must be {json.dumps(NEUTRAL[name])}")
    return read


def _equal(value: object, neutral: object) -> bool:
    return str(value).lower() == str(neutral).lower()


def _given(inputs: Inputs, parameters: Mapping[str, object]) -> Mapping[str, object]:
    """The JSON of the tensor, or without one the request parameters."""
    if "sampling_parameters" not in inputs:
        return {name: value for name, value in parameters.items() if name not in NOT_SAMPLING}
    text: str = inputs.one("sampling_parameters")
    given = values.json_value("sampling_parameters", text) if text else {}
    if not isinstance(given, dict):
        raise invalid("sampling_parameters", f"{shown(given)} must be a JSON object")
    return given
