"""The tensors of the vLLM backend over a fake host, through the wire."""

from __future__ import annotations

import json
import math
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb

from engine import Grammar, SamplingParams
from service.errors import Code, ServiceError
from service.grpc.kserve import llm_models
from service.text.chat import Conversation, Message
from tests.service.fakes import Answer, FakeHost, Gate
from tests.service.grpc.kserve.calls import add, ask, iter_requests, outputs, stream, text, vllm
from tests.service.grpc.kserve.conftest import Running

RETURNS = {
    name: True
    for name in (
        "return_finish_reason",
        "return_cumulative_logprob",
        "return_logprobs",
        "return_num_input_tokens",
        "return_num_output_tokens",
    )
}


async def infer(running: Running, request: pb.ModelInferRequest) -> dict[str, Any]:
    return outputs(await running.stub.ModelInfer(request, timeout=10))


async def refused(running: Running, request: pb.ModelInferRequest) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.ModelInfer(request, timeout=10)
    return caught.value.code(), caught.value.details() or ""


def test_the_view_has_the_names_of_the_backend(host: FakeHost) -> None:
    specs = {model.spec.name: model.spec for model in llm_models(host)}
    spec = specs["vllm_model"]
    assert specs["fake"].inputs == spec.inputs
    assert (spec.max_batch_size, spec.decoupled) == (0, True)
    assert [t.name for t in spec.inputs if not t.optional] == ["text_input"]
    inputs = {t.name: (t.datatype, t.dims) for t in spec.inputs}
    assert inputs == {
        "text_input": ("BYTES", (1,)),
        "messages": ("BYTES", (1,)),
        "image": ("BYTES", (-1,)),
        "stream": ("BOOL", (1,)),
        "sampling_parameters": ("BYTES", (1,)),
        "exclude_input_in_output": ("BOOL", (1,)),
        **{name: ("BOOL", (1,)) for name in RETURNS},
    }
    assert {t.name: (t.datatype, t.dims) for t in spec.outputs} == {
        "text_output": ("BYTES", (-1,)),
        "finish_reason": ("BYTES", (-1,)),
        "cumulative_logprob": ("FP32", (-1,)),
        "logprobs": ("BYTES", (-1,)),
        "num_input_tokens": ("UINT32", (1,)),
        "num_output_tokens": ("UINT32", (-1,)),
    }


# -- text --------------------------------------------------------------------------------------------------------------


async def test_a_whole_answer_begins_with_the_prompt_unless_excluded(llm: Running) -> None:
    assert await infer(llm, vllm("hi", stream=False, max_tokens=2)) == {"text_output": ["hi t0 t1"]}
    assert await infer(llm, add(vllm("hi", stream=False, max_tokens=2), "exclude_input_in_output", False)) == {
        "text_output": ["hi t0 t1"]
    }
    assert await infer(llm, add(vllm("hi", stream=False, max_tokens=2), "exclude_input_in_output", True)) == {
        "text_output": [" t0 t1"]
    }


async def test_a_streamed_answer_never_has_the_prompt(llm: Running) -> None:
    (message,) = await stream(llm.stub, add(vllm("hi"), "exclude_input_in_output", False))
    assert (
        message.error_message
        == "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."
    )
    messages = await stream(llm.stub, vllm("hi", max_tokens=2))
    assert "".join(text(message.infer_response) for message in messages) == " t0 t1"


async def test_a_streamed_answer_needs_a_stream(llm: Running) -> None:
    assert await refused(llm, vllm("hi", stream=True)) == (
        grpc.StatusCode.UNIMPLEMENTED,
        "ModelInfer RPC doesn't support models with decoupled transaction policy",
    )


async def test_a_whole_answer_on_a_stream_is_one_message(llm: Running) -> None:
    (message,) = await stream(llm.stub, vllm("hi", stream=False, max_tokens=3))
    assert text(message.infer_response) == "hi t0 t1 t2"


async def test_the_default_is_sixteen_tokens(llm: Running, host: FakeHost) -> None:
    assert await infer(llm, ask("vllm_model", text_input="hi")) == {
        "text_output": ["hi" + "".join(f" t{i}" for i in range(16))]
    }
    assert host.requests[0].sampling == SamplingParams(max_tokens=16, temperature=1.0)


async def test_a_leading_batch_dimension_of_one_is_accepted(llm: Running) -> None:
    request = pb.ModelInferRequest(model_name="vllm_model")
    add(add(request, "text_input", "hi", shape=(1, 1)), "stream", False, shape=(1, 1))
    assert "hi t0" in (await infer(llm, request))["text_output"][0]


async def test_several_completions_stand_side_by_side(llm: Running) -> None:
    request = add(vllm("hi", stream=False, max_tokens=2, n=3), "return_finish_reason", True)
    assert await infer(llm, request) == {"text_output": ["hi t0 t1"] * 3, "finish_reason": ["length"] * 3}


# -- outputs beside the text -------------------------------------------------------------------------------------------


async def test_other_outputs_come_only_when_asked_for(llm: Running) -> None:
    request = ask("vllm_model", text_input="hi", sampling_parameters='{"max_tokens": 2, "logprobs": 1}', **RETURNS)
    got = await infer(llm, request)
    assert list(got) == [
        "text_output",
        "finish_reason",
        "cumulative_logprob",
        "logprobs",
        "num_input_tokens",
        "num_output_tokens",
    ]
    assert (got["finish_reason"], got["num_input_tokens"], got["num_output_tokens"]) == (["length"], [2], [2])
    assert got["cumulative_logprob"] == [-0.75]
    assert json.loads(got["logprobs"][0]) == [
        {"256": {"logprob": -0.25, "rank": 1, "decoded_token": " t0"}},
        {"257": {"logprob": -0.5, "rank": 1, "decoded_token": " t1"}},
    ]


async def test_logprobs_list_the_chosen_token_and_the_likeliest(llm: Running) -> None:
    request = add(vllm("hi", stream=False, max_tokens=1, logprobs=2), "return_logprobs", True)
    assert json.loads((await infer(llm, request))["logprobs"][0]) == [
        {
            "256": {"logprob": -0.25, "rank": 1, "decoded_token": " t0"},
            "257": {"logprob": -1.25, "rank": 2, "decoded_token": " t1"},
        }
    ]


async def test_logprobs_that_sampling_did_not_ask_for_are_null(llm: Running) -> None:
    request = ask("vllm_model", text_input="hi", sampling_parameters='{"max_tokens": 2}', **RETURNS)
    got = await infer(llm, request)
    assert (got["logprobs"], got["cumulative_logprob"]) == (["null"], [-0.75])


async def test_streamed_counts_are_of_each_message_and_the_reason_of_the_last(llm: Running, host: FakeHost) -> None:
    host.answers["hi"] = Answer(gate=(gate := Gate()))
    request = ask("vllm_model", text_input="hi", stream=True, sampling_parameters='{"max_tokens": 3}', **RETURNS)
    call = llm.stub.ModelStreamInfer(iter_requests(request))
    seen = []
    for _ in range(3):
        gate.allow()
        got = outputs((await call.read()).infer_response)
        seen.append((got["num_output_tokens"], got["finish_reason"], got["cumulative_logprob"]))
    assert seen == [([1], ["None"], [-0.25]), ([1], ["None"], [-0.75]), ([1], ["length"], [-1.5])]


async def test_an_answer_that_ends_by_itself_ends_with_stop(llm: Running, host: FakeHost) -> None:
    host.answers["hi"] = Answer(pieces=("é", "!"))
    request = add(vllm("hi", stream=False), "return_finish_reason", True)
    assert await infer(llm, request) == {"text_output": ["hié!"], "finish_reason": ["stop"]}


# -- sampling parameters -----------------------------------------------------------------------------------------------


async def test_values_may_be_texts(llm: Running, host: FakeHost) -> None:
    as_text = {
        "max_tokens": "7",
        "min_tokens": "1",
        "temperature": "0.5",
        "top_p": "0.9",
        "top_k": "-1",
        "min_p": "0.1",
        "repetition_penalty": "1.1",
        "presence_penalty": "0.2",
        "frequency_penalty": "-0.2",
        "seed": "18446744073709551615",
        "ignore_eos": "false",
        "n": "2",
        "include_stop_str_in_output": "True",
        "cache_salt": "17",
    }
    await infer(llm, vllm("hi", stream=False, **as_text))
    (request,) = host.requests
    assert request.sampling == SamplingParams(
        max_tokens=7,
        min_tokens=1,
        temperature=0.5,
        top_p=0.9,
        top_k=0,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.2,
        seed=2**64 - 1,
        ignore_eos=False,
    )
    assert (request.n, request.include_stop, request.cache_salt) == (2, True, "17")


async def test_lists_and_maps_are_read(llm: Running, host: FakeHost) -> None:
    await infer(
        llm,
        vllm("hi", stream=False, stop="end", stop_token_ids=[5, "6"], logit_bias={"7": -1}, max_tokens=None),
    )
    (request,) = host.requests
    assert (request.stop, request.sampling.stop_token_ids) == (("end",), (5, 6))
    assert (request.sampling.logit_bias, request.sampling.max_tokens) == ({7: -1.0}, 16)


async def test_without_the_tensor_request_parameters_are_the_sampling_parameters(llm: Running, host: FakeHost) -> None:
    parameters = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True, "stop": "x"}
    await infer(llm, ask("vllm_model", text_input="hi", parameters=parameters))
    (request,) = host.requests
    assert request.sampling == SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    assert request.stop == ("x",)


async def test_bad_words_of_one_token_become_impossible(llm: Running, host: FakeHost) -> None:
    # One token per byte: " x" has two, but they hold the banned "x".
    await infer(llm, vllm("hi", stream=False, bad_words=["x"], logit_bias={"9": 1}))
    assert host.requests[0].sampling.logit_bias == {ord("x"): -math.inf, 9: 1.0}


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"banana": 1}, "banana: is no sampling parameter of this server; there are bad_words, "),
        ({"prompt_logprobs": 1}, "prompt_logprobs: is no sampling parameter of this server"),  # no output has them
        ({"max_tokens": 0}, "max_tokens: 0 must be "),
        ({"max_tokens": "many"}, "max_tokens: 'many' must be an integer"),
        ({"max_tokens": 1.5}, "max_tokens: 1.5 must be an integer"),
        ({"max_tokens": True}, "max_tokens: True must be an integer"),
        ({"max_tokens": 10**30}, f"max_tokens: {10**30} must be between -2147483648 and 2147483647"),
        ({"temperature": -1}, "temperature: -1.0 must be between 0 and 100"),
        ({"temperature": math.nan}, "temperature: nan must be between 0 and 100"),
        ({"temperature": []}, "temperature: [] must be a number"),
        ({"top_p": 0}, "top_p: 0.0 must be greater than 0"),
        ({"ignore_eos": "maybe"}, "ignore_eos: 'maybe' must be true or false"),
        ({"stop": [1]}, "stop: [1] must be a string or a list of strings"),
        ({"stop_token_ids": [1, "x"]}, "stop_token_ids[1]: 'x' must be an integer"),
        ({"logit_bias": {"x": 1}}, "logit_bias: 'x' must be an integer"),
        ({"bad_words": ["long"]}, "bad_words: 'long' takes 4 tokens; only words of one token can be banned"),
        ({"cache_salt": 17}, "cache_salt: 17 must be a string"),
        ({"n": 0}, "n: 0 must be between 1 and 128"),
        ({"n": 10**9}, "n: 1000000000 must be between 1 and 128"),
        ({"seed": -1}, "seed: -1 must be between 0 and 18446744073709551615"),
        ({"best_of": 2}, "best_of: 2 is not served; it must be 1"),
        ({"skip_special_tokens": False}, "skip_special_tokens: False is not served; it must be true"),
    ],
    ids=str,
)
async def test_a_bad_sampling_parameter_is_refused_by_name(llm: Running, sampling: dict[str, Any], says: str) -> None:
    code, message = await refused(llm, vllm("hi", stream=False, **sampling))
    assert (code, message[: len(says)]) == (grpc.StatusCode.INVALID_ARGUMENT, says)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"text_input": ""}, "text_input: is empty"),
        ({"text_input": b"caf\xe9"}, "text_input: is not valid UTF-8: byte 0xe9 at 3"),
        ({"text_input": "x" * 512}, "prompt: 512 tokens must be fewer than the context of 512 tokens"),
        ({"text_input": "hi", "image": "aGk="}, "image: is not served"),
        ({"text_input": "hi", "sampling_parameters": "{"}, "sampling_parameters: is not valid JSON"),
        ({"text_input": "hi", "sampling_parameters": "[" * 10**5}, "sampling_parameters: is not valid JSON"),
        ({"text_input": "hi", "sampling_parameters": "[1]"}, "sampling_parameters: [1] must be a JSON object"),
        ({"text_input": "hi", "messages": "[]"}, "messages: cannot stand beside"),
        ({"messages": "[]"}, "messages: [] must be a list of at least one"),
        ({"messages": "[" + ",".join(["{}"] * 16385) + "]"}, "messages: has 16385 messages, must have at most 16384"),
        ({"messages": "[" + "[],[" * 2**18 + "]]"}, "messages: has more than 524288 values, by its commas"),
        ({"messages": '[{"role": "user"}]'}, "messages[0]: {'role': 'user'} must be an object with the strings"),
        ({"messages": '[{"role": "user", "content": "x", "name": "y"}]'}, "messages[0].name: is not served"),
        ({"stream": False}, "[request id: <id_unknown>] expected number of inputs between 1 and 11"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_tensor_is_refused_by_name(llm: Running, inputs: dict[str, Any], says: str) -> None:
    code, message = await refused(llm, ask("vllm_model", **inputs))
    assert (code, message[: len(says)]) == (grpc.StatusCode.INVALID_ARGUMENT, says)


# -- chat --------------------------------------------------------------------------------------------------------------

CHAT = '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]'
CONVERSATION = Conversation(messages=(Message(role="system", content="Be brief."), Message(role="user", content="Hi")))


@pytest.mark.parametrize(
    "request_",
    [
        ask("vllm_model", messages=CHAT),
        ask("vllm_model", text_input="", messages=CHAT),
        ask("vllm_model", parameters={"messages": CHAT}),
        ask("vllm_model", text_input="", parameters={"messages": CHAT}),
    ],
    ids=["tensor", "tensor beside empty text", "parameter", "parameter beside empty text"],
)
async def test_a_chat_comes_as_tensor_or_parameter(llm: Running, host: FakeHost, request_: Any) -> None:
    got = await infer(llm, request_)
    assert host.requests[0].prompt == CONVERSATION
    assert got["text_output"][0].startswith(" t0")


async def test_a_model_without_chat_template_says_so(llm: Running, host: FakeHost) -> None:
    host.has_chat = False
    code, message = await refused(llm, ask("vllm_model", messages=CHAT))
    assert (code, message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "messages: this model has no chat template; send text_input",
    )


# -- priority, time, ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "ours"), [(0, 0), (1, -1), (2, 0), (5, 3)])
async def test_priority_one_runs_first(llm: Running, host: FakeHost, sent: int, ours: int) -> None:
    request = vllm("hi", stream=False)
    request.parameters["priority"].uint64_param = sent
    await infer(llm, request)
    assert host.requests[0].priority == ours


async def test_a_timeout_ends_the_wait_for_the_first_token(llm: Running, host: FakeHost) -> None:
    host.answers["hi"] = Answer(gate=Gate())
    code, message = await refused(llm, ask("vllm_model", text_input="hi", parameters={"timeout": 50_000}))
    assert (code, message) == (grpc.StatusCode.UNAVAILABLE, "Request timeout expired")
    await host.until(lambda: host.running == 0)


async def test_a_timeout_does_not_end_what_has_begun(llm: Running, host: FakeHost) -> None:
    host.answers["hi"] = Answer(gate=(gate := Gate()))
    host.answers["never"] = Answer(gate=Gate())
    gate.allow()
    begun = ask("vllm_model", text_input="hi", stream=True, parameters={"max_tokens": 2, "timeout": 500_000})
    call = llm.stub.ModelStreamInfer(iter_requests(begun))
    first = await call.read()
    # Once a request that came later has timed out, so would the first have.
    await refused(llm, ask("vllm_model", text_input="never", parameters={"timeout": 500_000}))
    gate.allow()
    last = await call.read()
    assert (text(first.infer_response), text(last.infer_response), last.error_message) == (" t0", " t1", "")


async def test_the_deadline_of_a_call_frees_its_place(llm: Running, host: FakeHost) -> None:
    host.answers["hi"] = Answer(gate=Gate())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await llm.stub.ModelInfer(vllm("hi", stream=False), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await host.until(lambda: host.running == 0)
    assert len(host.cancelled) == 1


async def test_cancelling_a_call_frees_its_place(llm: Running, host: FakeHost) -> None:
    host.answers["hi"] = Answer(gate=Gate())
    call = llm.stub.ModelInfer(vllm("hi", stream=False))
    await host.until(lambda: host.running == 1)
    call.cancel()
    await host.until(lambda: host.running == 0)
    assert len(host.cancelled) == 1


async def test_a_full_queue_is_told_with_a_retry_hint(llm: Running, host: FakeHost) -> None:
    full = ServiceError(Code.RESOURCE_EXHAUSTED, "the queue is full", retry_after_ms=250)
    host.answers["hi"] = Answer(error=full)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await llm.stub.ModelInfer(vllm("hi", stream=False), metadata=(("x-request-id", "r1"),))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(caught.value.trailing_metadata()) == {
        "x-request-id": "r1",
        "retry-after-ms": "250",
        "grpc-retry-pushback-ms": "250",
    }


async def test_what_is_too_long_for_a_request_id_is_not_sent_back(llm: Running) -> None:
    call = llm.stub.ModelInfer(vllm("hi", stream=False, max_tokens=1), metadata=(("x-request-id", "a" * 257),))
    assert "x-request-id" not in dict(await call.trailing_metadata())
    assert await call.code() is grpc.StatusCode.OK


async def test_a_generation_that_breaks_is_an_error(llm: Running, host: FakeHost) -> None:
    host.answers["hi"] = Answer(finished_error="the logits are not finite", error_after=2)
    assert await refused(llm, vllm("hi", stream=False)) == (
        grpc.StatusCode.INTERNAL,
        "the logits are not finite",
    )


async def test_ids_in_the_engine_are_unique_whatever_clients_send(llm: Running, host: FakeHost) -> None:
    await stream(llm.stub, vllm("A", id="same"), vllm("B", id="same"), vllm("C"), vllm("D"))
    assert len({request.request_id for request in host.requests}) == 4


# -- grammars ----------------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
AS_SCHEMA = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
ONE_OF = Grammar(kind="lark", text='start: "yes" | "\\"no\\""')


@pytest.mark.parametrize(
    ("sampling", "grammar"),
    [
        ({"guided_json": SCHEMA}, AS_SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, AS_SCHEMA),
        ({"guided_regex": "a+"}, Grammar(kind="regex", text="a+")),
        ({"guided_choice": ["yes", '"no"']}, ONE_OF),
        ({"guided_grammar": 'start: "a"'}, Grammar(kind="lark", text='start: "a"')),
        ({"guided_decoding": {"json": SCHEMA}}, AS_SCHEMA),
        ({"guided_decoding": json.dumps({"json": SCHEMA, "regex": None})}, AS_SCHEMA),
        ({"structured_outputs": {"choice": ["yes", '"no"'], "json_object": False}}, ONE_OF),
        ({"structured_outputs": {"json_object": True}}, Grammar(kind="json_object")),
        ({"structured_outputs": {}}, None),
    ],
)
async def test_guided_decoding_becomes_a_grammar(
    llm: Running, host: FakeHost, sampling: dict[str, Any], grammar: Grammar | None
) -> None:
    await infer(llm, vllm("hi", stream=False, **sampling))
    assert host.requests[0].sampling.grammar == grammar


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_decoding: 2 grammars are given"),
        ({"guided_decoding": {"json": "{}", "regex": "a"}}, "guided_decoding: 2 grammars are given"),
        ({"guided_decoding": {"structural_tag": "x"}}, "guided_decoding.structural_tag: is not served; there are json"),
        ({"guided_decoding": [1]}, "guided_decoding: [1] must be an object with one of json, regex"),
        ({"guided_decoding": "{"}, "guided_decoding: is not valid JSON"),
        ({"guided_choice": []}, "guided_choice: [] must be a list of texts that are not empty"),
        ({"guided_choice": [""]}, "guided_choice: [''] must be a list of texts that are not empty"),
        ({"guided_regex": 3}, "guided_regex: 3 must be a string"),
        ({"guided_regex": ""}, "response_format: the regex is empty"),
    ],
)
async def test_guided_decoding_without_sense_is_refused(llm: Running, sampling: dict[str, Any], says: str) -> None:
    code, message = await refused(llm, vllm("hi", stream=False, **sampling))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith(says)
