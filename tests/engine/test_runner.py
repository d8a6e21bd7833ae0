"""The runner: same tokens for any chunking, batch mix, page size and row; sizes that cannot work are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import torch

from engine import runner as runner_module
from engine.config import EngineConfig
from engine.errors import EngineConfigError
from engine.machine import choose_device, choose_dtype, free_memory, usable_cores
from engine.memory import MemoryPlan
from engine.model.decoder import Decoder
from engine.request import SamplingParams
from engine.runner import Runner, WarmUpStep, warm_up_steps
from engine.sizing import CacheSize, check_config, size_cache
from engine.step import RowInit, RowWork, StepPlan
from tests.engine.oracle import BASE, decoder_of, transformers_model

ENGINE = EngineConfig(model_path="-", max_batch_size=4, max_batch_tokens=64)
MAX_LEN = 128
NEW_TOKENS = 12
PROMPTS = [[random.Random(n).randrange(BASE.vocab_size) for _ in range(n)] for n in (1, 40, 17, 64, 5, 90)]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of(BASE, transformers_model(BASE), max_len=MAX_LEN)


def make_runner(decoder: Decoder, page_size: int = 16, config: EngineConfig = ENGINE) -> Runner:
    pages = -(-MAX_LEN // page_size)
    config = msgspec.structs.replace(config, page_size=page_size)
    return Runner(config, decoder, CacheSize(config.batch_on("cpu").size * pages, MAX_LEN, pages))


@dataclass
class Sequence:
    """A request as a scheduler sees it: known tokens, how many are computed, which pages hold them."""

    prompt: list[int]
    output: list[int] = field(default_factory=list)
    row: int = -1
    computed: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.output) == NEW_TOKENS


def generate(runner: Runner, prompts: list[list[int]], rng: random.Random, preempt: float = 0.0) -> list[list[int]]:
    """Greedy tokens of all prompts under a random schedule: rows, pages, chunks and who runs are drawn each step."""
    page_size = runner.info.page_size
    waiting = [Sequence(prompt) for prompt in prompts]
    everyone, running = list(waiting), []
    rows, pages = list(range(runner.info.max_batch_size)), list(range(runner.info.kv_pages))
    released: list[int] = []

    def stop(sequence: Sequence) -> None:
        released.append(sequence.row)
        rows.append(sequence.row)
        pages.extend(sequence.pages)
        running.remove(sequence)
        sequence.row, sequence.computed, sequence.pages = -1, 0, []

    while not all(sequence.done for sequence in everyone):
        rng.shuffle(rows)
        rng.shuffle(pages)
        admitted = []
        while waiting and rows and (not running or rng.random() < 0.7):
            sequence = waiting.pop(0)
            sequence.row = rows.pop()
            running.append(sequence)
            admitted.append(
                RowInit(sequence.row, SamplingParams(temperature=0.0), 0, sequence.prompt, list(sequence.output))
            )
        work = []
        for sequence in rng.sample(running, rng.randint(1, len(running))):
            known = sequence.prompt + sequence.output
            end = rng.randint(sequence.computed + 1, len(known))
            new = [pages.pop() for _ in range(-(-end // page_size) - len(sequence.pages))]
            sequence.pages += new
            work.append(
                RowWork(sequence.row, sequence.computed, known[sequence.computed : end], new, end == len(known))
            )
            sequence.computed = end
        result = runner.run(StepPlan(work=work, admitted=admitted, released=released))
        released = []
        assert [token.row for token in result.sampled] == [item.row for item in work if item.sample]
        by_row = {sequence.row: sequence for sequence in running}
        for token in result.sampled:
            sequence = by_row[token.row]
            sequence.output.append(token.token_id)
            if sequence.done:
                stop(sequence)
            elif rng.random() < preempt:
                stop(sequence)
                waiting.append(sequence)
    return [sequence.output for sequence in everyone]


@pytest.fixture(scope="module")
def expected(decoder: Decoder) -> list[list[int]]:
    """Each prompt alone, by recomputing everything for every token."""
    runner, pages = make_runner(decoder, page_size=MAX_LEN), [0]
    outputs = []
    for prompt in PROMPTS:
        output: list[int] = []
        while len(output) < NEW_TOKENS:
            work = RowWork(0, 0, prompt + output, pages, sample=True)
            init = RowInit(0, SamplingParams(temperature=0.0), 0, prompt, list(output))
            output.append(runner.run(StepPlan(work=[work], admitted=[init], released=[0])).sampled[0].token_id)
        outputs.append(output)
    return outputs


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_the_same_for_any_chunking_batch_mix_page_size_and_row(
    decoder: Decoder, expected: list[list[int]], page_size: int, seed: int
) -> None:
    assert len({tuple(output) for output in expected}) == len(expected)
    assert generate(make_runner(decoder, page_size), PROMPTS, random.Random(seed)) == expected


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_the_same_after_preemption(decoder: Decoder, expected: list[list[int]], seed: int) -> None:
    assert generate(make_runner(decoder), PROMPTS, random.Random(seed), preempt=0.3) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_warm_up_leaves_no_trace(
    decoder: Decoder, expected: list[list[int]], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "warm_up_steps", lambda _, *most: warm_up_steps(device, *most))
    runner = make_runner(decoder)
    runner.warm_up()
    assert generate(runner, PROMPTS, random.Random(0)) == expected


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 2), (2, 2), (3, 40), (32, 512), (256, 8192)])
@pytest.mark.parametrize("longer", [0, 100])
def test_warm_up_on_a_gpu_has_steps_of_every_size_within_limits(rows: int, tokens: int, longer: int) -> None:
    steps = warm_up_steps("cuda", rows, tokens, tokens + longer)
    assert steps[0] == WarmUpStep(1, 0, tokens)
    assert steps[-1] == WarmUpStep(rows, 0, 1)
    for step in steps:
        assert 1 <= step.rows <= rows
        assert step.tokens >= 1
        assert 0 <= step.start <= tokens + longer - step.tokens
        assert step.tokens + step.rows - 1 <= tokens
    for least, most in ((1, 1), (2, 16), (17, 32), (33, 64)):
        assert any(least <= step.tokens + step.rows - 1 <= most for step in steps) or tokens < least
        assert any(least <= step.rows <= most for step in steps) or rows < least


def test_a_step_without_work_only_frees_rows(decoder: Decoder) -> None:
    init = RowInit(2, SamplingParams(), 0, [1], [])
    assert make_runner(decoder).run(StepPlan(work=[], admitted=[init], released=[])).sampled == []


def test_a_row_whose_logits_are_not_numbers_fails_alone() -> None:
    model = transformers_model(BASE)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    runner = make_runner(decoder_of(BASE, model, max_len=MAX_LEN))
    greedy = SamplingParams(temperature=0.0)
    plan = StepPlan(
        work=[RowWork(row, 0, tokens, [row], sample=True) for row, tokens in enumerate([[1, 2], [5, 2], [3]])],
        admitted=[RowInit(row, greedy, 0, [1], []) for row in range(3)],
    )
    sampled = runner.run(plan).sampled
    assert [token.failed is not None for token in sampled] == [False, True, False]


def test_an_end_of_sequence_that_the_vocabulary_has_not_is_none() -> None:
    config = msgspec.structs.replace(BASE, eos_token_ids=(3, BASE.vocab_size, 10**9))
    runner = make_runner(decoder_of(config, transformers_model(BASE), max_len=MAX_LEN))
    assert runner.eos_token_ids == (3,)
    init = RowInit(0, SamplingParams(temperature=0.0, min_tokens=2), 0, [1, 2], [])
    [token] = runner.run(StepPlan(work=[RowWork(0, 0, [1, 2], [0], sample=True)], admitted=[init])).sampled
    assert token.failed is None


SIZES = msgspec.structs.replace(BASE, max_position_embeddings=8192)
TOKEN_BYTES = SIZES.kv_bytes_per_token(4)


def left(cache: int, missing: int = 0) -> MemoryPlan:
    """A plan that leaves so many bytes to the cache."""
    return MemoryPlan(
        free=cache,
        weights=0,
        tables=0,
        workspace=0,
        reserve=missing,
        cache=cache,
        missing=missing,
        token_bytes=TOKEN_BYTES,
        page_size=ENGINE.page_size,
    )


def test_the_default_pool_serves_2048_tokens_for_every_sequence() -> None:
    size = size_cache(ENGINE, SIZES, left(1 << 40), "cpu")
    assert size.num_pages * ENGINE.page_size == 4 * 2048
    assert size.max_model_len == 8192


def test_the_default_pool_grows_to_one_sequence_of_the_context_that_was_asked_for() -> None:
    config = msgspec.structs.replace(ENGINE, max_batch_size=1, max_model_len=8000)
    size = size_cache(config, SIZES, left(1 << 40), "cpu")
    assert size.num_pages == size.pages_per_sequence == 125


def test_the_default_pool_takes_at_most_half_of_what_is_left_on_a_cpu() -> None:
    size = size_cache(ENGINE, SIZES, left(2 * TOKEN_BYTES * 64 * 10), "cpu")
    assert (size.num_pages, size.max_model_len) == (10, 640)


def test_the_default_pool_takes_all_that_is_left_on_a_gpu() -> None:
    size = size_cache(ENGINE, SIZES, left(TOKEN_BYTES * (64 * 1000 + 63)), "cuda")
    assert (size.num_pages, size.max_model_len) == (1000, 8192)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_share_of_what_is_left_is_taken_at_its_word(device: str) -> None:
    config = msgspec.structs.replace(ENGINE, kv_memory_share=0.25)
    assert size_cache(config, SIZES, left(TOKEN_BYTES * 64 * 1000), device).num_pages == 250


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_memory_share": 0.0}, "kv_memory_share: 0.0 must be above 0 and at most 1"),
        ({"kv_memory_share": float("nan")}, "kv_memory_share: nan must be above 0"),
        ({"kv_memory_share": 0.5, "kv_memory_bytes": 10}, "kv_memory_share: 0.5 does not go with kv_memory_bytes"),
    ],
)
def test_a_share_that_is_none_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(EngineConfigError, match=message):
        check_config(msgspec.structs.replace(ENGINE, **change))


def test_the_context_is_never_taken_from_a_boast_in_the_file() -> None:
    nemo = msgspec.structs.replace(SIZES, max_position_embeddings=1_024_000)
    config = msgspec.structs.replace(ENGINE, kv_memory_bytes=TOKEN_BYTES * 200_000)
    assert size_cache(config, nemo, left(1 << 40), "cpu").max_model_len == 131072


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 9000}, "max_model_len: 9000 must be at most the model's own limit of 8192 tokens"),
        ({"max_model_len": 8192, "kv_memory_bytes": TOKEN_BYTES * 64 * 3}, "hold 192 tokens"),
        ({"kv_memory_bytes": 1 << 50}, f"kv_memory_bytes: {1 << 50} must be at most the {1 << 40} bytes"),
        ({"kv_memory_bytes": 10}, "but 10 bytes hold 0 tokens"),
    ],
)
def test_a_context_that_cannot_fit_is_refused_with_numbers(change: dict[str, int], message: str) -> None:
    with pytest.raises(EngineConfigError, match=message):
        size_cache(msgspec.structs.replace(ENGINE, **change), SIZES, left(1 << 40), "cpu")


def test_weights_that_do_not_fit_are_refused_with_numbers() -> None:
    with pytest.raises(
        EngineConfigError, match="precision: auto takes 0 bytes of weights and 7 bytes to compute with, but 0 "
    ):
        size_cache(ENGINE, SIZES, left(0, missing=7), "cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"max_batch_size": 0},
        {"page_size": 0},
        {"max_batch_tokens": 3},
        {"threads": 0},
        {"kv_memory_bytes": -1},
        {"max_model_len": 1},
    ],
)
def test_an_impossible_setting_is_refused_by_name(change: dict[str, int]) -> None:
    with pytest.raises(EngineConfigError, match=f"^{next(iter(change))}: {next(iter(change.values()))} must be"):
        check_config(msgspec.structs.replace(ENGINE, **change))


@pytest.mark.parametrize("field", ["precision", "kv_precision"])
def test_an_unknown_precision_is_refused_with_those_there_are(field: str) -> None:
    with pytest.raises(EngineConfigError, match=f"^{field}: fp4 must be auto, bf16, fp8"):
        check_config(msgspec.structs.replace(ENGINE, **{field: "fp4"}))


def test_limits_of_a_container_bind(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    assert usable_cores(tmp_path) == 1
    assert free_memory(torch.device("cpu"), tmp_path) == 2000
    assert free_memory(torch.device("cpu"), tmp_path / "none") > 1 << 20


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_gpu_computes_in_bfloat16_where_it_multiplies_it(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize("choose", [lambda: choose_device("tpu"), lambda: choose_dtype("float16", torch.device("cpu"))])
def test_an_unknown_device_or_dtype_is_refused(choose: Callable[[], object]) -> None:
    with pytest.raises(EngineConfigError, match="must be auto"):
        choose()
