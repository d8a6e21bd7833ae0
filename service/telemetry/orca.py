"""Load reports for balancers that weigh replicas by them: ORCA, `xds.data.orca.v3.OrcaLoadReport`.

gRPC: the trailer `endpoint-load-metrics-bin` of an RPC (gRFC A51), HTTP: the header `endpoint-load-metrics` for those
who ask by `endpoint-load-metrics-format: TEXT` or `JSON`, as of Envoy and the Gateway API inference extension.

The message has so few fields that it is written here by hand; a generated copy of xds' protos would be a dependency of
some hundred files, or a second definition of a public message in one process:

    map<string, double> utilization = 5;  map<string, double> named_metrics = 8;  double application_utilization = 9;
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

from engine import EngineStats

TRAILER = "endpoint-load-metrics-bin"
HEADER, FORMAT_HEADER = "endpoint-load-metrics", "endpoint-load-metrics-format"
UTILIZATION, NAMED_METRICS, APPLICATION_UTILIZATION = 5, 8, 9  # numbers of fields
_DOUBLE, _BYTES = 1, 2  # wire types


def report(stats: EngineStats) -> tuple[float, Mapping[str, float], Mapping[str, float]]:
    """How full the server is, above 1 while requests wait; how full its KV cache is; and how many requests there are.

    Names of the parts are those of vLLM's reports.
    """
    capacity, pages = stats.max_batch_size, stats.kv_pages_total
    kv_usage = stats.kv_pages_used / pages if pages else 0.0
    wanted = (stats.running + stats.queued) / capacity if capacity else 0.0
    named = {"num_requests_waiting": float(stats.queued), "num_requests_running": float(stats.running)}
    return max(wanted, kv_usage), {"kv_cache": kv_usage}, named


def encode(stats: EngineStats) -> bytes:
    """A serialised OrcaLoadReport."""
    application, utilization, named = report(stats)
    parts = [_map_entry(UTILIZATION, name, value) for name, value in utilization.items()]
    parts += [_map_entry(NAMED_METRICS, name, value) for name, value in named.items()]
    return b"".join(parts) + _double(APPLICATION_UTILIZATION, application)


def header(stats: EngineStats, form: str) -> str | None:
    """The value of the HTTP header in the form that was asked for, None if there is no such form."""
    application, utilization, named = report(stats)
    if form.upper() == "JSON":
        value = {"application_utilization": application, "utilization": utilization, "named_metrics": named}
        return "JSON " + json.dumps(value)
    if form.upper() == "TEXT":
        pairs = {"application_utilization": application}
        pairs |= {f"utilization.{name}": each for name, each in utilization.items()}
        pairs |= {f"named_metrics.{name}": each for name, each in named.items()}
        return "TEXT " + ",".join(f"{name}={each:g}" for name, each in pairs.items())
    return None


def _map_entry(field: int, name: str, value: float) -> bytes:
    key = name.encode()
    entry = bytes([1 << 3 | _BYTES, len(key)]) + key + _double(2, value)
    return bytes([field << 3 | _BYTES, len(entry)]) + entry


def _double(field: int, value: float) -> bytes:
    return bytes([field << 3 | _DOUBLE]) + struct.pack("<d", value)
