"""The engine with adapters: slots, names and requests, over a runner that notices every mistake and over a real one."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import (
    AdapterLimitError,
    AdapterNotFoundError,
    CheckpointError,
    EngineConfigError,
    EngineDeadError,
    UnsupportedModelError,
)
from engine.face import Engine
from engine.local import LocalEngine
from engine.remote import RemoteEngine
from engine.request import AdapterInfo, FinishReason, Request, SamplingParams, TokenEvent
from engine.runner import Runner, load_runner
from tests.engine.fake_runner import FakeAdapter, FakePool, FakeRunner, engine_info, expected
from tests.engine.test_local import Gate
from tests.tiny_adapters import write_peft
from tests.tiny_models import config_json, model_config, write_hf

CONFIG = EngineConfig(model_path="-", seed=1, max_cpu_loras=5)


def request(name: str, adapter: str | None = None, prompt: int = 4, max_tokens: int = 6) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
    return Request(request_id=name, prompt_token_ids=[1] * prompt, sampling=sampling, adapter=adapter)


# -- the core --------------------------------------------------------------------------------------------------


class Core:
    """A core over the fake runner, with adapters that are what their names say."""

    def __init__(self, *names: str, slots: int = 2, **sizes: int) -> None:
        self.runner = FakeRunner(engine_info(max_loras=slots, **sizes))
        assert self.runner.adapters is not None
        self.pool: FakePool = self.runner.adapters
        self.core = EngineCore(self.runner, CONFIG, clock=lambda: 0.0)
        self.tokens: dict[str, list[int]] = {}
        self.order: list[str] = []
        for name in names:
            self.load(name)

    def load(self, name: str) -> AdapterInfo:
        return self.core.add_adapter(name, self.core.read_adapter(name, name))

    def step(self) -> None:
        for event in self.core.step():
            if event.request_id not in self.tokens:
                self.order.append(event.request_id)
            self.tokens.setdefault(event.request_id, []).extend(event.token_ids)

    def run(self) -> None:
        while self.core.has_work:
            self.step()

    def said(self, each: Request) -> bool:
        return self.tokens[each.request_id] == expected(each, self.runner.info).token_ids

    def fills(self) -> list[str]:
        """Adapters that were copied into slots, in order."""
        numbers = {number: adapter.name for number, adapter in self.pool.kept.items()}
        return [numbers[fill.adapter] for plan in self.runner.plans for fill in plan.fills]


def test_each_request_runs_with_its_adapter() -> None:
    engine = Core("a", "b")
    requests = [request(str(n), adapter) for n, adapter in enumerate([None, "a", "b", "a", None, "b"])]
    for each in requests:
        engine.core.add(each)
    engine.run()
    assert all(map(engine.said, requests))
    assert len({tuple(tokens) for tokens in engine.tokens.values()}) == 3


def test_an_adapter_that_is_not_loaded_is_named_beside_those_that_are() -> None:
    engine = Core("b", "a")
    with pytest.raises(AdapterNotFoundError, match=r"^adapter: 'c' is not loaded; loaded are a, b$"):
        engine.core.add(request("1", "c"))
    with pytest.raises(AdapterNotFoundError, match="loaded are none"):
        Core().core.add(request("1", "c"))


def test_more_adapters_than_slots_take_turns_in_the_order_of_arrival() -> None:
    engine = Core("a", "b", "c", slots=1)
    requests = [request(f"{adapter}{n}", adapter, max_tokens=2 + n) for n in range(3) for adapter in ("a", "b", "c")]
    for each in requests:
        engine.core.add(each)
    engine.run()
    assert all(map(engine.said, requests))
    assert engine.order == [each.request_id for each in requests]


def test_a_request_that_waits_for_a_slot_is_overtaken_by_plain_ones_alone() -> None:
    engine = Core("a", "b", slots=1)
    for each in (request("a1", "a", max_tokens=9), request("b", "b"), request("a2", "a"), request("plain")):
        engine.core.add(each)
    engine.step()
    assert (engine.core.stats().queued, engine.core.stats().blocked) == (2, 2)  # what no free row would help
    engine.run()
    assert engine.core.stats().blocked == 0
    assert engine.order == ["a1", "plain", "b", "a2"]  # a2 does not keep the slot from b


def test_the_slot_that_was_not_used_for_longest_gives_way() -> None:
    engine = Core("a", "b", "c", slots=2)
    for name in ("a", "b", "a", "c", "a", "b"):
        engine.core.add(request(name, name))
        engine.run()
    assert engine.fills() == ["a", "b", "c", "b"]


def test_with_pages_for_few_all_are_preempted_and_say_the_same() -> None:
    engine = Core("a", "b", "c", slots=2, page_size=1, kv_pages=16)
    requests = [request(str(n), [None, "a", "b", "c"][n % 4], max_tokens=11) for n in range(10)]
    for each in requests:
        engine.core.add(each)
    engine.run()
    assert all(map(engine.said, requests))
    assert engine.core.stats().preemptions > 0


def test_unloading_lets_those_end_that_run_or_wait_and_then_frees_the_memory() -> None:
    engine = Core("a", "b", slots=1)
    running, waiting = request("running", "a", max_tokens=8), request("waiting", "b")
    engine.core.add(running)
    engine.core.add(waiting)
    engine.step()
    for name in ("a", "b"):
        engine.core.remove_adapter(name)
        with pytest.raises(AdapterNotFoundError):
            engine.core.add(request("late", name))
    assert len(engine.pool.kept) == 2
    engine.run()
    assert engine.said(running)
    assert engine.said(waiting)
    assert engine.pool.kept == {}


def test_a_cancelled_request_gives_the_memory_of_an_unloaded_adapter_back() -> None:
    engine = Core("a")
    engine.core.add(request("1", "a"))
    engine.step()
    engine.core.remove_adapter("a")
    engine.core.cancel("1")
    assert engine.pool.kept == {}
    engine.run()


def test_an_adapter_that_is_loaded_again_serves_new_requests_only() -> None:
    engine = Core("a", "a2", slots=2)
    old, new = request("old", "a", max_tokens=9), request("new", "a")
    engine.core.add(old)
    engine.step()
    engine.core.add_adapter("a", engine.core.read_adapter("a", "a2"))
    engine.core.add(new)
    engine.run()
    assert engine.said(old)
    assert engine.tokens["new"] == expected(replace(new, adapter="a2"), engine.runner.info).token_ids
    assert len(engine.pool.kept) == 2  # the old a is gone


def test_adapters_beyond_the_limit_are_refused_but_not_another_of_the_same_name() -> None:
    engine = Core(*"abcde")
    with pytest.raises(AdapterLimitError, match="max_cpu_loras: 5 adapters are loaded, 'f' is too many"):
        engine.load("f")
    engine.load("e")
    engine.core.remove_adapter("a")
    engine.load("f")


def test_an_engine_without_slots_refuses_adapters() -> None:
    core = EngineCore(FakeRunner(engine_info()), CONFIG)
    with pytest.raises(EngineConfigError, match="max_loras: 0, so that this engine serves no adapters"):
        core.read_adapter("a", "a")


# -- the asynchronous face -------------------------------------------------------------------------------------


@asynccontextmanager
async def engine_with(runner: FakeRunner) -> AsyncIterator[LocalEngine]:
    engine = await LocalEngine.start(CONFIG, load=lambda config, progress: runner)
    try:
        yield engine
    finally:
        await engine.close()


async def collect(engine: Engine, each: Request) -> list[TokenEvent]:
    return [event async for event in engine.generate(each)]


async def tokens_of(engine: Engine, each: Request) -> list[int]:
    events = await collect(engine, each)
    assert events[-1].finish_reason is FinishReason.LENGTH, events[-1]
    return [token for event in events for token in event.token_ids]


async def test_steps_go_on_while_an_adapter_is_read() -> None:
    runner = FakeRunner(engine_info(max_loras=1))
    assert runner.adapters is not None
    gate = runner.adapters.gate = threading.Event()
    async with engine_with(runner) as engine:
        loading = asyncio.create_task(engine.load_adapter("a", "a"))
        plain = request("plain", max_tokens=20)
        assert await tokens_of(engine, plain) == expected(plain, engine.info).token_ids
        assert not loading.done()
        assert engine.adapters == ()
        with pytest.raises(AdapterNotFoundError, match="'a' is not loaded; loaded are none"):
            await collect(engine, request("early", "a"))
        gate.set()
        assert await loading == AdapterInfo(name="a", rank=4, nbytes=100)
        assert engine.adapters == (await loading,)
        adapted = request("adapted", "a")
        assert await tokens_of(engine, adapted) == expected(adapted, engine.info).token_ids


async def test_an_adapter_is_there_although_who_asked_for_it_has_gone() -> None:
    runner = FakeRunner(engine_info(max_loras=1))
    assert runner.adapters is not None
    gate = runner.adapters.gate = threading.Event()
    async with engine_with(runner) as engine:
        asked = asyncio.create_task(engine.load_adapter("a", "a"))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        gate.set()
        await engine.load_adapter("b", "b")
        assert [adapter.name for adapter in engine.adapters] == ["a", "b"]


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (CheckpointError("file: broken"), CheckpointError),
        (UnsupportedModelError("file: broken"), UnsupportedModelError),
        (AdapterLimitError("file: broken"), AdapterLimitError),
        (MemoryError("no more"), CheckpointError),
        (OSError(5, "I/O error"), CheckpointError),
    ],
)
async def test_an_adapter_that_cannot_be_read_is_an_error_of_its_caller_alone(
    raised: Exception, kind: type[Exception]
) -> None:
    runner = FakeRunner(engine_info(max_loras=1))
    assert runner.adapters is not None
    runner.adapters.errors["bad"] = raised
    async with engine_with(runner) as engine:
        running = asyncio.create_task(tokens_of(engine, request("plain", max_tokens=30)))
        with pytest.raises(kind, match="broken" if "broken" in str(raised) else "bad: cannot be read"):
            await engine.load_adapter("a", "bad")
        assert await running
        await engine.load_adapter("a", "good")


async def test_unloading_takes_the_name_at_once() -> None:
    gate = Gate(passing=3)
    async with engine_with(FakeRunner(engine_info(max_loras=1), gate)) as engine:
        with pytest.raises(AdapterNotFoundError):
            engine.unload_adapter("a")
        await engine.load_adapter("a", "a")
        adapted = request("adapted", "a", max_tokens=30)
        running = asyncio.create_task(tokens_of(engine, adapted))
        assert await asyncio.to_thread(gate.entered.wait, 30)
        engine.unload_adapter("a")
        assert engine.adapters == ()
        with pytest.raises(AdapterNotFoundError, match="loaded are none"):
            await collect(engine, request("late", "a"))
        gate.opened.set()
        assert await running == expected(adapted, engine.info).token_ids


async def test_unloading_does_not_take_what_has_been_loaded_under_the_name_meanwhile() -> None:
    runner = FakeRunner(engine_info(max_loras=1))
    assert runner.adapters is not None
    async with engine_with(runner) as engine:
        await engine.load_adapter("a", "a")
        keep, kept = runner.adapters.keep, threading.Event()

        def keep_and_tell(number: int, adapter: FakeAdapter) -> None:
            keep(number, adapter)
            kept.set()

        runner.adapters.keep = keep_and_tell  # type: ignore[method-assign]
        again = asyncio.create_task(engine.load_adapter("a", "a"))
        await asyncio.sleep(0)
        assert kept.wait(30)  # the core has it; this loop cannot know yet
        engine.unload_adapter("a")
        info = await again
        assert engine.adapters == (info,)
        each = request("1", "a")
        assert (await collect(engine, each))[-1].finish_reason is FinishReason.LENGTH


async def test_a_dead_engine_ends_loads_too() -> None:
    runner = FakeRunner(engine_info(max_loras=1))
    assert runner.adapters is not None
    gate = runner.adapters.gate = threading.Event()
    async with engine_with(runner) as engine:
        loading = asyncio.create_task(engine.load_adapter("a", "a"))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineDeadError, match="the engine was closed"):
            await loading
        for call in (lambda: engine.load_adapter("a", "a"), lambda: collect(engine, request("1"))):
            with pytest.raises(EngineDeadError):
                await call()
        with pytest.raises(EngineDeadError):
            engine.unload_adapter("a")
        gate.set()


# -- a real model ----------------------------------------------------------------------------------------------

MODEL = model_config(config_json())
NAMES = (None, "a", "b", "c")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and adapters of different ranks beside it."""
    root = tmp_path_factory.mktemp("tiny")
    write_hf(root / "model", seed=8)
    write_peft(root / "a", MODEL, rank=4, alpha=8, seed=1)
    write_peft(root / "b", MODEL, rank=8, alpha=8, seed=2, modules=("q_proj", "v_proj", "down_proj"))
    write_peft(root / "c", MODEL, rank=2, alpha=6, seed=3, rslora=True)
    return root


def tiny_config(root: Path, **changes: object) -> EngineConfig:
    config = EngineConfig(
        model_path=str(root / "model"), dtype="float32", threads=1, max_loras=3, max_lora_rank=8, max_model_len=80
    )
    return replace(config, **changes)


def tiny_requests(count: int = 16) -> list[Request]:
    generator = random.Random(5)
    return [
        Request(
            request_id=str(number),
            prompt_token_ids=[generator.randrange(3, 160) for _ in range(generator.randint(1, 30))],
            sampling=SamplingParams(
                max_tokens=generator.randint(2, 20), ignore_eos=True, temperature=number % 2, seed=number
            ),
            adapter=NAMES[number % len(NAMES)],
        )
        for number in range(count)
    ]


def run_core(config: EngineConfig, root: Path, requests: list[Request]) -> tuple[dict[str, list[int]], EngineCore]:
    core = EngineCore(load_runner(config, lambda phase, fraction: None), config, clock=lambda: 0.0)
    for name in NAMES[1:]:
        core.add_adapter(name, core.read_adapter(name, str(root / name)))
    for each in requests:
        core.add(each)
    tokens: dict[str, list[int]] = {each.request_id: [] for each in requests}
    while core.has_work:
        for event in core.step():
            tokens[event.request_id] += event.token_ids
    return tokens, core


@pytest.fixture(scope="module")
def alone(tiny: Path) -> dict[str, list[int]]:
    """Tokens of each request when nothing else is in the batch."""
    tokens, _ = run_core(tiny_config(tiny, max_batch_size=1), tiny, tiny_requests())
    plain, _ = run_core(tiny_config(tiny), tiny, [replace(each, adapter=None) for each in tiny_requests()])
    changed = [each.request_id for each in tiny_requests() if tokens[each.request_id] != plain[each.request_id]]
    assert {each.adapter for each in tiny_requests() if each.request_id in changed} == {"a", "b", "c"}
    return tokens


@pytest.mark.parametrize(
    ("changes", "preempts"),
    [
        ({}, False),
        ({"max_loras": 1}, False),
        ({"max_loras": 2, "max_batch_size": 5, "max_batch_tokens": 9}, False),
        ({"max_batch_size": 8, "page_size": 4, "max_model_len": 64, "kv_memory_bytes": 20 * 4 * 512}, True),
        ({"max_loras": 2, "page_size": 2, "max_model_len": 56, "kv_memory_bytes": 28 * 2 * 512}, True),
    ],
    ids=["in a crowd", "one slot", "chunks", "pre-empted", "pre-empted, two slots"],
)
def test_tokens_depend_on_the_request_and_its_adapter_alone(
    tiny: Path, alone: dict[str, list[int]], changes: dict[str, object], preempts: bool
) -> None:
    tokens, core = run_core(tiny_config(tiny, **changes), tiny, tiny_requests())
    assert tokens == alone
    assert (core.stats().preemptions > 0) == preempts


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_one_prompt_under_several_adapters_shares_pages_only_where_the_adapter_is_the_same(tiny: Path, kv: str) -> None:
    prompt = [3 + number % 150 for number in range(40)]
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    requests = [
        Request(request_id=f"{name} {number}", prompt_token_ids=[*prompt, number], sampling=sampling, adapter=name)
        for number in range(2)
        for name in NAMES
    ]
    config = tiny_config(tiny, page_size=8, max_batch_size=8, kv_precision=kv)
    shared, core = run_core(config, tiny, requests)
    apart, _ = run_core(replace(config, prefix_caching=False), tiny, requests)
    assert shared == apart
    assert len({tuple(tokens) for tokens in apart.values()}) >= len(NAMES)
    assert core.stats().prefix_cache_hit_tokens == len(NAMES) * 40


@pytest.mark.parametrize("kind", [LocalEngine, RemoteEngine])
async def test_loading_and_unloading_under_traffic(
    tiny: Path, tmp_path: Path, alone: dict[str, list[int]], kind: type[LocalEngine] | type[RemoteEngine]
) -> None:
    engine: Engine = await kind.start(tiny_config(tiny, max_loras=2, max_cpu_loras=3))
    try:
        with pytest.raises(AdapterNotFoundError):
            await tokens_of(engine, tiny_requests()[1])
        loaded = await asyncio.gather(*(engine.load_adapter(name, str(tiny / name)) for name in ("a", "b", "c")))
        assert [(each.name, each.rank) for each in loaded] == [("a", 4), ("b", 8), ("c", 2)]
        assert engine.adapters == tuple(loaded)

        traffic = [asyncio.create_task(tokens_of(engine, each)) for each in tiny_requests()]
        async with aclosing(engine.generate(request("first", max_tokens=3))) as events:
            await anext(events)
        with pytest.raises(AdapterLimitError, match="max_cpu_loras: 3 adapters are loaded, 'd' is too many"):
            await engine.load_adapter("d", str(tiny / "a"))
        engine.unload_adapter("c")  # the requests for it that were accepted end with it
        write_peft(tmp_path / "wide", MODEL, rank=9)
        write_peft(tmp_path / "other", replace(MODEL, hidden_size=32))
        write_peft(tmp_path / "dora", MODEL, use_dora=True)
        for name, error, message in (
            ("wide", CheckpointError, "has rank 9; max_lora_rank is 8"),
            ("other", CheckpointError, "has shape .* for this model it must be"),
            ("dora", UnsupportedModelError, "use_dora is set, which is not supported"),
            ("nowhere", CheckpointError, "neither adapter_config.json nor lora.safetensors is in this folder"),
        ):
            with pytest.raises(error, match=message):
                await engine.load_adapter("d", str(tmp_path / name))
        with pytest.raises(AdapterNotFoundError, match="'c' is not loaded; loaded are a, b"):
            await tokens_of(engine, tiny_requests()[3])
        said = await asyncio.gather(*traffic)
        assert said == [alone[each.request_id] for each in tiny_requests()]
    finally:
        await engine.close()


def test_without_slots_nothing_is_allocated(tiny: Path) -> None:
    runner = Runner.load(tiny_config(tiny, max_loras=0), lambda phase, fraction: None)
    assert runner.adapters is None
    assert runner.info.max_loras == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_loras": -1}, "max_loras: -1 must be 0 .no adapters. or positive"),
        ({"max_lora_rank": 0}, "max_lora_rank: 0 must be at least 1"),
        ({"max_cpu_loras": 0}, "max_cpu_loras: 0 must be at least 1"),
        ({"max_loras": 10**9}, "precision: auto takes .* are free"),
    ],
)
def test_limits_that_cannot_work_are_refused(tiny: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(EngineConfigError, match=message):
        Runner.load(tiny_config(tiny, **changes), lambda phase, fraction: None)


def test_a_step_without_adapters_goes_through_the_plain_layers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner.load(tiny_config(tiny), lambda phase, fraction: None)
    monkeypatch.setattr("engine.model.lora.LoraPool.around", None)  # must not be called
    core = EngineCore(runner, tiny_config(tiny), clock=lambda: 0.0)
    core.add(replace(tiny_requests()[0], adapter=None))
    while core.has_work:
        core.step()
    assert core.stats().generated_tokens == tiny_requests()[0].sampling.max_tokens
