"""The operator of a release: one value turns it on, its rights are few, and it finds whom it scales."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest

from autoscaler.main import FILE, cli
from helm.chart import DEFINITION, Object, RenderError, objects, of_kind, render
from helm.tools import HELMS
from tests.helm.conftest import COMPONENT, SETS, one, rendered, server, workload
from tests.helm.test_resource import Schema, defaulted, load, refusals, spec_of

QUEUE = [name for name in SETS if of_kind(rendered(name), "QueueAutoscaler")]
NAME, OPERATOR = "nemo-nemoserve", "nemo-nemoserve-autoscaler"


def operator(found: list[Object]) -> Object:
    return one(found, "Deployment", OPERATOR)


def container(found: list[Object]) -> Object:
    [only] = operator(found)["spec"]["template"]["spec"]["containers"]
    return only


def test_one_value_turns_it_on() -> None:
    found = objects(render(HELMS[-1], None, "--set", "autoscaling.enabled=true"))
    assert of_kind(found, "QueueAutoscaler")
    assert operator(found)["spec"]["replicas"] == 2  # one leads, and one is ready to


def closed(schema: Schema) -> Schema:
    """A typo is an error: the API server would drop the field."""
    schema = copy.deepcopy(schema)
    if "properties" in schema:
        schema["additionalProperties"] = False
        schema["properties"] = {name: closed(below) for name, below in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = closed(schema["items"])
    return schema


def errors(resource: Object) -> list[str]:
    """What the API server would say of it."""
    schema = spec_of(load(DEFINITION))
    found = [each.message for each in jsonschema.Draft4Validator(closed(schema)).iter_errors(resource["spec"])]
    return found or refusals(schema, defaulted(schema, copy.deepcopy(resource["spec"])))


@pytest.mark.parametrize("name", QUEUE)
def test_the_resource_is_one_that_the_definition_takes(name: str) -> None:
    resource = one(rendered(name), "QueueAutoscaler")
    assert errors(resource) == []
    resource["spec"]["minReplica"] = 1
    resource["spec"]["target"]["ttftSeconds"] = 0
    assert len(errors(resource)) == 2


def test_what_was_asked_for_is_in_the_resource() -> None:
    spec = one(rendered("scale-to-zero"), "QueueAutoscaler")["spec"]
    assert spec == {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME},
        "minReplicas": 0,
        "maxReplicas": 16,
        "target": {"ttftSeconds": 1.5, "itlSeconds": 0.06, "lateShare": 0.01, "queueWaitSeconds": 0.5},
        "behavior": {
            "scaleOut": {"maxStep": 8},
            "scaleIn": {"windowSeconds": 600, "maxStep": 2, "periodSeconds": 300},
        },
        "scaleToZero": {"enabled": True, "idleSeconds": 1800},
        "schedules": [{"cron": "45 7 * * 1-5", "durationSeconds": 7200, "minReplicas": 4, "timezone": "Europe/Berlin"}],
        "dryRun": False,
    }
    assert one(rendered("autoscaling-volumes"), "QueueAutoscaler")["spec"]["target"]["queuedTokensPerReplica"] == 2**24


def test_ports_are_those_that_the_definition_takes_for_granted() -> None:
    fields = spec_of(load(DEFINITION))["properties"]
    ports = {port["name"]: port["containerPort"] for port in server(rendered("autoscaling"))["ports"]}
    assert (fields["grpcPort"]["default"], fields["metricsPort"]["default"]) == (ports["grpc"], ports["http-openai"])


# -- the definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_helm_brings_the_definition_where_autoscaling_is_on_and_nobody_says_otherwise(name: str) -> None:
    """As it would on install; it is never part of the release, which an uninstall deletes."""
    found = of_kind(objects(render(HELMS[-1], SETS[name], "--include-crds")), "CustomResourceDefinition")
    assert len(found) == (name in (*QUEUE, "hpa", "keda"))
    assert of_kind(rendered(name), "CustomResourceDefinition") == []


@pytest.mark.parametrize("helm", HELMS)
def test_an_upgrade_that_turns_it_on_asks_for_the_definition(helm: str) -> None:
    """helm brings definitions on install alone."""
    with pytest.raises(RenderError, match="kubectl apply --server-side --filename deploy/crds"):
        render(helm, SETS["autoscaling"], "--is-upgrade")
    assert render(helm, SETS["autoscaling"], "--is-upgrade", "--api-versions=autoscaling.nemoserve.dev/v1alpha1")


# -- rights ------------------------------------------------------------------------------------------------------------

# what it may do in its namespace: "group/resource" -> verbs, and whether of named objects alone
RIGHTS = {
    "autoscaling.nemoserve.dev/queueautoscalers": ({"get", "list", "watch"}, False),
    "autoscaling.nemoserve.dev/queueautoscalers/status": ({"patch"}, True),
    "apps/deployments/scale": ({"get", "patch"}, True),
    "/pods": ({"get", "list", "watch", "patch"}, False),
    "events.k8s.io/events": ({"create", "patch"}, False),
    "coordination.k8s.io/leases": ({"get", "update"}, True),
    "coordination.k8s.io/leases ": ({"create"}, False),  # of what is not there yet no name can be given
    "autoscaling/horizontalpodautoscalers": ({"list"}, False),
}


def rights(role: Object) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rule in role["rules"]:
        assert rule.keys() <= {"apiGroups", "resources", "resourceNames", "verbs"}
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                key = f"{group}/{resource}"
                found[key + " " * (key in found)] = (set(rule["verbs"]), "resourceNames" in rule)
    return found


@pytest.mark.parametrize("name", QUEUE)
def test_its_rights_are_these(name: str) -> None:
    found = rendered(name)
    kind = f"{workload(found)['kind'].lower()}s"
    role = one(found, "Role", OPERATOR)
    assert rights(role) == {key.replace("deployments", kind): value for key, value in RIGHTS.items()}
    assert "*" not in str(role["rules"])
    names = {name for rule in role["rules"] for name in rule.get("resourceNames", [])}
    assert names == {workload(found)["metadata"]["name"], OPERATOR}


@pytest.mark.parametrize("name", QUEUE)
def test_its_pods_alone_have_them(name: str) -> None:
    found = rendered(name)
    binding = one(found, "RoleBinding", OPERATOR)
    assert binding["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": OPERATOR}
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": OPERATOR, "namespace": "serving"}]
    users = [
        each["metadata"]["name"]
        for each in found
        if "template" in each.get("spec", {}) and each["spec"]["template"]["spec"]["serviceAccountName"] == OPERATOR
    ]
    assert users == [OPERATOR]
    assert one(found, "ServiceAccount", OPERATOR)


# -- pods and their neighbours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_every_server_bears_the_label_and_no_selector_depends_on_it(name: str) -> None:
    """So that a release of any kind may turn the operator on later, and pods may lose the label while they drain."""
    spec = workload(rendered(name))["spec"]
    name = workload(rendered(name))["metadata"]["name"]
    assert spec["template"]["metadata"]["labels"]["nemoserve.dev/serves"] == name
    assert "nemoserve.dev/serves" not in spec["selector"]["matchLabels"]


@pytest.mark.parametrize("name", SETS)
def test_services_choose_by_the_label_where_the_operator_may_take_it(name: str) -> None:
    found = rendered(name)
    for service in of_kind(found, "Service"):
        if name in QUEUE:
            assert service["spec"]["selector"] == {"nemoserve.dev/serves": NAME}
        else:
            assert service["spec"]["selector"] == workload(found)["spec"]["selector"]["matchLabels"]


@pytest.mark.parametrize("name", QUEUE)
def test_it_is_no_server_until_it_says_so(name: str) -> None:
    found = rendered(name)
    labels = operator(found)["spec"]["template"]["metadata"]["labels"]
    assert labels.items() >= operator(found)["spec"]["selector"]["matchLabels"].items()
    assert "nemoserve.dev/serves" not in labels
    assert labels[COMPONENT] == "autoscaler"
    for each in (*of_kind(found, "NetworkPolicy"), *of_kind(found, "PodDisruptionBudget")):
        selector = (each["spec"].get("selector") or each["spec"]["podSelector"])["matchLabels"]
        assert (selector.items() <= labels.items()) == (each["metadata"]["name"] == OPERATOR)


@pytest.mark.parametrize("name", QUEUE)
def test_it_holds_requests_at_the_ports_that_services_lead_to(name: str) -> None:
    found = rendered(name)
    ports = {port["name"]: port["containerPort"] for port in container(found)["ports"]}
    theirs = {port["name"]: port["containerPort"] for port in server(found)["ports"]}
    zero = one(found, "QueueAutoscaler")["spec"]["scaleToZero"]["enabled"]
    assert ports == {"metrics": 9090, **(theirs if zero else {})}
    ingress = one(found, "NetworkPolicy", OPERATOR)["spec"]["ingress"]
    assert {port["port"] for rule in ingress for port in rule["ports"]} == set(ports)


@pytest.mark.parametrize("name", QUEUE)
def test_it_reaches_servers_and_the_api_server_and_at_zero_the_one_that_leads(name: str) -> None:
    found = rendered(name)
    egress = one(found, "NetworkPolicy", OPERATOR)["spec"]["egress"]
    anywhere = [port["port"] for rule in egress if "to" not in rule for port in rule["ports"]]
    assert anywhere == [53, 53, 443, 6443, *([15012] if name == "platform" else [])]  # the last is its own rule
    [servers] = [rule for rule in egress if "to" in rule]
    selectors = [workload(found)["spec"]["selector"]]
    if name == "scale-to-zero":  # what a process holds that does not lead it passes on
        selectors.append(operator(found)["spec"]["selector"])
    assert servers["to"] == [{"podSelector": selector} for selector in selectors]
    assert {port["port"] for port in servers["ports"]} == {port["name"] for port in server(found)["ports"]}


def test_at_zero_it_takes_its_own_whomever_else_it_takes() -> None:
    others = "networkPolicy.from[0].namespaceSelector.matchLabels.team=ingress"
    found = objects(render(HELMS[-1], SETS["scale-to-zero"], "--set", others))
    [rule] = one(found, "NetworkPolicy", OPERATOR)["spec"]["ingress"]
    team = {"namespaceSelector": {"matchLabels": {"team": "ingress"}}}
    assert rule["from"] == [team, {"podSelector": operator(found)["spec"]["selector"]}]


def test_servers_take_it_whomever_else_they_take() -> None:
    others = "networkPolicy.from[0].namespaceSelector.matchLabels.team=ingress"
    found = objects(render(HELMS[-1], SETS["autoscaling"], "--set", others))
    first, second = one(found, "NetworkPolicy", NAME)["spec"]["ingress"]
    assert first["from"] == [{"namespaceSelector": {"matchLabels": {"team": "ingress"}}}]
    assert second["from"] == [{"podSelector": operator(found)["spec"]["selector"]}]
    assert second["ports"] == first["ports"]


def test_it_asks_for_no_gpu_and_runs_an_image_without_any() -> None:
    found = rendered("scale-to-zero")
    assert container(found)["image"] == "nemoserve:0.1.0-autoscaler"
    assert "nvidia" not in str(operator(found))
    digest = "sha256:" + "0" * 64
    found = objects(render(HELMS[-1], SETS["autoscaling"], "--set", f"autoscaling.operator.image.digest={digest}"))
    assert container(found)["image"] == f"nemoserve@{digest}"


def test_it_knows_who_it_is() -> None:
    variables = {each["name"]: each["valueFrom"] for each in container(rendered("scale-to-zero"))["env"]}
    assert variables == {
        "POD_NAME": {"fieldRef": {"fieldPath": "metadata.name"}},
        "POD_NAMESPACE": {"fieldRef": {"fieldPath": "metadata.namespace"}},
    }


def test_it_finds_the_files_that_it_is_told_of() -> None:
    """The servers' key, which it shows, and their certificate; files, which may be exchanged under it."""
    found = rendered("scale-to-zero")
    mounted = {mount["name"]: mount["mountPath"] for mount in container(found)["volumeMounts"]}
    volumes = {each["name"]: each for each in operator(found)["spec"]["template"]["spec"]["volumes"]}
    assert mounted.keys() == volumes.keys()
    assert volumes["key"]["secret"]["secretName"] == "nemoserve-operator-key"
    assert volumes["key"]["secret"]["items"] == [{"key": "token", "path": "token"}]
    assert volumes["tls"]["secret"]["secretName"] == "nemoserve-tls"
    paths = [each.partition("=")[2] for each in container(found)["args"] if "=/" in each]
    assert len(paths) == 4
    assert {path.rpartition("/")[0] for path in paths} == {mounted["key"], mounted["tls"]}


FILES = "/etc/nemoserve/tls"


def test_it_is_told_whose_requests_it_holds_and_how_many() -> None:
    assert container(rendered("autoscaling"))["args"] == [
        f"--name={NAME}",
        f"--lease-name={OPERATOR}",
        "--log-level=info",
        "--log-json",
    ]
    assert container(rendered("scale-to-zero"))["args"][4:] == [
        *(f"--activate={NAME}", "--hold-requests=1024", "--hold-mebibytes=64", "--hold-seconds=600"),
        "--api-key-file=/etc/nemoserve/key/token",
        *(f"--tls-cert={FILES}/tls.crt", f"--tls-key={FILES}/tls.key", f"--tls-ca={FILES}/ca.crt"),
        f"--tls-server-name={NAME}",
    ]


@pytest.mark.parametrize("name", QUEUE)
def test_the_program_takes_what_it_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FILE, "exists", False)
    args = container(rendered(name))["args"]
    with cli.make_context("nemoserve-autoscaler", list(args)) as context:
        assert context.params["names"] == (NAME,)
        assert context.params["lease_name"] == OPERATOR
        assert context.params["metrics_port"] == 9090
        assert (context.params["activator_http_port"], context.params["activator_grpc_port"]) == (8000, 8001)


def test_it_is_scraped_where_servers_are() -> None:
    found = rendered("scale-to-zero")
    monitor = one(found, "PodMonitor", OPERATOR)["spec"]
    assert monitor["selector"] == operator(found)["spec"]["selector"]
    [endpoint] = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in container(found)["ports"]]
    assert "authorization" not in endpoint  # it has numbers of its own alone, and no key
