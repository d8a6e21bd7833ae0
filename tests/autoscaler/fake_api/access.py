"""Who calls, by bearer token, and what that account may do, by the Roles that are stored."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from tests.autoscaler.fake_api.errors import ApiError, Json
from tests.autoscaler.fake_api.machinery import Machinery

ADMIN = "kubernetes-admin"
RBAC = "rbac.authorization.k8s.io"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. `resource` with its subresource: `deployments/scale`."""

    user: str
    verb: str
    group: str = ""
    resource: str = ""
    namespace: str = ""
    name: str = ""

    def __str__(self) -> str:
        where = f' in the namespace "{self.namespace}"' if self.namespace else " at the cluster scope"
        what = f'resource "{self.resource}" in API group "{self.group}"'
        return f'User "{self.user}" cannot {self.verb} {what}{where}'


class Access:
    """Attributes:
    tokens: token -> user.
    """

    def __init__(self, machinery: Machinery) -> None:
        self._machinery = machinery
        self.tokens: dict[str, str] = {}

    def token(self, user: str) -> str:
        """A new one."""
        token = secrets.token_hex(16)
        self.tokens[token] = user
        return token

    def user(self, authorization: str) -> str:
        """Raises 401 for a token that nobody has."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or token.strip() not in self.tokens:
            raise ApiError(401, "Unauthorized", "Unauthorized")
        return self.tokens[token.strip()]

    def check(self, request: Request) -> None:
        """Raises 403 for what no role of the user's allows."""
        if request.user != ADMIN and not any(_allows(rule, request) for rule in self._rules(request)):
            plural = request.resource.partition("/")[0]
            qualified = f"{plural}.{request.group}" if request.group else plural
            what = f'{qualified} "{request.name}"' if request.name else qualified
            raise ApiError(403, "Forbidden", f"{what} is forbidden: {request}")

    def _rules(self, request: Request) -> Iterator[Json]:
        store, resource = self._machinery.store, self._machinery.resource
        bindings = store.list(resource(RBAC, "clusterrolebindings"))
        if request.namespace:
            bindings += store.list(resource(RBAC, "rolebindings"), request.namespace)
        for binding in bindings:
            if any(_is(subject, request.user) for subject in binding.get("subjects", ())):
                role, namespace = binding["roleRef"], binding["metadata"].get("namespace", "")
                plural, within = ("roles", namespace) if role["kind"] == "Role" else ("clusterroles", "")
                found = store.find(resource(RBAC, plural), within, role["name"])
                yield from (found or {}).get("rules") or ()


def account(namespace: str, name: str) -> str:
    """The user that a ServiceAccount is."""
    return f"system:serviceaccount:{namespace}:{name}"


def _is(subject: Json, user: str) -> bool:
    if subject["kind"] == "ServiceAccount":
        return account(subject["namespace"], subject["name"]) == user
    return bool(subject["kind"] == "User" and subject["name"] == user)


def _allows(rule: Json, request: Request) -> bool:
    plural, slash, subresource = request.resource.partition("/")
    asked = {"*", request.resource, f"*/{subresource}" if slash else plural}
    names = rule.get("resourceNames")
    return (
        bool({"*", request.verb} & set(rule.get("verbs", ())))
        and bool({"*", request.group} & set(rule.get("apiGroups", ())))
        and bool(asked & set(rule.get("resources", ())))
        and (not names or request.name in names)
    )
