"""Replicas that batch continuously, compiled: what `autoscaler.simulate.reference` says step by step, in leaps.

A step computes one token of each row that decodes, and prompts with what is left of the token budget, first come first
served; a request whose prompt is done has its first token when that step ends. It takes the time that the curve says.
This is `engine.scheduler`, without priorities, adapters and drafts: a test gives both the same requests.

    gateway ─► queue of a replica (FIFO) ─► one prompt at a time, in chunks ─► rows that decode ─► finished
                       ▲                                                              │
                       └──────────── KV is full: who came last, to the front ─────────┘

Between two changes of the rows all steps are alike but for the context, which grows by one token per row, so that k of
them take k (A + C n + D c) + D n k (k - 1) / 2 seconds. A replica leaps to the next finish, the next request that it
could admit, the step that KV has no room for, or the time it was asked for, whichever comes first.

A replica has a clock of its own, the end of its latest step, and is brought up to a time only when someone looks. What
it admits depends on when requests came to it (`enqueued`) and not on when it is brought up, so that looks change
nothing: a step that is under way at that time is left for later.

State is two arrays of `autoscaler.simulate.records`; lines are linked by `next`, rows are a heap by the step that they
finish in. All that is compiled, and the constants in it, is in this one file: the cache of numba looks for changes in
the file of the function that is called and in no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

WAITING, QUEUED, PREFILLING, DECODING, FINISHED, LOST = range(6)
NONE = -1
NEVER = np.inf

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    return cast(F, numba.njit(cache=True)(function))


# -- rows: a heap of finish step and request in one integer ---------------------------------------------------------


@compiled
def sift_up(heap: Any, place: int) -> None:
    item = heap[place]
    while place > 0:
        above = (place - 1) >> 1
        if heap[above] <= item:
            break
        heap[place] = heap[above]
        place = above
    heap[place] = item


@compiled
def remove(heap: Any, size: int, place: int) -> None:
    """Take one of `size` items out."""
    item = heap[size - 1]
    size -= 1
    if place == size:
        return
    while True:
        below = 2 * place + 1
        if below >= size:
            break
        if below + 1 < size and heap[below + 1] < heap[below]:
            below += 1
        if heap[below] >= item:
            break
        heap[place] = heap[below]
        place = below
    heap[place] = item
    sift_up(heap, place)


# -- one replica ----------------------------------------------------------------------------------------------------


@compiled
def push(requests: Any, replicas: Any, index: int, which: int, now: float) -> None:
    """A request comes to a replica that was brought up to now."""
    request, replica = requests[which], replicas[index]
    request.enqueued, request.replica, request.state, request.next = now, index, QUEUED, NONE
    request.attempts += 1
    request.generated = 0
    if replica.queued == 0:
        replica.head = which
    else:
        requests[replica.tail].next = which
    replica.tail = which
    replica.queued += 1
    replica.queued_tokens += request.input
    replica.outstanding += 1
    replica.due = now
    replica.arrived_requests += 1
    replica.arrived_prompt_tokens += request.input


@compiled
def may_start(requests: Any, replica: Any, shape: Any, extra_rows: int, extra_tokens: int) -> bool:
    """The head of the queue is there when this step starts, and has room beside what this step adds to the rows."""
    if replica.queued == 0 or replica.rows + extra_rows >= shape.max_batch_size:
        return False
    head = requests[replica.head]
    # One token is left for each row to grow, or the newcomer would soon be put back
    held = replica.context + extra_tokens + replica.rows + extra_rows
    return bool(head.enqueued <= replica.clock and held + head.input + head.generated <= shape.kv_tokens)


@compiled
def start(requests: Any, replica: Any) -> None:
    which = replica.head
    request = requests[which]
    replica.head = request.next
    replica.queued -= 1
    replica.queued_tokens -= request.input + request.generated
    replica.prompt = which
    replica.prompt_size = request.input + request.generated
    replica.prompt_left = replica.prompt_size - request.cached
    if request.generated == 0:  # what is found again after it was put back is not counted again
        replica.cached_prompt_tokens += request.cached
    replica.admissions += 1
    request.admission = replica.admissions
    request.state = PREFILLING
    request.started = min(request.started, replica.clock)


@compiled
def finish(requests: Any, replica: Any, shape: Any, which: int) -> None:
    request = requests[which]
    request.finished = replica.clock
    request.state = FINISHED
    if replica.clock - request.first_token > shape.itl * (request.output - 1):
        replica.slow_requests += 1
    replica.outstanding -= 1
    replica.finished_requests += 1


@compiled
def finish_rows(requests: Any, replica: Any, heap: Any, shape: Any) -> None:
    while replica.rows > 0 and (heap[0] >> 32) <= replica.step:
        which = heap[0] & 0xFFFFFFFF
        remove(heap, replica.rows, 0)
        replica.rows -= 1
        replica.context -= requests[which].input + requests[which].output
        finish(requests, replica, shape, which)


@compiled
def join(requests: Any, replica: Any, heap: Any, shape: Any, which: int) -> None:
    """The prompt of a request is computed, and its next token is there."""
    request = requests[which]
    replica.generated_tokens += 1
    if request.generated == 0:
        request.first_token = replica.clock
        replica.first_tokens += 1
        if replica.clock - request.enqueued > shape.ttft:
            replica.late_first_tokens += 1
    left = request.output - request.generated - 1
    if left <= 0:
        finish(requests, replica, shape, which)
        return
    request.state = DECODING
    heap[replica.rows] = ((replica.step + left) << 32) | which
    sift_up(heap, replica.rows)
    replica.rows += 1
    replica.context += request.input + request.generated + 1


@compiled
def put_back(requests: Any, replica: Any, which: int) -> None:
    """To the front of the queue, with the tokens that it has generated: all but those in the prefix cache are computed
    again."""
    request = requests[which]
    request.state, request.next = QUEUED, replica.head
    replica.head = which
    if replica.queued == 0:
        replica.tail = which
    replica.queued += 1
    replica.queued_tokens += request.input + request.generated
    replica.preemptions += 1


@compiled
def make_room(requests: Any, replica: Any, heap: Any, shape: Any) -> None:
    """Put back who came last while KV has no room for the next token of each row."""
    computed = replica.prompt_size - replica.prompt_left
    if replica.prompt != NONE and replica.context + computed >= shape.kv_tokens:
        put_back(requests, replica, replica.prompt)
        replica.prompt = NONE
    while replica.context > shape.kv_tokens:
        place = 0
        for other in range(1, replica.rows):
            if requests[heap[other] & 0xFFFFFFFF].admission > requests[heap[place] & 0xFFFFFFFF].admission:
                place = other
        which = heap[place] & 0xFFFFFFFF
        request = requests[which]
        request.generated = request.output - ((heap[place] >> 32) - replica.step)
        remove(heap, replica.rows, place)
        replica.rows -= 1
        replica.context -= request.input + request.generated
        put_back(requests, replica, which)


@compiled
def plan(requests: Any, replica: Any, shape: Any) -> None:
    """Start a step that computes prompts: what it computes is settled now, and happens when it ends."""
    budget, context, tokens = shape.max_step_tokens - replica.rows, replica.context, 0
    rows = decoding = 0
    while budget > 0:
        if replica.prompt == NONE:
            if not may_start(requests, replica, shape, rows, replica.joining_tokens):
                break
            start(requests, replica)
        take = min(budget, replica.prompt_left)
        if rows == 0:  # one that is under way already was not left room for all its tokens
            take = min(take, shape.kv_tokens - replica.context - (replica.prompt_size - replica.prompt_left))
        replica.prompt_left -= take
        budget -= take
        tokens += take
        context += replica.prompt_size - replica.prompt_left
        if replica.prompt_left > 0:
            break
        decoding += take == 1  # to the engine, a prompt's last token alone is a row that decodes
        which = replica.prompt
        requests[which].next = replica.joining
        replica.joining = which
        replica.joining_tokens += replica.prompt_size
        rows += 1
        replica.prompt = NONE
    seconds = shape.base + shape.per_prefill_token * (tokens - decoding)
    seconds += shape.per_decode_row * (replica.rows + decoding) + shape.per_context_token * context
    replica.ends = replica.clock + seconds
    replica.step_tokens = tokens


@compiled
def commit(requests: Any, replica: Any, heap: Any, shape: Any) -> None:
    """A planned step ends."""
    replica.clock, replica.ends = replica.ends, NEVER
    replica.step += 1
    replica.computed_prompt_tokens += replica.step_tokens
    replica.generated_tokens += replica.rows
    replica.context += replica.rows
    finish_rows(requests, replica, heap, shape)
    while replica.joining != NONE:
        which = replica.joining
        replica.joining = requests[which].next
        join(requests, replica, heap, shape, which)
    replica.joining_tokens = 0


@compiled
def steps_within(first: float, growth: float, seconds: float) -> int:
    """How many steps of first, first + growth, first + 2 growth … seconds fit into a time."""
    if seconds < first:
        return 0
    half = first - growth / 2
    # The positive root of growth/2 k² + half k = seconds, in the form that stays exact where growth is small
    count = int(2 * seconds / (half + np.sqrt(half * half + 2 * growth * seconds)))
    while count * half + growth / 2 * count * count > seconds:
        count -= 1
    while (count + 1) * half + growth / 2 * (count + 1) * (count + 1) <= seconds:
        count += 1
    return count


@compiled
def leap(requests: Any, replica: Any, heap: Any, shape: Any, until: float) -> bool:
    """Decode until something changes, or until then; False: not one step ends by then."""
    rows = replica.rows
    first = shape.base + shape.per_decode_row * rows + shape.per_context_token * replica.context
    growth = shape.per_context_token * rows
    half = first - growth / 2
    steps = min((heap[0] >> 32) - replica.step, (shape.kv_tokens - replica.context) // rows + 1)
    replica.due = replica.clock + steps * half + growth / 2 * steps * steps
    if replica.queued > 0 and requests[replica.head].enqueued > replica.clock:
        wait = requests[replica.head].enqueued - replica.clock
        enough = steps_within(first, growth, wait)
        if enough * half + growth / 2 * enough * enough < wait:
            enough += 1
        steps = min(steps, enough)
        replica.due = replica.clock
    if replica.clock + (steps * half + growth / 2 * steps * steps) > until:
        steps = min(steps, steps_within(first, growth, until - replica.clock))
    if steps <= 0:
        return False
    replica.clock += steps * half + growth / 2 * steps * steps
    replica.step += steps
    replica.context += rows * steps
    replica.generated_tokens += rows * steps
    finish_rows(requests, replica, heap, shape)
    return True


@compiled
def advance(requests: Any, replicas: Any, heaps: Any, shape: Any, index: int, until: float) -> None:
    """Run every step of a replica that ends by then."""
    replica, heap = replicas[index], heaps[index]
    while True:
        if replica.ends < NEVER:
            if replica.ends > until:
                replica.due = replica.ends
                return
            commit(requests, replica, heap, shape)
            continue
        if replica.rows == 0 and replica.prompt == NONE:
            if replica.queued == 0:
                replica.due = NEVER
                return
            replica.clock = max(replica.clock, requests[replica.head].enqueued)
        make_room(requests, replica, heap, shape)
        if replica.prompt != NONE or may_start(requests, replica, shape, 0, 0):
            plan(requests, replica, shape)
        elif replica.rows > 0 and not leap(requests, replica, heap, shape, until):
            return


@compiled
def evict(requests: Any, replicas: Any, heaps: Any, index: int, out: Any) -> int:
    """All that a replica has not finished, in `out`; the replica itself is to be cleared."""
    replica = replicas[index]
    count = 0
    for line in (replica.head, replica.joining):
        which = line
        while which != NONE:
            out[count] = which
            count += 1
            which = requests[which].next
    if replica.prompt != NONE:
        out[count] = replica.prompt
        count += 1
    for place in range(replica.rows):
        out[count] = heaps[index, place] & 0xFFFFFFFF
        count += 1
    for place in range(count):
        request = requests[out[place]]
        request.state, request.started, request.first_token = WAITING, NEVER, NEVER
    return count


# -- the fleet ------------------------------------------------------------------------------------------------------


@compiled
def draw(random: Any, bound: int) -> int:
    """A number below bound from one word of state: a linear congruential generator, its upper half."""
    random[0] = random[0] * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
    return int(((random[0] >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@compiled
def least_outstanding(
    requests: Any, replicas: Any, heaps: Any, shape: Any, accepting: Any, choices: int, random: Any, now: float
) -> int:
    """Of all that accept, or of `choices` random ones: the one with the fewest requests; the first that is met."""
    count = len(accepting)
    everyone = choices >= count
    offset = draw(random, count)
    best, fewest = NONE, 1 << 60
    for turn in range(min(choices, count)):
        index = accepting[(offset + turn) % count] if everyone else accepting[draw(random, count)]
        if replicas[index].due <= now:
            advance(requests, replicas, heaps, shape, index, now)
        if replicas[index].outstanding < fewest:
            best, fewest = index, replicas[index].outstanding
    return best


@compiled
def dispatch(
    requests: Any,
    replicas: Any,
    heaps: Any,
    shape: Any,
    accepting: Any,
    choices: int,
    random: Any,
    first: int,
    now: float,
    until: float,
) -> int:
    """Give every request from `first` on that arrives before `until` to a replica, none before now. Returns the next.

    Without replicas that accept, they wait where they are.
    """
    if len(accepting) == 0:
        return first
    while first < len(requests) and requests[first].arrival < until:
        at = max(requests[first].arrival, now)
        index = least_outstanding(requests, replicas, heaps, shape, accepting, choices, random, at)
        advance(requests, replicas, heaps, shape, index, at)
        push(requests, replicas, index, first, at)
        first += 1
    return first


@compiled
def advance_all(requests: Any, replicas: Any, heaps: Any, shape: Any, indices: Any, until: float) -> None:
    for place in range(len(indices)):
        if replicas[indices[place]].outstanding > 0:
            advance(requests, replicas, heaps, shape, indices[place], until)
