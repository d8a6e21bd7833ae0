"""Weight formats behind one call: how a matrix is stored, multiplied and counted."""

from engine.quant.build import Part, Target, build_linear, build_table
from engine.quant.coded import find_products, has_fp8_units
from engine.quant.linear import Linear, Table
from engine.quant.matrix import Matrix

__all__ = [
    "Linear",
    "Matrix",
    "Part",
    "Table",
    "Target",
    "build_linear",
    "build_table",
    "find_products",
    "has_fp8_units",
]
