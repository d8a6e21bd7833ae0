"""Parameters that chat completions and completions share: OpenAI's, and those of vLLM and NIM beside them at top level.

Every name that clients are known to send is decided here: honoured (the fields of the structs), without effect on what
is generated (IGNORED), or refused with a reason unless it says what is done anyway (UNSERVED). Other names are refused
as OpenAI does, because a parameter that is misspelt and ignored is a wrong answer that nobody notices.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from engine import Grammar, SamplingParams
from service.caller import CALLER
from service.errors import invalid
from service.generation import MAX_COMPLETIONS, GenerationRequest
from service.host import Host
from service.http.body import decode, meant, read_bytes
from service.names import adapter_of
from service.text.chat import Conversation
from service.text.grammar import choice

IGNORED = frozenset(
    {
        *("user", "metadata", "store", "safety_identifier", "service_tier"),  # who asks, and what OpenAI does with it
        *("prompt_cache_key", "prompt_cache_retention", "prediction"),  # hints how to be faster
        *("include_reasoning", "guided_decoding_backend", "spaces_between_special_tokens"),  # mean nothing here
    }
)
# name -> values that ask for what is done anyway, beside null; why others are not served
UNSERVED: dict[str, tuple[tuple[object, ...], str]] = {
    "audio": ((), "the model makes text alone"),
    "modalities": ((["text"],), "the model makes text alone"),
    "functions": (([],), "replaced by `tools`"),
    "function_call": (("none", "auto"), "replaced by `tool_choice`"),
    "web_search_options": ((), "the model cannot search"),
    "reasoning_effort": (("none",), "the model has no reasoning to adjust"),
    "verbosity": (("medium",), "ask for it in the prompt"),
    "moderation": ((), "nothing is moderated"),
    "chat_template": ((), "the model's own chat template is used"),
    "chat_template_kwargs": (({},), "the model's own chat template is used as it is"),
    "documents": (([],), "put them into messages"),
    "suffix": (("",), "the model does not fill in the middle"),
    "use_beam_search": ((False,), "there is no beam search"),
    "length_penalty": ((1.0,), "there is no beam search"),
    "early_stopping": ((False,), "there is no beam search"),
    "truncate_prompt_tokens": ((), "prompts are never cut"),
    "skip_special_tokens": ((True,), "control tokens are no text"),
    "guided_whitespace_pattern": ((), "not served"),
    "logits_processors": (([],), "clients cannot bring code"),
    "allowed_token_ids": ((), "use `logit_bias` or a grammar"),
    "bad_words": (([],), "use `logit_bias`"),
    "mm_processor_kwargs": (({},), "the model reads text alone"),
}
NVEXT = frozenset(
    {
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        *("ignore_eos", "repetition_penalty", "top_k"),
    }
)
"""What clients of NIM 1.x and of Dynamo may put into `nvext`: the same names as at top level."""
MAX_TIMEOUT_SECONDS = 86400.0
T = TypeVar("T", bound="GenerationBody")


class StreamOptions(msgspec.Struct, kw_only=True):
    """`include_usage`: an event with the usage before the end; `continuous_usage_stats`, vLLM's: in each event."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(msgspec.Struct, kw_only=True):
    name: str | None = None
    description: str | None = None
    schema: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """What the answer must be: `type` is text, json_object, json_schema, regex or grammar (Lark)."""

    type: str
    json_schema: JsonSchema | None = None
    regex: str | None = None
    grammar: str | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's way to say it; exactly one of them."""

    json: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerationBody(msgspec.Struct, kw_only=True):
    """Fields of both kinds of requests. null means: not given."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    timeout: float | None = None


async def read_parameters(request: Request, kind: type[T], max_bytes: int) -> T:
    """The body of a request for completions.

    Raises:
        ServiceError: INVALID_ARGUMENT.
        RouteError: the body is too large or comes too slowly.
    """
    data = await read_bytes(request, max_bytes)
    known = kind.__struct_encode_fields__
    fields = decode(data, dict[str, msgspec.Raw])
    if "nvext" in fields:
        fields = _without_nvext(fields)
        data = msgspec.json.encode(fields)
    for name, value in fields.items():
        if name in UNSERVED and name not in known:
            _refuse_unserved(name, value)
        elif name not in known and name not in IGNORED:
            raise invalid(name[:64], f"is not a known parameter{meant(name, known)}")
    return decode(data, kind)


def _without_nvext(fields: dict[str, msgspec.Raw]) -> dict[str, msgspec.Raw]:
    """What stood in `nvext`, at top level."""
    extension = bytes(fields.pop("nvext"))
    inner = {} if extension == b"null" else decode(extension, dict[str, msgspec.Raw], "nvext")
    for name in inner:
        if name not in NVEXT:
            raise invalid(f"nvext.{name[:64]}", f"is not a known parameter{meant(name, NVEXT)}")
        if name in fields:
            raise invalid(f"nvext.{name}", f"stands at top level too, as {name}")
    return fields | inner


def _refuse_unserved(name: str, value: msgspec.Raw) -> None:
    harmless, reason = UNSERVED[name]
    given = decode(bytes(value), object, name)
    if given is not None and given not in harmless:
        raise invalid(name, f"is not served: {reason}")


def generation_of(
    host: Host,
    body: GenerationBody,
    request: Request,
    *,
    request_id: str,
    prompt: str | list[int] | Conversation,
    sampling: SamplingParams,
    until_context: bool = False,
) -> GenerationRequest:
    """The protocol-neutral form of a request.

    Raises:
        ServiceError: INVALID_ARGUMENT, NOT_FOUND.
    """
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=sampling,
        until_context=until_context,
        n=count_of(body),
        stop=stops_of(body),
        include_stop=bool(body.include_stop_str_in_output),
        priority=body.priority or 0,
        adapter=adapter_of(host, body.model or ""),
        cache_salt=body.cache_salt or "",
        tenant=CALLER.get().tenant,
        deadline=deadline_of(body, request),
    )


def sampling_of(body: GenerationBody, **more: Any) -> SamplingParams:
    """The engine's parameters, whose ranges the engine checks.

    Args:
        more: fields that the two kinds of requests spell differently.
    """
    names = ("min_tokens", "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
    given = {name: getattr(body, name) for name in (*names, "repetition_penalty", "ignore_eos", "logit_bias")}
    given |= more
    if body.top_k is not None:
        given["top_k"] = 0 if body.top_k == -1 else body.top_k  # -1 is vLLM's "all"
    if body.seed is not None:
        given["seed"] = body.seed % 2**64 if body.seed >= -(2**63) else body.seed  # OpenAI's are signed
    if body.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(body.stop_token_ids)
    if (asked := grammar_of(body)) is not None:
        given["grammar"] = asked[1]
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def count_of(body: GenerationBody) -> int:
    """How many completions of each prompt."""
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_COMPLETIONS:
        raise invalid("n", f"{n} must be between 1 and {MAX_COMPLETIONS}")
    return n


def stops_of(body: GenerationBody) -> tuple[str, ...]:
    """OpenAI takes four, we as many as `service.text.stop` does."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def deadline_of(body: GenerationBody, request: Request) -> float | None:
    """When the client gives up, on the clock of time.monotonic(): `timeout` seconds from now, or the header's."""
    field, seconds = "timeout", body.timeout
    if seconds is None and (header := request.headers.get("x-request-timeout")):
        field = "x-request-timeout"
        try:
            seconds = float(header)
        except ValueError:
            raise invalid(field, f"{header[:64]!r} must be a number of seconds") from None
    if seconds is None:
        return None
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        raise invalid(field, f"{seconds} must be greater than 0 and at most {MAX_TIMEOUT_SECONDS:.0f} seconds")
    return time.monotonic() + seconds


def grammar_of(body: GenerationBody) -> tuple[str, Grammar] | None:
    """What the answer must be, whichever way it is said, and the field that says it.

    Raises:
        ServiceError: INVALID_ARGUMENT, it is said twice or incompletely.
    """
    found: list[tuple[str, Grammar]] = []
    if body.response_format is not None and (grammar := _of_format(body.response_format)) is not None:
        found.append(("response_format", grammar))
    guided = StructuredOutputs(
        json=body.guided_json, regex=body.guided_regex, choice=body.guided_choice, grammar=body.guided_grammar
    )
    found += _of_structured("guided_", guided)
    if body.structured_outputs is not None:
        found += _of_structured("structured_outputs.", body.structured_outputs)
    if len(found) > 1:
        raise invalid(found[1][0], f"does not go with {found[0][0]}: the answer can have one form")
    return found[0] if found else None


def names_of(body: GenerationBody) -> dict[str, str]:
    """What the client wrote for fields that have other names in the service."""
    asked = grammar_of(body)
    return {} if asked is None else {"response_format": asked[0]}


def _of_format(given: ResponseFormat) -> Grammar | None:
    match given.type:
        case "text":
            return None
        case "json_object":
            return Grammar(kind="json_object")
        case "json_schema":
            schema = raw_text(given.json_schema.schema) if given.json_schema is not None else None
            return Grammar(kind="json_schema", text=_needed("response_format.json_schema.schema", schema))
        case "regex":
            return Grammar(kind="regex", text=_needed("response_format.regex", given.regex))
        case "grammar":
            return Grammar(kind="lark", text=_needed("response_format.grammar", given.grammar))
    rule = "must be text, json_object, json_schema, regex or grammar"
    raise invalid("response_format.type", f"{given.type[:64]!r} {rule}")


def _of_structured(prefix: str, given: StructuredOutputs) -> list[tuple[str, Grammar]]:
    found = []
    if (schema := raw_text(given.json)) is not None:
        if schema.startswith('"'):  # the schema as text
            schema = msgspec.json.decode(schema, type=str)
        found.append((prefix + "json", Grammar(kind="json_schema", text=schema)))
    if given.regex is not None:
        found.append((prefix + "regex", Grammar(kind="regex", text=given.regex)))
    if given.choice is not None:
        if not given.choice or not all(given.choice):
            raise invalid(prefix + "choice", "must be texts that are not empty, at least one")
        found.append((prefix + "choice", choice(given.choice)))
    if given.grammar is not None:
        found.append((prefix + "grammar", Grammar(kind="lark", text=given.grammar)))
    if given.json_object:
        found.append((prefix + "json_object", Grammar(kind="json_object")))
    return found


def _needed(field: str, text: str | None) -> str:
    if text is None:
        raise invalid(field, "is missing")
    return text


def raw_text(raw: msgspec.Raw) -> str | None:
    """JSON text as the client wrote it; None if it was not given, or null."""
    text = bytes(raw).decode()
    return None if text in ("", "null") else text
