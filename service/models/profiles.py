"""Profiles in NIM's manner, `MODEL/DEVICE-PRECISION-tpN`: what of a model can run on what, and what `serve` would take.

Only what the engine runs is listed: N devices, one unless more are asked for, and the precisions that make sense there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from engine import EngineConfig
from service.models.fit import Fit, Place, Subject, fit
from service.models.gpus import KNOWN_GPUS

_ID = re.compile(
    r"(?P<model>[^/\s]+)/(?P<device>[a-z0-9][a-z0-9-]*?)-"
    r"(?P<precision>stored|bf16|fp8|fp8-weight-only|int8|int4)(?P<kv>-kvfp8)?-tp(?P<ranks>[1-9]\d?)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One way to run a model.

    Attributes:
        taken: `serve` takes it at this place: the precision that is asked for, else the file's own.
    """

    id: str
    precision: str
    place: Place
    fit: Fit
    taken: bool

    @property
    def group(self) -> str:
        """As NIM groups them."""
        if self.fit.tight:
            return "tight"
        return "runs here" if self.fit.reason is None else "does not fit"

    def as_json(self) -> dict[str, Any]:
        return {
            "profile": self.id,
            "device": self.place.name,
            "taken": self.taken,
            "group": self.group,
            **self.fit.as_json(),
            "precision": self.precision,
        }


def settings_of(profile: str) -> dict[str, str]:
    """What a profile's id says of the settings of `serve`, by their names.

    Raises:
        ValueError: it is no such id.
    """
    match = _ID.fullmatch(profile)
    if match is None or match["device"] not in ("cpu", "gpu", *(gpu.slug for gpu in KNOWN_GPUS)):
        raise ValueError("must be MODEL/DEVICE-PRECISION-tpN, as `nemoserve profiles MODEL --gpu all` lists them")
    return {
        "model": match["model"],
        "device": "cpu" if match["device"] == "cpu" else "cuda",
        "precision": "auto" if match["precision"] == "stored" else match["precision"],
        "kv_precision": "fp8" if match["kv"] else "auto",
        "tensor_parallel_size": match["ranks"],
    }


def precisions(place: Place) -> tuple[str, ...]:
    """Without FP8 units to multiply rounded activations, weights alone in FP8 are as small and more exact."""
    return ("bf16", "fp8" if place.multiplies_fp8 else "fp8-weight-only", "int8", "int4")


def profiles(subject: Subject, place: Place, options: EngineConfig) -> list[Profile]:
    """All of one model at one place, the file's own precision first if it is none of the others."""
    stored = subject.stored if subject.stored in precisions(place) else "auto"
    if subject.stored == "fp8":
        stored = precisions(place)[1]
    taken = stored if options.precision == "auto" else options.precision
    names = dict.fromkeys((*(["auto"] if stored == "auto" else []), *precisions(place), taken))
    return [
        Profile(
            id=profile_id(subject.name, place.slug, name, options.kv_precision, options.tensor_parallel_size),
            precision=name,
            place=place,
            fit=fit(subject, place, msgspec.structs.replace(options, precision="auto" if name == stored else name)),
            taken=name == taken,
        )
        for name in names
    ]


def profile_id(model: str, slug: str, precision: str, kv_precision: str, ranks: int) -> str:
    """As `settings_of` reads it. Precision "auto" is a file's own, where nobody knows which that is."""
    kv = "-kvfp8" if kv_precision == "fp8" else ""
    return f"{model}/{slug}-{'stored' if precision == 'auto' else precision}{kv}-tp{ranks}"
