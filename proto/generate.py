"""Generate the Python stubs of `proto/` with grpcio-tools and mypy-protobuf. Run as `python -m proto.generate [OUT]`.

Generated files are committed, so that users need no compiler, and never edited; a test proves that they are current.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(PROTO) for path in PROTO.glob("nemoserve/**/*.proto"))


def generate(out: Path) -> None:
    """Write `*_pb2.py`, `*_pb2_grpc.py` and their `.pyi` files below `out`.

    Raises:
        RuntimeError: the protobuf compiler refused the sources; it has printed why.
    """
    scripts = Path(sys.executable).parent
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTO}",
            f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *map(str, SOURCES),
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO)
