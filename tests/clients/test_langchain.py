"""LangChain's ChatOpenAI and OpenAI."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

from tests.clients.conftest import MODEL, asked
from tests.server import ServerProcess

QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city and how long one stays there."""

    name: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def chat(server: ServerProcess, **fields: Any) -> ChatOpenAI:
    return ChatOpenAI(**asked(server, model=MODEL, temperature=0, max_tokens=60, **fields))


def caller(nemo: ServerProcess) -> ChatOpenAI:
    """Of the model with tools; it is random, so it has to be held to a call."""
    return ChatOpenAI(**asked(nemo, model="nemo", temperature=1, seed=7, max_tokens=200))


async def test_a_stream_says_what_the_whole_answer_says(server: ServerProcess) -> None:
    model = chat(server, stream_usage=True)
    whole = await model.ainvoke(QUESTION)
    chunks = [chunk async for chunk in model.astream(QUESTION)]
    assert "Paris" in whole.content
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    counts = [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata]
    assert whole.usage_metadata is not None
    assert counts == [whole.usage_metadata["output_tokens"]]


def test_several_at_once_and_what_a_conversation_may_hold(server: ServerProcess) -> None:
    talk = [("system", "You answer briefly."), HumanMessage(QUESTION), AIMessage("Paris."), ("user", "And of Italy?")]
    answers = chat(server).batch([talk, QUESTION, [HumanMessage([{"type": "text", "text": QUESTION}])]])
    assert all(answer.content for answer in answers)
    assert "Paris" in answers[2].content


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_structured_output(server: ServerProcess, method: Any) -> None:
    told = "Name a city as JSON with the keys name (Paris or Rome) and days (1 to 9)."
    answer = chat(server).with_structured_output(City, method=method, include_raw=True).invoke(told)
    assert isinstance(answer, dict)
    if method == "json_schema":
        assert isinstance(answer["parsed"], City)
    else:  # any object: whether it fits is up to the model
        assert str(answer["raw"].content).startswith("{")


def test_structured_output_by_a_tool(nemo: ServerProcess) -> None:
    assert isinstance(caller(nemo).with_structured_output(City, method="function_calling").invoke("Hi"), City)


def test_a_tool_is_called_and_its_result_sent_back(nemo: ServerProcess) -> None:
    model = caller(nemo).bind_tools([City], tool_choice="any", parallel_tool_calls=False)
    answer = model.invoke("Hi")
    assert isinstance(answer, AIMessage)
    [call] = answer.tool_calls
    assert City(**call["args"])
    streamed = None
    for chunk in model.stream("Hi"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [each["args"] for each in streamed.tool_calls] == [call["args"]]
    result = ToolMessage("sunny", tool_call_id=call["id"])
    assert caller(nemo).bind(max_tokens=3).invoke([HumanMessage("Hi"), answer, result]).response_metadata


def test_completions(server: ServerProcess) -> None:
    model = OpenAI(**asked(server, model=MODEL, temperature=0, max_tokens=4))
    whole = model.invoke("The capital of France is")
    assert whole.startswith(" Paris")
    assert "".join(model.stream("The capital of France is")) == whole


def test_what_is_not_served_is_an_error_of_its_kind(server: ServerProcess) -> None:
    with pytest.raises(ContextOverflowError):
        chat(server).invoke("word " * 20_000)
    with pytest.raises(openai.NotFoundError, match="the model has no embeddings"):
        OpenAIEmbeddings(check_embedding_ctx_length=False, **asked(server, model=MODEL)).embed_query("x")
    with pytest.raises(openai.BadRequestError, match="the model reads text alone"):
        chat(server).invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "http://x/y.png"}}])])
    with pytest.raises(openai.BadRequestError, match="chat template has no place for it"):
        chat(server).bind_tools([City]).invoke("Hi")
