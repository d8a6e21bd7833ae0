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
    "networkPolicy.ingress[0].ports[0].port=15008": "allowAnonymous",
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
    "autoscaling.minReplicas=0": "minReplicas",
    "autoscaling.kind=hpa,autoscaling.minReplicas=0,autoscaling.scaleToZero.enabled=true": "minReplicas",
    "autoscaling.kind=hpa,autoscaling.scaleToZero.enabled=true": "scaleToZero",
    "autoscaling.kind=hpa,autoscaling.dryRun=true": "dryRun",
    "autoscaling.kind=keda,autoscaling.behavior.scaleOut.maxStep=1": "behavior",
    "autoscaling.enabled=true,autoscaling.prometheusAddress=http://prometheus": "prometheusAddress",
    "autoscaling.enabled=true,autoscaling.metrics[0].type=Pods": "metrics",
    "autoscaling.behavior.scaleIn.maxStep=1": "windowSeconds",
    "autoscaling.behavior.scaleout.maxStep=1": "scaleout",
    "autoscaling.target.queueWaitSeconds=1,autoscaling.target.queuedTokensPerReplica=1": "target",
    "autoscaling.target.queueWaitSeconds=3": "autoscaling.target.ttftSeconds",
    "autoscaling.schedules[0].cron=0 8 * *,autoscaling.schedules[0].minReplicas=1": "cron",
    "autoscaling.schedules[0].cron=0 8 * * *,autoscaling.schedules[0].durationSeconds=60": "minReplicas",
    "autoscaling.operator.replicas=0": "replicas",
    "autoscaling.enabled=true,security.apiKeysSecret.name=keys": "apiKeySecret",
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


def test_a_schedule_has_no_more_servers_than_there_may_be() -> None:
    schedule = "autoscaling.schedules[0].cron=0 8 * * *,autoscaling.schedules[0].durationSeconds=60"
    with pytest.raises(
        RenderError, match=r"autoscaling\.schedules.* 5 must be at most the 4 of autoscaling\.maxReplicas"
    ):
        render(HELMS[-1], None, "--set", f"{schedule},autoscaling.schedules[0].minReplicas=5")


@pytest.mark.parametrize("helm", HELMS)
def test_a_cluster_that_is_too_old_is_refused(helm: str) -> None:
    done = run(helm, "template", "nemo", "helm/nemoserve", "--kube-version", "1.27.0")
    assert done.returncode
