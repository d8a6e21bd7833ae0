"""The pages of docs/ have the figures of the result files that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from bench.fullsize import Result
from bench.measure import Comparison, Run
from bench.peers.report import Peers
from bench.peers.report import plot as plot_peers
from bench.quality_report import KINDS, Report, plot
from bench.tokenizer import Tokenizers

ROOT = Path(__file__).resolve().parent.parent.parent
R = TypeVar("R")


def page(name: str) -> list[str]:
    return (ROOT / "docs" / name).read_text().splitlines()


def result(name: str, kind: type[R], form: str = "") -> R:
    """The result file that a page links to.

    Args:
        form: part of its name, where a page has several.
    """
    links = re.findall(r"bench/results/(\S+?\.json)", "\n".join(page(name)))
    (link,) = {link for link in links if form in link}
    return msgspec.json.decode((ROOT / "bench" / "results" / link).read_bytes(), type=kind)


def cells(values: list[str]) -> str:
    return " | ".join(values)


def test_quality() -> None:
    lines, report = page("quality.md"), result("quality.md", Report)
    for row in report.rows:
        found = row.quality
        figures = [
            f"`{row.weights}`{', shuffled' * row.shuffled}",
            row.kv,
            row.against.partition(" ")[0],
            f"{row.weight_bytes / 1e6:.1f}",
            f"{row.token_bytes / 1024:.1f}",
            f"{found.kl_mean:.5f}",
            f"{found.kl_p99:.4f}",
            f"{100 * found.top1:.1f} %",
            f"{found.perplexity:.3f}",
            f"{100 * found.increase:+.2f} ± {100 * found.increase_error:.2f} %",
        ]
        assert f"| {cells(figures)} |" in lines
    for table in report.sensitivities:
        for layer in dict.fromkeys(cell.layer for cell in table.cells):
            kinds = KINDS if layer is not None else (*KINDS, "all", "head", "embedding")
            values = [1e4 * (table.kl(layer, kind) or 0) for kind in kinds]
            name = f"`{table.weights}`" if layer is None else str(layer)
            values += [sum(values)] if layer is not None else []
            assert f"| {cells([name, *(f'{value:.1f}' for value in values)])} |" in lines
    (picture,) = re.findall(r"bench/results/(\S+?\.svg)", "\n".join(lines))
    assert (ROOT / "bench" / "results" / picture).read_text() == plot(report)


def test_the_engine_beside_transformers() -> None:
    lines, comparison = page("performance.md"), result("performance.md", Comparison, "engine-")
    for streams in comparison.job.streams:
        ours, theirs = (comparison.best(peer, streams) for peer in comparison.peers())
        speeds = [
            f"{run.tokens_per_second:.3g} ({min(r.tokens_per_second for r in comparison.runs(peer, streams)):.3g})"
            for peer, run in zip(comparison.peers(), (ours, theirs), strict=True)
        ]
        figures = [
            str(streams),
            *speeds,
            f"**{ours.tokens_per_second / theirs.tokens_per_second:.1f}×**",
            f"{1000 * ours.ttft_p50_seconds:.0f} / {1000 * theirs.ttft_p50_seconds:.0f} ms",
            f"{1000 * ours.itl_p50_seconds:.1f} / {1000 * theirs.itl_p50_seconds:.1f} ms",
        ]
        assert f"| {cells(figures)} |" in lines


def speed(run: Run) -> str:
    """tokens/s in three digits, or more where there are more before the point."""
    return f"{run.tokens_per_second:.{0 if run.tokens_per_second >= 100 else 1}f}"


def servers_table(found: Peers) -> list[str]:
    """tokens/s and the median TTFT of every server in every case, best round."""
    names = [" ".join(kind) for kind in found.kinds]
    lines = [f"| streams, tokens | {cells(names)} |", "|---" * (1 + len(names)) + "|"]
    for case in found.cases:
        what = f"{case.name}: {case.streams} × {case.prompt_tokens} + {case.new_tokens}"
        best = [next(iter(found.speeds(kind, case)), None) for kind in found.kinds]
        figures = ["–" if run is None else f"{speed(run)} · {run.ttft_p50_seconds:.2g} s" for run in best]
        lines.append(f"| {cells([what, *figures])} |")
    memory = [f"{max(turn.peak_rss_bytes for turn in found.of(kind)) / 2**20:.0f} MiB" for kind in found.kinds]
    return [*lines, f"| {cells(['peak memory', *memory])} |"]


@pytest.mark.parametrize("model", ["smollm2", "nemo-1b"])
def test_servers_side_by_side(model: str) -> None:
    lines, found = page("performance.md"), result("performance.md", Peers, f"peers-{model}")
    for line in servers_table(found):
        assert line in lines
    (picture,) = re.findall(rf"bench/results/(peers-{model}\S+?\.svg)", "\n".join(lines))
    assert (ROOT / "bench" / "results" / picture).read_text() == plot_peers(found)


def test_nemo_at_its_real_size() -> None:
    lines = page("performance.md")
    found = [result("performance.md", Result, form) for form in ("gguf-q4_k_m", "nemo-fp8", "bf16-int4")]

    def decode(each: Result, streams: int) -> float:
        (run,) = (run for run in each.runs if run.streams == streams)
        return streams / run.itl_p50_seconds

    def of_the_limit(each: Result) -> str:
        read = each.bandwidth.read_bytes_per_second
        return f"{decode(each, 1) * each.sizes.streamed_bytes / read:.0%}".replace("%", f" % of {read / 1e9:.0f} GB/s")

    rows = {
        "files": [f"{each.sizes.file_bytes / 1e9:.2f} GB" for each in found],
        "weights in memory": [f"{each.sizes.weight_bytes / 1e9:.2f} GB" for each in found],
        "anonymous memory of the engine while loading, beyond the weights": [
            f"{(each.memory.peak_anonymous_bytes - each.sizes.weight_bytes) / 2**30:.2f} GiB" for each in found
        ],
        "ready after": [f"{each.ready_seconds:.1f} s" for each in found],
        "KV cache per token": [f"{each.sizes.kv_token_bytes / 1024:.4g} KiB" for each in found],
        "1 stream: decode, of what memory reads at in the same run": [
            f"{decode(each, 1):.1f} tokens/s, {of_the_limit(each)}" for each in found
        ],
        "4 streams: decode": [f"{decode(each, 4):.1f} tokens/s" for each in found],
    }
    for name, values in rows.items():
        assert f"| {cells([name, *values])} |" in lines


def test_tokenizers() -> None:
    lines, measured = page("tokenizer.md"), result("tokenizer.md", Tokenizers)
    languages = {"it": "Italian", "fr": "French", "de": "German", "es": "Spanish", "ru": "Russian", "zh": "Chinese"}
    languages |= {"ko": "Korean", "ar": "Arabic"}
    for kind, language in languages.items():
        rows = {row.source: row for row in measured.compression if row.kind == kind}
        handbook = f"{rows['handbook'].ratio:.2f} " if "handbook" in rows else ""
        assert f"| {language} | {rows['UDHR'].claimed:g} | {rows['UDHR'].ratio:.2f} | {handbook}|" in lines
    text = "\n".join(lines)
    for row in measured.compression:
        assert f"{row.ratio:.2f}" in text
    peers = dict.fromkeys((speed.vocabulary, speed.peer) for speed in measured.speeds)
    for vocabulary, peer in peers:
        speeds = {s.text: s for s in measured.speeds if (s.vocabulary, s.peer) == (vocabulary, peer)}
        encode = [f"{s.text_bytes / min(s.encode_seconds) / 1e6:.1f}" for s in speeds.values()]
        english = speeds["English"]
        decode = f"{english.text_bytes / min(english.decode_seconds) / 1e6:.0f}"
        assert any(line.endswith(f"| {cells([*encode, decode])} |") for line in lines), (vocabulary, peer)


def test_the_autoscaler_beside_its_rivals() -> None:
    """The page's totals of both machines are those of the table that was written with the result."""
    totals: dict[str, list[list[str]]] = {}
    for line in (ROOT / "bench" / "results" / "autoscaler-score.md").read_text().splitlines():
        if re.match(r"\| \S.* \| \d+ of \d+ \|", line):
            name, *figures = line.strip("| ").split(" | ")
            totals.setdefault(name, []).append(figures)
    for label, name in {
        "static, known in hindsight": "static",
        "oracle": "oracle",
        "**ours**": "ours",
        "HPA, tuned": "hpa tuned",
        "KEDA, tuned": "keda tuned",
        "KPA, tuned": "kpa tuned",
        "WVA v2, tuned": "wva tuned",
        "Dynamo's planner, tuned": "dynamo tuned",
        "Ray Serve, tuned": "ray tuned",
    }.items():
        h100, cpu = totals[name]
        columns = [f"{h100[place]}, {cpu[place]}" for place in (0, 1, 3, 5)]
        assert f"| {label} | {cells(columns)} |" in page("performance.md")
