"""A kube-apiserver of our own, in memory, on loopback: real HTTP for the real client and the real kubectl.

    server ── front ── access ── machinery ── store ──► watching
                │                  │     │
            discovery,        resources schema ── cel      workloads, nodes: what the rest of a cluster does
            table, faults

It keeps the semantics that a controller depends on: uid, resourceVersion, generation, 409 on what is stale, PUT, the
three patches, /status and /scale, selectors, watches that expire, schemas with their CEL rules, RBAC.
`tests/autoscaler/contract` says the same of it and of a real cluster. What it does not have, it refuses
(server-side apply, OpenAPI, which `kubectl create` does without by `--validate=false`, `deletecollection`, binding,
eviction, admission webhooks); lists come whole, as a server may send them.
"""

from tests.autoscaler.fake_api.faults import Fault
from tests.autoscaler.fake_api.front import Call
from tests.autoscaler.fake_api.nodes import Container
from tests.autoscaler.fake_api.server import FakeApi
from tests.autoscaler.fake_api.workloads import Workloads, endpoints

__all__ = ["Call", "Container", "FakeApi", "Fault", "Workloads", "endpoints"]
