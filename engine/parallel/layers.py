"""Maps of a divided model, around maps that know nothing of it. A decoder of one device has none of them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from engine.model.decoder import Weights
from engine.ops import Activations
from engine.parallel.communicator import Communicator
from engine.parallel.share import vocabulary
from engine.quant import Linear, Table


class SummedLinear:
    """Row-parallel: each rank has some of the inputs, and all the sum of what ranks make of theirs."""

    def __init__(self, linear: Linear, communicator: Communicator) -> None:
        self._linear, self._communicator = linear, communicator
        self.nbytes, self.rounding = linear.nbytes, linear.rounding

    def __call__(self, x: Activations) -> Tensor:
        return self._communicator.all_reduce(self._linear(x))


class _Vocabulary:
    """Token ids of the ranks."""

    def __init__(self, vocab_size: int, communicator: Communicator) -> None:
        size = communicator.size
        self._communicator = communicator
        self._widths = [len(vocabulary(vocab_size, size, rank)) for rank in range(size)]
        self._own = vocabulary(vocab_size, size, communicator.rank)


class DividedTable(_Vocabulary):
    """An embedding by token id: zeros from all ranks but the one that has the token, so that the sum is exact."""

    def __init__(self, table: Table, vocab_size: int, communicator: Communicator) -> None:
        super().__init__(vocab_size, communicator)
        self._table = table

    def rows(self, index: Tensor) -> Tensor:
        own = index - self._own.start
        elsewhere = (own < 0) | (own >= len(self._own))
        rows = self._table.rows(own.masked_fill_(elsewhere, 0))
        return self._communicator.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(-1), 0))


class DividedHead(_Vocabulary):
    """Logits of the whole vocabulary, on every rank."""

    def __init__(self, linear: Linear, vocab_size: int, communicator: Communicator) -> None:
        super().__init__(vocab_size, communicator)
        self._linear = linear
        self.nbytes, self.rounding = linear.nbytes, linear.rounding

    def __call__(self, x: Activations) -> Tensor:
        return self._communicator.gather_logits(self._linear(x), self._widths)


def join_ranks(vocab_size: int, communicator: Communicator, weights: Weights) -> Weights:
    """A rank's own weights as parts of a whole: what a decoder computes with them, all ranks compute together.

    Args:
        vocab_size: of the whole model.
        weights: read from a `RankCheckpoint`.
    """
    layers = [
        replace(
            layer,
            attention_output=SummedLinear(layer.attention_output, communicator),
            down=SummedLinear(layer.down, communicator),
        )
        for layer in weights.layers
    ]
    embedding = DividedTable(weights.embedding, vocab_size, communicator)
    head = DividedHead(weights.head, vocab_size, communicator)
    return replace(weights, embedding=embedding, layers=layers, head=head)
