"""Completions over fakes: several prompts, echo, and logprobs as evaluation harnesses read them."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import pytest

from tests.service.fake_engine import EOS, FakeEngine
from tests.service.fakes import FakeHost
from tests.service.grpc.ports import served
from tests.service.http.ports import error, events, serving


async def test_the_official_client_completes_a_prompt() -> None:
    async with serving(served(FakeEngine(b"Hello"))) as port:
        answer = await port.openai.completions.create(model="toy", prompt="Hi", max_tokens=5)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert [(each.index, each.text, each.finish_reason, each.logprobs) for each in answer.choices] == [
        (0, "Hello", "length", None)
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)  # with the one that begins a text


async def test_a_stream_has_pieces_end_usage_and_done() -> None:
    async with serving(served(FakeEngine(b"Hey"))) as port:
        found = events(await port.complete(max_tokens=3, stream=True, stream_options={"include_usage": True}))
    *chunks, last = found
    assert [each["choices"][0]["text"] for each in chunks] == ["H", "e", "y", ""]
    assert [each["choices"][0]["finish_reason"] for each in chunks] == [None, None, None, "length"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("ab", ["ab"]),
        ([97, 98], [[97, 98]]),
        (["ab", "c"], ["ab", "c"]),
        ([[97, 98], [99]], [[97, 98], [99]]),
    ],
)
async def test_prompts_are_texts_or_token_ids_one_or_several(prompt: Any, sent: list[Any]) -> None:
    host = FakeHost()
    async with serving(host) as port:
        answer = (await port.complete(prompt, max_tokens=1, n=2)).json()
    assert sorted((each.prompt for each in host.requests), key=str) == sorted(sent, key=str)
    assert [each["index"] for each in answer["choices"]] == list(range(2 * len(sent)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, sent))


async def test_several_prompts_share_a_stream_and_are_told_apart_by_their_index() -> None:
    async with serving(served(FakeEngine(b"Hey"))) as port:
        found = events(await port.complete(["a", "b"], max_tokens=3, stream=True))
    choices = [each["choices"][0] for each in found]
    for index in (0, 1):
        mine = [each for each in choices if each["index"] == index]
        assert "".join(each["text"] for each in mine) == "Hey"
        assert [each["finish_reason"] for each in mine][-1] == "length"


async def test_logprobs_are_four_lists_of_one_length() -> None:
    async with serving(served(FakeEngine("aé!".encode()))) as port:
        answer = (await port.complete(max_tokens=4, logprobs=1)).json()
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9", "!"],
        "token_logprobs": [-0.97, -1.95, -1.69, -0.33],
        "top_logprobs": [{"a": -0.97}, {"bytes:\\xc3": -1.95}, {"bytes:\\xa9": -1.69}, {"!": -0.33}],
        "text_offset": [0, 1, 1, 2],
    }


async def test_tokens_are_spelt_as_ids_if_asked_for() -> None:
    async with serving(served(FakeEngine(b"a"))) as port:
        answer = (await port.complete(max_tokens=1, logprobs=0, return_tokens_as_token_ids=True)).json()
    assert answer["choices"][0]["logprobs"]["tokens"] == ["token_id:97"]
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"token_id:97": -0.97}]


@pytest.mark.parametrize("prompt", ["Hi", [256, 72, 105]])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_in_front(prompt: Any, stream: bool) -> None:
    async with serving(served(FakeEngine(b"Hey"))) as port:
        response = await port.complete(prompt, max_tokens=3, echo=True, logprobs=0, stream=stream)
    choices = [each["choices"][0] for each in events(response)] if stream else response.json()["choices"]
    assert "".join(each["text"] for each in choices) == "HiHey"
    logprobs = [each["logprobs"] for each in choices if each["logprobs"]]
    assert [name for each in logprobs for name in each["tokens"]] == ["<s>", *"HiHey"]
    assert [value for each in logprobs for value in each["token_logprobs"]][:3] == [None, -0.72, -1.05]
    assert [at for each in logprobs for at in each["text_offset"]] == [0, 0, 1, 2, 3, 4]


async def test_the_likelihood_of_a_text_is_had_as_lm_eval_asks_for_it() -> None:
    """`local-completions` sends this, and reads all but the last token as the prompt's."""
    context, continuation = [72, 105], [33, 34]
    body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    async with serving(served(FakeEngine([EOS]))) as port:  # the model would end here
        answer = (await port.complete([context + continuation, [1, 2, 3]], **body)).json()
    first, second = sorted(answer["choices"], key=itemgetter("index"))
    assert first["logprobs"]["token_logprobs"][2:-1] == [-0.33, -0.34]
    assert [max(top.values()) for top in first["logprobs"]["top_logprobs"][2:-1]] == [-0.33, -0.34]  # so it is greedy
    assert len(second["logprobs"]["tokens"]) == 4


async def test_no_tokens_at_all_beside_the_echo() -> None:
    async with serving(served(FakeEngine(b"Hey"))) as port:
        answer = (await port.complete("Hi", max_tokens=0, echo=True, logprobs=1)).json()
        refused = error(await port.complete("Hi", max_tokens=0), 400)
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "H", "i"]
    assert answer["usage"]["completion_tokens"] == 0
    assert refused["param"] == "max_tokens"


async def test_the_token_that_begins_a_text_can_be_left_out() -> None:
    host = FakeHost()
    async with serving(host) as port:
        await port.complete("Hi", max_tokens=1, add_special_tokens=False)
        await port.complete("Hi", max_tokens=1)
    assert [each.prompt for each in host.requests] == [[72, 105], "Hi"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"suffix": "end"}, "suffix", "does not fill in the middle"),
        ({"best_of": 3}, "best_of", "3 must be n (1)"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": ["a", 1]}, "prompt", "must be a text, a list of texts"),
        ({"prompt": [[]]}, "prompt", "0 tokens must have at least one token"),
        ({"prompt": [-1]}, "prompt_token_ids[0]", "-1 must be between 0 and"),
        ({"prompt": [10**30]}, "prompt_token_ids[0]", "must be between 0 and"),
        ({"prompt": [99999], "echo": True}, "token_ids[0]", "99999 must be between 0 and"),
        ({"prompt": {"a": 1}}, "prompt", "got `object`"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt", "at most 128 completions"),
        ({"logprobs": 21}, "logprobs", "21 must be between 0 and 20"),
        ({"logprobs": True}, "logprobs", "expected `int | null`"),
        ({"messages": []}, "messages", "is not a known parameter"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "expected `int`"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(fields: Any, param: str, words: str) -> None:
    async with serving(served(FakeEngine())) as port:
        found = error(await port.post("/v1/completions", {"prompt": "Hi"} | fields), 400)
    assert found["param"] == param
    assert words in found["message"]


async def test_one_prompt_that_is_refused_refuses_all() -> None:
    engine = FakeEngine()
    async with serving(served(engine)) as port:
        found = error(await port.complete([[1], [2] * 500]), 400)
    assert "must be fewer than the context" in found["message"]
    assert len(engine.ended) == 0


async def test_tokens_and_texts_are_turned_into_each_other() -> None:
    async with serving(served(FakeEngine())) as port:
        counted = (await port.post("/tokenize", {"prompt": "Hi", "return_token_strs": True})).json()
        bare = (await port.post("/tokenize", {"prompt": "Hi", "add_special_tokens": False})).json()
        chat = (await port.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]})).json()
        text = (await port.post("/detokenize", {"tokens": [72, 105]})).json()
        bad = error(await port.post("/detokenize", {"tokens": [72, 500]}), 400)
        info = (await port.http.get("/tokenizer_info")).json()
        both = error(await port.post("/tokenize", {}), 400)
    assert info == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "bos_token_id": 256,
        "eos_token_id": 257,
        "vocab_size": 260,
        "model_max_length": 128,
    }
    assert counted == {"count": 3, "max_model_len": 128, "tokens": [256, 72, 105], "token_strs": ["<s>", "H", "i"]}
    assert bare["tokens"] == [72, 105]
    assert chat["tokens"][0] == 256
    assert text == {"prompt": "Hi"}
    assert bad["param"] == "token_ids[1]"
    assert both["param"] == "prompt"
