"""Damaged and hostile checkpoints: each is refused before anything large is read or allocated, in one line with a name.

Those that only values betray are refused when the values are read.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from engine.checkpoint import open_checkpoint
from engine.checkpoint.files import SafetensorsFiles
from engine.checkpoint.layout import expected_tensors
from engine.config import EngineConfig
from engine.errors import CheckpointError, UnsupportedModelError
from engine.runner import load_runner
from tests.tiny_models import config_json, write_consolidated, write_hf

FILE = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"


def refusal(path: Path, kind: type[CheckpointError] = CheckpointError) -> str:
    """Of the whole engine."""
    with pytest.raises(kind) as caught:
        load_runner(EngineConfig(model_path=str(path), dtype="float32", threads=1), lambda phase, done: None)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600
    return text


def with_length(length: int) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(struct.pack("<Q", length) + content[8:])

    return change


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        file.write_bytes(change(file.read_bytes()))

    return apply


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The JSON of the header is changed; the data stays."""

    def apply(file: Path) -> None:
        content = file.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:end])
        changed = change(header)
        text = json.dumps(header if changed is None else changed).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])

    return apply


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return apply


def entry(**changes: Any) -> Callable[[Path], None]:
    """The header's entry of one tensor is changed."""
    return with_header(lambda header: header[DOWN].update(changes))


def shifted(begin: int, end: int) -> Callable[[Path], None]:
    def change(header: dict[str, Any]) -> None:
        first, last = header[DOWN]["data_offsets"]
        header[DOWN]["data_offsets"] = [first + begin, last + end]

    return with_header(change)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no header": (with_length(0), "a header of 0 bytes"),
    "header beyond the file": (with_length(10**7), "a header of 10000000 bytes in"),
    "huge header": (with_length(2**63), f"a header of {2**63} bytes in"),
    "header too short": (with_length(100), "its header is not JSON"),
    "empty file": (with_bytes(lambda content: b""), "not a safetensors file, or truncated"),
    "cut in the length": (with_bytes(lambda content: content[:5]), "not a safetensors file, or truncated"),
    "cut in the data": (with_bytes(lambda content: content[:-1]), r"truncated: tensor \S+ ends at byte"),
    "cut at half": (with_bytes(lambda content: content[: len(content) // 2]), r"truncated: tensor \S+ ends at"),
    "bytes behind": (with_bytes(lambda content: content + b"12"), "2 bytes behind the last tensor"),
    "no text": (with_bytes(lambda content: content[:8] + b"\xff" * (len(content) - 8)), "its header is not JSON"),
    "deep header": (with_bytes(lambda _: struct.pack("<Q", 10**6) + b"[" * 10**6), "its header is not JSON"),
    "no object": (with_header(lambda header: [1]), "not a JSON object"),
    "entry no object": (with_header(lambda header: header.update({DOWN: 7})), f"{DOWN} has no valid dtype"),
    "negative shape": (entry(shape=[-64, -96]), f"{DOWN} has no valid dtype, shape"),
    "shape of floats": (entry(shape=[64.0, 96]), f"{DOWN} has no valid dtype, shape"),
    "thousand dimensions": (entry(shape=[2**62] * 1000), f"{DOWN} has no valid dtype, shape"),
    "vast shape": (entry(shape=[2**62, 2**62]), f"{DOWN}, F32 .* cannot be the 24576 bytes"),
    "another shape": (entry(shape=[96, 64]), rf"{DOWN} has shape \[96, 64\], expected \[64, 96\]"),
    "name of two lines": (with_header(lambda header: header.update({"a\nb": header.pop(DOWN)})), r"'a\\nb' is no name"),
    "name of a novel": (with_header(lambda header: header.update({"a" * 10**5: header.pop(DOWN)})), "is no name of"),
    "name that rings": (with_header(lambda header: header.update({"\x1b[2J": header.pop(DOWN)})), "is no name of"),
    "unknown dtype": (entry(dtype="F8_E9M9"), f"{DOWN} has the unknown dtype F8_E9M9"),
    "wider dtype": (entry(dtype="F64"), f"{DOWN}, F64 .* cannot be"),
    "integers": (entry(dtype="I32"), f"{DOWN} has dtype I32; supported are F32, F16, BF16, F8_E4M3"),
    "offsets from the end": (entry(data_offsets=[10**15, 10**15 + 24576]), "truncated"),
    "offsets reversed": (entry(data_offsets=[24576, 0]), "cannot be the -24576 bytes"),
    "overlap": (shifted(-4, -4), "overlaps another"),
    "gap": (shifted(4, 4), "follows a gap"),
    "I64": (with_tensors(lambda t: t.update({DOWN: t[DOWN].long()})), f"{DOWN} has dtype I64"),
    "BOOL": (with_tensors(lambda t: t.update({DOWN: t[DOWN] > 0})), f"{DOWN} has dtype BOOL"),
    "F64": (with_tensors(lambda t: t.update({DOWN: t[DOWN].double()})), f"{DOWN} has dtype F64"),
    "E5M2": (with_tensors(lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e5m2)})), f"{DOWN} has dtype F8_E5M2"),
    "norm in FP8": (
        with_tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)})),
        "model.norm.weight has dtype F8_E4M3; supported are F32, F16, BF16",
    ),
    "NaN": (with_tensors(lambda t: t[DOWN][63].fill_(float("nan"))), f"{DOWN} has values that are not finite"),
    "one infinity": (with_tensors(lambda t: t[DOWN][5, 7].fill_(float("-inf"))), f"{DOWN} has values that are not"),
    "NaN in a norm": (
        with_tensors(lambda t: t["model.norm.weight"][3].fill_(float("nan"))),
        "model.norm.weight has values that are not finite",
    ),
    "NaN in the embedding": (
        with_tensors(lambda t: t["model.embed_tokens.weight"][-1, -1].fill_(float("nan"))),
        "model.embed_tokens.weight has values that are not finite",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    damage, names = DAMAGES[kind]
    folder = write_hf(tmp_path)
    damage(folder / FILE)
    text = refusal(folder)
    assert re.search(names, text), text
    assert str(folder) in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_value_that_is_not_finite_is_found_in_every_type(tmp_path: Path, dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        folder = write_hf(tmp_path, dtype=dtype)
        largest = torch.finfo(dtype).max
        with_tensors(lambda t, largest=largest: t[DOWN][:2].fill_(largest))(folder / FILE)  # these are no fault
        with_tensors(lambda t, value=value: t[DOWN][40, 1].fill_(value))(folder / FILE)
        with open_checkpoint(folder) as checkpoint:
            checkpoint.matrix(DOWN, 0, 40)
            checkpoint.matrix(DOWN, 41, 64)
            with pytest.raises(CheckpointError, match="not finite"):
                checkpoint.matrix(DOWN, 32, 48)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"hidden_size": 10**12}, "hidden_size 1000000000000 must be"),
        ({"vocab_size": 10**4000}, "vocab_size 1000"),
        ({"num_hidden_layers": 10**8}, r"tensor model.layers.2.\S+ is missing"),
        (
            {"num_hidden_layers": 2**27, "num_attention_heads": 2**27, "num_key_value_heads": 2**27},
            "q_proj.weight has sha",
        ),
        ({"intermediate_size": 2**27}, "gate_proj.weight has shape"),
        ({"head_dim": 2**26}, "q_proj.weight has shape"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings 1000000000000 must be"),
        ({"sliding_window": -1}, "sliding_window -1 must be"),
        ({"rope_theta": 10**400}, "rope_theta 1000"),
    ],
)
def test_absurd_sizes_are_refused_and_nothing_is_allocated(tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    folder = write_hf(tmp_path)
    (folder / "config.json").write_text(json.dumps(config_json(**changes)))
    text = refusal(folder)
    assert re.search(names, text), text


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_vast_configuration_is_not_read(tmp_path: Path, name: str) -> None:
    folder = write_hf(tmp_path)
    (folder / name).touch()
    os.truncate(folder / name, 10**12)  # a hole, that takes no disk
    assert f"{name}: 1000000000000 bytes, more than" in refusal(folder)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\0b", "a\\b", 7, None]
)
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, file: object) -> None:
    folder = write_hf(tmp_path / "model", shards=2)
    (tmp_path / "model.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(content))
    assert "which is not a file of this folder" in refusal(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: no such file" in refusal(folder)


def test_a_pipe_in_place_of_weights_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "model.safetensors: not a regular file" in refusal(folder)


def test_messages_are_one_line_whatever_a_file_says(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"weight_map": {"a\nb": "model-00001-of-00002"}}))
    assert "which is no name of a tensor" in refusal(folder)
    for key in ("architectures", "hidden_act", "rope_scaling", "quantization_config", "text_config", "vocab_size"):
        value = {"rope_type": "a\nb" * 10**5, "quant_method": "a\nb" * 10**5}
        (folder / "config.json").write_text(json.dumps(config_json(**{key: value})))
        refusal(folder)
    group = {"\x1b[2J\n": {"weights": {"strategy": "\n" * 10**5}, "targets": ["\n"]}}
    quantisation = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": group}
    (folder / "config.json").write_text(json.dumps(config_json(quantization_config=quantisation)))
    refusal(folder)


@pytest.mark.parametrize("write", ["lost", "elsewhere"])
def test_an_index_must_be_true(tmp_path: Path, write: str) -> None:
    folder = write_hf(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    other = {name: file for name, file in content["weight_map"].items() if name != DOWN}
    name = "ghost.weight" if write == "lost" else DOWN
    content["weight_map"][name] = next(file for file in other.values() if file != content["weight_map"].get(name))
    index.write_text(json.dumps(content))
    assert f"tensor {name} is not in this file, as the index says" in refusal(folder)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, shards=2)
    first, second = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    tensors = load_file(second)
    name = next(iter(load_file(first)))
    save_file(tensors | {name: torch.ones(1)}, second)
    assert f"tensor {name} is also in" in refusal(folder)


def test_a_file_that_shrinks_while_it_is_open_is_an_error_and_no_signal(tmp_path: Path) -> None:
    folder = write_hf(tmp_path)
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / FILE, 30_000)
        with pytest.raises(CheckpointError, match="truncated while it was read, in tensor"):
            [checkpoint.read(name) for name in expected_tensors(checkpoint.config)]


@pytest.mark.parametrize("seed", range(3))
def test_what_the_formats_own_library_refuses_is_refused(tmp_path: Path, seed: int) -> None:
    """Random damage to the header: never another exception, never more tolerant, the same shapes where it is read."""
    folder = write_hf(tmp_path)
    content = (folder / FILE).read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    generator = random.Random(seed)
    damaged, read = tmp_path / "damaged.safetensors", 0
    for _ in range(200):
        changed = bytearray(content)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(end)] = generator.choice(b'0123456789,:[]{}" FABx')
        damaged.write_bytes(changed)
        try:
            with safe_open(damaged, framework="pt") as library:
                shapes = {name: tuple(library.get_slice(name).get_shape()) for name in library.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError):
            with pytest.raises(CheckpointError):
                SafetensorsFiles([damaged])
            continue
        files = SafetensorsFiles([damaged])
        assert files.shapes == shapes
        files.close()
        read += 1
    assert 0 < read < 200


# -- forms that are not read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("consolidated.00.pth", "params.json"),
        ("pytorch_model.bin", "config.json"),
        ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "config.json"),
        ("model.pt",),
        ("model.ckpt",),
    ],
)
def test_pickled_weights_are_refused_with_what_to_use(tmp_path: Path, names: tuple[str, ...]) -> None:
    write_consolidated(write_hf(tmp_path))
    for file in tmp_path.iterdir():
        if file.name not in names:
            file.unlink()
    for name in names:
        (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / names[0]):
        text = refusal(path, UnsupportedModelError)
        assert f"{names[0]} is pickled" in text
        assert "consolidated.safetensors with params.json" in text


@pytest.mark.parametrize(
    "names", [("model.nemo",), ("model_config.yaml", "model_weights/x"), ("context/model.yaml", "weights/.metadata")]
)
def test_nemo_archives_are_refused_with_what_to_use(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = [tmp_path, *tmp_path.glob("*.nemo")]
    for path in paths:
        assert "NVIDIA NeMo's form of a checkpoint is not read; use the model's *.safetensors" in refusal(path)


def test_pickles_beside_safetensors_do_not_matter(tmp_path: Path) -> None:
    folder = write_consolidated(write_hf(tmp_path, seed=1), seed=2)
    for name in ("consolidated.00.pth", "pytorch_model.bin"):
        (folder / name).touch()
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.max_position_embeddings == 512


def test_mistrals_weights_are_read_where_they_alone_are_there(tmp_path: Path) -> None:
    """Its repositories have both configurations; a download may have one set of weights."""
    folder = write_consolidated(write_hf(tmp_path, seed=1), seed=1)
    (folder / FILE).unlink()
    with open_checkpoint(folder) as checkpoint, open_checkpoint(folder / "consolidated.safetensors") as same:
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(checkpoint.read(name), same.read(name))
