"""The fake API server with what helm alone asks of one: kinds that nobody else needs, OpenAPI, and protobuf.

helm keeps its releases in Secrets, and its client writes these as protobuf, in an envelope (`runtime.Unknown`):

    "k8s\\0" · 1: {1: apiVersion, 2: kind} · 2: the object          of a Secret 1: metadata, 2: data, 3: type
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from tests.autoscaler.fake_api import FakeApi
from tests.autoscaler.fake_api.errors import Json

MAGIC = b"k8s\0"
NAMES = {1: "name", 3: "namespace", 5: "uid", 6: "resourceVersion"}  # fields of metadata
LABELS = 11
OPENAPI = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
NO_LISTS = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"


class HelmApi(FakeApi):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        if request.url.path == "/openapi/v2":  # describes nothing: objects are not looked at before they are sent
            await Response(b"", media_type=OPENAPI)(scope, receive, send)
        elif "sendInitialEvents" in request.query_params:  # its client lists instead, then
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": 422}
            await JSONResponse(status | {"message": NO_LISTS}, 422)(scope, receive, send)
        else:
            await super().__call__(scope, _readable(receive), send)


def _readable(receive: Receive) -> Receive:
    """Of a body that comes as a whole, protobuf as JSON."""

    async def read() -> Message:
        message = await receive()
        while message.get("more_body"):
            more = await receive()
            message = more | {"body": message["body"] + more["body"]}
        if message.get("body", b"").startswith(MAGIC):
            message["body"] = json.dumps(decoded(message["body"])).encode()
        return message

    return read


def decoded(body: bytes) -> Json:
    """A Secret as JSON; of anything else what it is."""
    envelope = dict(_fields(body.removeprefix(MAGIC)))
    version, kind = (value.decode() for value in dict(_fields(envelope[1])).values())
    found: Json = {"apiVersion": version, "kind": kind}
    if kind == "Secret":
        fields = list(_fields(envelope[2]))
        metadata = list(_fields(dict(fields)[1]))
        found["metadata"] = {NAMES[number]: value.decode() for number, value in metadata if number in NAMES and value}
        found["metadata"]["labels"] = _mapping(metadata, LABELS, bytes.decode)
        found["data"] = _mapping(fields, 2, lambda value: base64.b64encode(value).decode())
        found["type"] = dict(fields)[3].decode()
    return found


def _mapping(fields: list[tuple[int, bytes]], number: int, read: Callable[[bytes], str]) -> dict[str, str]:
    entries = [dict(_fields(value)) for key, value in fields if key == number]
    return {entry[1].decode(): read(entry.get(2, b"")) for entry in entries}


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Those with a length; numbers are passed over."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        number, wire = divmod(varint(), 8)
        size = varint()
        if wire == 2:
            yield number, data[position : position + size]
            position += size
