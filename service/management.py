"""What a server says of itself, in NIM's words: metadata, manifest, version, licence, health. No protocol in here.

Shapes as NVIDIA's containers answer and its Kubernetes operator reads them; profile ids stay readable (NIM's are
hashes), and health is asked of the engine (NIM's liveness is answered by a proxy before it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from engine import EngineConfig, EngineInfo
from service.errors import ServiceError
from service.host import Host, Phase
from service.models import catalog
from service.models.fit import Place
from service.models.gpus import KNOWN_GPUS, recognise
from service.models.profiles import precisions, profile_id
from service.models.store import ModelStore
from service.version import VERSION

API_VERSION = "1.0.0"  # of the paths below /v1 and of package nemoserve.v1
LICENCE_URL = "https://www.apache.org/licenses/LICENSE-2.0"
LICENCE_BYTES = 2**20  # of a model's own text; the longest that is known has some 20,000
_CPU = Place(slug="cpu", name="a CPU", kind="cpu", free=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """The served model as something that was published and fetched.

    Attributes:
        name: its own, whatever clients call it.
        source: URI that it was fetched from, None for files of the user's own.
        licence: its name, None where nobody says; `licence_text` is what lies beside its files.
        files: their names.
        stored: the precision that the files are nearest to, None where the catalogue does not know them.
        options: how the engine was asked to run it.
    """

    name: str
    source: str | None
    licence: str | None
    licence_text: str | None
    files: tuple[str, ...]
    stored: str | None
    options: EngineConfig

    @classmethod
    def of(cls, store: ModelStore, options: EngineConfig) -> Package:
        """Of the model that the engine is told to load; without files while they are being fetched.

        Raises:
            StoreError: it is a path, and no model is there any more.
        """
        reference = store.reference_of(Path(options.model_path))
        wanted, entry = store.resolve(reference), catalog.find(reference)
        folder = wanted.path if wanted.path.is_dir() else wanted.path.parent
        names: list[str] = []
        if store.find(reference) is not None:
            names = [wanted.path.name]
            if wanted.path.is_dir():
                names = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        exported = store.exported(reference)
        licence = entry.licence if entry else exported.licence if exported else None
        text = next((_text(folder / name) for name in sorted(names) if name.startswith("LICENSE")), None)
        return cls(
            name=wanted.name,
            source=store.source_of(reference),
            licence=licence,
            licence_text=text,
            files=tuple(sorted(names)),
            stored=entry.stored if entry else None,
            options=options,
        )

    @property
    def url(self) -> str:
        return self.source or f"local://{self.name}"

    def uri(self, file: str) -> str:
        """Of one of the files. A path on this machine is nobody's business."""
        if self.url.startswith("hf://") or self.source is None:
            return f"{self.url}/{file}"
        return self.url

    def profile(self, info: EngineInfo) -> str:
        """The id of the profile that runs, as `nemoserve profiles` lists it."""
        return profile_id(
            self.name, _slug(info), self.kept(info.device), self.options.kv_precision, self.options.tensor_parallel_size
        )

    def kept(self, device: str) -> str:
        """The precision of the weights; "auto" where only the files know it."""
        if self.options.precision != "auto" or self.stored is None:
            return self.options.precision
        return "fp8-weight-only" if self.stored == "fp8" and device == "cpu" else self.stored


def _slug(info: EngineInfo) -> str:
    if info.device == "cpu":
        return "cpu"
    known = recognise(info.device_name, info.device_bytes)
    return known.slug if known else "gpu"


def metadata(host: Host, package: Package, repository_override: str = "") -> dict[str, Any]:
    """Body of /v1/metadata.

    Args:
        repository_override: where models are fetched from instead of from where they were published.
    """
    info = info_of(host)
    return {
        "version": VERSION,
        "modelInfo": [{"shortName": package.name, "modelUrl": package.url}],
        "selectedModelProfileId": None if info is None else package.profile(info),
        "assetInfo": [package.uri(name) for name in package.files],
        "licenseInfo": _licence_info(),
        "modelLicenseInfo": {"name": package.licence, "url": package.url},
        "repository_override": repository_override,
    }


def info_of(host: Host) -> EngineInfo | None:
    """Of the engine; None before there is one, and after."""
    try:
        return host.info
    except ServiceError:
        return None


def manifest(package: Package, info: EngineInfo | None = None) -> dict[str, Any]:
    """Body of /v1/manifest: every way to run this model, in version 2 of NIM's schema.

    Args:
        info: of the running engine, whose profile is listed whatever it is.
    """
    files = {name: {"uri": package.uri(name)} for name in package.files}
    found = dict(_profiles(package))
    if info is not None and (running := package.profile(info)) not in found:
        found[running] = _tags(package.options, _slug(info), package.kept(info.device))
    return {
        "schema_version": "2.0.0",
        "profile_selection_criteria": "default",
        "profiles": [{"id": name, "tags": tags, "workspace": {"files": files}} for name, tags in found.items()],
    }


def _profiles(package: Package) -> Iterator[tuple[str, dict[str, str]]]:
    """Ids and tags, on one device of each kind that has a name."""
    for place in (_CPU, *(Place.of_gpu(gpu) for gpu in KNOWN_GPUS)):
        names = dict.fromkeys((package.stored or "auto", *precisions(place)))
        for precision in names:
            if precision == "fp8" and place.kind == "cpu":
                continue  # its weights are kept so, but a CPU multiplies no rounded activations
            yield profile_id(package.name, place.slug, precision, "auto", 1), _tags(None, place.slug, precision)


def _tags(options: EngineConfig | None, slug: str, precision: str) -> dict[str, str]:
    """Strings throughout, as NIM's are."""
    return {
        "llm_engine": "nemoserve",
        "gpu": slug,
        "precision": "stored" if precision == "auto" else precision,
        "kv_precision": options.kv_precision if options else "auto",
        "tp": str(options.tensor_parallel_size if options else 1),
        "pp": "1",
        "feat_lora": str(bool(options and options.max_loras)).lower(),
    }


def version() -> dict[str, str]:
    """Body of /v1/version."""
    return {"release": VERSION, "api": API_VERSION}


def licence(package: Package) -> dict[str, Any]:
    """Body of /v1/license: of this program with its text, and of the model with its own where it lies beside it."""
    return {
        **_licence_info(),
        "content": licence_text(),
        "model": {"shortName": package.name, "name": package.licence, "content": package.licence_text},
    }


@cache
def licence_text() -> str:
    """Of this program, as it is installed with it."""
    text = distribution("nemoserve").read_text("licenses/LICENSE")
    if text is None:  # pragma: no cover - every wheel has it
        raise FileNotFoundError("the installed package nemoserve has no LICENSE")
    return text


def _licence_info() -> dict[str, Any]:
    content = licence_text().encode()
    return {
        "name": "Apache-2.0",
        "path": "LICENSE",
        "sha": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "url": LICENCE_URL,
        "type": "file",
    }


@dataclass(frozen=True, slots=True)
class Health:
    """An answer to a probe."""

    ok: bool
    body: dict[str, Any]


def live(host: Host) -> Health:
    """The load makes progress, or the engine's heart beats."""
    return _health(host, ok=host.alive, name="live")


def ready(host: Host) -> Health:
    """A token can be made."""
    return _health(host, ok=host.alive and host.status.phase is Phase.READY, name="ready")


def _health(host: Host, *, ok: bool, name: str) -> Health:
    """NIM's body; where the answer is no, with what a person wants to know next."""
    body: dict[str, Any] = {"object": "health.response"}
    if ok:
        return Health(True, {**body, "message": f"nemoserve is {name}", "status": name})
    status = host.status
    words = status.phase.value
    if status.phase is Phase.READY:
        words = "the engine does not answer"
    elif status.phase is Phase.LOADING:
        left = f", about {status.eta_seconds:.0f} s left" if status.eta_seconds is not None else ""
        what = f" ({status.detail})" if status.detail else ""
        words = f"loading{what}, {status.progress:.0%}{left}"
    return Health(
        False,
        {
            **body,
            "message": f"nemoserve is not {name}: {words}",
            "status": f"not {name}",
            "phase": status.phase.value,
            "progress": round(status.progress, 4),
            "eta_seconds": status.eta_seconds,
        },
    )


def _text(path: Path) -> str | None:
    """A licence beside a model; what cannot be one is left out."""
    try:
        with path.open("rb") as file:
            content = file.read(LICENCE_BYTES + 1)
        return content.decode() if len(content) <= LICENCE_BYTES else None
    except (OSError, UnicodeDecodeError):
        return None
