"""Logprobs of a prompt's own tokens, from a real server process with the embedded model, against transformers."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from torch import Tensor

from tests.e2e.conftest import STEP_TOKENS, ServerProcess

TEXT = Path(__file__).with_name("conftest.py")


@torch.inference_mode()
def logprobs(model: transformers.PreTrainedModel, prompt: list[int]) -> Tensor:
    """Of every token after each of the prompt's tokens but the last, float32 [n - 1, V]."""
    return model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)


def test_they_are_those_of_transformers(
    exact_server: ServerProcess, smollm2_reference: transformers.PreTrainedModel
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with exact_server.channel() as channel:
        typed = rpc.GenerationServiceStub(channel)
        text = list(typed.Tokenize(pb.TokenizeRequest(text=TEXT.read_text()), timeout=10).token_ids)[:300]
        noise = [rng.randrange(smollm2_reference.config.vocab_size) for _ in range(100)]
        requests = [
            pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParameters(max_tokens=2, prompt_logprobs=5)
            )
            for prompt in (text, noise, text[:2], text[:STEP_TOKENS], text[: STEP_TOKENS + 1])
        ]
        calls = [typed.Generate(request, timeout=120) for request in requests]  # all at once, sharing steps
        answers = [list(call) for call in calls]
    for request, events in zip(requests, answers, strict=True):
        prompt = list(request.token_ids.ids)
        got = [entry for event in events for entry in event.prompt_logprobs.logprobs]
        expected = logprobs(smollm2_reference, prompt)
        own = expected.gather(-1, torch.tensor(prompt[1:])[:, None])
        assert [entry.token_id for entry in got] == prompt[1:]
        assert torch.tensor([entry.logprob for entry in got]).sub(own[:, 0]).abs().max() < 1e-3
        ranks = (expected > own).sum(-1) + 1
        assert (torch.tensor([entry.rank for entry in got]) == ranks).float().mean() > 0.9  # near ties far down
        top = torch.tensor([[each.logprob for each in entry.top] for entry in got])
        assert top.sub(expected.topk(5).values).abs().max() < 1e-3
        assert events[-1].finished.usage.completion_tokens <= 2


def test_a_prompt_of_one_token_has_none(exact_server: ServerProcess) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5]), sampling=pb.SamplingParameters(max_tokens=1, prompt_logprobs=3)
    )
    with exact_server.channel() as channel:
        events = list(rpc.GenerationServiceStub(channel).Generate(request, timeout=60))
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    assert "prompt_logprobs" not in kinds
