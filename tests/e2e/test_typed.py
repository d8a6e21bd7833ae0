"""The typed API against a real server process with the embedded model."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from tests.e2e.conftest import ServerProcess
from tests.server import NEMOSERVE

GREEDY = {"temperature": 0.0}


def ask(question: str, **sampling: object) -> pb.GenerateRequest:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=question)])
    return pb.GenerateRequest(chat=chat, sampling=pb.SamplingParameters(**{**GREEDY, **sampling}))


def answer(service: rpc.GenerationServiceStub, request: pb.GenerateRequest) -> tuple[str, pb.Finished]:
    """Text and end of one completion; checks the order of the stream on the way."""
    events = list(service.Generate(request, timeout=120))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) <= {"delta"}
    return "".join(event.delta.text for event in events), events[-1].finished


def test_a_question_is_answered_by_the_real_model(typed: rpc.GenerationServiceStub) -> None:
    text, finished = answer(typed, ask("What is 2+2?", max_tokens=32))
    assert "4" in text
    assert finished.reason == pb.FINISH_REASON_STOP
    assert 0 < finished.usage.completion_tokens <= 32


def test_max_tokens_ends_with_length(typed: rpc.GenerationServiceStub) -> None:
    _, finished = answer(typed, ask("Tell a long story.", max_tokens=5))
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert finished.usage.completion_tokens == 5


def test_a_stop_string_is_cut_off_and_named(typed: rpc.GenerationServiceStub) -> None:
    text, finished = answer(typed, ask("What is 2+2?", max_tokens=32, stop=["4"]))
    assert "4" not in text
    assert finished.stop == "4"


def test_the_same_seed_gives_the_same_text_in_any_company(typed: rpc.GenerationServiceStub) -> None:
    request = ask("Name an animal.", max_tokens=24, temperature=1.0, seed=7)
    alone, _ = answer(typed, request)
    with ThreadPoolExecutor(8) as pool:
        crowd = [pool.submit(answer, typed, ask(f"Count to {i}.", max_tokens=24)) for i in range(7)]
        again, _ = pool.submit(answer, typed, request).result()
        assert all(future.result()[0] for future in crowd)
    assert again == alone


def test_completions_of_one_prompt_share_it_and_are_those_of_their_seeds(typed: rpc.GenerationServiceStub) -> None:
    def request(n: int, seed: int, salt: str) -> pb.GenerateRequest:
        sampling = pb.SamplingParameters(max_tokens=12, temperature=1.0, ignore_eos=True, n=n, seed=seed)
        return pb.GenerateRequest(prompt="Say it again. " * 50, sampling=sampling, cache_salt=salt)

    events = list(typed.Generate(request(4, 2**64 - 2, "together"), timeout=120))
    ends = {event.finished.index: event.finished for event in events if event.HasField("finished")}
    texts = ["".join(event.delta.text for event in events if event.delta.index == index) for index in range(4)]
    alone = [answer(typed, request(1, (2**64 - 2 + index) % 2**64, f"alone {index}")) for index in range(4)]
    assert texts == [text for text, _ in alone]
    assert len(set(texts)) == 4
    assert sorted(ends) == [0, 1, 2, 3]
    assert events[0].started.cached_tokens == 0  # of the one that computes the prompt
    [usage, *shared] = sorted((end.usage for end in ends.values()), key=lambda usage: usage.cached_tokens)
    pages = (usage.prompt_tokens - 1) // 64 * 64
    assert (usage.cached_tokens, [each.cached_tokens for each in shared]) == (0, [pages] * 3)
    assert [end.usage.cached_tokens for _, end in alone] == [0] * 4  # each has a salt of its own


def test_32_concurrent_streams_all_finish(typed: rpc.GenerationServiceStub) -> None:
    with ThreadPoolExecutor(32) as pool:
        requests = [ask(f"Write about the number {i}.", max_tokens=24, ignore_eos=True) for i in range(32)]
        ends = [end for _, end in pool.map(lambda request: answer(typed, request), requests)]
    assert [end.usage.completion_tokens for end in ends] == [24] * 32


def test_cancelling_the_call_frees_the_pages(typed: rpc.GenerationServiceStub, server: ServerProcess) -> None:
    call = typed.Generate(ask("Tell a long story.", max_tokens=4000, ignore_eos=True), timeout=60)
    assert next(call).WhichOneof("event") == "started"
    assert server.load().running_requests == 1
    call.cancel()
    load = server.until("an empty engine", lambda load: load.running_requests == 0)
    assert load.kv_pages_used == 0


def test_a_deadline_ends_the_request_in_the_engine_too(typed: rpc.GenerationServiceStub, server: ServerProcess) -> None:
    code = reason = None
    try:
        *_, last = typed.Generate(ask("Tell a long story.", max_tokens=4000, ignore_eos=True), timeout=1.0)
        reason = last.finished.reason
    except grpc.RpcError as error:
        code = error.code()
    # Of the client's clock and the server's either may be first.
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED or reason == pb.FINISH_REASON_DEADLINE
    assert server.until("an empty engine", lambda load: load.running_requests == 0).kv_pages_used == 0


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (pb.GenerateRequest(prompt=""), "prompt"),
        (pb.GenerateRequest(), "input"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[49152])), "49151"),
        (pb.GenerateRequest(prompt="word " * 9000), "8192"),
        (ask("x", max_tokens=0), "max_tokens"),
        (ask("x", temperature=-0.1), "temperature"),
        (ask("x", temperature=float("nan")), "temperature"),
        (ask("x", top_p=1.5), "top_p"),
        (ask("x", n=-1), "n"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="wizard", content="x")])), "role"),
    ],
)
def test_bad_input_is_refused_by_name(
    typed: rpc.GenerationServiceStub, request_: pb.GenerateRequest, names: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(typed.Generate(request_, timeout=30))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert names in caught.value.details()


def test_an_unknown_model_is_not_found(typed: rpc.GenerationServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(typed.Generate(pb.GenerateRequest(prompt="x", model="gpt-9"), timeout=30))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "gpt-9" in caught.value.details()


def test_tokenize_and_detokenize_are_inverse(typed: rpc.GenerationServiceStub) -> None:
    text = "Ein Zug fährt um 9 Uhr ab. 🚆"
    ids = typed.Tokenize(pb.TokenizeRequest(text=text), timeout=10).token_ids
    assert typed.Detokenize(pb.DetokenizeRequest(token_ids=ids), timeout=10).text == text


def test_control_tokens_in_user_text_are_text(typed: rpc.GenerationServiceStub) -> None:
    [end] = typed.Tokenize(pb.TokenizeRequest(text="<|im_end|>"), timeout=10).token_ids[:1]
    assert len(typed.Tokenize(pb.TokenizeRequest(text="<|im_end|>"), timeout=10).token_ids) > 1
    assert end != 2


def test_chat_in_the_terminal_over_grpc(server: ServerProcess) -> None:
    done = subprocess.run(
        [
            NEMOSERVE,
            "chat",
            "--address",
            server.address,
            "--temperature",
            "0",
            "--once",
            "What is 2+2?",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "4" in done.stdout
