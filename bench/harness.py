"""A served model as lm-evaluation-harness sees one. Needs the extra `eval`; the work is done in `bench.scoring`."""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM

from bench.scoring import Scorer


class ServerLM(LM):  # type: ignore[misc]
    """`lm_eval.api.model.LM` over the typed API. Chat templates are not applied here: the published table of the model
    was measured without."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self._scorer = scorer

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return self._scorer.loglikelihoods([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return self._scorer.rolling([request.args[0] for request in requests])

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self._scorer.complete([request.args for request in requests])
