"""A checkpoint as one rank sees it: a narrower model, of whose matrices no more is kept than the rank's own share.

Rows of other ranks are not read. Columns are cut out of whole rows: the ranks of one machine read a file through one
page cache, where a row in one piece is as fast as its part.
"""

from __future__ import annotations

from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.checkpoint.layout import expected_tensors
from engine.errors import EngineConfigError
from engine.parallel.share import Piece, piece_of, share_of
from engine.quant import Matrix
from engine.quant.matrix import columns, groups_of


class RankCheckpoint:
    """`engine.model.load.TensorSource` for rank `rank` of `size`."""

    def __init__(self, checkpoint: Checkpoint, rank: int, size: int) -> None:
        """Raises EngineConfigError if the model cannot be divided so."""
        self._checkpoint, self._rank, self._size = checkpoint, rank, size
        self._shapes = expected_tensors(checkpoint.config)
        self.config = share_of(checkpoint.config, size, rank)

    def read(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(name)
        piece = self._piece(name)
        return tensor if piece is None else tensor[piece.rows.start : piece.rows.stop]

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> Matrix:
        piece = self._piece(name)
        assert piece is not None, f"{name} is no matrix"
        rows = piece.rows[start:stop]
        matrix = self._checkpoint.matrix(name, rows.start, rows.stop)
        inputs, cut = matrix.shape[1], piece.columns
        if len(cut) == inputs:
            return matrix
        if (group := groups_of(matrix)) and (cut.start % group or (cut.stop % group and cut.stop != inputs)):
            raise EngineConfigError(
                f"tensor_parallel_size: {self._size} cuts {name} every {len(cut)} inputs, but the file has a scale for "
                f"every {group}, which must stay whole; choose a smaller size"
            )
        return columns(matrix, cut.start, cut.stop)

    def stored_bytes(self, name: str) -> int:
        """Of the share."""
        whole, piece = self._checkpoint.stored_bytes(name), self._piece(name)
        if piece is None:
            return whole
        rows, *columns = self._shapes[name]
        part = whole * len(piece.rows) // rows
        return part * len(piece.columns) // columns[0] if columns else part

    def _piece(self, name: str) -> Piece | None:
        return piece_of(name, self._checkpoint.config, self._size, self._rank)
