"""A real Triton, see `bench.triton`, that serves the twins of toy models."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf import text_format

from bench.triton import serving
from service.grpc.kserve.management import model_config
from tests.service.grpc.kserve.toys import Toy

TWINS = Path(__file__).parent / "models"


@contextlib.contextmanager
def reference(toys: Sequence[Toy], work: Path) -> Iterator[str]:
    """HOST:PORT of a running Triton; its models are written into `work`.

    Raises:
        ServerFailedError: it does not become ready.
    """
    for toy in toys:
        folder = work / toy.spec.name
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(text_format.MessageToString(model_config(toy.spec)))
        shutil.copy(TWINS / f"{toy.spec.name}.py", folder / "1" / "model.py")
    with serving(work) as (_, address):
        yield address
