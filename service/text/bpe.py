"""Byte-level BPE on tiktoken's core: Tekken, and GPT-2-style vocabularies (SmolLM2, Qwen2, Llama 3, NeMo in GGUF).

tiktoken merges the pair whose *concatenation* has the lowest rank; a merge list applies the pair that stands first in
the list. Both give the same ids when every token is made in one place of the list, so ranks are computed from that
order and mapped back to ids, and any other vocabulary is refused. (Inside one piece, two neighbours whose concatenation
is token z are always the pair that the list makes z from: all merges before z's rank have been done on exactly z's
bytes, since no token crosses z's borders.)

Control tokens have no rank, so no text can produce one.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tiktoken

from engine import CheckpointError, UnsupportedModelError
from service.text.plain import require_utf8

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+"
_LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_UPPER, _TEKKEN_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# In these vocabularies every digit is split off first, so that white space before a digit ends its chunk.
_SINGLE_DIGITS = rf"{_GPT2_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|\s+(?=\p{{N}})|\s+(?!\S)|\s+"

# How text is cut before merging, by the `tokenizer.ggml.pre` of a GGUF file (llama.cpp, src/llama-vocab.cpp).
PATTERNS: Mapping[str, str] = {
    "gpt-2": rf"{_GPT2_WORDS}| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "llama-bpe": rf"{_LLAMA3_WORDS}|\p{{N}}{{1,3}}|{_LLAMA3_REST}",
    "llama3": rf"{_LLAMA3_WORDS}|\p{{N}}{{1,3}}|{_LLAMA3_REST}",
    "qwen2": rf"{_LLAMA3_WORDS}|\p{{N}}|{_LLAMA3_REST}",
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_TEKKEN_UPPER}*{_TEKKEN_LOWER}+"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_TEKKEN_UPPER}+{_TEKKEN_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

# Of Tekken files up to version 7, which list no control tokens of their own (mistral-common, tekken.py).
_TEKKEN_CONTROLS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)

# The regex engine keeps one stack entry per character of a white-space run and panics at a million. Longer runs are
# cut; their ids then differ from the reference at the cut, their text does not.
_MAX_SPACE_RUN = 100_000
_SPACE_RUN = re.compile(rf"\s{{{_MAX_SPACE_RUN}}}")

_DROPPED = -1


class BpeTokenizer:
    """`service.text.tokenizer.Tokenizer` over a ranked vocabulary.

    Args:
        tokens: bytes of every ordinary token by id.
        order: ids of ordinary tokens in merge order, single bytes first.
        controls: control tokens by name. A name may be missing from text vocabularies of any kind.
        pattern: regular expression that cuts text into pieces; no token crosses pieces.
        bos_id: id that belongs in front of every text, None if none does.
    """

    def __init__(
        self,
        *,
        tokens: Mapping[int, bytes],
        order: Sequence[int],
        controls: Mapping[str, int],
        pattern: str,
        bos_id: int | None,
        eos_id: int | None,
    ) -> None:
        self.controls = dict(controls)
        self._names = {token_id: name for name, token_id in controls.items()}
        self._size = max(itertools.chain(tokens, self._names)) + 1
        self._bytes = [tokens.get(token_id, b"") for token_id in range(self._size)]
        self._bos_id, self._eos_id = bos_id, eos_id
        self._ids = list(order)  # by rank
        ranks = {tokens[token_id]: rank for rank, token_id in enumerate(order)}
        if len(ranks) != len(order):
            raise CheckpointError("tokenizer: two tokens have the same bytes")
        # Some vocabularies lack bytes that their training text never had; like the reference, drop them from text.
        missing = [bytes([value]) for value in range(256) if bytes([value]) not in ranks]
        ranks |= {byte: len(order) + index for index, byte in enumerate(missing)}
        self._ids += [_DROPPED] * len(missing)
        self._drops = bool(missing)
        try:
            self._core = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        except ValueError as error:
            raise CheckpointError(f"tokenizer: bad pre-tokenisation pattern: {error}") from None

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def eos_id(self) -> int | None:
        return self._eos_id

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        require_utf8(text, "prompt")
        table = self._ids
        ids = [table[rank] for part in _cut_space_runs(text) for rank in self._core.encode_ordinary(part)]
        if self._drops:
            ids = [token_id for token_id in ids if token_id != _DROPPED]
        return [self._bos_id, *ids] if add_bos and self._bos_id is not None else ids

    def control_id(self, name: str) -> int | None:
        return self.controls.get(name)

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._size:
            raise ValueError(f"token id {token_id} is not in the vocabulary (0 to {self._size - 1})")
        return self._bytes[token_id]

    def token_name(self, token_id: int) -> str:
        return self._names.get(token_id) or self.token_bytes(token_id).decode("utf-8", "replace")

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join([self.token_bytes(token_id) for token_id in token_ids]).decode("utf-8", "replace")


def _cut_space_runs(text: str) -> Iterable[str]:
    """`text` in parts, cut where a run of white space would overflow the regex engine's stack."""
    if len(text) < _MAX_SPACE_RUN:
        return (text,)
    cuts = [0, *(match.end() for match in _SPACE_RUN.finditer(text)), len(text)]
    return (text[start:end] for start, end in itertools.pairwise(cuts))


def load_tekken(path: Path) -> tuple[BpeTokenizer, str]:
    """Tokenizer of a `tekken.json` and its format version (`v3`, `v7`, …). Token id = rank + number of control tokens.

    Raises:
        CheckpointError: the file is missing or not what it should be.
    """
    try:
        data = json.loads(path.read_bytes())
        config = data["config"]
        num_controls, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        if not 3 <= num_controls < size <= num_controls + len(data["vocab"]):
            raise ValueError(f"{num_controls} control tokens and {len(data['vocab'])} others do not make {size}")
        tokens = {
            num_controls + rank: base64.b64decode(entry["token_bytes"], validate=True)
            for rank, entry in enumerate(data["vocab"][: size - num_controls])
        }
        if any(entry["rank"] != rank for rank, entry in enumerate(data["vocab"])):
            raise ValueError("the vocabulary is not in rank order")
        names = {rank: name for rank, name in enumerate(_TEKKEN_CONTROLS)}
        names |= {int(entry["rank"]): str(entry["token_str"]) for entry in data.get("special_tokens") or ()}
        names = {rank: names.get(rank, f"<SPECIAL_{rank}>") for rank in range(num_controls)}
        controls = {name: rank for rank, name in names.items()}
        tokenizer = BpeTokenizer(
            tokens=tokens,
            order=list(tokens),
            controls=controls,
            pattern=str(config["pattern"]),
            bos_id=controls.get("<s>"),
            eos_id=controls.get("</s>"),
        )
        return tokenizer, str(config["version"])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise CheckpointError(f"{path}: not a Tekken tokenizer: {line}") from None


def from_merges(
    *,
    vocabulary: Sequence[str],
    merges: Sequence[str],
    control_ids: Iterable[int],
    pre: str,
    bos_id: int | None,
    eos_id: int | None,
) -> BpeTokenizer:
    """Tokenizer from a GPT-2-style vocabulary, its tokens spelled in the byte alphabet, and its list of merges.

    Args:
        vocabulary: spelling by id; control tokens are spelled as they are.
        merges: "left right", the first is applied first.
        control_ids: tokens that text never produces.
        pre: name of the pre-tokeniser, a key of PATTERNS.

    Raises:
        CheckpointError: the vocabulary is inconsistent; UnsupportedModelError if it is one that we cannot run.
    """
    if pre not in PATTERNS:
        raise UnsupportedModelError(f"tokenizer: unknown pre-tokeniser {pre!r}; known are {', '.join(PATTERNS)}")
    controls = {vocabulary[token_id]: token_id for token_id in control_ids}
    ids = {text: token_id for token_id, text in enumerate(vocabulary) if text not in controls}
    if len(ids) + len(controls) != len(vocabulary):
        raise CheckpointError("tokenizer: two tokens have the same spelling")
    bytes_of = {char: value for value, char in enumerate(byte_alphabet())}
    order = [ids[char] for char in bytes_of if char in ids]
    made = _merge_order(ids, merges)
    tokens = {token_id: bytes(bytes_of[char] for char in vocabulary[token_id]) for token_id in [*order, *made]}
    unreachable = len(ids) - len(tokens)
    if unreachable:
        raise UnsupportedModelError(f"tokenizer: {unreachable} tokens are made by no merge")
    return BpeTokenizer(
        tokens=tokens,
        order=[*order, *made],
        controls=controls,
        pattern=PATTERNS[pre],
        bos_id=bos_id,
        eos_id=eos_id,
    )


def _merge_order(ids: Mapping[str, int], merges: Sequence[str]) -> list[int]:
    """Ids of merged tokens in the order in which the list makes them.

    A token may be made by several pairs, one after the other; at least one of them must be of tokens made before.

    Raises:
        CheckpointError: a merge names or makes a token that is not there; UnsupportedModelError if a token is made in
            two places of the list, or of tokens that are made only later.
    """
    made: dict[str, int] = {}
    pairs = ((left, right) for left, _, right in (merge.partition(" ") for merge in merges))
    for token, group in itertools.groupby(pairs, key="".join):
        parts = list(group)
        if token not in ids or any(part not in ids for pair in parts for part in pair):
            raise CheckpointError(f"tokenizer: a merge to {token!r} names a token that is not in the vocabulary")
        if token in made:
            raise UnsupportedModelError(f"tokenizer: token {token!r} is made by merges in two places of the list")
        if not any(all(len(part) == 1 or part in made for part in pair) for pair in parts):
            raise UnsupportedModelError(f"tokenizer: token {token!r} is made of tokens that are made later")
        made[token] = ids[token]
    return list(made.values())


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte value in GPT-2-style files (openai/gpt-2, bytes_to_unicode)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = itertools.count(256)
    return [chr(value if value in printable else next(spare)) for value in range(256)]
