"""What sampling means: one row, plain Python, one step after the other.

The specification that tests hold the sampler to; nothing runs it in service. It takes the uniform number as an
argument, so that it names the token exactly.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from engine.request import SamplingParams, TokenLogprob


def adjusted(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    eos_token_ids: Sequence[int],
    allowed: Container[int] | None = None,
) -> list[float]:
    """Logits after logit_bias, min_tokens, the three penalties and what a grammar allows (None = everything)."""
    scores = [logit + params.logit_bias.get(token, 0.0) for token, logit in enumerate(logits)]
    if len(output) < params.min_tokens:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)):
            scores[token] = -math.inf
    for token in {*prompt, *output}:
        score = scores[token]
        scores[token] = score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
    for token in set(output):
        scores[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    return [score if allowed is None or token in allowed else -math.inf for token, score in enumerate(scores)]


def chosen(scores: Sequence[float], params: SamplingParams, uniform: float) -> int:
    """The token of adjusted logits: the likeliest, or the one at which the cumulative distribution passes `uniform`."""
    likeliest_first = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.temperature == 0:
        return likeliest_first[0]
    peak = max(scores)
    weight = [math.exp((score - peak) / params.temperature) for score in scores]
    if params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
        return _invert(range(len(scores)), weight, uniform)

    kept = likeliest_first[: params.top_k or None]
    if params.top_p < 1:
        whole, mass, nucleus = math.fsum(weight[token] for token in kept), 0.0, []
        for token in kept:
            if mass >= params.top_p * whole:
                break
            nucleus.append(token)
            mass += weight[token]
        kept = nucleus
    kept = [token for token in kept if weight[token] >= params.min_p * weight[kept[0]]]
    return _invert(sorted(kept), weight, uniform)


def logprob(scores: Sequence[float], token: int, top: int) -> TokenLogprob:
    """Logprob and rank of a token, and the `top` likeliest tokens, under softmax of the adjusted logits."""
    peak = max(scores)
    norm = peak + math.log(math.fsum(math.exp(score - peak) for score in scores))
    likeliest_first = sorted(range(len(scores)), key=lambda each: (-scores[each], each))
    return TokenLogprob(
        token_id=token,
        logprob=scores[token] - norm,
        rank=1 + sum(score > scores[token] for score in scores),
        top=[(each, scores[each] - norm) for each in likeliest_first[:top] if scores[each] > -math.inf],
    )


def _invert(tokens: Sequence[int], weight: Sequence[float], uniform: float) -> int:
    target = uniform * math.fsum(weight[token] for token in tokens)
    mass = 0.0
    for token in tokens:
        mass += weight[token]
        if mass > target:
            return token
    return max((token for token in tokens if weight[token] > 0), key=tokens.index)  # the running sum was rounded down
