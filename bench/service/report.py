"""What `bench.service` found: the schema of its result file, and its tables.

A result file is one `ServiceCost` as JSON; names end in their unit, `schema` grows when a field changes its meaning.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import Machine
from bench.service.client import Load

SCHEMA = 1
TRITON = "triton"


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One number of streams on one way to one server. `pace_seconds`: between two tokens of a stream, 0 = as fast as
    they are taken."""

    server: str
    path: str
    streams: int
    pace_seconds: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    case: Case
    load: Load


class ServiceCost(msgspec.Struct, frozen=True, kw_only=True):
    """A result file. `measured` is in the order in which it was: A B A B.

    Attributes:
        server_cores, client_cores: that the processes may use; the kernel's list, as "0" or "0,1".
    """

    schema: int = SCHEMA
    started_at: str  # ISO 8601, UTC
    machine: Machine
    server_cores: str
    client_cores: str
    tokens: int
    measured: list[Measured]

    @property
    def cases(self) -> list[Case]:
        """In order of appearance."""
        return list(dict.fromkeys(each.case for each in self.measured))

    def loads(self, case: Case) -> list[Load]:
        """All rounds, the cheapest first: what else runs on the machine only ever adds."""
        loads = [each.load for each in self.measured if each.case == case]
        return sorted(loads, key=lambda load: load.server_seconds_per_token)

    def rival(self, case: Case) -> list[Load]:
        """The rounds of Triton at as many streams and the same pace."""
        others = [
            other
            for other in self.cases
            if other.server == TRITON and (other.streams, other.pace_seconds) == (case.streams, case.pace_seconds)
        ]
        return self.loads(others[0]) if others and case.server != TRITON else []


def show(result: ServiceCost, console: Console) -> None:
    """A table for each pace. Microseconds are of the server's processor time. Speed is messages/s over Triton's, thrift
    is Triton's processor time per token over ours."""
    for pace in dict.fromkeys(case.pace_seconds for case in result.cases):
        title = f"one token per stream every {1000 * pace:g} ms" if pace else "as fast as messages are taken"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for column in ("server", "path"):
            table.add_column(column)
        figures = ("streams", "messages/s", "tokens/s", "µs/message", "µs/token", "late ms (p99)", "client")
        for column in (*figures, "speed", "thrift"):
            table.add_column(column, justify="right", no_wrap=True)
        for case in (each for each in result.cases if each.pace_seconds == pace):
            table.add_row(*_row(result, case))
        console.print(table)
    console.print(
        f"servers on core {result.server_cores}, client on core {result.client_cores}; load average before: "
        f"{result.machine.load_average:.2f}; each figure is the best of its rounds"
    )


def _row(result: ServiceCost, case: Case) -> list[str]:
    loads, rivals = result.loads(case), result.rival(case)

    def most(loads: list[Load], figure: Callable[[Load], float]) -> float:
        return max(map(figure, loads))

    def least(loads: list[Load], figure: Callable[[Load], float]) -> float:
        return min(map(figure, loads))

    late = {
        50: 1000 * least(loads, lambda load: load.late_p50_seconds),
        99: 1000 * least(loads, lambda load: load.late_p99_seconds),
    }
    speed = most(loads, lambda load: load.messages_per_second)
    cost = least(loads, lambda load: load.server_seconds_per_token)
    against = ["", ""]
    if rivals:
        against = [
            f"{speed / most(rivals, lambda load: load.messages_per_second):.2f}x" if not case.pace_seconds else "",
            f"{least(rivals, lambda load: load.server_seconds_per_token) / cost:.2f}x",
        ]
    return [
        case.server,
        case.path,
        str(case.streams),
        f"{speed:.0f}",
        f"{most(loads, lambda load: load.tokens / load.seconds):.0f}",
        f"{1e6 * least(loads, lambda load: load.server_seconds_per_message):.1f}",
        f"{1e6 * cost:.1f}",
        f"{late[50]:.2f} ({late[99]:.2f})" if case.pace_seconds else "",
        f"{least(loads, lambda load: load.client_cpu_seconds / load.seconds):.0%}",
        *against,
    ]
