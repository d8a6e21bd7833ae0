"""Weight formats behind one call: how a matrix is stored, multiplied and counted."""

from engine.quant.linear import BlockedLinear, DenseLinear, Linear, make_linear

__all__ = ["BlockedLinear", "DenseLinear", "Linear", "make_linear"]
