"""`python -m bench.tokenizer`: what Mistral claimed of Tekken, and the speed of our tokenizers beside their peers.

Compression: tokens of Mistral's SentencePiece vocabulary (v3, that of Mistral 7B) over tokens of Tekken, text by text.
The claims are those of Mistral's announcement of NeMo (mistral.ai/news/mistral-nemo, July 2024): "~30% more efficient
at compressing source code, Chinese, Italian, French, German, Spanish, and Russian. It is also 2x and 3x more efficient
at compressing Korean and Arabic, respectively." They are read as this ratio, the reading under which they come nearest.

Speed: one thread, pieces of the length of a prompt, seconds of CPU time, in which other load on the machine has little
part. Peers take turns (A B A B) in one process and the best round counts, since other load only ever takes speed away.
Nothing is timed before our tokenizers have given every text back as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import Machine, this_machine, write_result
from bench.options import TEXTS
from bench.texts import CODE, Text, read_texts
from bench.vocabularies import Peer, mistral_peers, smollm2_peers

CLAIMED = {CODE: 1.3, "zh": 1.3, "it": 1.3, "fr": 1.3, "de": 1.3, "es": 1.3, "ru": 1.3, "ko": 2.0, "ar": 3.0}
PIECE = 4096  # characters of what is encoded at a time: a prompt with a page of context
TIMED = {"English": ("en", "handbook"), "Python": (CODE, "Python library"), "11 languages": None}


class Compression(msgspec.Struct, frozen=True, kw_only=True):
    """One text in both vocabularies. `claimed` is the ratio that was announced, None if there is no claim."""

    kind: str
    source: str
    text_bytes: int
    tekken_tokens: int
    sentencepiece_tokens: int
    claimed: float | None

    @property
    def ratio(self) -> float:
        """How many times as many tokens the older vocabulary takes."""
        return self.sentencepiece_tokens / self.tekken_tokens


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """One tokenizer on one text; CPU seconds of every round. `same_ids`: as the first peer of the vocabulary."""

    vocabulary: str
    peer: str
    text: str
    text_bytes: int
    tokens: int
    same_ids: bool
    encode_seconds: list[float]
    decode_seconds: list[float]


class Tokenizers(msgspec.Struct, frozen=True, kw_only=True):
    """A result file."""

    schema: int = 1
    started_at: str  # ISO 8601, UTC
    machine: Machine
    versions: dict[str, str]
    compression: list[Compression]
    speeds: list[Speed]


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=TEXTS,
    help="folder of the texts",
)
@click.option("--rounds", type=click.IntRange(1), default=3, help="how often each peer has its turn")
@click.option("--json", type=click.Path(path_type=Path), help="also write the result to this file")
def main(data: Path, rounds: int, json: Path | None) -> None:
    """Compression of Tekken beside its claims, and tokenizer throughput beside peers."""
    started_at, machine = datetime.now(UTC).isoformat(timespec="seconds"), this_machine()
    try:
        texts = read_texts(data)
    except FileNotFoundError as error:
        raise click.ClickException(f"--data: {error.filename} is not there") from None
    peers = [*mistral_peers(), *smollm2_peers()]
    for peer in peers:
        if peer.name.startswith("nemoserve"):
            for text in texts:
                check_round_trip(peer, text)
    tekken, older = (next(p for p in peers if p.vocabulary == name) for name in ("Tekken", "SentencePiece"))
    result = Tokenizers(
        started_at=started_at,
        machine=machine,
        versions={name: version(name) for name in ("tiktoken", "mistral-common", "sentencepiece", "tokenizers")},
        compression=[compress(text, tekken, older) for text in texts],
        speeds=[speed for name, text in timed_texts(texts).items() for speed in race(peers, name, text, rounds)],
    )
    if json is not None:
        write_result(json, result)
    show_compression(result.compression, Console())
    show_speeds(result.speeds, Console())


# -- measurements ------------------------------------------------------------------------------------------------------


def check_round_trip(peer: Peer, text: Text) -> None:
    """Raises click.ClickException: the tokens of the text are another text."""
    back = peer.decode(peer.encode(text.text))
    if back != text.text:
        at = next((i for i, (a, b) in enumerate(zip(back, text.text, strict=False)) if a != b), len(back))
        raise click.ClickException(
            f"{peer.vocabulary}, {peer.name}: {text.source} ({text.kind}) comes back different at character {at}: "
            f"{back[at : at + 20]!r} instead of {text.text[at : at + 20]!r}"
        )


def compress(text: Text, tekken: Peer, older: Peer) -> Compression:
    """Count the tokens of a text in both vocabularies."""
    return Compression(
        kind=text.kind,
        source=text.source,
        text_bytes=len(text.text.encode()),
        tekken_tokens=len(tekken.encode(text.text)),
        sentencepiece_tokens=len(older.encode(text.text)),
        claimed=CLAIMED.get(text.kind),
    )


def timed_texts(texts: Sequence[Text]) -> dict[str, list[str]]:
    """What speed is measured on, in pieces: English prose, Python, and prose of all languages but English."""
    chosen = {
        name: "".join(t.text for t in texts if ((t.kind, t.source) == which if which else t.kind not in (CODE, "en")))
        for name, which in TIMED.items()
    }
    return {name: [text[at : at + PIECE] for at in range(0, len(text), PIECE)] for name, text in chosen.items()}


def race(peers: Sequence[Peer], name: str, pieces: Sequence[str], rounds: int) -> list[Speed]:
    """Every peer on one text, in turns."""
    tokens = [[peer.encode(piece) for piece in pieces] for peer in peers]  # warm, too
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in peers]
    for _ in range(rounds):
        for peer, ids, (encode, decode) in zip(peers, tokens, times, strict=True):
            encode.append(_seconds(peer.encode, pieces))
            decode.append(_seconds(peer.decode, ids))
    first = {peer.vocabulary: ids for peer, ids in reversed(list(zip(peers, tokens, strict=True)))}
    return [
        Speed(
            vocabulary=peer.vocabulary,
            peer=peer.name,
            text=name,
            text_bytes=sum(len(piece.encode()) for piece in pieces),
            tokens=sum(map(len, ids)),
            same_ids=ids == first[peer.vocabulary],
            encode_seconds=encode,
            decode_seconds=decode,
        )
        for peer, ids, (encode, decode) in zip(peers, tokens, times, strict=True)
    ]


def _seconds(do: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    began = time.process_time()
    for each in inputs:
        do(each)
    return time.process_time() - began


# -- tables ------------------------------------------------------------------------------------------------------------


def show_compression(rows: Sequence[Compression], console: Console) -> None:
    """Measured beside claimed, the kinds of text that there are claims about first."""
    columns = ("KB", "tokens\nTekken", "\nSP", "B/token\nTekken", "\nSP", "ratio", "claimed", "off")
    table = _table("Tekken against Mistral's SentencePiece (SP): ratio of tokens", ("text", "kind"), columns)
    kinds = list(dict.fromkeys([*CLAIMED, *(row.kind for row in rows)]))
    for row in sorted(rows, key=lambda row: kinds.index(row.kind)):
        table.add_row(
            row.source,
            row.kind,
            f"{row.text_bytes / 1000:.0f}",
            f"{row.tekken_tokens:,}",
            f"{row.sentencepiece_tokens:,}",
            f"{row.text_bytes / row.tekken_tokens:.2f}",
            f"{row.text_bytes / row.sentencepiece_tokens:.2f}",
            f"{row.ratio:.2f}",
            "" if row.claimed is None else f"{row.claimed:.1f}",
            "" if row.claimed is None else f"{100 * (row.ratio / row.claimed - 1):+.0f} %",
        )
    console.print(table)


def show_speeds(speeds: Sequence[Speed], console: Console) -> None:
    """Best rounds, a table for each text. "ours is": how many times as fast as each the first tokenizer of its
    vocabulary is."""
    columns = ("encode\nMB/s", "\nMtok/s", "ours\nis", "decode\nMB/s", "\nMtok/s", "ours\nis", "same\nids")
    for text in dict.fromkeys(speed.text for speed in speeds):
        table = _table(f"{text}: one thread, pieces of {PIECE:,} characters", ("vocabulary", "tokenizer"), columns)
        for _, peers in groupby((s for s in speeds if s.text == text), lambda speed: speed.vocabulary):
            table.add_section()
            first, *rest = peers
            for speed in (first, *rest):
                encode, decode = min(speed.encode_seconds), min(speed.decode_seconds)
                table.add_row(
                    speed.vocabulary,
                    speed.peer,
                    f"{speed.text_bytes / encode / 1e6:.2f}",
                    f"{speed.tokens / encode / 1e6:.2f}",
                    f"{encode / min(first.encode_seconds):.2f}x",
                    f"{speed.text_bytes / decode / 1e6:.1f}",
                    f"{speed.tokens / decode / 1e6:.1f}",
                    f"{decode / min(first.decode_seconds):.2f}x",
                    "yes" if speed.same_ids else "no",
                )
        console.print(table)


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in names:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, no_wrap=True, justify="right")
    return table


if __name__ == "__main__":
    main()
