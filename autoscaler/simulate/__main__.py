"""`python -m autoscaler.simulate TRACE --policy ours --policy static:8`: a trace against policies, as one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from autoscaler.simulate.curve import Curve, default_curve, read_curve
from autoscaler.simulate.options import Slo, WorldOptions
from autoscaler.simulate.oracle import Search
from autoscaler.simulate.plot import picture
from autoscaler.simulate.policies import Setup, make_policy
from autoscaler.simulate.provision import smallest_static
from autoscaler.simulate.result import Result
from autoscaler.simulate.run import simulate
from autoscaler.simulate.traces import Trace, load_trace

TRACES = Path(__file__).parents[3] / "shared" / "data" / "traces"
COLUMNS: dict[str, Callable[[Result], str]] = {
    "policy": lambda each: each.policy,
    "violations": lambda each: f"{each.violations:.2%}",
    "late first": lambda each: f"{each.late_first_token:.2%}",
    "slow tokens": lambda each: f"{each.slow_tokens:.2%}",
    "lost": lambda each: f"{each.lost:.2%}",
    "unscalable": lambda each: f"{each.unscalable:.2%}",
    "wait p50": lambda each: f"{each.wait_p50:.3f} s",
    "wait p99": lambda each: f"{each.wait_p99:.2f} s",
    "TTFT p99": lambda each: f"{each.ttft_p99:.2f} s",
    "GPU-hours": lambda each: f"{each.gpu_hours:.2f}",
    "out/in": lambda each: f"{each.scale_outs}/{each.scale_ins}",
    "max ready": lambda each: f"{each.max_ready}",
}


@click.command(context_settings={"show_default": True})
@click.argument("trace")
@click.option("--policy", "policies", multiple=True, default=["ours"], help="ours, static[:N], oracle or a baseline.")
@click.option("--curve", "curve_path", type=click.Path(path_type=Path), help="What a replica is; default: measured.")
@click.option(
    "--traces",
    "folder",
    type=click.Path(path_type=Path),
    default=TRACES,
    show_default="beside the checkout",
    envvar="NEMOSERVE_TRACES",
    help="Folder of recorded traces.",
)
@click.option("--ttft", type=float, help="Seconds to the first token that are promised; default: 2 on a GPU's curve.")
@click.option("--itl", type=float, help="Mean seconds between tokens, promised; default: 0.06 on a GPU's curve.")
@click.option("--initial-replicas", type=int, help="Ready at first; default: the fewest of static provisioning.")
@click.option("--min-replicas", type=int, default=1)
@click.option("--max-replicas", type=int, help="Default: twice the initial ones.")
@click.option("--cold-start", type=float, default=120.0, help="Median seconds from a node to ready.")
@click.option("--node-delay", type=float, default=0.0, help="Median seconds until there is a node.")
@click.option("--provisioning-failure", type=float, default=0.0, help="Share of cold starts that fail at their end.")
@click.option("--crashes-mtbf", type=float, help="Mean seconds that a ready replica lives; default: for ever.")
@click.option("--retry/--no-retry", default=True, help="Whether what a crash interrupts goes to another replica.")
@click.option("--drain", type=float, default=120.0, help="Seconds that a victim has to finish.")
@click.option("--victims", type=click.Choice(["idlest", "newest", "random"]), default="idlest")
@click.option("--schedulable", type=int, help="Replicas that there are GPUs for; default: any.")
@click.option("--metric-lag", type=float, default=0.0, help="Age in seconds of what policies see.")
@click.option("--sample-loss", type=float, default=0.0, help="Share of what policies look at that does not come.")
@click.option("--step-cost-error", type=float, default=1.0, help="Factor on the step costs that replicas report.")
@click.option("--dispatch-choices", type=int, help="Replicas compared per request; default: all of up to 32, else 4.")
@click.option("--seed", type=int, default=0, help="Of the trace, cold starts, failures and dispatch.")
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write the timelines to this SVG file.")
def main(
    trace: str,
    policies: tuple[str, ...],
    curve_path: Path | None,
    folder: Path | None,
    ttft: float | None,
    itl: float | None,
    initial_replicas: int | None,
    max_replicas: int | None,
    cold_start: float,
    node_delay: float,
    crashes_mtbf: float | None,
    drain: float,
    metric_lag: float,
    seed: int,
    as_json: bool,
    plot: Path | None,
    **same_names: object,
) -> None:
    """Replay TRACE: a CSV file (arrival_s,input_tokens,output_tokens), or azure:12, mooncake:3,
    servegen-m-small:days=1-2,rate=40, spikes:seed=3,rate=20; steps, ramps, diurnal, poisson."""
    try:
        curve = read_curve(curve_path) if curve_path else default_curve()
        slo = promised(curve, ttft, itl)
        whole = load_trace(trace, folder, seed)
        made = whole.within(curve.kv_tokens)
        options = WorldOptions(
            max_replicas=1 << 20,
            cold_start_seconds=cold_start,
            node_delay_seconds=node_delay,
            mtbf_seconds=crashes_mtbf,
            drain_seconds=drain,
            metric_lag_seconds=metric_lag,
            **same_names,  # type: ignore[arg-type]  # click has checked them
        )
        initial = initial_replicas
        if initial is None:
            initial, _ = smallest_static(made, curve, slo, options, seed)
        options = replace(options, initial_replicas=initial, max_replicas=max_replicas or max(2 * initial, 1))
        results = [run(name, Setup(made, curve, slo, options), seed) for name in policies]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if plot is not None:
        plot.write_text(picture(results))
    if as_json:
        click.echo(json.dumps([each.summary() | {"timeline": each.timeline.lists()} for each in results]))
    else:
        click.echo(heading(made, curve, slo, options))
        if len(made) < len(whole):
            click.echo(f"left out: {len(whole) - len(made)} requests that KV of {curve.kv_tokens} tokens cannot hold\n")
        click.echo(table(results))


def promised(curve: Curve, ttft: float | None, itl: float | None) -> Slo:
    suited = Slo.suited_to(curve)
    return Slo(ttft or suited.ttft_seconds, itl or suited.itl_seconds)


def run(name: str, setup: Setup, seed: int) -> Result:
    """`static` is as many as that takes, and `oracle` is searched for: these two see the whole trace."""
    everything = setup.trace, setup.curve, setup.slo, setup.options, seed
    if name not in ("static", "oracle"):
        return simulate(setup.trace, make_policy(name, setup), *everything[1:], name)
    static = smallest_static(*everything)
    found = static[1] if name == "static" else Search(*everything, static).run().result
    return replace(found, policy=name)


def heading(trace: Trace, curve: Curve, slo: Slo, options: WorldOptions) -> str:
    rate = len(trace) / max(trace.duration_s, 1e-9)
    return (
        f"{trace.name}: {len(trace)} requests in {trace.duration_s / 3600:.2f} h, {rate:.1f}/s, on average "
        f"{trace.input_tokens.mean():.0f} tokens in and {trace.output_tokens.mean():.0f} out\n"
        f"replicas: {curve.name}: {curve.model}; {curve.machine}\n"
        f"promise: first token in {slo.ttft_seconds:.3g} s, then {slo.itl_seconds:.3g} s per token; cold start "
        f"{options.cold_start_seconds:g} s; {options.initial_replicas} replicas at first, at most "
        f"{options.max_replicas}; not scored: the first {options.warmup:g} s\n"
    )


def table(results: list[Result]) -> str:
    rows = [list(COLUMNS), *([show(each) for show in COLUMNS.values()] for each in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )


if __name__ == "__main__":
    main(prog_name="python -m autoscaler.simulate")
