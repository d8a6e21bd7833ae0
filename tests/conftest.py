"""Fixtures that rooms share: the embedded model, what transformers makes of it, the optional data folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cluster", action="store_true", help="the contract of API servers, of KUBECONFIG's too")
    parser.addoption("--full-dose", action="store_true", help="faults as docs/reliability.md says: minutes each")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The embedded model's GGUF file, pulled into the model store on first use."""
    from service.models.store import ModelStore

    return ModelStore.default().pull("smollm2-135m-instruct").path


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2_path: Path) -> Any:
    """SmolLM2's tokenizer as transformers reads it from the GGUF file; it forgets that digits are split."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(smollm2_path.parent), gguf_file=smollm2_path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_path: Path) -> Any:
    """SmolLM2 in float32 as transformers reads it, which takes 12 seconds. Who changes its weights puts them back."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        str(smollm2_path.parent), gguf_file=smollm2_path.name, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of optional data files; tests that need one skip where it is absent."""
    folder = Path(os.environ.get("NEMOSERVE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set NEMOSERVE_TEST_DATA")
    return folder
