"""Values that mean nothing, or do not go together, are refused by name before anything is installed."""

from __future__ import annotations

import pytest

from helm.chart import RenderError, render
from helm.tools import HELMS, run
from tests.helm.conftest import SETS

# what is set -> what the message must name
REFUSED = {
    "replicaCout=2": "replicaCout",
    "gpu.prodct=h100": "prodct",
    "gpu.product=v100": "product",
    "settings.max_batch_szie=3": "max_batch_szie",
    "settings.host=127.0.0.1": "host",
    "service.type=Loadbalancer": "type",
    "model.precision=fp4": "precision",
    "image.digest=latest": "digest",
    "replicaCount=two": "replicaCount",
    "persistence.enabled=true,hostPath.enabled=true": "hostPath",
    "persistence.existingClaim=models": "persistence",
    "persistence.enabled=true,persistence.accessMode=ReadWriteOnce,replicaCount=2": "replicaCount",
    "persistence.enabled=true,persistence.accessMode=ReadWriteOnce,autoscaling.enabled=true": "autoscaling",
    "model.offline=true": "persistence",
    "gpu.product=none,gpu.count=2": "count",
    "gpu.product=none,gpu.runtimeClassName=nvidia": "runtimeClassName",
    "gpu.product=a100,model.precision=fp8": "precision",
    "lora.existingClaim=adapters,gpu.count=2": "count",
    "service.type=LoadBalancer": "allowAnonymous",
    "networkPolicy.enabled=false": "allowAnonymous",
    "networkPolicy.from=null": "from",
    "networkPolicy.enabled=null": "allowAnonymous",
    "ingress.enabled=true,ingress.hosts[0].host=a,security.apiKeysSecret.name=null": "allowAnonymous",
    "gateway.enabled=true,gateway.parentRefs[0].name=public": "allowAnonymous",
    "security.apiKeysSecret.name=keys,security.allowAnonymous=true": "allowAnonymous",
    "security.apiKeysSecret.name=keys,ingress.enabled=true": "hosts",
    "security.apiKeysSecret.name=keys,gateway.enabled=true": "parentRefs",
    "metrics.withoutKey=true": "apiKeysSecret",
    "metrics.serviceMonitor.enabled=true,metrics.podMonitor.enabled=true": "podMonitor",
    "autoscaling.kind=both": "kind",
    "autoscaling.enabled=true,autoscaling.kind=keda": "prometheusAddress",
    "autoscaling.minReplicas=5": "autoscaling.maxReplicas",
    "drain.lameDuckSeconds=30": "drain.timeoutSeconds",
    "multiNode.enabled=true": "LeaderWorkerSets and MPIJobs are not supported; use gpu.count",
}


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize(("values", "named"), REFUSED.items())
def test_a_contradiction_or_typo_is_refused(helm: str, values: str, named: str) -> None:
    with pytest.raises(RenderError) as refused:
        render(helm, None, "--set", values)
    assert named in str(refused.value).replace("/", ".")


def test_keys_are_enough_to_be_published() -> None:
    render(HELMS[-1], SETS["keys-tls"])


@pytest.mark.parametrize("helm", HELMS)
def test_a_cluster_that_is_too_old_is_refused(helm: str) -> None:
    done = run(helm, "template", "nemo", "helm/nemoserve", "--kube-version", "1.27.0")
    assert done.returncode
