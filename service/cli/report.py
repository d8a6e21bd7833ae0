"""Memory plans as tables for people. The numbers are those of `service.models.fit`; GiB, as GPUs are sold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from service.cli.tables import table
from service.models.fit import Fit, Place, Subject
from service.models.machine import GIB, Check
from service.models.profiles import Profile

_PARTS = {
    "weights": "weights",
    "tables": "tables",
    "adapters": "adapters",
    "workspace": "workspace",
    "reserve": "reserve",
    "KV cache": "cache",
}
"""Head of a column -> field of a MemoryPlan."""


def check_lines(checks: Iterable[Check]) -> str:
    return "\n".join(f"{'ok' if check.ok else '!!'}  {check.name:12} {check.detail}" for check in checks)


def memory_table(subject: Subject, place: Place, fits: Mapping[str, Sequence[Fit]], asked: str) -> str:
    """A row per precision; the one asked for is marked.

    Args:
        fits: precision -> one Fit for each KV precision, the same ones in every row.
        asked: the precision that `serve` would take.
    """
    first = next(iter(fits.values()))
    kvs = [_kv_name(each, place) for each in first]
    context = f"{first[0].context:,}"
    parts = {head: part for head, part in _PARTS.items() if any(getattr(row[0].plan, part) for row in fits.values())}
    head = ["", "precision", *parts]
    for kv in kvs:
        head += [f"tokens, {kv}", f"x {context}"]
    rows = [head]
    for precision, row in fits.items():
        stored = f"as stored ({subject.stored})" if subject.stored else "as stored"
        name = stored if precision == "auto" else precision
        sizes = [f"{getattr(row[0].plan, part) / GIB:.2f}" for part in parts.values()]
        rows.append(["->" if precision == asked else "", name, *sizes, *_counts(row)])
    per_token = ", ".join(f"{each.plan.token_bytes / 1024:.4g} in {kv}" for each, kv in zip(first, kvs, strict=True))
    lines = [
        f"{subject.name} on {place.name}: {subject.parameters:,} parameters, {place.free / GIB:.2f} GiB free",
        f"Parts{_of_ranks(first[0])} in GiB; tokens that the KV cache can hold in {' and '.join(kvs)}, and sequences "
        f"of {context} tokens.",
        f"A token takes KiB: {per_token}.",
        "",
        table(rows, left=(0, 1)),
        *_notes(place, fits[asked][0]),
        *_reasons(fits, kvs),
    ]
    return "\n".join(lines)


def _of_ranks(fit: Fit) -> str:
    return f" of each of {fit.ranks} ranks" if fit.ranks > 1 else ""


def _kv_name(fit: Fit, place: Place) -> str:
    floats = "bf16" if place.float_bytes == 2 else "fp32"
    return "fp8" if fit.kv_precision == "fp8" else floats


def _notes(place: Place, asked: Fit) -> list[str]:
    notes = []
    if place.kind == "cpu" and asked.reason is None:
        notes.append(f"serve takes {asked.taken:,} of these tokens, enough for its batch; --kv-memory takes more.")
    if place.multiplies_fp8 is False:
        notes.append("fp8 rounds activations too, which gains no speed without FP8 units: take fp8-weight-only.")
    return ["", *notes] if notes else []


def _counts(row: Sequence[Fit]) -> list[str]:
    counts: list[str] = []
    for each in row:
        counts += ["-", "-"] if each.reason else [f"{each.tokens:,}", str(each.sequences)]
    return counts


def _reasons(fits: Mapping[str, Sequence[Fit]], kvs: Sequence[str]) -> list[str]:
    """Why what does not fit does not; a reason that all KV precisions share stands once."""
    found = []
    for precision, row in fits.items():
        name = "as stored" if precision == "auto" else precision
        if len({each.reason for each in row}) == 1:
            found += [f"{name} does not fit: {row[0].reason}"] if row[0].reason else []
            continue
        for kv, each in zip(kvs, row, strict=True):
            if each.reason:
                found.append(f"{name} with keys and values in {kv} does not fit: {each.reason}")
    return ["", *found] if found else []


def profile_table(profiles: Sequence[Profile]) -> str:
    """Of one or several models and places; those that `serve` takes are marked. At one place they are grouped."""
    places = {each.place.name: each.place for each in profiles}
    kv = _kv_name(profiles[0].fit, profiles[0].place)
    lines = [
        f"Weights and KV cache{_of_ranks(profiles[0].fit)} in GiB, tokens that the cache can hold in {kv}.",
        "-> is what serve takes: a file is kept as it is unless --precision says otherwise.",
    ]
    if len(places) > 1:
        return "\n".join([*lines, "", *_profile_lines(profiles)])
    [(name, place)] = places.items()
    lines.insert(0, f"On {name}, {place.free / GIB:.2f} GiB free.")
    head, *rows = _profile_lines(profiles)
    lines += ["", head]
    for group in ("runs here", "tight", "does not fit"):
        members = [row for row, each in zip(rows, profiles, strict=True) if each.group == group]
        lines += [group, *members] if members else []
    return "\n".join(lines)


def _profile_lines(profiles: Sequence[Profile]) -> list[str]:
    """The head and a line for each."""
    rows = [["", "profile", "weights", "KV cache", "tokens", "sequences", ""]]
    for each in profiles:
        plan = each.fit.plan
        counts = ["-", "-"]
        if each.fit.reason is None:
            counts = [f"{each.fit.tokens:,}", f"{each.fit.sequences} x {each.fit.context:,}"]
        sizes = [f"{plan.weights / GIB:.2f}", f"{plan.cache / GIB:.2f}"]
        rows.append(["->" if each.taken else "", each.id, *sizes, *counts, _verdict(each.fit)])
    return table(rows, left=(0, 1, 6)).split("\n")


def _verdict(fit: Fit) -> str:
    if fit.tight:
        return f"tight: --max-model-len={fit.longest} at most"
    if fit.reason:
        return f"{fit.plan.missing / GIB:.2f} GiB short" if fit.plan.missing else fit.reason
    return "fits"


def taken_line(profile: Profile, source: str) -> str:
    """Which profile `serve` takes, why, and what it gives.

    Args:
        source: where the precision comes from.
    """
    why = "its file is kept as it is unless --precision says otherwise"
    if source != "default":
        why = f"{source} asks for it"
    fit = profile.fit
    chosen = f"chosen here: {profile.id}, because {why}"
    if fit.reason:
        return f"{chosen}; it does not fit: {fit.reason}"
    return f"{chosen}; {fit.taken:,} tokens of KV cache, requests of up to {min(fit.context, fit.taken):,}"
