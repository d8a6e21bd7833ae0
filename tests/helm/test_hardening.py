"""Policies, asserted from the objects that every set of values renders to."""

from __future__ import annotations

import copy

import pytest

from helm.chart import Object, RenderError, objects, of_kind, render
from helm.tools import HELMS
from tests.helm.conftest import SETS, one, pod_specs, rendered, server, workload

INJECT = "sidecar.istio.io/inject"
BY_RESTRICTED = ("emptyDir", "configMap", "secret", "persistentVolumeClaim")


def violations(spec: Object, *, ids_from_namespace: bool = False) -> list[str]:
    """What of a pod the restricted level of Pod Security would refuse, and two things that it would not."""
    pod = spec.get("securityContext", {})
    found = []
    if not pod.get("runAsNonRoot"):
        found.append("may run as root")
    if pod.get("runAsUser", 1000) == 0 or (not ids_from_namespace and "runAsUser" not in pod):
        found.append("runs as a user of the image's choice")
    if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("has no seccomp profile")
    found += [f"{field} is shared with the node" for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    for volume in spec["volumes"]:
        if not any(kind in volume for kind in BY_RESTRICTED):
            found.append(f"mounts {volume}")
    for container in spec["containers"]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            found.append("may gain privileges")
        if own.get("capabilities", {}).get("drop") != ["ALL"] or own.get("capabilities", {}).get("add"):
            found.append("has capabilities")
        if not own.get("readOnlyRootFilesystem"):
            found.append("writes to its image")
        found += [f"port {port} of the node" for port in container.get("ports", []) if "hostPort" in port]
    if spec.get("automountServiceAccountToken") is not False and not is_operator(spec):
        found.append("has a token of the cluster")
    return found


def is_operator(spec: Object) -> bool:
    """The one pod that talks to the API server."""
    return [each["name"] for each in spec["containers"]] == ["autoscaler"]


@pytest.mark.parametrize("name", SETS)
def test_every_pod_is_restricted(name: str) -> None:
    for spec in pod_specs(rendered(name)):
        found = violations(spec, ids_from_namespace=name == "openshift")
        if name == "host-path":
            assert [each for each in found if "hostPath" not in each] == []
            assert len(found) <= 1
        else:
            assert found == []


def test_a_hole_would_be_found() -> None:
    [spec] = [each for each in pod_specs(rendered("default")) if len(each["volumes"]) > 1][:1]
    worse = copy.deepcopy(spec)
    worse["hostNetwork"] = True
    worse["containers"][0]["securityContext"]["capabilities"] = {"drop": []}
    del worse["automountServiceAccountToken"]
    assert len(violations(worse)) == 3


@pytest.mark.parametrize("name", SETS)
def test_no_secret_is_in_an_object(name: str) -> None:
    found = rendered(name)
    assert of_kind(found, "Secret") == []
    for spec in pod_specs(found):
        for container in spec["containers"]:
            for variable in container.get("env", []):
                secret = "secretKeyRef" in variable.get("valueFrom", {})
                assert secret == (variable["name"] in ("HF_TOKEN", "NEMOSERVE_API_KEY"))


@pytest.mark.parametrize("name", SETS)
def test_there_are_no_rights_in_the_cluster(name: str) -> None:
    """test_operator.py says which the operator has in its namespace."""
    found = rendered(name)
    rights = [each["kind"] for each in found if "Role" in each["kind"]]
    assert rights == (["Role", "RoleBinding"] if of_kind(found, "QueueAutoscaler") else [])
    for each in of_kind(found, "ServiceAccount"):
        assert each["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", SETS)
def test_services_put_no_variables_into_pods(name: str) -> None:
    """One called nemoserve-grpc would set NEMOSERVE_GRPC_PORT to tcp://…"""
    assert all(spec["enableServiceLinks"] is False for spec in pod_specs(rendered(name)))


@pytest.mark.parametrize("name", [name for name in SETS if name != "everything-off"])
def test_who_connects_is_said(name: str) -> None:
    found = rendered(name)
    policy = one(found, "NetworkPolicy", workload(found)["metadata"]["name"])["spec"]
    assert policy["podSelector"] == workload(found)["spec"]["selector"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    if name != "keys-tls":  # published, with keys
        assert {"podSelector": {}} in policy["ingress"][0]["from"]
    names = {port["name"] for port in server(found)["ports"]}
    assert {port["port"] for port in policy["ingress"][0]["ports"]} == names
    assert all(rule.get("ports") or rule.get("to") for rule in policy["egress"])


def test_what_is_offline_reaches_nothing_but_names() -> None:
    egress = one(rendered("air-gap"), "NetworkPolicy")["spec"]["egress"]
    assert [port["port"] for rule in egress for port in rule["ports"]] == [53, 53]


@pytest.mark.parametrize("collector", ["http://otel:4317", "https://otel.example.com", "http://otel:14317/x"])
def test_the_collector_can_be_reached(collector: str) -> None:
    found = objects(render(HELMS[-1], None, "--set", f"tracing.otlpEndpoint={collector}"))
    ports = [port["port"] for rule in one(found, "NetworkPolicy")["spec"]["egress"] for port in rule["ports"]]
    assert ports[-1] == (14317 if "14317" in collector else 4317)


def test_what_a_clusters_rules_ask_for_reaches_every_pod() -> None:
    """Admission refuses pods without labels, a quota those without limits; the Job fetches over the same proxy."""
    found = rendered("platform")
    assert all(each["metadata"]["labels"].items() >= {"team": "search"}.items() for each in found)
    pods = [each["spec"]["template"] for each in found if "template" in each.get("spec", {})] + of_kind(found, "Pod")
    assert len(pods) == 4
    for pod in pods:
        [container] = pod["spec"]["containers"]
        assert pod["metadata"]["labels"]["team"] == "search"
        assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
        assert ("HTTPS_PROXY" in str(container)) == any(each["name"] == "authority" for each in pod["spec"]["volumes"])
    injected = {pod["spec"]["containers"][0]["name"]: pod["metadata"]["labels"].get(INJECT) for pod in pods}
    assert injected == {"server": "true", "autoscaler": None, "pull": "false", "ask": "false"}
    for policy in of_kind(found, "NetworkPolicy"):
        assert policy["spec"]["egress"][-1] == {"ports": [{"port": 15012, "protocol": "TCP"}]}


@pytest.mark.parametrize("label", ["app.kubernetes.io/name", "nemoserve.dev/serves"])
@pytest.mark.parametrize("place", ["commonLabels", "podLabels", "service.labels"])
def test_labels_by_which_pods_are_chosen_are_not_given_away(place: str, label: str) -> None:
    with pytest.raises(RenderError, match=place.partition(".")[0]):
        render("helm3", None, "--set", f"{place}.{label.replace('.', chr(92) + '.')}=mine")


@pytest.mark.parametrize("name", SETS)
def test_services_choose_servers_alone(name: str) -> None:
    found = rendered(name)
    others = [each for each in found if "template" in each.get("spec", {}) and each != workload(found)]
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in others]
    labels += [each["metadata"]["labels"] for each in of_kind(found, "Pod")]
    for service in of_kind(found, "Service"):
        selector = service["spec"]["selector"].items()
        assert selector <= workload(found)["spec"]["template"]["metadata"]["labels"].items()
        assert not any(selector <= each.items() for each in labels)
