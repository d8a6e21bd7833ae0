"""The tensors of TensorRT-LLM over a fake host, through the wire."""

from __future__ import annotations

import math
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from engine import Grammar, SamplingParams
from service.grpc.kserve import llm_models
from service.grpc.kserve.tensors import DTYPES
from service.grpc.kserve.trtllm import UNSERVED
from service.text.chat import Conversation, Message
from tests.service.fakes import Answer, FakeHost, Gate
from tests.service.grpc.kserve.calls import add, ask, is_final, iter_requests, outputs, stream, text
from tests.service.grpc.kserve.conftest import Running

# fmt: off
UPSTREAM = {
    "text_input", "max_tokens", "decoder_text_input", "num_return_sequences", "bad_words", "stop_words",
    "exclude_input_in_output", "end_id", "pad_id", "top_k", "min_tokens", "beam_width", "top_p",
    "temperature", "length_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "return_log_probs", "return_context_logits", "return_generation_logits", "return_perf_metrics",
    "return_num_input_tokens", "return_num_output_tokens", "stream", "prompt_embedding_table",
    "prompt_table_extra_id", "prompt_vocab_size", "embedding_bias_words", "embedding_bias_weights",
    "lora_task_id", "lora_weights", "lora_config", "guided_decoding_guide_type", "guided_decoding_guide",
    "num_draft_tokens", "use_draft_logits", "image_input", "image_bytes_input", "video_bytes_input",
    "image_url_input",
}
# fmt: on


def trtllm(
    prompt: str = "hi",
    *,
    id: str = "",
    max_tokens: int = 2,
    parameters: dict[str, Any] | None = None,
    datatypes: dict[str, str] | None = None,
    **inputs: Any,
) -> pb.ModelInferRequest:
    """A request in the shapes of its clients: everything behind a batch dimension of 1."""
    request = ask("ensemble", id=id, parameters=parameters)
    for name, value in {"text_input": prompt, "max_tokens": max_tokens, **inputs}.items():
        count = len(value) if isinstance(value, list) else 1
        add(request, name, value, datatype=(datatypes or {}).get(name, ""), shape=(1, count))
    return request


async def infer(running: Running, request: pb.ModelInferRequest) -> dict[str, Any]:
    return outputs(await running.stub.ModelInfer(request, timeout=10))


async def refused(running: Running, request: pb.ModelInferRequest) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.ModelInfer(request, timeout=10)
    return caught.value.code(), caught.value.details() or ""


def test_the_view_has_the_names_of_ensemble_and_bls(host: FakeHost) -> None:
    specs = {model.spec.name: model.spec for model in llm_models(host)}
    spec = specs["ensemble"]
    assert specs["tensorrt_llm_bls"].inputs == spec.inputs
    assert spec.max_batch_size >= 1
    assert spec.decoupled
    assert [t.name for t in spec.inputs if not t.optional] == ["text_input", "max_tokens"]
    assert {t.name for t in spec.inputs} == {*UPSTREAM, "messages", "random_seed", "min_length"}


# -- outputs -----------------------------------------------------------------------------------------------------------


async def test_the_text_has_one_dimension_and_the_rest_a_batch(llm: Running) -> None:
    response = await llm.stub.ModelInfer(trtllm())
    shapes = {tensor.name: list(tensor.shape) for tensor in response.outputs}
    assert shapes == {"text_output": [1], "batch_index": [1, 1], "sequence_index": [1, 1]}
    assert outputs(response)["text_output"] == [" t0 t1"]


async def test_shapes_without_batch_dimension_are_accepted(llm: Running) -> None:
    assert await infer(llm, ask("tensorrt_llm_bls", text_input="hi", max_tokens=1, stop_words=["a", "b"])) == {
        "text_output": [" t0"],
        "batch_index": [[0]],
        "sequence_index": [[0]],
    }


async def test_streamed_texts_are_deltas_and_the_last_is_final(llm: Running, host: FakeHost) -> None:
    host.answers["hi"] = Answer(gate=(gate := Gate()))
    call = llm.stub.ModelStreamInfer(iter_requests(trtllm(stream=True, max_tokens=3)))
    seen = []
    for _ in range(3):
        gate.allow()
        response = (await call.read()).infer_response
        seen.append((text(response), is_final(response)))
    assert seen == [(" t0", False), (" t1", False), (" t2", True)]


async def test_the_prompt_comes_first_only_where_it_is_not_excluded(llm: Running) -> None:
    for exclude, expected in ((True, " t0 t1"), (False, "hi t0 t1")):
        assert (await infer(llm, trtllm(exclude_input_in_output=exclude)))["text_output"] == [expected]
    messages = await stream(llm.stub, trtllm(exclude_input_in_output=False, stream=True))
    assert "".join(text(message.infer_response) for message in messages) == " t0 t1"


async def test_log_probs_and_counts_come_when_asked_for(llm: Running) -> None:
    asked = trtllm(return_log_probs=True, return_num_input_tokens=True, return_num_output_tokens=True)
    got = await infer(llm, asked)
    assert got["cum_log_probs"] == [[-0.75]]
    assert got["output_log_probs"] == [[[-0.25, -0.5]]]
    assert (got["num_input_tokens"], got["num_output_tokens"]) == ([[2]], [[2]])


async def test_several_sequences_have_an_index_each(llm: Running) -> None:
    got = await infer(llm, trtllm(num_return_sequences=3, return_log_probs=True))
    assert got["text_output"] == [" t0 t1"] * 3
    assert (got["sequence_index"], got["cum_log_probs"]) == ([[0, 1, 2]], [[-0.75] * 3])


@pytest.mark.parametrize("streaming", [True, False])
async def test_on_a_stream_each_sequence_has_its_own_messages(llm: Running, streaming: bool) -> None:
    texts = {0: "", 1: "", 2: ""}
    messages = await stream(llm.stub, trtllm(num_return_sequences=3, stream=streaming))
    for message in messages:
        got = outputs(message.infer_response)
        texts[got["sequence_index"][0][0]] += got["text_output"][0]
    assert texts == dict.fromkeys(range(3), " t0 t1")
    assert [is_final(message.infer_response) for message in messages] == [False] * (len(messages) - 1) + [True]


# -- inputs ------------------------------------------------------------------------------------------------------------


async def test_every_sampling_tensor_reaches_the_engine(llm: Running, host: FakeHost) -> None:
    request = trtllm(
        max_tokens=9,
        temperature=0.1,
        top_k=5,
        top_p=0.9,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        min_length=2,
        random_seed=7,
        end_id=3,
        pad_id=3,
        length_penalty=1.0,
        beam_width=1,
        stop_words=["end", "stop"],
        bad_words=["x"],
        datatypes={"random_seed": "UINT64"},
    )
    await infer(llm, request)
    (got,) = host.requests
    assert got.sampling == SamplingParams(
        max_tokens=9,
        temperature=0.1,
        top_k=5,
        top_p=0.9,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        min_tokens=2,
        seed=7,
        stop_token_ids=(3,),
        logit_bias={ord("x"): -math.inf},
    )
    assert (got.stop, got.include_stop) == (("end", "stop"), True)


async def test_words_that_are_empty_are_ignored(llm: Running, host: FakeHost) -> None:
    await infer(llm, trtllm(stop_words=[""], bad_words=[""]))
    assert (host.requests[0].stop, host.requests[0].sampling.logit_bias) == ((), {})


@pytest.mark.parametrize(
    ("given", "temperature", "top_k", "top_p"),
    [
        ({}, 0.0, 0, 1.0),
        ({"temperature": 0.5}, 0.5, 0, 1.0),
        ({"top_k": 5}, 1.0, 5, 1.0),
        ({"top_k": 5, "top_p": 0.0}, 1.0, 5, 1.0),
        ({"top_p": 0.0}, 0.0, 0, 1.0),
        ({"top_p": 0.5}, 1.0, 0, 0.5),
    ],
    ids=str,
)
async def test_decoding_is_greedy_unless_something_is_to_be_sampled(
    llm: Running, host: FakeHost, given: dict[str, Any], temperature: float, top_k: int, top_p: float
) -> None:
    await infer(llm, trtllm(**given))
    sampling = host.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (temperature, top_k, top_p)


async def test_an_end_id_of_minus_one_means_no_end(llm: Running, host: FakeHost) -> None:
    await infer(llm, trtllm(end_id=-1))
    assert (host.requests[0].sampling.ignore_eos, host.requests[0].sampling.stop_token_ids) == (True, ())


async def test_seed_and_min_tokens_have_two_names(llm: Running, host: FakeHost) -> None:
    await infer(llm, trtllm(seed=5, min_tokens=1, datatypes={"seed": "UINT64"}))
    assert (host.requests[0].sampling.seed, host.requests[0].sampling.min_tokens) == (5, 1)


async def test_request_parameters_fill_in_for_tensors(llm: Running, host: FakeHost) -> None:
    parameters = {"max_tokens": 3, "temperature": 0.5, "stop_words": "end"}
    await infer(llm, ask("ensemble", text_input="hi", temperature=0.25, parameters=parameters))
    (got,) = host.requests
    assert (got.sampling.max_tokens, got.sampling.temperature, got.stop) == (3, 0.25, ("end",))


async def test_a_chat_takes_the_place_of_the_text(llm: Running, host: FakeHost) -> None:
    chat = '[{"role": "user", "content": "Hi"}]'
    await infer(llm, ask("ensemble", messages=chat, max_tokens=1))
    await infer(llm, ask("ensemble", text_input="", max_tokens=1, parameters={"messages": chat}))
    expected = Conversation(messages=(Message(role="user", content="Hi"),))
    assert [request.prompt for request in host.requests] == [expected, expected]


def neutral_of(name: str) -> tuple[Any, Any]:
    """The value that asks for nothing, and one that asks for something."""
    datatype, _, neutral = UNSERVED[name]
    other = {"INT32": 2, "BOOL": True, "BYTES": "x", "FP32": 0.5, "UINT64": 1, "FP16": 1.0, "UINT8": 1}[datatype]
    return neutral, other


@pytest.mark.parametrize(
    ("kind", "guide", "grammar"),
    [
        ("", "", None),
        ("json", "", Grammar(kind="json_object")),
        ("json_schema", '{"type": "null"}', Grammar(kind="json_schema", text='{"type": "null"}')),
        ("regex", "a+", Grammar(kind="regex", text="a+")),
        ("lark", 'start: "a"', Grammar(kind="lark", text='start: "a"')),
    ],
)
async def test_a_guide_becomes_a_grammar(
    llm: Running, host: FakeHost, kind: str, guide: str, grammar: Grammar | None
) -> None:
    await infer(llm, trtllm(guided_decoding_guide_type=kind, guided_decoding_guide=guide))
    assert host.requests[0].sampling.grammar == grammar


async def test_a_guide_of_an_unknown_type_is_refused(llm: Running) -> None:
    code, message = await refused(llm, trtllm(guided_decoding_guide_type="ebnf_grammar", guided_decoding_guide="x"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith("guided_decoding_guide_type: 'ebnf_grammar' is not served; there are json, json_schema")


@pytest.mark.parametrize("name", UNSERVED)
async def test_what_is_not_served_is_refused_by_name_unless_it_asks_for_nothing(llm: Running, name: str) -> None:
    datatype, dims, _ = UNSERVED[name]
    neutral, other = neutral_of(name)

    def request(value: Any) -> pb.ModelInferRequest:
        raw = value if datatype == "BYTES" else np.full([abs(dim) for dim in dims], value, DTYPES[datatype]).tobytes()
        return add(trtllm(), name, raw, datatype=datatype, shape=(1, *map(abs, dims)))

    code, message = await refused(llm, request(other))
    assert (code, message.split(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, name)
    if neutral is not None:
        assert (await infer(llm, request(neutral)))["text_output"] == [" t0 t1"]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (trtllm(""), "text_input: is empty"),
        (trtllm(max_tokens=0), "max_tokens: 0 must be "),
        (trtllm(max_tokens=-1), "max_tokens: -1 must be "),
        (trtllm(temperature=math.nan), "temperature: nan must be between 0 and 100"),
        (trtllm(temperature=math.inf), "temperature: inf must be between 0 and 100"),
        (trtllm(top_p=1.5), "top_p: 1.5 must be greater than 0 and at most 1"),
        (trtllm(top_k=-5), "top_k: -5 must be 0 (off) or positive"),
        (trtllm(end_id=10**6), "stop_token_ids: 1000000 must be between 0 and 1255"),
        (trtllm(num_return_sequences=0), "num_return_sequences: 0 must be between 1 and 128"),
        (trtllm(bad_words=["two words"]), "bad_words: 'two words' takes 9 tokens; only words of one token can be"),
        (trtllm(parameters={"stream": True}), "stream: is no parameter of this server; there are "),
        (trtllm(parameters={"banana": 1}), "banana: is no parameter of this server; there are bad_words, "),
        (
            ask("ensemble", text_input="hi"),
            "[request id: <id_unknown>] expected number of inputs between 2 and 45 but got 1 inputs for model "
            "'ensemble'. Got input(s) ['text_input'], but missing required input(s) ['max_tokens'].",
        ),
        (
            add(ask("ensemble", max_tokens=1), "text_input", ["a", "b"], shape=(2, 1)),
            "[request id: <id_unknown>] unexpected shape for input 'text_input' for model 'ensemble'. Expected [-1,1], "
            "got [2,1].",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_tensors_are_refused_by_name(llm: Running, request_: pb.ModelInferRequest, says: str) -> None:
    code, message = await refused(llm, request_)
    assert (code, message[: len(says)]) == (grpc.StatusCode.INVALID_ARGUMENT, says)
