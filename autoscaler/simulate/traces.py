"""Requests that arrive: recorded ones, ones drawn from what was recorded of them, and made-up ones.

A name is `kind`, `kind:12` (that many times the rate) or `kind:name=value,name=value`; everything else is a path.

    azure:12                           a recorded trace of the folder, at 12 times its rate
    servegen-m-small:days=1-2,rate=40  drawn from ServeGen's processes of those days, for 40 requests/s on average
    spikes:seed=3,rate=20              made up; so are steps, diurnal, poisson, ramps
    requests.csv, requests.csv.gz      columns arrival_s,input_tokens,output_tokens, perhaps prefix_block_hashes_512

The same name and seed give the same requests.
"""

from __future__ import annotations

import csv
import gzip
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler.simulate.servegen import draw
from autoscaler.simulate.synthetic import KINDS, make, number

RECORDED = {"azure": "azure2023_conv", "azure-code": "azure2023_code", "mooncake": "mooncake_conversation"}
RECORDED |= {"mooncake-synthetic": "mooncake_synthetic"}
JITTER_SECONDS = 2.0  # between the copies of a request that scale a trace up: apart, and in the same burst
BLOCK_TOKENS = 512  # of the prefix hashes
CACHE_TOKENS = 330_000  # that prefixes of recorded traces are kept for: the pages of one replica
SERVEGEN_FILES = ("clients", "lengths")


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival, as arrays of one length."""

    name: str
    arrival_s: Any
    input_tokens: Any
    output_tokens: Any
    cached_tokens: Any  # of input: that a prefix cache has

    def __post_init__(self) -> None:
        if not len(self.arrival_s):
            raise ValueError(f"{self.name}: has no requests")
        if min(self.input_tokens.min(), self.output_tokens.min()) < 1:
            raise ValueError(f"{self.name}: a request without a token of input or of output")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        return float(self.arrival_s[-1])

    def within(self, tokens: int) -> Trace:
        """Without the requests that have more, prompt and answer together: a server refuses those."""
        fits = self.input_tokens + self.output_tokens <= tokens
        columns = self.arrival_s, self.input_tokens, self.output_tokens, self.cached_tokens
        return self if fits.all() else Trace(self.name, *(column[fits] for column in columns))


def trace(name: str, arrival: Any, input_tokens: Any, output_tokens: Any, cached: Any = None) -> Trace:
    """From arrays in any order."""
    order = np.argsort(arrival, kind="stable")
    cached = np.zeros(len(order), np.int64) if cached is None else cached
    whole = (np.asarray(each)[order].astype(np.int64) for each in (input_tokens, output_tokens, cached))
    return Trace(name, np.asarray(arrival, np.float64)[order], *whole)


def load_trace(name: str, folder: Path | None = None, seed: int = 0) -> Trace:
    """Read or make a trace. `folder` holds the recorded ones.

    Raises ValueError that names what is wrong with the name or in the file.
    """
    kind, _, rest = name.partition(":")
    options = parse_options(name, rest)
    try:
        seed = int(number(options, "seed", seed))
        if kind in RECORDED:
            blocks = int(number(options, "cache_tokens", CACHE_TOKENS)) // BLOCK_TOKENS
            made = read_csv(in_folder(folder, f"{RECORDED[kind]}.csv.gz", name), blocks)
        elif kind.startswith("servegen-"):
            model = kind.removeprefix("servegen-")
            clients, lengths = (in_folder(folder, f"servegen_{model}_{part}.csv.gz", name) for part in SERVEGEN_FILES)
            made = trace(name, *draw(clients, lengths, options, np.random.default_rng(seed)))
        elif kind in KINDS:
            made = trace(name, *make(kind, options, np.random.default_rng(seed)))
        elif Path(name).is_file():
            return read_csv(Path(name))
        else:
            raise ValueError(f"neither a file nor one of {', '.join([*RECORDED, 'servegen-*', *KINDS])}")
        made = scale(made, number(options, "times", 1), np.random.default_rng(seed))
        if options:
            raise ValueError(f"unknown option {sorted(options)[0]!r}")
    except ValueError as error:
        raise ValueError(f"trace {name!r}: {error}") from error
    return replace(made, name=name)


def parse_options(name: str, rest: str) -> dict[str, str]:
    """`12` or `name=value,name=value`."""
    if not rest:
        return {}
    if rest.replace(".", "", 1).isdigit():
        return {"times": rest}
    options: dict[str, str] = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"trace {name!r}: {part!r} is not name=value")
        options[key] = value
    return options


def in_folder(folder: Path | None, file: str, name: str) -> Path:
    if folder is None or not (folder / file).is_file():
        raise ValueError(f"needs {file}, which is not in {folder or 'any folder: none is given'}")
    return folder / file


def read_csv(path: Path, cache_blocks: int | None = None) -> Trace:
    """Columns arrival_s,input_tokens,output_tokens, and perhaps cached_tokens or prefix_block_hashes_512."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        reader = csv.DictReader(file)
        missing = {"arrival_s", "input_tokens", "output_tokens"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: has no column {sorted(missing)[0]}")
        rows = list(reader)
    columns = []
    for column in ("arrival_s", "input_tokens", "output_tokens"):
        try:
            columns.append(np.array([row[column] for row in rows], dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: column {column}: {error}") from error
    arrival, inputs, outputs = columns
    inputs, outputs = np.maximum(inputs, 1), np.maximum(outputs, 1)
    cached = None
    if rows and "prefix_block_hashes_512" in rows[0]:
        hits = prefix_hits([expand(row["prefix_block_hashes_512"]) for row in rows], cache_blocks)
        cached = np.minimum(np.array(hits) * BLOCK_TOKENS, inputs - 1)
    elif rows and "cached_tokens" in rows[0]:
        cached = np.minimum(np.array([float(row["cached_tokens"]) for row in rows]), inputs - 1)
    return trace(path.name, arrival - (arrival.min() if len(arrival) else 0), inputs, outputs, cached)


def expand(runs: str) -> Iterator[int]:
    """`46-48 2353` is 46, 47, 48, 2353."""
    for run in runs.split():
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)


def prefix_hits(requests: Iterable[Iterable[int]], capacity: int | None) -> list[int]:
    """Leading blocks of each request that one cache of `capacity` blocks has (None: of any number), which all replicas
    share, and which forgets what was not asked for longest. Real replicas each have their own: routing decides how much
    of this they find."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = []
    for blocks in requests:
        known, counting = 0, True
        for block in blocks:
            counting = counting and block in cache
            known += counting
            cache[block] = None
            cache.move_to_end(block)
            if capacity is not None and len(cache) > capacity:
                cache.popitem(last=False)
        hits.append(known)
    return hits


def scale(made: Trace, times: float, random: np.random.Generator) -> Trace:
    """That many times the rate: whole copies, each request of them a little later, and a part of one more."""
    if not 0 < times <= 10_000:
        raise ValueError(f"times is {times:g}; it must be above 0 and at most 10000")
    if times == 1:
        return made
    copies = [np.arange(len(made))] * int(times)
    copies.append(np.flatnonzero(random.random(len(made)) < times % 1))
    chosen = np.concatenate(copies)
    late = random.uniform(0, JITTER_SECONDS, len(chosen))
    late[: len(made) if times >= 1 else len(chosen)] = 0
    columns = (each[chosen] for each in (made.input_tokens, made.output_tokens, made.cached_tokens))
    return trace(made.name, made.arrival_s[chosen] + late, *columns)
