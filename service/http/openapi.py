"""GET /openapi.json, made of the same structs that bodies are decoded into and answers are encoded from; GET /docs, a
page that shows it without fetching anything from elsewhere."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from service.http.errors import ErrorBody
from service.http.openai.chat import ChatBody, ChatChunk, ChatCompletion
from service.http.openai.completions import Completion, CompletionBody
from service.http.openai.models import ModelCard, ModelList
from service.http.openai.tokenize import DetokenizeAnswer, DetokenizeBody, TokenizeAnswer, TokenizeBody, TokenizerInfo
from service.http.reply import Json
from service.version import VERSION

# All of the page is in the page; it asks this server alone.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)
REFERENCE = "#/components/schemas/{name}"
ERRORS = {
    "400": "a field is missing, wrong or not served",
    "404": "the model or route is not served here",
    "408": "the deadline passed",
    "413": "the body is too large",
    "429": "the queue is full; Retry-After tells when to come again",
    "500": "our fault; the id in the message stands in the log",
    "503": "loading, draining, or the engine is down",
}

# method, path, what it does, body, answer, events of its stream
Operation = tuple[str, str, str, type[Any] | None, type[Any] | None, type[Any] | None]
OPERATIONS: tuple[Operation, ...] = (
    ("post", "/v1/chat/completions", "Answer a conversation", ChatBody, ChatCompletion, ChatChunk),
    ("post", "/v1/completions", "Continue texts", CompletionBody, Completion, Completion),
    ("get", "/v1/models", "The model, its aliases and adapters", None, ModelList, None),
    ("get", "/v1/models/{model}", "One of them", None, ModelCard, None),
    ("post", "/tokenize", "Token ids of a text or conversation", TokenizeBody, TokenizeAnswer, None),
    ("post", "/detokenize", "Text of token ids", DetokenizeBody, DetokenizeAnswer, None),
    ("get", "/tokenizer_info", "What clients that tokenise themselves must know", None, TokenizerInfo, None),
    ("get", "/v1/health/live", "Whether the engine's heart beats, or loading makes progress", None, None, None),
    ("get", "/v1/health/ready", "Whether a token can be made; 503 says how far it is", None, None, None),
    ("get", "/v1/metadata", "Model, profile, licence and version", None, None, None),
    ("get", "/v1/manifest", "Every profile of the model; YAML unless JSON is accepted", None, None, None),
    ("get", "/v1/version", "Of the release and of this API", None, None, None),
    ("get", "/v1/license", "Texts of the licences", None, None, None),
    ("get", "/v2/health/live", "Whether a restart would not help", None, None, None),
    ("get", "/v2/health/ready", "Whether a token could be made now", None, None, None),
    ("get", "/health", "The same, as vLLM has it", None, None, None),
    ("get", "/v2/models/{model}/ready", "The same of one model", None, None, None),
)
OTHER_TYPES = {"/v1/manifest": "application/yaml"}  # that answers come in, beside JSON


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document; what has no kind of its own describes itself by its answers."""
    kinds = {kind for operation in OPERATIONS for kind in operation[3:] if kind is not None}
    _, schemas = msgspec.json.schema_components(
        sorted({*kinds, ErrorBody}, key=lambda kind: kind.__name__), ref_template=REFERENCE
    )
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation[1], {})[operation[0]] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "nemoserve", "version": VERSION, "description": "OpenAI-compatible HTTP of nemoserve."},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _described(operation: Operation) -> dict[str, Any]:
    _, path, summary, body, answer, events = operation
    content: dict[str, Any] = {"application/json": {"schema": _reference(answer) if answer else {"type": "object"}}}
    if path in OTHER_TYPES:
        content[OTHER_TYPES[path]] = {"schema": {"type": "object"}}
    if events is not None:
        content["text/event-stream"] = {"schema": _reference(events)}
    failures = {
        status: {"description": what, "content": {"application/json": {"schema": _reference(ErrorBody)}}}
        for status, what in ERRORS.items()
    }
    described: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "done", "content": content}, **failures},
    }
    if body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": _reference(body)}}}
    if "{model}" in path:
        described["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return described


def _reference(kind: type[Any]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(name=kind.__name__)}


def openapi_routes() -> list[Route]:
    found = document()
    page = files("service.http").joinpath("docs.html").read_text()

    async def openapi(request: Request) -> Json:
        return Json(found)

    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": CONTENT_SECURITY_POLICY})

    return [Route("/openapi.json", openapi), Route("/docs", docs)]
