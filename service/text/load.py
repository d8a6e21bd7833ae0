"""The text side of a checkpoint, whatever its format: which files speak for the tokenizer, which for the chat format.

.gguf       tokenizer and template in the metadata
directory   tekken.json, else tokenizer.json, else tokenizer.model[.v1|.v3|.v7];
            chat_template.jinja, else chat_template in tokenizer_config.json, else in chat_template.json;
            eos_token_id of generation_config.json and config.json
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from engine import CheckpointError, UnsupportedModelError
from engine.gguf_header import read_header
from service.text.bpe import BpeTokenizer, from_merges, load_tekken
from service.text.hf import load_hf, token_text
from service.text.mistral import MistralChat
from service.text.sentencepiece import SentencePieceTokenizer, from_pieces, load_sentencepiece
from service.text.template import TemplateChat
from service.text.tokenizer import ChatTemplate, TextModel, Tokenizer
from service.text.tools.format import find_format

_MAX_FILE = 256 * 1024 * 1024  # bytes; the largest known tokenizer files have 35 MB

# Control tokens that end a turn in the formats of our model families; none belongs into an answer.
_TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")

# llama.cpp's rule where `add_bos_token` is absent.
_PRE_WITH_BOS = ("llama-bpe", "llama3", "tekken")

# Mistral's chat format by the version of a tekken.json. No Tekken was ever published with the first two.
_TEKKEN_PLACES = (3, 9)  # ids of [INST] and [TOOL_CALLS]
_TEKKEN_FORMATS = {"v1": 3, "v2": 3, "v3": 3, "v7": 7, "v11": 11, "v13": 13}

# Types of tokens in a GGUF vocabulary that ordinary text never yields: unknown, control, user-defined, unused.
_CONTROL_TYPES = (2, 3, 4, 5)


def load_text(path: Path) -> TextModel:
    """Tokenizer and chat template of a `.gguf` file, a checkpoint directory, or a file within one.

    Raises:
        CheckpointError: something is missing, corrupt or not supported; one line that names the file.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.suffix == ".gguf":
        return _from_gguf(path)
    return _from_directory(path if path.is_dir() else path.parent)


def _from_gguf(path: Path) -> TextModel:
    fields = read_header(path, lambda key: key.startswith("tokenizer.")).metadata
    try:
        vocabulary, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        if len(types) != len(vocabulary):
            raise CheckpointError(f"{len(types)} token types for {len(vocabulary)} tokens")
        bos, eos = fields.get("tokenizer.ggml.bos_token_id"), fields.get("tokenizer.ggml.eos_token_id")
        for token_id in (bos, eos):
            if token_id is not None and not 0 <= token_id < len(vocabulary):
                raise CheckpointError(f"token id {token_id} is not in the vocabulary of {len(vocabulary)}")
        template = fields.get("tokenizer.chat_template")
        kind = fields["tokenizer.ggml.model"]
        tokenizer: BpeTokenizer | SentencePieceTokenizer
        if kind == "gpt2":
            tokenizer = _gguf_bpe(fields, bos, eos)
            mistral = _tekken_format(template) if fields["tokenizer.ggml.pre"] == "tekken" else None
        elif kind == "llama":
            tokenizer = _gguf_sentencepiece(fields, bos, eos)
            mistral = _sentencepiece_format(tokenizer)
        else:
            raise UnsupportedModelError(f"tokenizer model {kind!r} in GGUF is not supported, only gpt2 and llama")
        variables = {
            name: vocabulary[token_id]
            for name, token_id in (("bos_token", bos), ("eos_token", eos))
            if token_id is not None
        }
        chat = _chat(template, tokenizer, tokenizer.controls, tokenizer.encode, variables, mistral)
        ends = [fields.get("tokenizer.ggml.eot_token_id"), fields.get("tokenizer.ggml.eom_token_id")]
        return _text_model(tokenizer, chat, template, ends)
    except KeyError as error:
        raise CheckpointError(f"{path}: the metadata {error} is missing") from None
    except (TypeError, AttributeError, ValueError, OverflowError, struct.error) as error:
        raise CheckpointError(f"{path}: metadata of the wrong type: {error}") from None
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None


def _gguf_bpe(fields: Mapping[str, Any], bos: int | None, eos: int | None) -> BpeTokenizer:
    pre = fields["tokenizer.ggml.pre"]
    return from_merges(
        vocabulary=fields["tokenizer.ggml.tokens"],
        merges=fields["tokenizer.ggml.merges"],
        control_ids=[i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind in _CONTROL_TYPES],
        pre=pre,
        bos_id=bos if fields.get("tokenizer.ggml.add_bos_token", pre in _PRE_WITH_BOS) else None,
        eos_id=eos,
    )


def _gguf_sentencepiece(fields: Mapping[str, Any], bos: int | None, eos: int | None) -> SentencePieceTokenizer:
    """Defaults are llama.cpp's."""
    pieces, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    if len(scores) != len(pieces):
        raise CheckpointError(f"{len(scores)} scores for {len(pieces)} tokens")
    if fields.get("tokenizer.ggml.remove_extra_whitespaces", False) or "tokenizer.ggml.precompiled_charsmap" in fields:
        raise UnsupportedModelError("a SentencePiece vocabulary that rewrites its text is not supported")
    return from_pieces(
        pieces,
        scores,
        fields["tokenizer.ggml.token_type"],
        ends=(bos if fields.get("tokenizer.ggml.add_bos_token", True) else None, eos),
        add_space_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
    )


def _from_directory(folder: Path) -> TextModel:
    config = _json(folder / "tokenizer_config.json")
    template = _template(folder, config)
    variables = {key: text for key, value in config.items() if key.endswith("_token") and (text := token_text(value))}
    ends = _eos_ids(_json(folder / "generation_config.json")) + _eos_ids(_json(folder / "config.json"))
    if _bounded(folder / "tekken.json"):
        tekken, version = load_tekken(folder / "tekken.json")
        variables = {"bos_token": "<s>", "eos_token": "</s>"} | variables
        mistral = _TEKKEN_FORMATS.get(version)
        if template is None and not config:  # Mistral publishes instruction models without either
            if mistral is None:
                raise UnsupportedModelError(f"{folder / 'tekken.json'}: chat format {version} is not supported")
            return _text_model(tekken, MistralChat(tekken, mistral), template, ends)
        chat = _chat(template, tekken, tekken.controls, tekken.encode, variables, mistral)
        return _text_model(tekken, chat, template, ends)
    if _bounded(folder / "tokenizer.json"):
        hf = load_hf(folder / "tokenizer.json", config)
        is_tekken = (hf.control_id("[INST]"), hf.control_id("[TOOL_CALLS]")) == _TEKKEN_PLACES
        mistral = _tekken_format(template) if is_tekken else None
        chat = _chat(template, hf, hf.controls, hf.encode_inside, variables, mistral)
        return _text_model(hf, chat, template, ends)
    for name in ("tokenizer.model.v7", "tokenizer.model.v3", "tokenizer.model.v1", "tokenizer.model"):
        if _bounded(folder / name):
            return _from_sentencepiece(folder / name, template, variables, ends, bool(config))
    raise CheckpointError(f"{folder}: neither tekken.json nor tokenizer.json nor tokenizer.model is there")


def _from_sentencepiece(
    path: Path, template: str | None, variables: Mapping[str, str], ends: list[int], has_config: bool
) -> TextModel:
    tokenizer = load_sentencepiece(path)
    mistral = _sentencepiece_format(tokenizer)
    chat: ChatTemplate | None
    if path.suffix == ".v1":
        chat = MistralChat(tokenizer, 1)
    elif mistral is not None and template is None and not has_config:
        chat = MistralChat(tokenizer, mistral)
    else:
        chat = _chat(template, tokenizer, tokenizer.controls, tokenizer.encode, variables, mistral)
    return _text_model(tokenizer, chat, template, ends)


def _text_model(
    tokenizer: Tokenizer, chat: ChatTemplate | None, template: str | None, ends: Iterable[int | None]
) -> TextModel:
    """
    Args:
        ends: ids that the checkpoint names as ends of an answer.
    """
    version = chat.version if isinstance(chat, MistralChat) else None
    tools = None if chat is None else find_format(template, tokenizer.control_id, version)
    return TextModel(tokenizer, chat, _stop_ids(tokenizer, ends), tools)


def _chat(
    template: str | None,
    tokenizer: Tokenizer,
    controls: Mapping[str, int],
    encode: Callable[[str], list[int]],
    variables: Mapping[str, str],
    mistral: int | None,
) -> ChatTemplate | None:
    """The chat format that a checkpoint's template stands for.

    Mistral's formats are written out in `MistralChat`: a template of theirs, rendered as text, differs from what the
    model was trained on. It is recognised by [INST].

    Args:
        mistral: the version of Mistral's format that the tokenizer was made for, None if for none that we know.
    """
    if template is None:
        return None
    if mistral is not None and "[INST]" in template:
        return MistralChat(tokenizer, mistral)
    return TemplateChat(template, controls=controls, encode=encode, variables=variables)


def _tekken_format(template: str | None) -> int | None:
    """Version of Mistral's format where no tekken.json tells it: v3, unless the template has what came with v7."""
    return 3 if "[SYSTEM_PROMPT]" not in (template or "") else None


def _sentencepiece_format(tokenizer: Tokenizer) -> int | None:
    """Version of Mistral's format that a SentencePiece vocabulary was made for. Tools came with v3 (and a short-lived
    v2), [SYSTEM_PROMPT] with v7."""
    if tokenizer.control_id("[TOOL_CALLS]") is None:
        return None
    return 3 if tokenizer.control_id("[SYSTEM_PROMPT]") is None else 7


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if _bounded(path := folder / "chat_template.jinja"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
    template = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template is not text")
    return template


def _stop_ids(tokenizer: Tokenizer, more: Iterable[int | None]) -> tuple[int, ...]:
    ids = {*more, *map(tokenizer.control_id, _TURN_ENDS)} - {None, tokenizer.eos_id}
    return tuple(sorted(token_id for token_id in ids if token_id is not None and 0 <= token_id < tokenizer.vocab_size))


def _eos_ids(config: Mapping[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    return [token_id for token_id in (value if isinstance(value, list) else [value]) if isinstance(token_id, int)]


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    if not _bounded(path):
        return {}
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data


def _bounded(path: Path) -> bool:
    """Whether the file is there; refuses one too large to be what its name says."""
    if not path.is_file():
        return False
    if (size := path.stat().st_size) > _MAX_FILE:
        raise CheckpointError(f"{path}: {size} bytes, more than {_MAX_FILE}")
    return True
