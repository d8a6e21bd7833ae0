"""What the clients' tests need of the project's own environment: `.venv/bin/python -m tests.clients.material WHAT …`.

The clients live in an environment of their own, which has neither our contract nor torch of our version.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# The wheels of tritonclient had the binary up to this one; those after it ask for a newer glibc than Debian 12 has, and
# perf-analyzer on PyPI is empty.
WITH_PERF_ANALYZER = "tritonclient==2.51.0"


def tokenizer(folder: Path) -> None:
    """The embedded model's tokenizer as transformers reads it, for load generators that make prompts."""
    from transformers import AutoTokenizer

    from service.models.store import ModelStore

    file = ModelStore.default().pull("smollm2-135m-instruct").path
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def nemo(folder: Path) -> None:
    """A random model of NeMo's shape and chat format, which can be held to tool calls."""
    from tests.service.text.conftest import small_tekken
    from tests.tiny_models import write_hf

    write_hf(folder, vocab_size=9000)
    (folder / "tekken.json").write_text(json.dumps(small_tekken("v3")))


def likelihoods(address: str) -> None:
    """Of (context, continuation) pairs in standard input, as `bench.evaluate` gets them over the typed API."""
    from bench.scoring import Scorer

    json.dump(Scorer(address).loglikelihoods([tuple(pair) for pair in json.load(sys.stdin)]), sys.stdout)


def perf_analyzer(folder: Path) -> None:
    """NVIDIA's perf_analyzer as folder/perf_analyzer, the libraries that it wants beside it in folder/lib.

    They are those of the Triton server that `make triton-diff` installs too (135 MB, once).
    """
    from bench.triton import install

    with tempfile.TemporaryDirectory() as work:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WITH_PERF_ANALYZER]
        subprocess.run(download, check=True)
        [wheel] = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [name] = [each for each in archive.namelist() if each.endswith("bin/perf_analyzer")]
            (folder / "perf_analyzer").write_bytes(archive.read(name))
    (folder / "perf_analyzer").chmod(0o755)
    (folder / "lib").mkdir()
    for pattern, soname in (("libb64-*.so.0d", "libb64.so.0d"), ("libcudart-*.so.12*", "libcudart.so.12")):
        [library] = (install() / "nvidia_pytriton.libs").glob(pattern)
        (folder / "lib" / soname).symlink_to(library)


if __name__ == "__main__":
    what, where = sys.argv[1:]
    if what == "likelihoods":
        likelihoods(where)
    else:
        {"tokenizer": tokenizer, "nemo": nemo, "perf_analyzer": perf_analyzer}[what](Path(where))
