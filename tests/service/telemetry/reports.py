"""What telemetry says, as tests look at it."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from service.telemetry.telemetry import Telemetry


class Scrape:
    """The samples of one scrape, parsed by Prometheus' own parser."""

    def __init__(self, telemetry: Telemetry) -> None:
        text, self.content_type = telemetry.metrics.exposition()
        self.families = {family.name: family for family in text_string_to_metric_families(text.decode())}
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def value(self, name: str, /, **labels: str) -> float:
        """Of exactly these labels."""
        return self.samples[name, frozenset(labels.items())]

    def values(self, name: str) -> Mapping[frozenset[tuple[str, str]], float]:
        """By labels, those that are 0 left out."""
        return {labels: value for (found, labels), value in self.samples.items() if found == name and value}
