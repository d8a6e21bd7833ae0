"""Servers of a release: where they run, when they are ready, how they go, and where models are kept."""

from __future__ import annotations

import pytest

from helm.chart import Object, objects, of_kind, render
from helm.tools import HELMS
from tests.helm.conftest import SETS, one, rendered, server, workload


def of(values: str, name: str = "default") -> list[Object]:
    return objects(render(HELMS[-1], SETS[name], "--set", values))


def pod(found: list[Object]) -> Object:
    spec: Object = workload(found)["spec"]["template"]["spec"]
    return spec


def products(found: list[Object]) -> list[str]:
    affinity = pod(found)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    [[expression]] = [term["matchExpressions"] for term in affinity["nodeSelectorTerms"]]
    assert (expression["key"], expression["operator"]) == ("nvidia.com/gpu.product", "In")
    return list(expression["values"])


@pytest.mark.parametrize(("product", "known"), [("a100", "A100"), ("h100", "H100"), ("h200", "H200")])
def test_servers_run_on_the_cards_that_were_asked_for(product: str, known: str) -> None:
    found = of(f"gpu.product={product}")
    assert all(known in label for label in products(found))
    assert server(found)["resources"]["limits"] == {"nvidia.com/gpu": 1}


def test_labels_of_ones_own_and_several_gpus() -> None:
    found = rendered("tensor-parallel")
    assert products(found) == ["NVIDIA-L40S"]
    assert server(found)["resources"]["limits"] == {"nvidia.com/gpu": 2}


def test_other_affinity_is_kept_beside_that_of_the_gpu() -> None:
    anti = "affinity.podAntiAffinity.preferredDuringSchedulingIgnoredDuringExecution"
    found = of(f"gpu.product=h100,{anti}[0].weight=1")
    assert set(pod(found)["affinity"]) == {"nodeAffinity", "podAntiAffinity"}
    own = "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
    found = of(f"gpu.product=h100,{own}[0].matchExpressions[0].key=mine")
    assert pod(found)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] == {
        "nodeSelectorTerms": [{"matchExpressions": [{"key": "mine"}]}]
    }


def test_without_gpus_there_is_none_and_the_image_is_the_small_one() -> None:
    found = rendered("cpu")
    assert server(found)["resources"]["limits"] == {"memory": "4Gi"}
    assert "affinity" not in pod(found)
    assert server(found)["image"] == "nemoserve:0.1.0-cpu"


@pytest.mark.parametrize("name", SETS)
def test_a_server_has_the_time_that_it_says_it_needs(name: str) -> None:
    """SIGTERM, drain, and five seconds until it is killed; nothing waits before SIGTERM."""
    config = one(rendered(name), "ConfigMap", workload(rendered(name))["metadata"]["name"])["data"]["nemoserve.yaml"]
    [drain] = [line.split('"')[1] for line in config.splitlines() if line.startswith("drain_timeout")]
    assert pod(rendered(name))["terminationGracePeriodSeconds"] == int(drain) + 5
    assert "lifecycle" not in server(rendered(name))


def budget(found: list[Object]) -> int:
    probe = server(found)["startupProbe"]
    return int(probe["periodSeconds"] * probe["failureThreshold"])


def test_the_startup_budget_follows_the_model() -> None:
    small, large = budget(rendered("cpu")), budget(rendered("a100"))
    assert 180 <= small <= 200
    assert large >= 180 + 23361 / 25 + 23361 / 100
    assert budget(of("model.name=hf://org/name,model.sizeGiB=100")) >= 180 + 102400 / 25 + 102400 / 100
    assert budget(of("model.name=hf://org/name")) >= budget(of("model.name=mistral-small-24b-instruct"))
    assert budget(of("startup.downloadMiBps=1000", "a100")) < large
    assert budget(rendered("long-drain")) == 3605
    assert budget(rendered("air-gap")) < 180 + 22.9 * 1024 / 100 + 10  # is read, not fetched


@pytest.mark.parametrize("name", SETS)
def test_a_rollout_is_not_given_up_while_a_server_starts(name: str) -> None:
    found = rendered(name)
    if workload(found)["kind"] == "Deployment":
        assert workload(found)["spec"]["progressDeadlineSeconds"] > budget(found)


@pytest.mark.parametrize("name", SETS)
def test_probes_ask_for_what_they_mean(name: str) -> None:
    container = server(rendered(name))
    for probe, health in (("startupProbe", "ready"), ("readinessProbe", "ready"), ("livenessProbe", "live")):
        if name in ("keys-tls", "pod-monitor", "scale-to-zero"):
            assert container[probe]["httpGet"] == {
                "path": f"/v1/health/{health}",
                "port": "http-openai",
                "scheme": "HTTPS",
            }
        else:
            assert container[probe]["grpc"] == {"port": 8001, "service": f"nemoserve.{health}"}


def test_models_are_fetched_once_onto_a_volume_that_all_share() -> None:
    found = rendered("h100")
    claim, job = one(found, "PersistentVolumeClaim"), one(found, "Job")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    fetcher = job["spec"]["template"]["spec"]
    assert fetcher["containers"][0]["args"] == ["pull", "mistral-nemo-12b-instruct"]
    assert fetcher["affinity"] == pod(found)["affinity"]  # or the volume may come to be where no GPU is
    assert "nvidia.com/gpu" not in str(fetcher["containers"][0]["resources"])
    for spec in (fetcher, pod(found)):
        volume = {"name": "model-store", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
        assert volume in spec["volumes"]
        environ = {each["name"]: each.get("value") for each in spec["containers"][0]["env"]}
        assert {"name": "model-store", "mountPath": environ["NEMOSERVE_CACHE"]} in spec["containers"][0]["volumeMounts"]


def test_another_model_is_another_job() -> None:
    names = {one(of(f"model.name={model}", "h100"), "Job")["metadata"]["name"] for model in ("a", "b")}
    assert len(names) == 2
    assert one(rendered("h100"), "Job") == one(of("replicaCount=3", "h100"), "Job")


@pytest.mark.parametrize("name", ["volume-per-server", "air-gap", "host-path", "default"])
def test_no_job_where_it_could_fill_nothing(name: str) -> None:
    assert of_kind(rendered(name), "Job") == []


def test_a_volume_for_each_server() -> None:
    found = rendered("volume-per-server")
    [template] = one(found, "StatefulSet")["spec"]["volumeClaimTemplates"]
    assert template["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert template["metadata"]["name"] in [mount["name"] for mount in server(found)["volumeMounts"]]
    assert of_kind(found, "PersistentVolumeClaim") == []


@pytest.mark.parametrize("name", SETS)
def test_every_mount_has_its_volume(name: str) -> None:
    found = rendered(name)
    own = [each["metadata"]["name"] for each in workload(found)["spec"].get("volumeClaimTemplates", [])]
    assert {mount["name"] for mount in server(found)["volumeMounts"]} == {
        *own,
        *(volume["name"] for volume in pod(found)["volumes"]),
    }


def test_what_the_config_says_rolls_the_pods() -> None:
    sums = {
        workload(of(f"settings.max_batch_size={size}"))["spec"]["template"]["metadata"]["annotations"][
            "checksum/config"
        ]
        for size in (8, 16)
    }
    assert len(sums) == 2


SCALERS = {
    "autoscaling": "QueueAutoscaler",
    "autoscaling-volumes": "QueueAutoscaler",
    "platform": "QueueAutoscaler",
    "scale-to-zero": "QueueAutoscaler",
    "hpa": "HorizontalPodAutoscaler",
    "keda": "ScaledObject",
}


@pytest.mark.parametrize("name", SETS)
def test_who_scales_has_the_say_over_replicas(name: str) -> None:
    found = rendered(name)
    scalers = [each for each in found if each["kind"] in SCALERS.values()]
    assert [each["kind"] for each in scalers] == ([SCALERS[name]] if name in SCALERS else [])
    assert ("replicas" in workload(found)["spec"]) == (not scalers)
    for each in scalers:
        target = each["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == (workload(found)["kind"], workload(found)["metadata"]["name"])


@pytest.mark.parametrize("name", ["ingress", "gateway"])
def test_what_is_published_leads_to_the_service(name: str) -> None:
    found = rendered(name)
    ports = {port["name"]: port["port"] for port in one(found, "Service", "nemo-nemoserve")["spec"]["ports"]}
    if name == "ingress":
        [rule] = one(found, "Ingress")["spec"]["rules"]
        assert rule["http"]["paths"][0]["backend"]["service"] == {
            "name": "nemo-nemoserve",
            "port": {"name": "http-openai"},
        }
    else:
        for kind, port in (("HTTPRoute", "http-openai"), ("GRPCRoute", "grpc")):
            [rule] = one(found, kind)["spec"]["rules"]
            assert rule["backendRefs"] == [{"name": "nemo-nemoserve", "port": ports[port]}]
