"""`python -m bench.service.server`: the real server with an engine that answers at once. Ends with SIGTERM."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click

from bench.service.engine import InstantEngine, digits
from engine import Engine, EngineConfig, LoadProgress
from service.logs import configure
from service.security.access import EVERYBODY, Access
from service.security.keys import KeysFile
from service.server import Server, ServerConfig

MODEL = "bench"


@click.command()
@click.option("--grpc-port", type=int, required=True)
@click.option("--http-port", type=int, required=True)
@click.option("--pace", type=float, default=0.0, help="seconds between two tokens of a request; 0: none")
@click.option("--keys", type=click.Path(path_type=Path), help="the file of API keys; without, everybody is served")
def main(grpc_port: int, http_port: int, pace: float, keys: Path | None) -> None:
    """Serve until SIGTERM."""
    configure("warning", as_json=False)
    sys.exit(asyncio.run(_serve(grpc_port, http_port, pace, keys)))


async def _serve(grpc_port: int, http_port: int, pace: float, keys: Path | None) -> int:
    async def start(config: EngineConfig, progress: LoadProgress) -> Engine:
        return InstantEngine(pace)

    config = ServerConfig(
        engine=EngineConfig(model_path="none"),
        model_name=MODEL,
        grpc_address=f"127.0.0.1:{grpc_port}",
        http_address=f"127.0.0.1:{http_port}",
        access=EVERYBODY if keys is None else Access(keys=KeysFile(keys)),
    )
    return await Server(config, start, lambda path: digits()).run()


if __name__ == "__main__":
    main()
