"""One replica, slow and obvious, step by step: what `autoscaler.simulate.kernel` must agree with."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from autoscaler.simulate.curve import Curve


@dataclass
class Request:
    arrival: float
    input: int
    cached: int
    output: int
    generated: int = 0
    computed: int = 0  # of its tokens; cached ones among them
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def tokens(self) -> int:
        return self.input + self.generated


def run(curve: Curve, requests: Sequence[Request]) -> int:
    """Serve requests, in the order of their arrival, with one replica; fills their times in. Returns preemptions."""
    coming, queue = deque(requests), deque[Request]()
    rows: list[Request] = []  # in the order of their admission
    prompt: Request | None = None
    clock, preemptions, cost = 0.0, 0, curve.step_cost
    while coming or queue or rows or prompt:
        if not (queue or rows or prompt):
            clock = max(clock, coming[0].arrival)
        while coming and coming[0].arrival <= clock:
            queue.append(coming.popleft())

        if prompt and sum(row.tokens for row in rows) + prompt.computed >= curve.kv_tokens:
            queue.appendleft(prompt)
            prompt, preemptions = None, preemptions + 1
        while sum(row.tokens for row in rows) > curve.kv_tokens:
            queue.appendleft(rows.pop())
            preemptions += 1

        context, computed = sum(row.tokens for row in rows), 0
        budget, free = curve.max_step_tokens - len(rows), curve.kv_tokens - context - (prompt.computed if prompt else 0)
        done: list[Request] = []
        decoding = len(rows)
        while budget > 0:
            if prompt is None:
                full = len(rows) + len(done) >= curve.max_batch_size
                if not queue or full or queue[0].tokens + len(rows) + len(done) > free:
                    break
                prompt = queue.popleft()
                prompt.computed = prompt.cached
                prompt.started = clock if prompt.started is None else prompt.started
                free -= prompt.cached
            take = min(budget, prompt.tokens - prompt.computed, free)
            prompt.computed += take
            budget -= take
            free -= take
            computed += take
            context += prompt.computed
            if prompt.computed < prompt.tokens:
                break
            decoding += take == 1  # to the engine, a prompt's last token alone is a row that decodes
            done.append(prompt)
            prompt = None

        prefill = computed - (decoding - len(rows))
        clock += cost.base + cost.per_prefill_token * prefill
        clock += cost.per_decode_row * decoding + cost.per_context_token * context
        for row in (*rows, *done):
            row.generated += 1
            row.first_token = clock if row.first_token is None else row.first_token
            row.finished = clock if row.generated == row.output else None
        rows = [row for row in (*rows, *done) if row.finished is None]
    return preemptions
