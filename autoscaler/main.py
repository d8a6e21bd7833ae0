"""`nemoserve-autoscaler`: the operator as a process.

Ends with 0 when it is told to, 1 where it cannot run, 2 where it is called in a wrong way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
from functools import partial
from pathlib import Path

import click

from autoscaler.activator import ActivatorSettings, HoldLimits, TlsFiles
from autoscaler.cluster.face import ClusterError
from autoscaler.observe import Observer, Secrets
from autoscaler.operator import OperatorSettings, run
from process import logs

PORT = click.IntRange(0, 65_535)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
HOLD = HoldLimits()
FILES = 65_536  # open at once: each replica has a connection, and container runtimes may start with a limit of 1,024


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120})
@click.option("--namespace", envvar="POD_NAMESPACE", help="Of the resources; by default this pod's, or the context's.")
@click.option("--kubeconfig", envvar="KUBECONFIG", help="By default this pod's service account.")
@click.option(
    "--name", "names", multiple=True, help="A QueueAutoscaler to look after; by default all of the namespace."
)
@click.option("--lease-name", default="nemoserve-autoscaler", help="One of the processes that share it leads.")
@click.option("--pod-name", envvar="POD_NAME", default=socket.gethostname, show_default="host name", help="This one.")
@click.option("--metrics-host", default="0.0.0.0", help="Of /metrics, /healthz and /readyz.")
@click.option("--metrics-port", type=PORT, default=9090, help="0: any free one.")
@click.option("--activate", metavar="NAME", help="Hold requests to this QueueAutoscaler's workload at 0 replicas.")
@click.option("--activator-host", default="0.0.0.0", help="Where such requests come in.")
@click.option("--activator-grpc-port", type=PORT, default=8001)
@click.option("--activator-http-port", type=PORT, default=8000)
@click.option("--hold-requests", type=click.IntRange(1), default=HOLD.max_requests, help="Of such, at most.")
@click.option(
    "--hold-mebibytes", type=click.IntRange(1), default=HOLD.max_bytes >> 20, help="Of all together, at most."
)
@click.option("--hold-seconds", type=click.FloatRange(0, min_open=True), default=HOLD.hold_seconds, help="At most.")
@click.option("--api-key-file", type=FILE, help="Shown to replicas; or the variable NEMOSERVE_API_KEY.")
@click.option("--tls-cert", type=FILE, help="Shown to replicas, and by the activator.")
@click.option("--tls-key", type=FILE)
@click.option("--tls-ca", type=FILE, help="Who signs the replicas' certificates; without it there is no TLS.")
@click.option("--tls-server-name", default="", help="That the replicas' certificates have.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
@click.option("--log-json", is_flag=True, help="One JSON object per line.")
def cli(
    namespace: str | None,
    kubeconfig: str | None,
    names: tuple[str, ...],
    lease_name: str,
    pod_name: str,
    metrics_host: str,
    metrics_port: int,
    activate: str | None,
    activator_host: str,
    activator_grpc_port: int,
    activator_http_port: int,
    hold_requests: int,
    hold_mebibytes: int,
    hold_seconds: float,
    api_key_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    tls_server_name: str,
    log_level: str,
    log_json: bool,
) -> None:
    """As many replicas of workloads as their queues need, as QueueAutoscalers ask for."""
    logs.configure(log_level, as_json=log_json)
    for talkative in ("httpx", "kubernetes", "grpc"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    if activate is not None and names and activate not in names:
        raise click.UsageError(f"--activate {activate} is none of --name {', '.join(names)}")
    try:
        secrets = Secrets(
            api_key=api_key_file,
            api_key_text=os.environ.get("NEMOSERVE_API_KEY", ""),
            ca=tls_ca,
            certificate=tls_cert,
            key=tls_key,
            server_name=tls_server_name,
        )
        activator = ActivatorSettings(
            grpc_address=f"{activator_host}:{activator_grpc_port}",
            http_address=f"{activator_host}:{activator_http_port}",
            limits=HoldLimits(max_requests=hold_requests, max_bytes=hold_mebibytes << 20, hold_seconds=hold_seconds),
            tls=_activator_tls(secrets) if activate is not None else None,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    settings = OperatorSettings(
        kubeconfig=kubeconfig,
        namespace=namespace,
        names=frozenset(names),
        lease_name=lease_name,
        pod_name=pod_name,
        metrics_address=f"{metrics_host}:{metrics_port}",
        activate=activate,
        activator=activator,
    )
    try:
        asyncio.run(run(settings, partial(Observer, secrets)))
    except (ClusterError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _activator_tls(secrets: Secrets) -> TlsFiles | None:
    """None: the servers' ports are plain text, and so are the activator's. Raises ValueError."""
    if secrets.ca is None:
        return None
    if secrets.certificate is None or secrets.key is None:
        raise ValueError("--activate needs --tls-cert and --tls-key with --tls-ca: its ports are those of the servers")
    return TlsFiles(certificate=secrets.certificate, key=secrets.key, ca=secrets.ca, server_name=secrets.server_name)


def main() -> None:
    """The command line. As process 1 of a container it gets no signal that it has no handler for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # until `run` takes over: nothing has begun
    cli(prog_name="nemoserve-autoscaler")
