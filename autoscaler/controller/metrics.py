"""Prometheus metrics of the operator: all their names, each once. The label `autoscaler` is a QueueAutoscaler's name.

Names after `nemoserve_autoscaler_`:

desired_replicas, asked_replicas    that there should be; that the workload is asked for
ready_, loading_, draining_replicas that there are
held_requests                       that wait for the first replica
condition{type,status,reason}       1 for what each condition of the resource is now
reconcile_total{result}             looks: `ok`, `conflict`, `error`, `fenced` (it leads no more), `gone`
reconcile_seconds, decision_seconds of a look; of the policy within it
scale_events_total{direction}       the workload was asked for more (`out`), or fewer (`in`)
drained_total{how}                  replicas that went `idle`, at the `limit` of the time, or `free`: served nobody
cold_start_seconds                  from a pod's creation until it was ready
api_errors_total{code}              answers of the API server; code 0: there was none
leader                              1: this process leads
each of `Decision.figures`          what the policy worked its decision out from, under the name that it gives
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from autoscaler.controller.status import Condition

PREFIX = "nemoserve_autoscaler_"
DECISION_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
RECONCILE_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
COLD_START_BUCKETS = (1, 3, 10, 20, 30, 45, 60, 90, 120, 180, 240, 300, 450, 600, 900, 1800, 3600)
MAX_FIGURES = 64


class Metrics:
    """Of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        each = ("autoscaler",)
        self.desired = self._gauge("desired_replicas", "Replicas that there should be", *each)
        self.asked = self._gauge("asked_replicas", "Replicas that the workload is asked for", *each)
        self.ready = self._gauge("ready_replicas", "Replicas that serve", *each)
        self.loading = self._gauge("loading_replicas", "Replicas that are on the way to it", *each)
        self.draining = self._gauge("draining_replicas", "Replicas that finish what they accepted", *each)
        self.held = self._gauge("held_requests", "Requests that wait for the first replica", *each)
        self.condition = self._gauge("condition", "1: what it is now", *each, "type", "status", "reason")
        self.reconciles = self._counter("reconcile_total", "Looks, by how they ended", *each, "result")
        self.scale_events = self._counter("scale_events_total", "Changes of what is asked for", *each, "direction")
        self.drained = self._counter("drained_total", "Replicas that went, by their state", *each, "how")
        self.reconcile_seconds = self._histogram("reconcile_seconds", "Of one look", RECONCILE_BUCKETS)
        self.decision_seconds = self._histogram("decision_seconds", "Of the policy in it", DECISION_BUCKETS)
        self.cold_start = self._histogram("cold_start_seconds", "From creation until ready", COLD_START_BUCKETS)
        self.api_errors = self._counter("api_errors_total", "Errors of the API server; code 0: no answer", "code")
        self.leader = self._gauge("leader", "1: this process leads")
        self._figures: dict[str, Gauge] = {}

    def show_figures(self, autoscaler: str, figures: Mapping[str, float]) -> None:
        """What a decision was worked out from, each under its name. A figure is left out if its name cannot be that of
        a metric, or is that of one above, as `cold_start_seconds` is: a policy must not be able to break a look."""
        for name, value in figures.items():
            if name not in self._figures:
                if len(self._figures) >= MAX_FIGURES or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                    continue
                try:
                    self._figures[name] = self._gauge(name, "Of the latest decision", "autoscaler")
                except ValueError:  # the registry has this name already
                    continue
            self._figures[name].labels(autoscaler).set(value)

    def show_conditions(self, autoscaler: str, conditions: Sequence[Condition]) -> None:
        self.condition.remove_by_labels({"autoscaler": autoscaler})
        for each in conditions:
            self.condition.labels(autoscaler, each.type, each.status.value, each.reason).set(1)

    def forget(self, autoscaler: str) -> None:
        """The resource is gone, or another process looks after it: what was true of it is not any more."""
        now = (self.desired, self.asked, self.ready, self.loading, self.draining, self.held, self.condition)
        for gauge in (*now, *self._figures.values()):
            gauge.remove_by_labels({"autoscaler": autoscaler})

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, ("autoscaler",), registry=self.registry, buckets=buckets)
