"""`nemoserve doctor` and `nemoserve profiles`: what of a model fits on this machine, or on one that is not there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from engine import EngineConfigError
from engine.parallel.share import share_of
from engine.probe import Found, Weights
from engine.schemes import SCHEMES
from service.cli.report import check_lines, memory_table
from service.models import catalog
from service.models.errors import StoreError
from service.models.fit import Fit, Place, Subject, fit
from service.models.gpus import KNOWN_GPUS, find_gpu
from service.models.machine import Check, check_disk, check_machine, check_port, check_store, look
from service.models.profiles import Profile, precisions, profiles
from service.models.store import ModelStore
from service.security.errors import SecurityError
from service.settings.definitions import engine_config
from service.settings.resolve import SettingError

MEMORY_GIB = (0.1, 10_000.0)  # of a GPU that may be planned for


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What the doctor found.

    Attributes:
        asked: precision that `serve` would take.
        fits: precision -> one Fit for each KV precision, the one that `serve` would take first.
        checks: of this machine; none where another is planned for.
    """

    subject: Subject
    place: Place
    asked: str
    fits: Mapping[str, Sequence[Fit]]
    checks: Sequence[Check]

    @property
    def failure(self) -> str | None:
        """Why `serve` would refuse, with what would help."""
        if self.misfit is not None:
            return self.misfit
        broken = next((check for check in self.checks if check.fatal and not check.ok), None)
        return f"{broken.name}: {broken.detail}" if broken else None

    @property
    def misfit(self) -> str | None:
        """Why the model does not fit, with what would help."""
        reason = self.fits[self.asked][0].reason
        if reason is None:
            return None
        helps = [f"--kv-precision {each.kv_precision}" for each in self.fits[self.asked] if each.reason is None]
        helps += [f"--precision {name}" for name in precisions(self.place) if self.fits[name][0].reason is None]
        hint = f"; {helps[0]} fits" if helps else ""
        return f"{self.subject.name} does not fit on {self.place.name}: {reason}{hint}"

    def text(self) -> str:
        found = [check_lines(self.checks), ""] if self.checks else []
        return "\n".join([*found, memory_table(self.subject, self.place, self.fits, self.asked)])

    def as_json(self) -> dict[str, Any]:
        return {
            "model": {"name": self.subject.name, "parameters": self.subject.parameters},
            "device": asdict(self.place),
            "asked": self.asked,
            "fits": self.fits[self.asked][0].reason is None,
            "failure": self.failure,
            "precisions": [each.as_json() for row in self.fits.values() for each in row],
            "checks": [asdict(check) for check in self.checks],
        }


def place_of(gpu: str | None, memory: float | None) -> Place | None:
    """Where to plan for; None is this machine.

    Args:
        memory: GiB.

    Raises:
        SettingError: no GPU is called so, no GPU has so much memory, or both are given.
    """
    if gpu is not None and memory is not None:
        raise SettingError("--memory: does not go with --gpu, which has a memory of its own")
    if memory is not None:
        low, high = MEMORY_GIB
        if not low <= memory <= high:
            raise SettingError(f"--memory: {memory:g} must be between {low:g} and {high:g} GiB")
        return Place.of_size(memory)
    try:
        return Place.of_gpu(find_gpu(gpu)) if gpu is not None else None
    except ValueError as error:
        raise SettingError(f"--gpu: {error}") from None


def places_of(gpu: str | None) -> list[Place | None]:
    """The same for one GPU, for all that are known ("all"), or for this machine."""
    return [Place.of_gpu(each) for each in KNOWN_GPUS] if gpu == "all" else [place_of(gpu, None)]


def examine(values: Mapping[str, Any], elsewhere: Place | None) -> Examination:
    """Look at the model and at this machine, unless `elsewhere` is where it shall run.

    Args:
        values: every setting, as `serve` would take it.

    Raises:
        StoreError: the model is not known, or not here and of unknown shape.
        EngineError: the model cannot be opened or divided among so many ranks, or the settings are wrong for any model.
    """
    store = ModelStore.default()
    path = _path(store, values["model"])
    ranks = values["tensor_parallel_size"]
    found = look(path, *_device(values, elsewhere), ranks) if elsewhere is None or path else None
    subject = _subject(values["model"], found.weights if found else None)
    share_of(subject.shape, ranks)  # once, instead of as the reason of every precision
    place = _place(elsewhere, found, values)
    options = engine_config(path or Path("-"), values)
    kvs = [options.kv_precision] if options.kv_precision != "auto" else ["auto", "fp8"]
    fits = {
        precision: [
            fit(subject, place, msgspec.structs.replace(options, precision=precision, kv_precision=kv)) for kv in kvs
        ]
        for precision in SCHEMES
    }
    checks: list[Check] = []
    if elsewhere is None and found is not None:
        entry = catalog.find(values["model"])
        checks = [
            *check_machine(found.machine, ranks),
            check_port(values["host"], values["grpc_port"]),
            *_http_port(values),
            *check_security(values),
            check_store(store.root, entry.num_bytes if entry is not None and path is None else 0),
            *([check_disk(path)] if path is not None else []),
        ]
    return Examination(subject=subject, place=place, asked=options.precision, fits=fits, checks=checks)


def list_profiles(models: Sequence[str], elsewhere: Sequence[Place | None], values: Mapping[str, Any]) -> list[Profile]:
    """Profiles of these models at these places, also of those that so many ranks cannot share: they do not fit.

    Raises what `examine` raises otherwise.
    """
    store = ModelStore.default()
    options = engine_config(Path("-"), values)
    here = look(None, *_device(values, None)) if None in elsewhere else None
    listed = []
    for model in models:
        path = _path(store, model)
        ranks = options.tensor_parallel_size
        subject = _subject(model, look(path, *_device(values, elsewhere[0]), ranks).weights if path else None)
        for each in elsewhere:
            listed += profiles(subject, _place(each, here, values), options)
    return listed


def _http_port(values: Mapping[str, Any]) -> list[Check]:
    port = values["http_port"]
    return [] if port is None else [check_port(values["host"], port, "HTTP port")]


def check_security(values: Mapping[str, Any]) -> list[Check]:
    """Keys and certificates, where there are some."""
    from service.security.tls import SOON_DAYS  # by which time grpc is loaded

    try:
        days = check_files(values)
    except SecurityError as error:
        return [Check("security", False, str(error), fatal=True)]
    checks = []
    if values["api_keys_file"]:
        checks.append(Check("keys", True, f"{values['api_keys_file']} can be used"))
    if days is not None:
        left = f"{values['tls_cert']} may be used for {days:.0f} days more"
        checks.append(Check("TLS", days >= SOON_DAYS, left))
    return checks


def check_files(values: Mapping[str, Any]) -> float | None:
    """Read what `serve` would read of keys and certificates. Returns the days that the certificate may be used.

    Raises:
        SecurityError: a file cannot be used.
    """
    from service.security.access import access_of
    from service.security.tls import read_certificates, tls_files

    access_of(values)
    files = tls_files(values)
    return None if files is None else (read_certificates(files).expires - time.time()) / 86400


def choose(values: Mapping[str, Any]) -> Profile:
    """What `--profile auto` takes: the first that has room for a whole sequence, else the first that fits at all.

    Raises:
        EngineConfigError: none fits; the message has what each lacks.
    """
    found = list_profiles([values["model"]], [None], values)
    found.sort(key=lambda each: not each.taken)
    fitting = [each for each in found if each.fit.reason is None]
    fitting.sort(key=lambda each: each.fit.tight)
    if not fitting:
        lacks = "; ".join(f"{each.id}: {each.fit.reason}" for each in found)
        raise EngineConfigError(f"profile: no profile of {values['model']} fits here: {lacks}")
    return fitting[0]


def refuse_before_fetching(values: Mapping[str, Any]) -> None:
    """Say now, not after the download, that a model does not fit; by what the catalogue says of its shape.

    Raises:
        EngineConfigError: it does not.
    """
    if ModelStore.default().find(values["model"]) is not None or catalog.find(values["model"]) is None:
        return
    found = examine(values, None)
    if (reason := found.misfit) is not None:
        raise EngineConfigError(f"{reason}; nothing was fetched")


def _path(store: ModelStore, model: str) -> Path | None:
    """Where the model is; None if it is not here but its shape is known."""
    stored = store.find(model)
    if stored is None and catalog.find(model) is None:
        raise StoreError(f"{model}: not in the store, so its shape is not known; `nemoserve pull {model}` fetches it")
    return stored.path if stored else None


def _subject(model: str, weights: Weights | None) -> Subject:
    """By its file where there is one, else by the shape that the catalogue has."""
    entry = catalog.find(model)
    if weights is None:
        assert entry is not None
        return Subject.of_entry(entry)
    name = entry.name if entry else ModelStore.default().resolve(model).name
    return Subject.of_file(name, weights, entry.stored if entry else None)


def _place(elsewhere: Place | None, here: Found | None, values: Mapping[str, Any]) -> Place:
    if elsewhere is None:
        assert here is not None
        return Place.here(here.machine)
    return replace(elsewhere, float_bytes=4) if values["dtype"] == "fp32" else elsewhere


def _device(values: Mapping[str, Any], elsewhere: Place | None) -> tuple[str, str]:
    """Device and dtype to look with, as EngineConfig names them: elsewhere there is a GPU, which has bfloat16."""
    options = engine_config(Path("-"), values)
    if elsewhere is None:
        return options.device, options.dtype
    return "cpu", "bfloat16" if options.dtype == "auto" else options.dtype
