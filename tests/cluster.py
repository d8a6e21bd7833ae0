"""What only a real cluster can tell. `make cluster-test`.

First the contract of API servers, which the operator's tests take from a fake: that the real one keeps it too. Then a
release: install, test, upgrade, roll back, uninstall, with both helms.

Needs KUBECONFIG, and for the release an image that the cluster can pull,
IMAGE=registry.example.com/nemoserve:0.1.0-cpu. It works in namespaces of its own, the release's held to the restricted
level of Pod Security, and deletes them at the end, and the custom resource definition too, unless it was there. Without
KUBECONFIG it says so and has tested nothing.

With OPERATOR=registry.example.com/nemoserve:0.1.0-autoscaler the operator comes to the release and goes again, for
which the cluster gets the definition of QueueAutoscaler, and keeps it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Mapping

from helm.chart import CHART, CI
from helm.manifests import DEPLOY
from helm.tools import HELMS, tool

CONTRACT = "tests/autoscaler/contract"
READY = "--wait", "--timeout=15m"
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


def steps(namespace: str, image: str) -> list[list[str]]:
    """What is done with one helm; each command ends with 0, or the release is not as it should be."""
    repository, _, tag = image.rpartition(":")
    chosen = [
        str(CHART),
        f"--values={CI / 'cpu-values.yaml'}",
        f"--set-string=image.repository={repository},image.tag={tag}",
    ]
    within = f"--namespace={namespace}"
    return [
        ["install", "nemo", *chosen, within, *READY],
        ["test", "nemo", within, "--timeout=5m"],
        ["upgrade", "nemo", *chosen, "--set=settings.max_batch_size=8,replicaCount=2", within, *READY],
        ["test", "nemo", within, "--timeout=5m"],
        ["rollback", "nemo", "1", within, *READY],
        ["test", "nemo", within, "--timeout=5m"],
        ["uninstall", "nemo", within, *READY],
    ]


def operated(namespace: str, image: str, operator: str) -> list[list[str]]:
    """The operator comes to a release that runs, and goes again; each command with its program."""
    _, upgrade, *_ = [step for step in steps(namespace, image) if step[0] in ("install", "upgrade")]
    repository, _, tag = operator.rpartition(":")
    images = f"--set-string=autoscaling.operator.image.repository={repository},autoscaling.operator.image.tag={tag}"
    within = f"--namespace={namespace}"
    return [
        ["kubectl", "apply", "--server-side", f"--filename={DEPLOY / 'crds'}"],
        ["helm", *upgrade, images, "--set=autoscaling.enabled=true"],
        ["kubectl", "wait", "qas/nemo-nemoserve", "--for=condition=Ready", "--timeout=2m", within],
        ["helm", *upgrade],
    ]


def run(program: str, *args: str) -> str:
    print("$", program, *args, flush=True)
    done = subprocess.run([tool(program), *args], stdout=subprocess.PIPE, text=True, timeout=1200, check=True)
    print(done.stdout, flush=True)
    return done.stdout


def contract_holds() -> bool:
    command = [sys.executable, "-m", "pytest", CONTRACT, "--cluster"]
    print("$", *command, flush=True)
    return subprocess.run(command, timeout=1200, check=False).returncode == 0


def main(environ: Mapping[str, str]) -> int:
    if not environ.get("KUBECONFIG"):
        print("KUBECONFIG is not set: no cluster was asked, nothing was tested")
        return 0
    if not contract_holds():
        print("the cluster and the fake that stands for it differ")
        return 1
    if ":" not in environ.get("IMAGE", "").rpartition("/")[2]:
        print("no release was tested: IMAGE must be an image with a tag that the cluster can pull")
        return 2
    operator = environ.get("OPERATOR", "")
    for helm in HELMS:
        namespace = f"nemoserve-{uuid.uuid4().hex[:8]}"
        run("kubectl", "create", "namespace", namespace)
        try:
            run("kubectl", "label", "namespace", namespace, RESTRICTED)
            for step in steps(namespace, environ["IMAGE"]):
                if step[0] == "uninstall" and operator:
                    for program, *args in operated(namespace, environ["IMAGE"], operator):
                        run(helm if program == "helm" else program, *args)
                run(helm, *step)
            left = run("kubectl", "get", "all,pvc,configmap", f"--namespace={namespace}", "--output=name").split()
            if left := [name for name in left if name != "configmap/kube-root-ca.crt"]:
                print("left behind:", *left)
                return 1
        finally:
            run("kubectl", "delete", "namespace", namespace)
    print("installed, tested, upgraded, rolled back and uninstalled with", " and ".join(HELMS))
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
