"""Weight formats behind one call: how a matrix is stored, multiplied and counted."""

from engine.quant.linear import Linear, make_linear

__all__ = ["Linear", "make_linear"]
