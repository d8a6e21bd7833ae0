"""Structured outputs of the embedded model, through the typed API of a real server."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import grpc
import openai
import pytest
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from tests.e2e.conftest import ServerProcess
from tests.e2e.test_typed import answer, ask

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "country": {"type": "string", "maxLength": 30},
        "population": {"type": "integer", "minimum": 0, "maximum": 50_000_000},
        "capital": {"type": "boolean"},
    },
    "required": ["city", "country", "population", "capital"],
    "additionalProperties": False,
}


def formatted(question: str, form: pb.ResponseFormat, **sampling: object) -> pb.GenerateRequest:
    request = ask(question, **{"max_tokens": 120, **sampling})
    request.response_format.CopyFrom(form)
    return request


def test_an_answer_is_the_json_that_its_schema_asks_for(typed: rpc.GenerationServiceStub) -> None:
    form = pb.ResponseFormat(json_schema=json.dumps(CITY))
    text, finished = answer(typed, formatted("Describe Paris as JSON.", form))
    assert finished.reason == pb.FINISH_REASON_STOP
    city = json.loads(text)
    assert set(city) == set(CITY["required"])
    assert "Paris" in city["city"]
    assert type(city["population"]) is int
    assert type(city["capital"]) is bool


def test_over_http_it_is_the_same_json(typed: rpc.GenerationServiceStub, server: ServerProcess) -> None:
    text, _ = answer(typed, formatted("Describe Paris as JSON.", pb.ResponseFormat(json_schema=json.dumps(CITY))))
    with openai.OpenAI(base_url=f"http://{server.http_address}/v1", api_key="none", max_retries=0) as client:
        said = client.chat.completions.create(
            model="smollm2-135m-instruct",
            messages=[{"role": "user", "content": "Describe Paris as JSON."}],
            max_tokens=120,
            temperature=0,
            response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
        )
        assert said.choices[0].message.content == text
        with pytest.raises(openai.BadRequestError, match="response_format: the regex cannot be served") as caught:
            client.chat.completions.create(
                model="smollm2-135m-instruct",
                messages=[{"role": "user", "content": "x"}],
                response_format={"type": "regex", "regex": "(a"},  # type: ignore[typeddict-item]
            )
    assert caught.value.param == "response_format"


def test_any_object_a_pattern_and_a_grammar(typed: rpc.GenerationServiceStub) -> None:
    text, finished = answer(typed, formatted("Give me a small JSON object.", pb.ResponseFormat(json=True)))
    assert finished.reason == pb.FINISH_REASON_LENGTH or isinstance(json.loads(text), dict)
    text, _ = answer(typed, formatted("When did the war end?", pb.ResponseFormat(regex=r"\d{4}-\d{2}-\d{2}")))
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", text)
    form = pb.ResponseFormat(grammar='start: "The answer is " ("yes" | "no") "."')
    text, _ = answer(typed, formatted("Is 2 larger than 1?", form))
    assert text in ("The answer is yes.", "The answer is no.")


def test_neighbours_do_not_notice_and_a_seed_means_the_same_in_any_company(typed: rpc.GenerationServiceStub) -> None:
    form = pb.ResponseFormat(json_schema=json.dumps(CITY))
    plain = ask("Name an animal.", max_tokens=24, temperature=1.0, seed=7)
    drawn = formatted("Describe Rome as JSON.", form, temperature=0.7, seed=3)
    alone = [answer(typed, plain)[0], answer(typed, drawn)[0]]
    with ThreadPoolExecutor(6) as pool:
        crowd = [pool.submit(answer, typed, formatted(f"Describe city {i}.", form, max_tokens=40)) for i in range(4)]
        again = [pool.submit(answer, typed, request) for request in (plain, drawn)]
        assert [each.result()[0] for each in again] == alone
        assert all(each.result()[0].startswith("{") for each in crowd)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (pb.ResponseFormat(regex="(a"), "response_format: the regex cannot be served: .*unclosed group"),
        (pb.ResponseFormat(json_schema='{"type": "city"}'), "response_format: the json_schema .*Invalid type: city"),
        (pb.ResponseFormat(grammar="start: x"), 'response_format: the lark .*line 1, column 8: unknown name: "x"'),
        (pb.ResponseFormat(json_schema='{"items":' * 300 + "{}" + "}" * 300), "response_format: the json_schema"),
    ],
)
def test_a_wrong_grammar_is_an_invalid_argument_with_its_reason(
    typed: rpc.GenerationServiceStub, form: pb.ResponseFormat, reason: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(typed.Generate(formatted("Hi", form), timeout=60))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert re.match(reason, caught.value.details())
