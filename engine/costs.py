"""What steps cost: how long they took, how many tokens they computed, and a formula of the one from the other.

    seconds of a step  ≈  base + per_prefill_token · p + per_decode_row · d + per_context_token · c

    p  tokens beyond the first of each row that decodes: of prompts, and drafts
    d  rows that decode
    c  tokens that the rows attend to, their own included

`base` is the reading of the weights and what the host does once per step. A load balancer or an autoscaler reads off
the formula how much work waits and how much more fits into a latency; it needs no benchmark of the hardware.

The fit is least squares of the relative error over the latest steps, with coefficients that are not negative: a prefill
of half a second and a decode of six milliseconds count alike, and a step that something held up counts for little.
Steps with a prefill and without are forgotten each at their own pace, so that an hour of decoding does not make the
engine forget what a prompt costs. What never varied cannot be told apart: while one row decodes at a time, `base` and
`per_decode_row` share what it costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import msgspec

from engine.histogram import Histogram

STEP_SECONDS = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3),
    *(0.5, 1.0, 2.5, 5.0, 10.0),
)
BATCH_TOKENS = tuple(2**power for power in range(15))
REFIT_STEPS = 128  # between two fits: some tenth of a millisecond each
HALVING_STEPS = 512  # after which older steps count half
RIDGE = 1e-7  # of the normal equations scaled to ones on their diagonal: what cannot be told apart is shared


class StepCost(msgspec.Struct, frozen=True):
    """Seconds; all 0 before there are enough steps to tell."""

    base: float = 0.0
    per_prefill_token: float = 0.0
    per_decode_row: float = 0.0
    per_context_token: float = 0.0


class StepCosts:
    """Belongs to the core; every step that computed something is added."""

    def __init__(self) -> None:
        self.seconds = Histogram(STEP_SECONDS)
        self.tokens = Histogram(BATCH_TOKENS)
        self.cost = StepCost()
        self._with_prefill, self._decodes = NormalEquations(), NormalEquations()
        self._steps = 0

    def add(self, seconds: float, tokens: int, decode_rows: int, context_tokens: int) -> None:
        """`tokens` are all that were computed, one of each row that decodes among them."""
        self.seconds.add(seconds)
        self.tokens.add(tokens)
        if seconds <= 0:
            return
        prefill = tokens - decode_rows
        equations = self._with_prefill if prefill else self._decodes
        equations.add((1 / seconds, prefill / seconds, decode_rows / seconds, context_tokens / seconds))
        self._steps += 1
        if self._steps % REFIT_STEPS == 0:
            self.cost = StepCost(*solve((self._with_prefill, self._decodes)))


class NormalEquations:
    """Sums over rows y of y yᵀ and of y, for least squares of y · x = 1. Older rows count half, again and again."""

    def __init__(self) -> None:
        self.products = [0.0] * 10  # of the upper triangle
        self.sums = [0.0] * 4
        self._rows = 0

    def add(self, row: tuple[float, float, float, float]) -> None:
        (a, b, c, d), products, sums = row, self.products, self.sums
        # One by one: a loop over them takes four times as long, in every step.
        products[0] += a * a
        products[1] += a * b
        products[2] += a * c
        products[3] += a * d
        products[4] += b * b
        products[5] += b * c
        products[6] += b * d
        products[7] += c * c
        products[8] += c * d
        products[9] += d * d
        sums[0] += a
        sums[1] += b
        sums[2] += c
        sums[3] += d
        self._rows += 1
        if self._rows % HALVING_STEPS == 0:
            self.products = [each / 2 for each in self.products]
            self.sums = [each / 2 for each in self.sums]


def solve(equations: Iterable[NormalEquations]) -> list[float]:
    """The four numbers, none negative, that fit the rows of all equations best."""
    parts = list(equations)
    products = [sum(values) for values in zip(*(each.products for each in parts), strict=True)]
    sums = [sum(values) for values in zip(*(each.sums for each in parts), strict=True)]
    full = [[0.0] * 4 for _ in range(4)]
    for (i, j), value in zip(itertools.combinations_with_replacement(range(4), 2), products, strict=True):
        full[i][j] = full[j][i] = value
    seen = [i for i in range(4) if full[i][i] > 0]
    scale = {i: full[i][i] ** -0.5 for i in seen}
    matrix = {i: {j: full[i][j] * scale[i] * scale[j] + (RIDGE if i == j else 0.0) for j in seen} for i in seen}
    target = {i: sums[i] * scale[i] for i in seen}
    # At most 15 sets of coefficients may be those that are not 0; the best fit is the one with the highest x · target.
    best, best_fit = dict.fromkeys(range(4), 0.0), 0.0
    for size in range(len(seen), 0, -1):
        for used in itertools.combinations(seen, size):
            found = _eliminate([[matrix[i][j] for j in used] + [target[i]] for i in used])
            fit = sum(value * target[i] for i, value in zip(used, found, strict=True))
            if min(found) >= 0 and fit > best_fit:
                best = dict.fromkeys(range(4), 0.0) | {i: v * scale[i] for i, v in zip(used, found, strict=True)}
                best_fit = fit
        if size == len(seen) and best_fit:
            break  # without a bound in its way it is the best of all
    return [best[i] for i in range(4)]


def _eliminate(rows: Sequence[list[float]]) -> list[float]:
    """The solution of a small positive definite system, its right side the last column; changes the rows."""
    count = len(rows)
    for i in range(count):
        for below in rows[i + 1 :]:
            factor = below[i] / rows[i][i]
            for j in range(i, count + 1):
                below[j] -= factor * rows[i][j]
    found = [0.0] * count
    for i in reversed(range(count)):
        known = sum(rows[i][j] * found[j] for j in range(i + 1, count))
        found[i] = (rows[i][count] - known) / rows[i][i]
    return found
