"""Every weight format against the plain product of its dequantised matrix, for any number of rows and any shape."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.ops import Kernels, Rounding
from engine.ops.cpu import CpuOps
from engine.ops.reference import ReferenceOps, quantise_tokens
from engine.quant.activations import quantise_rows
from engine.quant.blocked import BlockedLinear
from engine.quant.build import Part, Target, build_linear, build_table, form_of
from engine.quant.coded import CodedLinear
from engine.quant.form import Form
from engine.quant.linear import DenseLinear, JoinedLinear, Linear, PackedLinear
from engine.quant.matrix import FloatMatrix, Fp8Matrix, GroupMatrix, Matrix
from engine.schemes import Kept
from tests.compiled import compiled

SHAPES = [(64, 32), (960, 576), (97, 96), (130, 416)]  # outputs, inputs
ODD_SHAPES = [(1, 7), (130, 33)]  # only formats without groups
ROWS = (1, 2, 3, 4, 5, 6, 13, 70, 131)
CPU = torch.device("cpu")


def random_matrix(kind: str, outputs: int, inputs: int) -> Matrix:
    """A matrix in one of the forms that a file can have, its scales exact in float16 as those of GGUF are."""

    def scales(groups: int) -> Tensor:
        return (torch.rand(outputs, groups) * 0.02 + 1e-4).half().float()

    match kind:
        case "bf16":
            return FloatMatrix(torch.randn(outputs, inputs).bfloat16())
        case "fp8":
            codes = (torch.randn(outputs, inputs) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
            return Fp8Matrix(codes, scales(1))
        case "fp8 subnormal":
            codes = torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8)
            codes[codes & 0x7F == 0x7F] = 3
            return Fp8Matrix(codes.view(torch.float8_e4m3fn), scales(1))
        case "fp8 blocks":
            codes = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
            return Fp8Matrix(codes, scales(-(-inputs // 128)), block=128)
        case "int8 rows":
            bits, group = 8, inputs
        case _:
            bits, group = (int(part) for part in kind.split("/"))
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8)
    scale = scales(inputs // group)
    mins = (torch.rand(scale.shape) * 0.2).half().float() if bits in (4, 5) else scale * 2 ** (bits - 1)
    return GroupMatrix(codes, bits, group, scale, mins)


GROUPED = ["4/32", "5/32", "6/16", "8/32"]
WHOLE_ROWS = ["bf16", "fp8", "fp8 subnormal", "fp8 blocks", "int8 rows"]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return compiled(threads=2)


@pytest.fixture(scope="module")
def portable() -> Kernels:
    """The kernels as a CPU without bfloat16 dot products has them."""
    if platform.machine() != "x86_64":
        pytest.skip("no x86-64")
    return compiled(threads=2, architecture="x86-64-v3")


def cases(kinds: list[str] | None = None) -> list[tuple[str, int, int]]:
    kinds = kinds or GROUPED + WHOLE_ROWS
    every = [(kind, *shape) for kind in kinds for shape in SHAPES + (ODD_SHAPES if kind in WHOLE_ROWS else [])]
    return [*every, ("8/64", 130, 576), ("6/64", 130, 576)]  # our own, which need wider rows


def check(linear: Linear, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype, wide: bool) -> None:
    """Compare with the float64 product; what is not wide is rounded to the compute dtype at the end, once."""
    weight = matrix.dequantise().double()
    for rows in ROWS:
        x = torch.randn(rows, weight.shape[1]).to(dtype)
        exact = x.double() @ weight.t() + (0.0 if bias is None else bias.double())
        y = linear(x)
        assert y.dtype == (torch.float32 if wide else dtype)
        size = exact.abs().max().item()
        rounding = 2**-8 if y.dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=4e-6 * size)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_blocked_products_are_the_plain_ones(
    kernels: Kernels, case: tuple[str, int, int], dtype: torch.dtype, wide: bool
) -> None:
    torch.manual_seed(0)
    matrix, bias = random_matrix(*case), torch.randn(case[1])
    check(blocked(matrix, kernels, bias, wide), matrix, bias, dtype, wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_cpu_without_bfloat16_products_gets_the_same(
    portable: Kernels, case: tuple[str, int, int], dtype: torch.dtype
) -> None:
    assert not portable.multiplies_bfloat16
    torch.manual_seed(1)
    matrix = random_matrix(*case)
    check(blocked(matrix, portable), matrix, None, dtype, wide=True)


@pytest.mark.parametrize("case", cases([kind for kind in GROUPED + WHOLE_ROWS if kind != "bf16"]), ids=str)
def test_plain_torch_gets_the_same(case: tuple[str, int, int]) -> None:
    torch.manual_seed(2)
    matrix, bias = random_matrix(*case), torch.randn(case[1])
    linear = CodedLinear(
        Form.of(matrix), *matrix.shape, bias=bias, wide=True, quantise_inputs=False, device=torch.device("cpu")
    )
    linear.fill(0, matrix)
    check(linear, matrix, bias, torch.float32, wide=True)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES + ODD_SHAPES)
def test_packed_and_dense_products_are_the_plain_ones(shape: tuple[int, int], dtype: torch.dtype, wide: bool) -> None:
    torch.manual_seed(shape[0])
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    exact_weight, exact_bias = weight.double(), bias.double()
    for kind in (PackedLinear, DenseLinear):
        x = torch.randn(13, shape[1]).to(dtype)
        y = kind(weight, bias, wide)(x)
        assert y.dtype == (torch.float32 if wide else dtype)
        rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y.double(), x.double() @ exact_weight.t() + exact_bias, rtol=rounding, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", GROUPED + WHOLE_ROWS)
def test_a_row_does_not_depend_on_its_batch(kernels: Kernels, kind: str, dtype: torch.dtype) -> None:
    """To the last bit: in groups of every size that the kernel has its own way of multiplying, and among 300 rows."""
    torch.manual_seed(0)
    matrix = random_matrix(kind, 200, 288)
    linear = blocked(matrix, kernels)
    x = torch.randn(300, 288).to(dtype)
    alone = torch.cat([linear(row.unsqueeze(0)) for row in x])
    for rows in (2, 3, 4, 5, 6, 7, 11, 45, 127, 300):
        assert torch.equal(torch.cat([linear(part) for part in x.split(rows)]), alone), rows


@pytest.mark.parametrize("kind", GROUPED + WHOLE_ROWS)
def test_rows_of_a_table_are_the_weights(kernels: Kernels, kind: str) -> None:
    torch.manual_seed(0)
    matrix = random_matrix(kind, 150, 96)
    index = torch.tensor([0, 149, 64, 63, 149])
    for kernel in (kernels, None):
        target = Target(torch.bfloat16, CPU, kernel)
        table = build_table(part(matrix), 96, Kept.STORED, target)
        torch.testing.assert_close(table.rows(index).float(), matrix.dequantise()[index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", WHOLE_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_an_odd_width_are_what_the_operators_take(kernels: Kernels, dtype: torch.dtype, kind: str) -> None:
    table = build_table(part(random_matrix(kind, 130, 33)), 33, Kept.STORED, Target(dtype, CPU, kernels))
    rows = table.rows(torch.tensor([0, 63, 64, 129, 5])).to(dtype)
    ones, residual = torch.ones(33, dtype=dtype), torch.zeros(5, 33)
    found = CpuOps(kernels).add_rms_norm(rows, residual.clone(), ones, 1e-5)
    expected = ReferenceOps().add_rms_norm(rows, residual, ones, 1e-5)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_w8a8_rounds_each_token_to_e4m3(kernels: Kernels, dtype: torch.dtype, with_kernels: bool) -> None:
    torch.manual_seed(3)
    matrix = random_matrix("fp8", 130, 96)
    target = Target(dtype, CPU, kernels if with_kernels else None, quantise_inputs=True)
    linear = build_linear([part(matrix)], 96, Kept.STORED, target, wide=True)
    x = (torch.randn(7, 96) * torch.logspace(-3, 3, 7).unsqueeze(1)).to(dtype)
    expected = quantise_tokens(x, Rounding(None))
    exact = (expected.codes.double() * expected.scales.double().unsqueeze(1)) @ matrix.dequantise().double().t()
    rounding = 2**-7 if not with_kernels and dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(linear(x).double(), exact, rtol=rounding, atol=rounding * exact.abs().max().item())


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_rounds_activations_as_torch_does(kernels: Kernels, dtype: torch.dtype, scale: float | None) -> None:
    torch.manual_seed(4)
    x = torch.randn(9, 100) * torch.logspace(-4, 4, 9).unsqueeze(1)
    x[3] = 0
    x[4, 5] = torch.nan
    x = x.to(dtype)
    codes, scales = quantise_rows(x, scale, kernels)
    expected = quantise_tokens(x, Rounding(scale))
    clean = torch.arange(9) != 4
    torch.testing.assert_close(scales[clean], expected.scales[clean], rtol=1e-6, atol=0)
    # Where the two scales differ in their last bit, a number half way between two codes may fall to either side.
    differs = (codes.float() != expected.codes.float())[clean]
    assert differs.float().mean() < 0.01
    assert codes[4, 5].isnan()


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("most", [0.0, 1e-40, 1e-37])
def test_tokens_as_good_as_zero_stay_numbers(kernels: Kernels, most: float, with_kernels: bool) -> None:
    x = torch.tensor([[most, 0.0, -most, most / 2]])
    codes, scales = quantise_rows(x, None, kernels if with_kernels else None)
    torch.testing.assert_close(codes * scales, x, rtol=0.07, atol=2.0**-126)


def test_all_e4m3_numbers_round_to_themselves(kernels: Kernels) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()].unsqueeze(0)
    between = (every[:, 1:] + every[:, :-1]) / 2
    for x in (every, between, every * 1.01):
        codes, _ = quantise_rows(x.contiguous(), 1.0, kernels)
        assert torch.equal(codes, x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("with_kernels", [True, False])
def test_differently_stored_neighbours_are_one_map(kernels: Kernels, with_kernels: bool) -> None:
    """As the projections of a Q4_K_M layer are; outputs that do not fill blocks, a bias across all."""
    torch.manual_seed(5)
    matrices = [random_matrix("4/32", 40, 96), random_matrix("4/32", 30, 96), random_matrix("6/16", 50, 96)]
    bias = torch.randn(120)
    target = Target(torch.float32, CPU, kernels if with_kernels else None)
    linear = build_linear([part(each) for each in matrices], 96, Kept.STORED, target, bias=bias)
    assert isinstance(linear, JoinedLinear)
    whole = torch.cat([each.dequantise() for each in matrices])
    check(linear, FloatMatrix(whole), bias, torch.float32, wide=False)


def test_what_onednn_packs_is_never_held_twice_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.quant.build._PACKED_BYTES", 96 * 4 * 70)  # one block at a time
    monkeypatch.setattr("engine.quant.build._SLAB", 96 * 10)
    torch.manual_seed(7)
    first, second, bias = random_matrix("bf16", 100, 96), random_matrix("bf16", 90, 96), torch.randn(190)
    target = Target(torch.float32, CPU, None)
    linear = build_linear([part(first), part(second)], 96, Kept.FLOAT, target, bias=bias)
    assert isinstance(linear, JoinedLinear)
    assert linear.nbytes == 190 * 96 * 4 + 190 * 4
    check(linear, FloatMatrix(torch.cat([first.dequantise(), second.dequantise()])), bias, torch.float32, wide=False)


@pytest.mark.parametrize("weight", [3e38, -3e38])
@pytest.mark.parametrize("kept", [Kept.INT4, Kept.INT6, Kept.INT8])
def test_weights_beyond_what_a_scale_can_hold_are_refused_by_name(kept: Kept, weight: float) -> None:
    values = torch.randn(70, 128)
    values[69, 100] = weight
    parts = [Part(lambda start, stop: FloatMatrix(values[start:stop]), 70, "model.layers.0.mlp.up_proj.weight")]
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.mlp\.up_proj\.weight has weights"):
        build_linear(parts, 128, kept, Target(torch.bfloat16, CPU, None))


def test_large_matrices_arrive_in_slabs(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.quant.build._SLAB", 96 * 70)  # one block at a time
    torch.manual_seed(6)
    first, second = random_matrix("5/32", 200, 96), random_matrix("5/32", 90, 96)
    read: list[int] = []

    def spy(start: int, stop: int) -> Matrix:
        read.append(stop - start)
        return rows(first, start, stop)

    target = Target(torch.bfloat16, CPU, kernels)
    linear = build_linear([Part(spy, 200), part(second)], 96, Kept.STORED, target, wide=True)
    assert max(read) <= 64
    whole = FloatMatrix(torch.cat([first.dequantise(), second.dequantise()]))
    check(linear, whole, None, torch.bfloat16, wide=True)


def test_huge_pages_hold_what_was_there(kernels: Kernels) -> None:
    around = torch.randint(0, 256, (3 * 2**21,), dtype=torch.uint8)
    before = around.clone()
    middle = around[2**20 + 64 : 2**22]
    kernels.library.nemo_use_huge_pages(middle.data_ptr(), middle.nbytes, True)
    assert torch.equal(around, before)


@pytest.mark.parametrize("kind", ["bf16", "5/32"])
def test_matrices_with_pages_of_their_own_are_multiplied_alike(kernels: Kernels, kind: str) -> None:
    torch.manual_seed(8)
    matrix = random_matrix(kind, 4113, 2080)  # planes above and below 4 MiB
    x = torch.randn(2, 2080).bfloat16()
    exact = x.double() @ matrix.dequantise().double().t()
    y = blocked(matrix, kernels)(x)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4e-6 * exact.abs().max().item())


def blocked(matrix: Matrix, kernels: Kernels, bias: Tensor | None = None, wide: bool = True) -> BlockedLinear:
    linear = BlockedLinear(Form.of(matrix), *matrix.shape, bias=bias, wide=wide, quantise_inputs=False, kernels=kernels)
    linear.fill(0, matrix)
    return linear


def part(matrix: Matrix) -> Part:
    return Part(lambda start, stop: rows(matrix, start, stop), matrix.shape[0])


def rows(matrix: Matrix, start: int, stop: int) -> Matrix:
    if isinstance(matrix, FloatMatrix):
        return FloatMatrix(matrix.values[start:stop])
    if isinstance(matrix, Fp8Matrix):
        return Fp8Matrix(matrix.codes[start:stop], matrix.scales[start:stop], matrix.block, matrix.input_scale)
    return GroupMatrix(
        matrix.codes[start:stop], matrix.bits, matrix.group, matrix.scales[start:stop], matrix.mins[start:stop]
    )


@pytest.mark.parametrize(
    ("kept", "stored", "bits"),
    [
        (Kept.INT8, "4/32", 4),
        (Kept.INT8, "6/16", 6),
        (Kept.INT8, "8/32", 8),
        (Kept.INT8, "fp8", 8),
        (Kept.INT8, "bf16", 8),
        (Kept.INT4, "5/32", 5),
        (Kept.INT4, "8/32", 4),
        (Kept.INT4, "bf16", 4),
        (Kept.INT6, "5/32", 5),
        (Kept.INT6, "8/32", 6),
        (Kept.INT6, "bf16", 6),
        (Kept.FP8, "fp8", 0),
        (Kept.FP8, "4/32", 0),
        (Kept.FLOAT, "4/32", 16),
        (Kept.STORED, "4/32", 4),
    ],
)
def test_codes_that_are_narrow_enough_stay_as_they_are(kept: Kept, stored: str, bits: int) -> None:
    target = Target(torch.bfloat16, CPU, None)
    assert form_of(part(random_matrix(stored, 64, 128)), kept, target).bits == bits
