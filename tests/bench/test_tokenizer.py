"""bench.tokenizer: its texts, its counts against mistral-common's own, its refusal of a tokenizer that loses text."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import click
import msgspec
import pytest
from rich.console import Console

from bench import tokenizer as program
from bench.measure import this_machine
from bench.texts import CODE, Text, read_texts
from bench.tokenizer import CLAIMED, Compression, Tokenizers, check_round_trip, compress, race, timed_texts
from bench.vocabularies import Peer, mistral_peers


@pytest.fixture(scope="module")
def texts(test_data: Path) -> list[Text]:
    return read_texts(test_data / "text")


@pytest.fixture(scope="module")
def peers() -> list[Peer]:
    return mistral_peers()


def test_there_is_text_for_every_claim(texts: list[Text]) -> None:
    assert {text.kind for text in texts} > set(CLAIMED)
    assert all(len(text.text) > 1000 for text in texts)
    timed = timed_texts(texts)
    assert len(timed) == 3
    assert all(timed.values())
    assert max(len(piece) for pieces in timed.values() for piece in pieces) == program.PIECE


def test_a_text_without_its_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"HumanEval.jsonl.gz"):
        read_texts(tmp_path)


def test_the_claims_hold_where_the_announcement_may_have_measured_them(texts: list[Text], peers: list[Peer]) -> None:
    ours = {peer.vocabulary: peer for peer in reversed(peers) if peer.name == "nemoserve"}
    for text in texts:
        if text.source == "UDHR":
            for peer in ours.values():
                check_round_trip(peer, text)
            row = compress(text, ours["Tekken"], ours["SentencePiece"])
            theirs = {p.vocabulary: len(p.encode(text.text)) for p in peers if p.name == "mistral-common"}
            assert (row.tekken_tokens, row.sentencepiece_tokens) == (theirs["Tekken"], theirs["SentencePiece"])
            assert row.claimed is None or row.ratio > 0.95 * row.claimed
            assert (row.claimed is None) == (text.kind in ("en", "ja", "pt", "hi"))


def test_a_tokenizer_that_loses_text_is_refused_with_the_place() -> None:
    lossy = Peer("v", "nemoserve", lambda text: [ord(char) for char in text], lambda ids: "".join(map(chr, ids[:-1])))
    with pytest.raises(click.ClickException, match=r"v, nemoserve: s \(en\) comes back different at character 2: '' "):
        check_round_trip(lossy, Text("en", "s", "abc"))
    check_round_trip(replace(lossy, decode=lambda ids: "".join(map(chr, ids))), Text("en", "s", "abc"))


def test_peers_race_in_turns_and_their_ids_are_compared() -> None:
    turns: list[str] = []

    def peer(name: str, shift: int) -> Peer:
        def encode(text: str) -> list[int]:
            turns.append(name)
            return [ord(char) + shift for char in text]

        return Peer("v", name, encode, lambda ids: "")

    speeds = race([peer("a", 0), peer("b", 0), peer("c", 1)], "t", ["é", "xy"], rounds=2)
    assert "".join(turns[::2]) == "abcabcabc"  # once warm, then two rounds; every turn has two pieces
    assert [(s.peer, s.text_bytes, s.tokens, s.same_ids) for s in speeds] == [
        ("a", 4, 3, True),
        ("b", 4, 3, True),
        ("c", 4, 3, False),
    ]
    assert {len(s.encode_seconds) for s in speeds} == {len(s.decode_seconds) for s in speeds} == {2}


def test_measured_stands_beside_claimed() -> None:
    rows = [
        Compression(kind=kind, source="s", text_bytes=4000, tekken_tokens=1000, sentencepiece_tokens=n, claimed=claim)
        for kind, n, claim in (("en", 1100, None), ("ar", 2550, 3.0), (CODE, 1300, 1.3))
    ]
    console = Console(file=io.StringIO(), width=80)
    program.show_compression(rows, console)
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.startswith(" s ")]
    assert [line[1] for line in lines] == [CODE, "ar", "en"]
    assert lines[1][-4:] == ["2.55", "3.0", "-15", "%"]
    assert lines[2][-1] == "1.10"
    result = Tokenizers(started_at="2026-01-01", machine=this_machine(), versions={}, compression=rows, speeds=[])
    assert msgspec.json.decode(msgspec.json.encode(result), type=Tokenizers) == result
