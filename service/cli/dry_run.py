"""`nemoserve serve --dry-run`: what would be served and how, setting by setting, without loading anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine import EngineError
from service.cli.doctor import check_files, list_profiles
from service.cli.report import profile_table, taken_line
from service.cli.tables import table
from service.models.errors import StoreError
from service.models.profiles import Profile
from service.security.errors import SecurityError
from service.settings.resolve import Resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What `serve` with these settings would do.

    Attributes:
        profiles: of the model on this machine, the one that would be taken among them.
        failure: why `serve` would refuse, in one line.
    """

    settings: Mapping[str, Resolved]
    profiles: Sequence[Profile]
    failure: str | None

    @property
    def _taken(self) -> Profile | None:
        return next((each for each in self.profiles if each.taken), None)

    def text(self) -> str:
        rows = [["setting", "value", "from"]]
        rows += [[name, _shown(each.value), each.source] for name, each in self.settings.items()]
        parts = [table(rows, left=(0, 1, 2))]
        if self._taken is not None:
            parts += ["", profile_table(self.profiles), "", taken_line(self._taken, self.settings["precision"].source)]
        return "\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        return {
            "settings": {name: {"value": each.value, "source": each.source} for name, each in self.settings.items()},
            "profile": self._taken.id if self._taken else None,
            "profiles": [each.as_json() for each in self.profiles],
            "failure": self.failure,
        }


def dry_run(settings: Mapping[str, Resolved]) -> DryRun:
    """Look at this machine and at the model, or at what the catalogue says of it, and plan."""
    values = {name: each.value for name, each in settings.items()}
    try:
        check_files(values)
        profiles = list_profiles([values["model"]], [None], values)
    except (StoreError, EngineError, SecurityError) as error:
        return DryRun(settings=settings, profiles=[], failure=str(error))
    reason = next((each.fit.reason for each in profiles if each.taken), None)
    failure = f"{values['model']} does not fit: {reason}" if reason else None
    return DryRun(settings=settings, profiles=profiles, failure=failure)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
