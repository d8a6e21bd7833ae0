"""The state of the kernel: requests, replicas, and what all replicas are like."""

from __future__ import annotations

from typing import Any

import numpy as np

from autoscaler.simulate.kernel import NEVER, NONE

REQUEST = np.dtype(
    [
        ("arrival", "f8"),
        ("enqueued", "f8"),  # when the replica got it
        ("started", "f8"),  # when its prompt was first computed
        ("first_token", "f8"),
        ("finished", "f8"),
        ("input", "i4"),
        ("cached", "i4"),  # of input: found in the prefix cache
        ("output", "i4"),
        ("generated", "i4"),  # when it was put back last, or 0
        ("next", "i4"),  # in the line it stands in
        ("replica", "i4"),
        ("admission", "i8"),  # number on its replica
        ("attempts", "i4"),  # replicas that got it
        ("state", "i4"),
    ]
)

REPLICA = np.dtype(
    [
        ("clock", "f8"),
        ("due", "f8"),  # before that nothing finishes
        ("step", "i8"),
        ("admissions", "i8"),
        ("rows", "i4"),
        ("context", "i8"),  # tokens of all rows
        ("prompt", "i4"),  # the request that is computed, or NONE
        ("prompt_left", "i4"),
        ("prompt_size", "i4"),
        ("ends", "f8"),  # of the step that computes prompts and is under way, or NEVER
        ("step_tokens", "i4"),  # of prompts, in that step
        ("joining", "i4"),  # requests whose prompt that step completes
        ("joining_tokens", "i8"),  # that they will hold
        ("head", "i4"),
        ("tail", "i4"),
        ("queued", "i4"),
        ("queued_tokens", "i8"),  # of those in the queue, as the engine counts them: cached ones too
        ("outstanding", "i4"),  # queued, prompt and rows
        ("preemptions", "i8"),
        ("arrived_requests", "i8"),
        ("arrived_prompt_tokens", "i8"),
        ("finished_requests", "i8"),
        ("computed_prompt_tokens", "i8"),
        ("cached_prompt_tokens", "i8"),
        ("generated_tokens", "i8"),
        ("first_tokens", "i8"),
        ("late_first_tokens", "i8"),
        ("slow_requests", "i8"),
    ]
)

# The curve and the promise, for the kernel
SHAPE = np.dtype(
    [
        ("base", "f8"),
        ("per_prefill_token", "f8"),
        ("per_decode_row", "f8"),
        ("per_context_token", "f8"),
        ("max_batch_size", "i8"),
        ("max_step_tokens", "i8"),
        ("kv_tokens", "i8"),
        ("ttft", "f8"),
        ("itl", "f8"),
    ]
)


def new_requests(arrival: Any, input_tokens: Any, cached_tokens: Any, output_tokens: Any) -> Any:
    requests = np.zeros(len(arrival), REQUEST)
    requests["arrival"], requests["input"], requests["output"] = arrival, input_tokens, output_tokens
    requests["cached"] = np.minimum(cached_tokens, requests["input"] - 1)  # the last token is always computed
    for name in ("enqueued", "started", "first_token", "finished"):
        requests[name] = NEVER
    requests["next"] = requests["replica"] = NONE
    return requests


def clear(replicas: Any, index: int, now: float) -> None:
    """Make a record that of an engine that just started."""
    replicas[index] = np.zeros((), REPLICA)
    replicas["clock"][index] = now
    for name in ("due", "ends"):
        replicas[name][index] = NEVER
    for name in ("prompt", "head", "tail", "joining"):
        replicas[name][index] = NONE
