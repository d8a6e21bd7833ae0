"""128K: angles, masks and sums are exact at position 131,071, and memory does not grow on the way there.

References are in float64 or wider. `pytest -s` prints the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import msgspec
import pytest
import torch
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig, Llama3RopeScaling, ModelConfig
from engine.core import EngineCore
from engine.errors import InvalidRequestError
from engine.memory import token_bytes
from engine.model.rope import rope_table
from engine.ops import AttentionBatch, LayerCache, Ops, select_ops
from engine.ops.reference import ReferenceOps, quantise
from engine.request import Request, SamplingParams, TokenLogprob, validate_request
from engine.runner import Runner, load_runner
from tests.compiled import compiled
from tests.engine.oracle import BASE
from tests.tiny_models import write_hf

LENGTH = 131_072
WINDOWS = (None, 4096)
CPU = torch.device("cpu")
LLAMA31 = Llama3RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
ROTARIES = {
    "NeMo": msgspec.structs.replace(BASE, head_dim=128, rope_theta=1e6),
    "Llama 3.1": msgspec.structs.replace(BASE, head_dim=128, rope_theta=5e5, rope_scaling=LLAMA31),
    "Mistral Small 3": msgspec.structs.replace(BASE, head_dim=128, rope_theta=1e8),
    "SmolLM2's first": msgspec.structs.replace(BASE, head_dim=64, rope_theta=1e4),
}


def exact_angles(config: ModelConfig, position: int) -> list[mpmath.mpf]:
    """In 40 digits, frequency by frequency as the papers have it."""
    angles = []
    for i in range(config.head_dim // 2):
        frequency = mpmath.mpf(config.rope_theta) ** (-mpmath.mpf(2 * i) / config.head_dim)
        if (scaling := config.rope_scaling) is not None:
            context = scaling.original_max_position_embeddings
            wavelength = 2 * mpmath.pi / frequency
            if wavelength > context / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength >= context / scaling.high_freq_factor:
                smooth = (context / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        angles.append(position * frequency)
    return angles


@pytest.mark.parametrize("name", ROTARIES)
def test_cosines_and_sines_are_exact_up_to_their_own_rounding(name: str) -> None:
    config = ROTARIES[name]
    table = rope_table(config, LENGTH, CPU)
    assert table.shape == (LENGTH, config.head_dim)
    with mpmath.workdps(40):
        for position in (0, 1, 4_095, 8_191, 8_192, 65_537, 131_070, 131_071):
            angles = exact_angles(config, position)
            row = [*map(mpmath.cos, angles), *map(mpmath.sin, angles)]
            for number, exact in zip(table[position].tolist(), row, strict=True):
                # Half a step of a float32 below 1, and what float64 makes of an angle of 131,071.
                assert abs(number - exact) <= 2.0**-25 + 1e-10


def long_case(
    kv_heads: int, dim: int, keys: Tensor, values: Tensor, new: int = 1, page_size: int = 64
) -> tuple[AttentionBatch, LayerCache]:
    """One sequence of LENGTH tokens on shuffled pages, its last `new` tokens being new. keys, values: [LENGTH, …]."""
    pages = LENGTH // page_size
    table = torch.randperm(pages)
    cache = LayerCache(*(torch.empty(pages, kv_heads, page_size, dim) for _ in range(2)))
    for stored, numbers in ((cache.keys, keys), (cache.values, values)):
        stored[table] = numbers.view(pages, page_size, kv_heads, dim).transpose(1, 2)
    batch = AttentionBatch(
        positions=torch.arange(LENGTH - new, LENGTH),
        slots=torch.zeros(new, dtype=torch.int64),  # nothing is written
        query_starts=torch.tensor([0, new], dtype=torch.int32),
        context_lens=torch.tensor([LENGTH], dtype=torch.int32),
        block_tables=table.to(torch.int32).unsqueeze(0),
        max_query_len=new,
        max_context_len=LENGTH,
        query_starts_list=[0, new],
        context_lens_list=[LENGTH],
    )
    return batch, cache


def exact_attention(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Of the last token, one kv head: float64 [heads, dim]; and the same of |values|, which errors are measured by."""
    span = slice(LENGTH - (window or LENGTH), LENGTH)
    keys, values = keys[span].double(), values[span].double()
    weights = (query.double() @ keys.T / math.sqrt(query.shape[-1])).softmax(-1)
    return weights @ values, weights @ values.abs()


def in_fp8(cache: LayerCache) -> LayerCache:
    (keys, key_scales), (values, value_scales) = quantise(cache.keys), quantise(cache.values)
    return LayerCache(keys, values, key_scales, value_scales)


def through_fp8(numbers: Tensor) -> Tensor:
    codes, scales = quantise(numbers)
    return codes.float() * scales.unsqueeze(-1)


def kernels() -> Ops:
    return select_ops(compiled(1), torch.device("cpu"))


def spread() -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all sizes: some hundred keys matter."""
    return torch.randn(4, 128) * 2, torch.randn(LENGTH, 128), torch.randn(LENGTH, 128)


def flat() -> tuple[Tensor, Tensor, Tensor]:
    """Every key weighs nearly the same and all values are near 0.3: what one running float32 sum gets wrong by 2e-5."""
    return torch.randn(4, 128) * 1e-2, torch.randn(LENGTH, 128), 0.3 + 1e-3 * torch.randn(LENGTH, 128)


def falling() -> tuple[Tensor, Tensor, Tensor]:
    """The oldest key scores highest: all that comes later is summed onto the largest. One running sum: 4e-5."""
    query, keys, values = flat()
    query[:, 0] = 1.0
    keys[:, 0] = torch.linspace(60, 0, LENGTH)
    return query, keys, values


@dataclass(frozen=True)
class Attended:
    """What one token attends to, and what it makes of it: by window, `exact_attention`."""

    query: Tensor
    batch: AttentionBatch
    cache: LayerCache
    exact: dict[int | None, tuple[Tensor, Tensor]]


@pytest.fixture(
    scope="module",
    params=[(make, fp8) for make in (spread, flat, falling) for fp8 in (False, True)],
    ids=lambda param: f"{param[0].__name__}-{'fp8' if param[1] else 'float'}",
)
def attended(request: pytest.FixtureRequest) -> Attended:
    """One at a time is in memory: pytest sorts the tests by it."""
    make, fp8 = request.param
    torch.manual_seed(0)
    query, keys, values = make()
    batch, cache = long_case(1, 128, keys, values)
    if fp8:
        cache, keys, values = in_fp8(cache), through_fp8(keys), through_fp8(values)
    return Attended(query, batch, cache, {window: exact_attention(query, keys, values, window) for window in WINDOWS})


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("ops", [kernels, ReferenceOps])
def test_attention_over_131072_keys_is_that_of_float64(
    ops: Callable[[], Ops], attended: Attended, window: int | None
) -> None:
    actual = ops().attention(attended.query.unsqueeze(0), attended.cache, attended.batch, window).view(4, 128)
    exact, size = attended.exact[window]
    error = ((actual - exact).abs() / size).max().item()
    print(f"\nwindow {window}: error {error:.1e} of the sum of |weight * value|")
    assert error <= 1e-5  # measured: 4e-6


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("ops", [kernels, ReferenceOps])
@pytest.mark.parametrize(
    ("window", "place", "seen"),
    [
        (4096, 126_974, [0, 0]),
        (4096, 126_975, [1, 0]),
        (4096, 126_976, [1, 1]),
        (None, 0, [1, 1]),
        (None, 131_070, [1, 1]),
        (None, 131_071, [0, 1]),
    ],
)
def test_masks_are_exact_at_both_ends(
    ops: Callable[[], Ops], window: int | None, place: int, seen: list[int], fp8: bool
) -> None:
    """Tokens 131,070 and 131,071 see `place` or not: all scores are 0, and its value alone is not 0 but 1."""
    keys, values = torch.zeros(LENGTH, 16), torch.zeros(LENGTH, 16)
    values[place] = 1.0
    batch, cache = long_case(1, 16, keys, values, new=2)
    out = ops().attention(torch.randn(2, 1, 16), in_fp8(cache) if fp8 else cache, batch, window)
    count = torch.tensor([window or LENGTH - 1, window or LENGTH])
    assert (out == out[:, :1]).all()
    torch.testing.assert_close(out[:, 0] * count, torch.tensor(seen, dtype=torch.float32), rtol=1e-5, atol=0)


# NeMo's shape in small: head_dim is not hidden_size / heads, and the file boasts of 1,024,000 positions.
SMALL = {"head_dim": 128, "num_attention_heads": 1, "num_key_value_heads": 1, "rope_theta": 1e6}
SMALL |= {"max_position_embeddings": 1_024_000}
PAGE = 64


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc on this system")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def last_logprobs(folder: Path, length: int, chunk: int, **options: Any) -> dict[int, float]:
    """Of the 20 likeliest tokens after a prompt of that length, computed chunk by chunk, its memory watched."""
    with open_checkpoint(str(folder)) as checkpoint:
        token = token_bytes(checkpoint.config, options.get("kv_precision", "auto"), 4)
    pages = -(-(length + 1) // PAGE)
    config = EngineConfig(
        model_path=str(folder),
        dtype="float32",
        device="cpu",
        max_model_len=length + 1,
        max_batch_size=1,
        max_batch_tokens=chunk,
        page_size=PAGE,
        kv_memory_bytes=pages * PAGE * token,
        threads=1,
        **options,
    )
    core = EngineCore(load_runner(config, lambda *progress: None), config)
    greedy = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20)
    core.add(Request(request_id="long", prompt_token_ids=prompt_of(length), sampling=greedy))
    tokens: list[TokenLogprob] = []
    resident: list[int] = []
    while not tokens:
        for event in core.step():
            tokens += event.logprobs or []
        resident.append(resident_bytes())
    assert len(resident) == -(-length // chunk)
    # Pages of the cache become resident as they are first written; beyond them, what the tenth chunk has taken is all.
    written = (length - 10 * chunk) * token
    growth = max(resident[9:]) - resident[9] - written
    print(f"\n{length} tokens in {len(resident)} chunks: {growth / 2**20:.1f} MiB beside the cache since the tenth")
    assert growth < 64 * 2**20
    return dict(tokens[0].top)


def exact_logprobs(folder: Path, length: int) -> Tensor:
    """After the last token of `prompt_of(length)`, of a model of one layer and one head: float64."""
    with open_checkpoint(str(folder)) as checkpoint:
        config = checkpoint.config

        def read(name: str) -> Tensor:
            return checkpoint.read(name).double()

        def norm(x: Tensor, name: str) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * read(name)

        block, half = "model.layers.0.", config.head_dim // 2
        x = read("model.embed_tokens.weight")[prompt_of(length)]
        normed = norm(x, block + "input_layernorm.weight")
        frequencies = config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(length).double().outer(frequencies))

        def rotated(name: str, rows: slice) -> Tensor:
            projected = normed[rows] @ read(block + f"self_attn.{name}_proj.weight").T
            turned = torch.complex(projected[:, :half], projected[:, half:]) * turn[rows]
            return torch.cat((turned.real, turned.imag), dim=-1)

        last = slice(length - 1, length)
        scores = rotated("q", last) @ rotated("k", slice(None)).T / math.sqrt(config.head_dim)
        mixed = scores.softmax(-1) @ (normed @ read(block + "self_attn.v_proj.weight").T)
        x = x[last] + mixed @ read(block + "self_attn.o_proj.weight").T
        normed = norm(x, block + "post_attention_layernorm.weight")
        gate, up = (normed @ read(block + f"mlp.{name}_proj.weight").T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ read(block + "mlp.down_proj.weight").T
        return (norm(x, "model.norm.weight") @ read("lm_head.weight").T).log_softmax(-1)[0]


@pytest.mark.parametrize("length", [32_768, pytest.param(LENGTH, marks=pytest.mark.slow)])
def test_a_long_prompt_is_computed_in_flat_memory_as_in_float64(tmp_path: Path, length: int) -> None:
    folder = write_hf(tmp_path, num_hidden_layers=1, **SMALL)
    found, exact = last_logprobs(folder, length, chunk=1024), exact_logprobs(folder, length)
    error = max(abs(logprob - exact[token].item()) for token, logprob in found.items())
    print(f"\n{length} tokens: |Δlogprob| <= {error:.1e} beside float64")
    assert error <= 1e-4
    if length < LENGTH:
        other = last_logprobs(folder, length, chunk=192)
        assert other == pytest.approx(found, abs=1e-5)


def test_a_prompt_of_131072_tokens_has_the_same_bits_in_chunks_of_any_size(tmp_path: Path) -> None:
    """With a window, so that it takes seconds. Weights that our own kernels multiply, and an FP8 cache."""
    folder = write_hf(tmp_path, sliding_window=4096, **SMALL)
    found = last_logprobs(folder, LENGTH, chunk=2048, precision="int8", kv_precision="fp8")
    assert len(found) == 20
    assert last_logprobs(folder, LENGTH, chunk=500, precision="int8", kv_precision="fp8") == found


def test_a_boast_of_a_million_positions_is_served_with_131072(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, num_hidden_layers=1, **SMALL)
    config = EngineConfig(
        model_path=str(folder), device="cpu", kv_precision="fp8", kv_memory_bytes=200_000 * 2 * 132, threads=1
    )
    info = Runner.load(config, lambda *progress: None).info
    assert info.max_model_len == LENGTH
    validate_request(Request(request_id="fits", prompt_token_ids=[5] * (LENGTH - 1)), info)
    for length in (LENGTH, LENGTH + 1):
        with pytest.raises(
            InvalidRequestError, match=f"{length} tokens must be fewer than the context of 131072 tokens"
        ):
            validate_request(Request(request_id="long", prompt_token_ids=[5] * length), info)
