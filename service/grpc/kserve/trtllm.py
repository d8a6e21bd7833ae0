"""The tensors of TensorRT-LLM's `ensemble` and `tensorrt_llm_bls`. Rules as in its `inflight_batcher_llm`:

- Every parameter is a tensor; request parameters of the same names fill in for absent tensors.
- Without temperature, top_k and top_p the decoding is greedy. `top_p` 0 means none.
- Empty stop and bad words are ignored: clients always send `[[""]]`. The matched stop word stays in the text.
- The prompt comes before a whole answer only where `exclude_input_in_output` is false.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import service.grpc.kserve.values as values
from engine import SamplingParams
from service.caller import CALLER
from service.errors import invalid
from service.generation import GenerationRequest
from service.grpc.kserve.guide import typed_guide
from service.grpc.kserve.llm import Ask, Completion, LlmModel, count, priority
from service.grpc.kserve.model import Array, InferRequest, ModelSpec, TensorSpec
from service.grpc.kserve.tensors import text_array
from service.grpc.kserve.values import Convert, Inputs, shown
from service.host import Host

ONE: tuple[int, ...] = (1,)
ANY: tuple[int, ...] = (-1,)
# Optional inputs that we serve: datatype, dims.
SERVED = {
    "stream": ("BOOL", ONE),
    "messages": ("BYTES", ONE),
    "num_return_sequences": ("INT32", ONE),
    "bad_words": ("BYTES", ANY),
    "stop_words": ("BYTES", ANY),
    "exclude_input_in_output": ("BOOL", ONE),
    "end_id": ("INT32", ONE),
    "pad_id": ("INT32", ONE),
    "top_k": ("INT32", ONE),
    "top_p": ("FP32", ONE),
    "temperature": ("FP32", ONE),
    "length_penalty": ("FP32", ONE),
    "repetition_penalty": ("FP32", ONE),
    "presence_penalty": ("FP32", ONE),
    "frequency_penalty": ("FP32", ONE),
    "min_tokens": ("INT32", ONE),
    "min_length": ("INT32", ONE),
    "seed": ("UINT64", ONE),
    "random_seed": ("UINT64", ONE),
    "guided_decoding_guide_type": ("BYTES", ONE),
    "guided_decoding_guide": ("BYTES", ONE),
    "return_log_probs": ("BOOL", ONE),
    "return_num_input_tokens": ("BOOL", ONE),
    "return_num_output_tokens": ("BOOL", ONE),
}
# Inputs that we do not serve: datatype, dims, and the value that asks for nothing, if there is one.
UNSERVED: dict[str, tuple[str, tuple[int, ...], object]] = {
    "beam_width": ("INT32", ONE, 1),
    "decoder_text_input": ("BYTES", ONE, ""),
    "return_context_logits": ("BOOL", ONE, False),
    "return_generation_logits": ("BOOL", ONE, False),
    "return_perf_metrics": ("BOOL", ONE, False),
    "prompt_embedding_table": ("FP16", (-1, -1), None),
    "prompt_table_extra_id": ("UINT64", ONE, None),
    "prompt_vocab_size": ("INT32", ONE, 0),
    "embedding_bias_words": ("BYTES", ANY, ""),
    "embedding_bias_weights": ("FP32", ANY, 0.0),
    "lora_task_id": ("UINT64", ONE, None),
    "lora_weights": ("FP16", (-1, -1), None),
    "lora_config": ("INT32", (-1, 3), None),
    "num_draft_tokens": ("INT32", ONE, 0),
    "use_draft_logits": ("BOOL", ONE, False),
    "image_input": ("FP16", (-1, -1, -1), None),
    "image_bytes_input": ("UINT8", (-1, -1, -1, -1), None),
    "image_url_input": ("BYTES", ANY, ""),
    "video_bytes_input": ("UINT8", (-1, -1, -1, -1), None),
}
INPUTS = (
    TensorSpec("text_input", "BYTES", ONE, instead="messages"),
    TensorSpec("max_tokens", "INT32", ONE, instead="max_tokens"),
    *(TensorSpec(name, datatype, dims, optional=True) for name, (datatype, dims) in SERVED.items()),
    *(TensorSpec(name, datatype, dims, optional=True) for name, (datatype, dims, _) in UNSERVED.items()),
)
OUTPUTS = (
    TensorSpec("text_output", "BYTES", ANY),
    TensorSpec("cum_log_probs", "FP32", ANY),
    TensorSpec("output_log_probs", "FP32", (-1, -1)),
    TensorSpec("batch_index", "INT32", ONE),
    TensorSpec("sequence_index", "INT32", ANY),
    TensorSpec("num_input_tokens", "INT32", ONE),
    TensorSpec("num_output_tokens", "INT32", ANY),
    # Clients may name these; they come with inputs that we do not serve, and so never.
    TensorSpec("context_logits", "FP32", (-1, -1)),
    TensorSpec("generation_logits", "FP32", (-1, -1, -1)),
    *(
        TensorSpec(name, datatype, ONE)
        for datatype, names in {
            "INT32": (
                "kv_cache_alloc_new_blocks",
                "kv_cache_reused_blocks",
                "kv_cache_alloc_total_blocks",
                "total_accepted_draft_tokens",
                "total_draft_tokens",
            ),
            "INT64": ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns"),
            "FP32": ("acceptance_rate",),
        }.items()
        for name in names
    ),
)
# Request parameters that fill in for tensors, and how their values are read.
FALLBACK: dict[str, Convert] = {
    "BOOL": values.boolean,
    "INT32": values.integer,
    "UINT64": values.seed,
    "FP32": values.number,
    "BYTES": values.strings,
}
NOT_INPUTS = ("headers", "binary_data_output")
ONLY_TENSORS = ("stream",)  # the servicer looks there to tell which RPC can answer
WANTS = ("return_log_probs", "return_num_input_tokens", "return_num_output_tokens")


class TrtLlmModel(LlmModel):
    """Shapes with a batch dimension of 1, which may also be left out. `text_output` has none."""

    def __init__(self, host: Host, name: str) -> None:
        spec = ModelSpec(
            name=name,
            inputs=INPUTS,
            outputs=OUTPUTS,
            max_batch_size=1,
            decoupled=True,
            stream_input="stream",
            lenient=True,
        )
        super().__init__(host, spec)

    async def ask(self, request: InferRequest) -> Ask:
        """See `LlmModel.ask`."""
        inputs = Inputs(request.inputs)
        _refuse_unserved(inputs)
        given = {**_fallback(request.parameters), **{n: inputs.all(n) for n in ("max_tokens", *SERVED) if n in inputs}}
        one = {name: elements[0] for name, elements in given.items() if elements}
        prompt = self.prompt(inputs, request.parameters)
        stream = one.get("stream", False)
        bad_words = tuple(word for word in given.get("bad_words", ()) if word)
        banned = await self.banned_tokens("bad_words", bad_words, both_spacings=False)
        generation = GenerationRequest(
            request_id=self.request_id(request),
            prompt=prompt,
            sampling=_sampling(one, banned),
            n=count("num_return_sequences", one.get("num_return_sequences", 1)),
            stop=tuple(word for word in given.get("stop_words", ()) if word),
            include_stop=True,
            priority=priority(request.priority),
            tenant=CALLER.get().tenant,
            deadline=request.deadline,
        )
        whole = not stream and not one.get("exclude_input_in_output", True)
        return Ask(
            generation=generation,
            stream=stream,
            single=request.single,
            wants=frozenset(name for name in WANTS if one.get(name, False)),
            prefix=prompt if whole and isinstance(prompt, str) else "",
        )

    def outputs(self, ask: Ask, completions: list[Completion], prompt_tokens: int) -> list[Mapping[str, Array]]:
        """One response for each completion that has something new, or one with all of them if only one may be."""
        changed = [[completion] for completion in completions if completion.changed]
        return [_tensors(ask, each, prompt_tokens) for each in ([completions] if ask.single else changed)]


def _tensors(ask: Ask, completions: list[Completion], prompt_tokens: int) -> Mapping[str, Array]:
    made = {
        "text_output": text_array([ask.prefix + completion.text for completion in completions]),
        "batch_index": np.zeros((1, 1), np.int32),
        "sequence_index": np.array([[completion.index for completion in completions]], np.int32),
    }
    if "return_log_probs" in ask.wants:
        made["cum_log_probs"] = np.array([[completion.cumulative_logprob for completion in completions]], np.float32)
        longest = max(len(completion.logprobs) for completion in completions)
        each = np.zeros((1, len(completions), longest), np.float32)
        for row, completion in zip(each[0], completions, strict=True):
            row[: len(completion.logprobs)] = [entry.logprob for entry in completion.logprobs]
        made["output_log_probs"] = each
    if "return_num_input_tokens" in ask.wants:
        made["num_input_tokens"] = np.array([[prompt_tokens]], np.int32)
    if "return_num_output_tokens" in ask.wants:
        made["num_output_tokens"] = np.array([[completion.tokens for completion in completions]], np.int32)
    return made


def _sampling(one: Mapping[str, Any], banned: dict[int, float]) -> SamplingParams:
    greedy = not any(name in one for name in ("temperature", "top_k", "top_p"))
    top_k, top_p = one.get("top_k", 0), one.get("top_p", 1.0)
    if top_p == 0.0:
        greedy, top_p = greedy or top_k == 0, 1.0
    end_id = one.get("end_id")
    return SamplingParams(
        max_tokens=one["max_tokens"],
        min_tokens=one.get("min_tokens", one.get("min_length", 0)),
        temperature=0.0 if greedy else one.get("temperature", 1.0),
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=one.get("repetition_penalty", 1.0),
        presence_penalty=one.get("presence_penalty", 0.0),
        frequency_penalty=one.get("frequency_penalty", 0.0),
        seed=one.get("seed", one.get("random_seed")),
        logit_bias=banned,
        stop_token_ids=() if end_id in (None, -1) else (end_id,),
        ignore_eos=end_id == -1,  # no id is -1: generate up to max_tokens
        logprobs=0 if one.get("return_log_probs") else None,
        grammar=typed_guide(one.get("guided_decoding_guide_type", ""), one.get("guided_decoding_guide", "")),
    )


def _refuse_unserved(inputs: Inputs) -> None:
    for name, (_, _, neutral) in UNSERVED.items():
        if name not in inputs:
            continue
        if neutral is None:
            raise invalid(name, "is not served by this server")
        asked = next((element for element in inputs.all(name) if element != neutral), neutral)
        if asked != neutral:
            raise invalid(name, f"{shown(asked)} is not served by this server; it must be {neutral!r}")


def _fallback(parameters: Mapping[str, object]) -> dict[str, list[Any]]:
    """Request parameters as if they were tensors.

    Raises:
        ServiceError: INVALID_ARGUMENT for one that is no input of ours.
    """
    served = {name: datatype for name, (datatype, _) in SERVED.items() if name not in ONLY_TENSORS}
    datatypes = {"max_tokens": "INT32"} | served
    read = {}
    for name, value in parameters.items():
        if name in NOT_INPUTS:
            continue
        if name not in datatypes:
            raise invalid(name, f"is no parameter of this server; there are {', '.join(sorted(datatypes))}")
        converted = FALLBACK[datatypes[name]](name, value)
        read[name] = list(converted) if isinstance(converted, tuple) else [converted]
    return read
