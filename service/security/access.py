"""Who may call what: decided here for every protocol, by the exact name of the method or of the route that answers.

Nothing is open by accident. A call needs a key unless its name stands here as OPEN, and an admin's key unless it stands
here as OPEN or TENANT; one that is added and forgotten here is closed to all but admins. No decision looks at the text
of a path or at the Host header: who compares beginnings of paths has been got round by `//`, by `/v1/models?` in a Host
header, and by paths that two parsers read differently.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from service.caller import Caller, TenantLimits
from service.errors import Code, ServiceError
from service.security.exposure import asks_for_certificates, is_loopback
from service.security.keys import NAME, NO_LIMITS, KeysFile, Tenant


class Level(enum.Enum):
    """What a call asks of its caller."""

    OPEN = "nothing"
    TENANT = "a key"
    ADMIN = "an admin's key"


# Open is only what a prober or a load balancer asks before it can have a key, and what says nothing but yes or no; and
# the page for people, because a browser cannot send a key with the address that is typed: the page is the same file
# for everybody, and what it does later needs a key like everything else.
_HEALTH, _REFLECTION = "/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/"
_TYPED, _KSERVE = "/nemoserve.v1.GenerationService/", "/inference.GRPCInferenceService/"

RPCS: Mapping[str, Level] = {
    **{_HEALTH + name: Level.OPEN for name in ("Check", "List", "Watch")},
    **{_KSERVE + name: Level.OPEN for name in ("ServerLive", "ServerReady")},
    _REFLECTION + "ServerReflectionInfo": Level.TENANT,
    **{
        _TYPED + name: Level.TENANT
        for name in ("Generate", "Tokenize", "Detokenize", "ListModels", "GetModel", "GetLoad", "WatchLoad")
    },
    **{
        _KSERVE + name: Level.TENANT
        for name in (
            *("ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex"),
            *("ModelInfer", "ModelStreamInfer"),
            *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"),  # refused
            *("CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"),  # all the same
        )
    },
    # TraceSetting and LogSettings read and write by one method.
    **{
        _KSERVE + name: Level.ADMIN
        for name in ("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings")
    },
}
"""By full method name."""

METRICS = ("GET /metrics", "GET /v1/metrics")

ROUTES: Mapping[str, Level] = {
    **{
        f"GET {path}": Level.OPEN
        for path in (
            "/v1/health/live",
            "/v1/health/ready",
            "/v2/health/live",
            "/v2/health/ready",
            "/health",
            "/",
            "/playground/{name}",
        )
    },
    **{
        f"GET {path}": Level.TENANT
        for path in (
            *("/v1/models", "/v1/models/{model:path}", "/v2/models/{model:path}/ready", "/tokenizer_info"),
            *("/v1/metadata", "/v1/manifest", "/v1/version", "/v1/license", "/openapi.json", "/docs"),
        )
    },
    **{each: Level.TENANT for each in METRICS},  # they tell of all tenants together; see Access.open_routes
    **{
        f"POST {path}": Level.TENANT for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
    },
}
"""By method and path of the route, as the route itself has it: parameters in braces. HEAD counts as GET."""


UNKNOWN = TenantLimits()  # where nobody is asked who he is, whoever lets him through decides


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Lets callers in or not.

    Attributes:
        keys: who has a key; None = nobody is asked for one.
        client_certificates: every connection has shown one that the client CA has signed.
        trusted: without keys and certificates, callers may also change what is served: nobody else can reach us.
        open_routes: routes that need no key either, for scrapers that cannot send one.
    """

    keys: KeysFile | None = None
    client_certificates: bool = False
    trusted: bool = True
    open_routes: frozenset[str] = frozenset()

    def limits(self, tenant: str) -> TenantLimits:
        """How much of the server it may have."""
        if self.keys is not None:
            return self.keys.limits(tenant)
        return NO_LIMITS if self.client_certificates else UNKNOWN

    def level_of_rpc(self, method: str) -> Level:
        return RPCS.get(method, Level.ADMIN)

    def level_of_route(self, route: str) -> Level:
        return Level.OPEN if route in self.open_routes else ROUTES.get(route, Level.ADMIN)

    def admit(self, level: Level, headers: Iterable[tuple[str, str]], certificate: Callable[[], str | None]) -> Caller:
        """As whom a call goes on.

        Args:
            headers: of the call, names in lower case.
            certificate: finds the name in the client's certificate; asked only if it decides.

        Raises:
            ServiceError: UNAUTHENTICATED or PERMISSION_DENIED.
        """
        if level is Level.OPEN:
            return Caller(admin=False)
        return decide(level, self._identify(headers, certificate))

    def check_origin(self, origin: str | None) -> None:
        """Of a page in a browser. Any site can give its name the address of this machine, and so have its pages ask
        what is open to everybody here; that they come from that site browsers still say.

        Raises:
            ServiceError: PERMISSION_DENIED.
        """
        if origin is None or self.keys is not None or self.client_certificates or not self.trusted:
            return
        try:
            host = urlsplit(origin).hostname or ""
        except ValueError:
            host = ""
        if not is_loopback(host):
            raise ServiceError(Code.PERMISSION_DENIED, "without keys, only pages of this machine are served")

    def _identify(self, headers: Iterable[tuple[str, str]], certificate: Callable[[], str | None]) -> Caller | None:
        """Raises ServiceError: UNAUTHENTICATED, for a key that is none. A certificate does not make up for it."""
        if self.keys is not None and (key := presented_key(headers)) is not None:
            if (tenant := self.keys.keys.of_key(key)) is None:
                raise ServiceError(Code.UNAUTHENTICATED, "the API key is not known here")
            return _caller(tenant)
        if not self.client_certificates:
            return Caller(admin=self.trusted) if self.keys is None else None
        name = certificate()
        if name is None or NAME.fullmatch(name) is None:
            raise ServiceError(Code.UNAUTHENTICATED, "the client certificate has no name that a tenant can have")
        if self.keys is None:
            return Caller(tenant=name, admin=False)
        tenant = self.keys.keys.of_certificate(name)
        return None if tenant is None else _caller(tenant)


EVERYBODY = Access()
"""Whoever reaches the port may do everything: on loopback, without keys."""


def access_of(values: Mapping[str, Any]) -> Access:
    """Raises SecurityError: the keys file cannot be used."""
    return Access(
        keys=KeysFile(Path(values["api_keys_file"])) if values["api_keys_file"] else None,
        client_certificates=asks_for_certificates(values),
        trusted=is_loopback(values["host"]),
        open_routes=frozenset(METRICS) if values["metrics_without_key"] else frozenset(),
    )


def decide(level: Level, caller: Caller | None) -> Caller:
    """The caller, if there is one who may do this.

    Raises:
        ServiceError: UNAUTHENTICATED, PERMISSION_DENIED.
    """
    if caller is None:
        raise ServiceError(
            Code.UNAUTHENTICATED, "an API key is needed: `authorization: Bearer KEY` or `x-api-key: KEY`"
        )
    if level is Level.ADMIN and not caller.admin:
        raise ServiceError(Code.PERMISSION_DENIED, "this needs the API key of an admin")
    return caller


def _caller(tenant: Tenant) -> Caller:
    return Caller(tenant=tenant.name, admin=tenant.admin)


def presented_key(headers: Iterable[tuple[str, str]]) -> str | None:
    """The key that a call brings, None without one.

    Raises:
        ServiceError: UNAUTHENTICATED for two different ones: who is meant would be anybody's guess.
    """
    keys = set()
    for name, value in headers:
        if name == "x-api-key":
            keys.add(value.strip())
        elif name == "authorization":
            scheme, _, token = value.strip().partition(" ")
            if scheme.lower() == "bearer":  # others are for a proxy in front
                keys.add(token.strip())
    if len(keys) > 1:
        raise ServiceError(Code.UNAUTHENTICATED, "there are two different API keys in the headers")
    return keys.pop() if keys else None
