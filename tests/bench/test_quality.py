"""bench.quality: its figures against slow formulas, its shuffle against the model it came from, and a whole run."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from bench.corpus import cut_passages, texts_by_kind
from bench.divergence import compare, join, observe, score, summarise
from bench.quality import Bench, main
from bench.quality_report import KINDS, Report, plot, show
from bench.shuffle import Shuffled
from engine.checkpoint import open_checkpoint
from engine.model.decoder import Decoder
from engine.model.load import TensorSource, load_decoder
from tests.engine.oracle import teacher_forced
from tests.tiny_models import write_hf

CPU = torch.device("cpu")


class Letters:
    """A tokenizer of one token per character, with or without a token to begin with."""

    def __init__(self, bos_id: int | None) -> None:
        self.bos_id = bos_id

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return [ord(letter) for letter in text]


def test_passages_take_turns_among_kinds_and_texts() -> None:
    texts = {"a": ["0123456789"], "b": ["abcd", "ABCDEFG", "x"]}
    for bos_id, cut in ((None, ["012", "abc", "345", "ABC", "678", "DEF"]), (1, ["01", "ab", "23", "AB", "45", "cd"])):
        passages = cut_passages(texts, Letters(bos_id), 6, 3)
        assert [passage.kind for passage in passages] == ["a", "b"] * 3
        start = [] if bos_id is None else [bos_id]
        assert [passage.token_ids for passage in passages] == [start + Letters(None).encode(text) for text in cut]
    with pytest.raises(ValueError, match="8 passages of 3 tokens were asked for, the texts have 6"):
        cut_passages(texts, Letters(None), 8, 3)


def test_scores_are_those_of_the_slow_formulas() -> None:
    torch.manual_seed(0)
    wanted, found = torch.randn(5, 11) * 3, torch.randn(5, 11) * 3
    following = [3, 0, 10, 7]
    scores = score(wanted, found, torch.tensor(following))
    for i in range(5):
        p = [math.exp(value) for value in wanted[i].tolist()]
        q = [math.exp(value) for value in found[i].tolist()]
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        assert scores.kl[i].item() == pytest.approx(
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-4
        )
        assert scores.same[i].item() == (p.index(max(p)) == q.index(max(q)))
        if i < 4:
            assert scores.loss[i].item() == pytest.approx(-math.log(q[following[i]]), rel=1e-5)
            assert scores.reference_loss[i].item() == pytest.approx(-math.log(p[following[i]]), rel=1e-5)


def test_quality_is_over_all_positions_and_of_each_kind() -> None:
    torch.manual_seed(1)
    passages = [score(torch.randn(9, 7), torch.randn(9, 7), torch.randint(0, 7, (8,))) for _ in range(3)]
    quality = summarise(passages, ["prose", "code", "prose"])
    whole = join(passages)
    ratio = [(a - b).item() for a, b in zip(whole.loss, whole.reference_loss, strict=True)]
    mean = sum(ratio) / len(ratio)
    assert len(ratio) == 24
    assert quality.kl_mean == pytest.approx(sum(whole.kl.tolist()) / 27, rel=1e-5)
    assert sorted(whole.kl.tolist())[-2] <= quality.kl_p99 <= max(whole.kl.tolist())
    assert quality.top1 == pytest.approx(sum(whole.same.tolist()) / 27)
    assert quality.perplexity == pytest.approx(math.exp(sum(whole.loss.tolist()) / 24), rel=1e-5)
    assert quality.increase == pytest.approx(math.exp(mean) - 1, rel=1e-4)
    spread = math.sqrt(sum((value - mean) ** 2 for value in ratio) / 23 / 24)
    assert quality.increase_error == pytest.approx(math.exp(mean) * spread, rel=1e-4)
    code = passages[1].loss.mean() - passages[1].reference_loss.mean()
    assert quality.increase_by_kind["code"] == pytest.approx(math.exp(code.item()) - 1, rel=1e-4)


def load(source: TensorSource, dtype: torch.dtype = torch.float32) -> Decoder:
    with torch.inference_mode():
        return load_decoder(source, dtype, CPU, 1024, 1, lambda phase, done: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "model", max_position_embeddings=1024)


def test_comparison_of_decoders_is_that_of_their_logits(folder: Path) -> None:
    passages = [torch.randint(0, 160, (length,)).tolist() for length in (600, 130)]
    with open_checkpoint(folder) as checkpoint:
        decoders = [load(checkpoint, dtype) for dtype in (torch.float32, torch.bfloat16)]
    observed = [observe(each, passages, each.dtype) for each in decoders]
    logits = [teacher_forced(each, passages) for each in decoders]
    for i, scores in enumerate(compare(*observed, passages)):
        expected = score(logits[0][i], logits[1][i], torch.tensor(passages[i][1:]))
        torch.testing.assert_close(scores.kl, expected.kl, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(scores.loss, expected.loss, rtol=1e-3, atol=1e-4)
        assert 0 < scores.kl.mean() < 0.1


@pytest.mark.parametrize("biased", [False, True])
def test_shuffled_weights_are_the_same_function(tmp_path: Path, biased: bool) -> None:
    changes = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} if biased else {}
    tokens = torch.randint(0, 160, (50,)).tolist()
    with open_checkpoint(write_hf(tmp_path / "model", **changes)) as checkpoint:
        plain, shuffled = load(checkpoint), load(Shuffled(checkpoint))
        names = ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
        for name in [f"model.layers.1.{name}.weight" for name in names]:
            stored = checkpoint.matrix(name).dequantise()
            assert not torch.equal(Shuffled(checkpoint).matrix(name).values, stored)
            assert torch.equal(
                Shuffled(checkpoint).matrix(name, 3, 9).values, Shuffled(checkpoint).matrix(name).values[3:9]
            )
    logits = [teacher_forced(decoder, [tokens])[0] for decoder in (plain, shuffled)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4 * logits[0].abs().max().item())


def write_texts(folder: Path) -> Path:
    """Tiny texts under the names and in the form of the real ones."""
    folder.mkdir()
    prose, code = "All human beings are born free. " * 60, {"prompt": "def f():\n", "canonical_solution": "    pass\n"}
    with gzip.open(folder / "debian-handbook.json.gz", "wt") as file:
        json.dump({"en": prose}, file)
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(code) for _ in range(60)))
    with gzip.open(folder / "udhr.json.gz", "wt") as file:
        json.dump({"en": prose, "it": prose.upper()}, file)
    return folder


def test_the_matrix_and_the_sensitivity_of_a_small_model(tmp_path: Path, folder: Path) -> None:
    texts = texts_by_kind(write_texts(tmp_path / "text"))
    passages = [
        msgspec.structs.replace(passage, token_ids=[token % 160 for token in passage.token_ids])
        for passage in cut_passages(texts, Letters(None), 3, 64)
    ]
    with open_checkpoint(folder) as checkpoint:
        bench = Bench(checkpoint, "bfloat16", "cpu", 1, passages)
        rows = bench.matrix(["bf16", "fp8", "int8", "int4"], ["bf16", "fp8"], True)
        shuffled = Bench(Shuffled(checkpoint), "bfloat16", "cpu", 1, passages)
        rows += shuffled.matrix(["int4"], ["bf16"], False)
        table = shuffled.sensitivity("int4", 96, True)
    found = {(row.weights, row.kv, row.shuffled): row for row in rows}
    assert [row.against for row in rows] == ["float32"] + ["bf16 / bf16"] * 8
    assert len(found) == 9
    kl = {key: row.quality.kl_mean for key, row in found.items()}
    plain, off_grid = ("int4", "bf16", False), ("int4", "bf16", True)
    assert 0 < kl["bf16", "bf16", False] < kl["int8", "bf16", False] < kl["fp8", "bf16", False] < kl[plain]
    assert kl[off_grid] == pytest.approx(kl[plain], rel=0.7)  # random weights are on no grid to begin with
    assert 0 < kl["bf16", "fp8", False] < kl["fp8", "fp8", False]
    sizes = [found[name, "bf16", False].weight_bytes for name in ("int4", "int8", "bf16")]
    assert sizes == sorted(sizes)
    assert found["fp8", "fp8", False].token_bytes < found["fp8", "bf16", False].token_bytes

    assert table.tokens == 96
    assert len(table.cells) == len(KINDS) + 3 + 2 * len(KINDS)
    assert all(cell.kl_mean > 0 for cell in table.cells)
    assert max(table.kl(0, "down"), table.kl(1, "down")) < table.kl(None, "all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schemes", "bf16,fp9"], "'fp9' is none of auto, bf16, fp8"),
        (["--data", "nowhere"], "--data nowhere: .*debian-handbook"),
        (["--tokens", "1000000"], "977 passages of 1024 tokens were asked for, the texts have"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, smollm2_path: Path, test_data: Path) -> None:
    done = CliRunner().invoke(main, ["--data", str(test_data / "text"), "--model", str(smollm2_path), *arguments])
    assert done.exit_code == 2
    assert re.search(message, done.output)


@pytest.mark.slow
def test_a_whole_run_prints_writes_and_draws(smollm2_path: Path, test_data: Path, tmp_path: Path) -> None:
    options = ["--tokens", "192", "--passage-tokens", "64", "--schemes", "auto,fp8", "--kv", "bf16"]
    files = ["--json", str(tmp_path / "q.json"), "--svg", str(tmp_path / "q.svg")]
    data = ["--data", str(test_data / "text"), "--model", str(smollm2_path), "--threads", "1", "--sensitivity", ""]
    done = CliRunner().invoke(main, [*options, *files, *data], catch_exceptions=False)
    report = msgspec.json.decode((tmp_path / "q.json").read_bytes(), type=Report)
    assert done.exit_code == 0
    assert [row.weights for row in report.rows] == ["bf16", "auto", "fp8", "int8", "int4"]
    assert str(smollm2_path.parent) not in (tmp_path / "q.json").read_text()
    console = Console(file=io.StringIO(), width=120)
    show(report, console)
    assert "int8 *" in console.file.getvalue()
    assert plot(report).count("<circle") == sum(row.quality.kl_mean > 0 for row in report.rows)
    assert (tmp_path / "q.svg").read_text() == plot(report)
