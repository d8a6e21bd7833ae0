"""A kube-apiserver on loopback: its life, who signs in, and what tests look at, and put there."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn
import yaml
from starlette.types import Receive, Scope, Send

from autoscaler.cluster.face import Kind
from tests.autoscaler.fake_api import selectors
from tests.autoscaler.fake_api.access import ADMIN, Access
from tests.autoscaler.fake_api.errors import Json
from tests.autoscaler.fake_api.front import Call, Front
from tests.autoscaler.fake_api.machinery import Machinery
from tests.autoscaler.fake_api.store import Store
from tests.service.security.certificates import Authority

CHANGES = ("create", "update", "patch", "delete")


class FakeApi:
    """A kube-apiserver on loopback. `async with FakeApi() as api:` runs it.

    Args:
        clock: Unix seconds, for timestamps.
        bookmark_seconds: between two bookmarks of a watch.
        authority: signs the certificate; without one it speaks plain HTTP, which kubectl sends no token over.

    Attributes:
        store: what it has; it outlives `stop` and `start`, as etcd does.
        calls: that were answered.
        faults: of them, the first that matches befalls a request.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        bookmark_seconds: float = 1.0,
        authority: Authority | None = None,
    ) -> None:
        self.store = Store()
        self.machinery = Machinery(self.store, clock)
        self.access = Access(self.machinery)
        self._front = Front(self.machinery, self.access, clock=clock, bookmark_seconds=bookmark_seconds, cut=self._cut)
        self.calls = self._front.calls
        self.faults = self._front.faults
        self._port = 0
        self._authority = authority
        self._signed = authority.server() if authority is not None else None
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._front(scope, receive, send)

    # -- its life, and who it knows ----------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"{'https' if self._signed else 'http'}://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """On the port that it had, if it ran before."""
        # Named TCP, so that asyncio sends at once what it is given: an answer would take 40 ms else
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(
            self,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.CRITICAL,
            access_log=False,
            ssl_certfile=None if self._signed is None else self._signed.certificate,
            ssl_keyfile=None if self._signed is None else self._signed.key,
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="fake-api")
        await self._server.listening.wait()

    async def stop(self) -> None:
        """At once: connections break, whatever is under way is lost. Raises what the fake itself failed with."""
        server, serving, self._server, self._serving = self._server, self._serving, None, None
        if server is None or serving is None:
            return
        server.leaving.set()
        await serving
        if self._front.bugs:
            raise self._front.bugs[0]

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def token(self, user: str = ADMIN) -> str:
        """A new one for this user: `system:serviceaccount:NAMESPACE:NAME`, or an administrator."""
        return self.access.token(user)

    def kubeconfig(self, folder: Path, user: str = ADMIN, namespace: str = "default") -> Path:
        """A new file in `folder` that signs in as this user."""
        token = self.token(user)
        context = {"cluster": "fake", "user": "user", "namespace": namespace}
        cluster = {"server": self.url}
        if self._authority is not None:
            cluster["certificate-authority"] = str(self._authority.path)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": cluster}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "fake", "context": context}],
            "current-context": "fake",
        }
        path = folder / f"kubeconfig-{token[:8]}"
        path.write_text(yaml.safe_dump(config))
        return path

    # -- what tests look at, and put there ---------------------------------------------------------------------

    def apply(self, *bodies: Json, namespace: str = "default") -> None:
        """Create objects, as an administrator, without a request. Custom resource definitions too."""
        for body in bodies:
            group, _, version = body["apiVersion"].rpartition("/")
            [resource] = [
                each
                for each in self.machinery.resources
                if (each.group, each.version, each.kind) == (group, version, body["kind"])
            ]
            within = body.get("metadata", {}).get("namespace", namespace) if resource.namespaced else ""
            self.machinery.create(resource, within, body)

    def apply_file(self, path: Path, namespace: str = "default") -> None:
        self.apply(*filter(None, yaml.safe_load_all(path.read_text())), namespace=namespace)

    def get(self, kind: Kind, name: str, namespace: str = "default") -> Json:
        """Raises ApiError 404."""
        return self.store.get(self.machinery.resource(kind.group, kind.plural), namespace, name)

    def list(self, kind: Kind, namespace: str = "default", label_selector: str = "") -> list[Json]:
        found = self.store.list(self.machinery.resource(kind.group, kind.plural), namespace)
        return [*filter(selectors.labels(label_selector), found)]

    def update(
        self, kind: Kind, name: str, alter: Callable[[Json], Json], subresource: str = "", namespace: str = "default"
    ) -> Json:
        """Change an object, as an administrator. `alter` gets it, and returns another: what is stored never changes."""
        resource = self.machinery.resource(kind.group, kind.plural)
        return self.machinery.update(resource, namespace, name, alter, subresource)

    def delete(self, kind: Kind, name: str, namespace: str = "default") -> None:
        self.machinery.delete(self.machinery.resource(kind.group, kind.plural), namespace, name, {})

    async def until(self, so: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until what is stored makes it so. Raises TimeoutError."""
        with self.store.changed() as changed:
            async with asyncio.timeout(seconds):
                while not so():
                    changed.clear()
                    await changed.wait()

    def writes(self, user: str = "", resource: str = "") -> Sequence[Call]:
        """Changes that were granted, oldest first."""
        return [
            call
            for call in self.calls
            if call.verb in CHANGES and call.code in (200, 201)
            if user in ("", call.request.user) and resource in ("", call.resource)
        ]

    def _cut(self, scope: Scope) -> None:
        assert self._server is not None
        for connection in list(self._server.server_state.connections):
            if getattr(connection, "scope", None) is scope:
                connection.transport.abort()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self.leaving = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        await self.leaving.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in [*self.servers, *(sockets or ())]:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the tests."""
        yield
