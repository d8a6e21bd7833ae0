"""`python -m bench.quality`: what each precision of weights and of keys and values costs a real model, on real text.

    bf16 weights, bf16 cache ── reference ──┬── every scheme x every KV precision      KL, top-1, perplexity, bytes
                                            ├── the same weights off their 4-bit grid  what int4 costs a float model
                                            └── one kind of matrix of one layer alone  where it comes from (sensitivity)

All is teacher-forced through the decoder and the paged cache that serve requests (`bench.divergence`). The reference
itself is compared with float32. The model is the embedded one, or any that the engine loads: `--model PATH`.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
import torch
from rich.console import Console

from bench.corpus import Passage, cut_passages, texts_by_kind
from bench.divergence import Observed, compare, observe, summarise
from bench.measure import this_machine, write_result
from bench.options import TEXTS, model_path, names
from bench.quality_report import KINDS, Cell, Report, Row, Sensitivity, plot, show
from bench.shuffle import Shuffled
from engine.checkpoint import open_checkpoint
from engine.machine import choose_device, choose_dtype, usable_cores
from engine.memory import token_bytes, vector_parameters
from engine.model.decoder import Decoder, Weights
from engine.model.load import TensorSource, load_decoder
from engine.schemes import SCHEMES, Scheme
from service.text.load import load_text

KV = ("bf16", "fp8")
REFERENCE = "bf16"


@click.command(context_settings={"show_default": True})
@click.option("--model", default="smollm2-135m-instruct", help="a .gguf file, a folder, or a name of the catalogue")
@click.option("--data", type=click.Path(path_type=Path), default=TEXTS, help="folder of the texts")
@click.option("--tokens", type=click.IntRange(1), default=8192, help="tokens that every scheme is judged by")
@click.option("--passage-tokens", type=click.IntRange(2), default=1024, help="tokens of one sequence")
@click.option("--schemes", callback=names(SCHEMES), default="auto,bf16,fp8,fp8-weight-only", help="of the weights")
@click.option("--kv", callback=names(KV), default=",".join(KV), help="precisions of keys and values")
@click.option("--float32/--no-float32", default=True, help="compare the reference with float32; needs its memory")
@click.option("--shuffled", callback=names(SCHEMES), default="int8,int4", help="schemes to try on shuffled weights")
@click.option("--sensitivity", callback=names(SCHEMES), default="int8,int4,fp8", help="schemes to take apart by kind")
@click.option("--layers", callback=names(SCHEMES), default="fp8", help="of these, schemes to take apart by layer too")
@click.option("--sensitivity-tokens", type=click.IntRange(6), default=768, help="for each figure of these tables")
@click.option("--dtype", default="auto", help="to compute in: auto, bfloat16 or float32")
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option("--threads", type=click.IntRange(1), default=usable_cores(), help="CPU threads")
@click.option("--json", type=click.Path(path_type=Path), help="also write the result to this file")
@click.option("--svg", type=click.Path(path_type=Path), help="also draw it into this file")
def main(
    model: str,
    data: Path,
    tokens: int,
    passage_tokens: int,
    schemes: list[str],
    kv: list[str],
    float32: bool,
    shuffled: list[str],
    sensitivity: list[str],
    layers: list[str],
    sensitivity_tokens: int,
    dtype: str,
    device: str,
    threads: int,
    json: Path | None,
    svg: Path | None,
) -> None:
    """Measure KL divergence, top-1 agreement and perplexity of every precision against bf16."""
    began, started_at, machine = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds"), this_machine()
    torch.set_num_threads(threads)
    path = model_path(model)
    tokenizer = load_text(path).tokenizer
    try:
        passages = cut_passages(texts_by_kind(data), tokenizer, -(-tokens // passage_tokens), passage_tokens)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--data {data}: {error}") from None
    rows: list[Row] = []
    tables: list[Sensitivity] = []
    with open_checkpoint(path) as checkpoint:
        bench = Bench(checkpoint, dtype, device, threads, passages)

        def save() -> Report:
            """After each part: a run of hours that ends early has not been for nothing."""
            report = Report(
                started_at=started_at,
                machine=machine,
                model=path.name,
                parameters=checkpoint.num_parameters,
                compute_dtype=str(bench.dtype).removeprefix("torch."),
                device=bench.device.type,
                tokens=len(passages) * passage_tokens,
                passage_tokens=passage_tokens,
                seconds=time.monotonic() - began,
                rows=rows,
                sensitivities=tables,
            )
            if json is not None:
                write_result(json, report)
            if svg is not None:
                svg.parent.mkdir(parents=True, exist_ok=True)
                svg.write_text(plot(report))
            return report

        rows += bench.matrix(schemes, kv, float32)
        report = save()
        if shuffled or sensitivity:
            off_grid = Bench(Shuffled(checkpoint), dtype, device, threads, passages)
            rows += off_grid.matrix(shuffled, kv, float32=False)
            report = save()
            for scheme in sensitivity:
                tables.append(off_grid.sensitivity(scheme, sensitivity_tokens, by_layer=scheme in layers))
                report = save()
    show(report, Console(width=None if sys.stdout.isatty() else 120))


class Bench:
    """One checkpoint, the text to judge it by, and what the reference says of that text.

    Args:
        dtype, device: "auto" or a name, as in EngineConfig.
    """

    def __init__(
        self, checkpoint: TensorSource, dtype: str, device: str, threads: int, passages: list[Passage]
    ) -> None:
        self._checkpoint, self._threads = checkpoint, threads
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self._kinds = [passage.kind for passage in passages]
        self._tokens = [passage.token_ids for passage in passages]
        self._decoder = self._load(SCHEMES[REFERENCE], self.dtype)
        self._reference = observe(self._decoder, self._tokens, self.dtype)

    def matrix(self, schemes: Sequence[str], kv: Sequence[str], float32: bool) -> list[Row]:
        """The reference against float32, then every scheme with every precision of the cache against the reference."""
        rows = []
        if float32 and self.dtype != torch.float32:
            exact = observe(self._load(SCHEMES[REFERENCE], torch.float32), self._tokens, torch.float32)
            rows.append(self._row(REFERENCE, KV[0], self._decoder, self._reference, exact, "float32"))
        for name in schemes:
            decoder = self._load(SCHEMES[name], self.dtype)
            for precision in kv:
                if (name, precision) != (REFERENCE, KV[0]):
                    kv_dtype = torch.float8_e4m3fn if precision == "fp8" else self.dtype
                    observed = observe(decoder, self._tokens, kv_dtype)
                    rows.append(
                        self._row(name, precision, decoder, observed, self._reference, f"{REFERENCE} / {KV[0]}")
                    )
        return rows

    def sensitivity(self, name: str, tokens: int, by_layer: bool) -> Sensitivity:
        """The reference with one kind of matrix after the other quantised: of all layers, then layer by layer.

        Args:
            tokens: in all, of the beginnings of one passage of each kind.
        """
        scheme = SCHEMES[name]
        least = scheme.gate_up or scheme.linear
        alike = dataclasses.replace(scheme, linear=least, head=least, embedding=least, gate_up=None)
        own, others = self._decoder.weights, self._load(alike, self.dtype).weights
        count = len(set(self._kinds))
        length = min(tokens // count, len(self._tokens[0]))
        passages = [token_ids[:length] for token_ids in self._tokens[:count]]
        reference = Observed([states[:length] for states in self._reference.hidden[:count]], own.head)

        def cell(layer: int | None, kind: str, weights: Weights) -> Cell:
            _say(f"sensitivity of {name}: layer {'all' if layer is None else layer}, {kind}")
            decoder = self._decoder.over(weights)
            found = compare(reference, observe(decoder, passages, self.dtype), passages)
            return Cell(layer=layer, kind=kind, kl_mean=summarise(found, self._kinds[:count]).kl_mean)

        def layers(which: int | None, kinds: Sequence[str]) -> Weights:
            mixed = [
                dataclasses.replace(mine, **{kind: getattr(its, kind) for kind in kinds})
                if which in (None, i)
                else mine
                for i, (mine, its) in enumerate(zip(own.layers, others.layers, strict=True))
            ]
            return dataclasses.replace(own, layers=mixed)

        cells = [cell(None, kind, layers(None, [kind])) for kind in KINDS]
        cells.append(cell(None, "all", layers(None, KINDS)))
        cells.append(cell(None, "head", dataclasses.replace(own, head=others.head)))
        cells.append(cell(None, "embedding", dataclasses.replace(own, embedding=others.embedding)))
        if by_layer:
            cells += [cell(i, kind, layers(i, [kind])) for i in range(len(own.layers)) for kind in KINDS]
        return Sensitivity(weights=name, tokens=sum(map(len, passages)), cells=cells)

    def _load(self, scheme: Scheme, dtype: torch.dtype) -> Decoder:
        longest = max(map(len, self._tokens))
        with torch.inference_mode():
            return load_decoder(
                self._checkpoint, dtype, self.device, longest, self._threads, lambda phase, done: None, scheme
            )

    def _row(
        self, name: str, kv: str, decoder: Decoder, observed: Observed, against: Observed, against_name: str
    ) -> Row:
        shuffled = isinstance(self._checkpoint, Shuffled)
        _say(f"{name} / {kv}{', shuffled' * shuffled}")
        floats = decoder.dtype.itemsize
        return Row(
            weights=name,
            kv=kv,
            shuffled=shuffled,
            against=against_name,
            weight_bytes=decoder.weights.nbytes + vector_parameters(decoder.config) * floats,
            token_bytes=token_bytes(decoder.config, kv, floats),
            quality=summarise(compare(against, observed, self._tokens), self._kinds),
        )


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
