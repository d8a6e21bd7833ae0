"""The vocabulary that crosses the engine's border: token ids in, token ids out. Torch-free.

    SamplingParams + prompt ids = Request  ──►  engine  ──►  TokenEvent, TokenEvent, … (exactly one with finish_reason)

All types are msgspec structs, so that the same objects serve in process and, as msgpack, between processes.
"""

from __future__ import annotations

import enum
import math
from typing import Literal

import msgspec

from engine.costs import StepCost
from engine.errors import InvalidRequestError
from engine.histogram import Distribution

MAX_LOGPROBS = 20  # as the OpenAI API; each one costs a top-k over the vocabulary
MAX_PROMPT_LOGPROBS = 2**18  # of one request, named tokens included: 1 beside each of 128K, or 20 beside each of 12K
MAX_LOGIT_BIAS = 1024  # entries per request
MAX_STOP_TOKEN_IDS = 1024
MAX_CACHE_SALT = 256  # characters; a tenant's name or a digest has fewer
MAX_GRAMMAR = 2**18  # characters; the schemas of large APIs have a fifth of it
MAX_INT = 2**31 - 1  # of fields that have no limit of their own; they cross borders and reach tensors as int32


class FinishReason(enum.StrEnum):
    """Why a request ended. Each admitted request ends with exactly one of these."""

    STOP = "stop"  # end-of-sequence or a stop token id
    LENGTH = "length"  # max_tokens or the context limit
    CANCELLED = "cancelled"
    DEADLINE = "deadline"  # said by the service, which knows how long a caller waits
    ERROR = "error"


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What the text of a completion must be: see `engine.grammar`.

    Attributes:
        kind: json_object (any; no text), json_schema, regex, or lark (llguidance's dialect of Lark grammars).
        text: the schema, the expression or the grammar.
    """

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    text: str = ""

    def validate(self) -> None:
        """What can be told without reading the text as what it should be.

        Raises:
            InvalidRequestError: names response_format, which is what users call it.
        """
        if self.kind == "json_object":
            return
        _check(bool(self.text), "response_format", f"the {self.kind}", "is empty")
        _check(
            len(self.text) <= MAX_GRAMMAR,
            "response_format",
            f"a {self.kind} of {len(self.text)} characters",
            f"must have at most {MAX_GRAMMAR}",
        )
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError("response_format", f"the {self.kind} is not valid UTF-8") from None


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """What tokens mean as text. The engine needs it for grammars alone.

    Attributes:
        tokens: bytes that each id adds to a text; of a special one its name; none where no text has the token.
        special: ids that are no text: a grammar yields one only where it names it.
    """

    tokens: list[bytes]
    special: list[int]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen from logits, and when to stop. Defaults follow the OpenAI API.

    Attributes:
        max_tokens: most tokens to generate, >= 1.
        min_tokens: end-of-sequence and stop ids are impossible before so many tokens.
        temperature: 0 = greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 = all.
        top_p: keep the smallest set whose probability reaches top_p; in (0, 1].
        min_p: drop tokens less likely than min_p times the likeliest; in [0, 1].
        repetition_penalty: in [0.001, 100]; divides positive and multiplies negative logits of tokens seen in prompt or
            output (CTRL, arXiv 1909.05858).
        presence_penalty, frequency_penalty: in [-2, 2]; subtracted once / per occurrence for tokens of the output
            (OpenAI).
        seed: 0 <= seed < 2**64; the same seed gives the same tokens whatever else runs. None = drawn by the engine.
        logit_bias: added to logits before anything else is done; token id -> [-100, 100] or -inf (never).
        stop_token_ids: end generation as end-of-sequence does.
        ignore_eos: the model's own end-of-sequence does not end the generation.
        logprobs: None = none; 0 = of the chosen token; n = also of the n likeliest.
        prompt_logprobs: the same of the prompt's own tokens, all but the first.
        grammar: None = any text. With one, min_tokens and ignore_eos count as far as the grammar lets a text go on:
            where nothing can follow, the generation ends (STOP).
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens that came before, beyond what the model makes of them."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def ends(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens that end the generation, of a model with these ends of sequence."""
        return self.stop_token_ids if self.ignore_eos else (*self.stop_token_ids, *eos_token_ids)

    def validate(self, vocab_size: int) -> None:
        """Check every field against its range.

        Raises:
            InvalidRequestError: names the field, the value and the limit.
        """
        _check(1 <= self.max_tokens <= MAX_INT, "max_tokens", self.max_tokens, f"must be between 1 and {MAX_INT}")
        _check(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"must be between 0 and max_tokens ({self.max_tokens})",
        )
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check(0 <= self.top_k <= MAX_INT, "top_k", self.top_k, f"must be 0 (off) or positive, at most {MAX_INT}")
        _check(
            math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0,
            "top_p",
            self.top_p,
            "must be greater than 0 and at most 1",
        )
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.001, 100.0)  # 1e-40 makes a logit infinite
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check(self.seed is None or 0 <= self.seed < 2**64, "seed", self.seed, "must be between 0 and 2**64 - 1")
        _check(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            "logit_bias",
            f"{len(self.logit_bias)} entries",
            f"must have at most {MAX_LOGIT_BIAS}",
        )
        for token, bias in self.logit_bias.items():
            _check(
                0 <= token < vocab_size,
                "logit_bias",
                f"token id {token}",
                f"must be between 0 and {vocab_size - 1}",
            )
            _check(
                bias == -math.inf or -100.0 <= bias <= 100.0,
                f"logit_bias[{token}]",
                bias,
                "must be between -100 and 100, or -inf",
            )
        _check(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"{len(self.stop_token_ids)} entries",
            f"must have at most {MAX_STOP_TOKEN_IDS}",
        )
        for token in self.stop_token_ids:
            _check(0 <= token < vocab_size, "stop_token_ids", token, f"must be between 0 and {vocab_size - 1}")
        if self.grammar is not None:
            self.grammar.validate()
        for field, top in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _check(top is None or 0 <= top <= MAX_LOGPROBS, field, top, f"must be between 0 and {MAX_LOGPROBS}")


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. `request_id` is unique among the requests in flight.

    Attributes:
        priority: lower runs first, 0 is normal; among equals the earlier arrival runs first. A number is a class: one
            that waits takes the place of one of a higher number, which resumes later, however late that is.
        adapter: name of a loaded LoRA adapter; None = the model as it is.
        cache_salt: what other requests have computed is used only if they have the same salt.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    adapter: str | None = None
    cache_salt: str = ""


class TokenLogprob(msgspec.Struct, frozen=True):
    """Natural-log probabilities of one token. `top` is sorted from the likeliest; `rank` counts from 1.

    Of a generated token they are under the distribution before temperature and truncation, after penalties and bias,
    and over the tokens that a grammar allows; of a token of the prompt under the model's own.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = []


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, monotonic clock of the engine, since the request reached the core."""

    queued: float
    first_token: float
    finished: float


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did to one request.

    Attributes:
        token_ids: new tokens; the end-of-sequence or stop token that ended it is not among them but in `stop_token_id`.
        logprobs: one per token of token_ids, if asked for.
        prompt_logprobs: of the prompt's next tokens, if asked for. They come as the prompt is computed, the last no
            later than the first token: no event has more of them than a step has tokens, however long the prompt.
        finish_reason: set on the last event of a request and on no other.
        error: what went wrong, when finish_reason is ERROR.
        refused: field of the request that is wrong, when finish_reason is ERROR and nothing was computed.
        prompt_tokens, cached_tokens: size of the prompt, and how much of it needed no computation because others, or an
            earlier turn, had done it.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    refused: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    timings: Timings | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Load of the engine after a step; also its heart beat. Counters run from the start of the engine.

    Attributes:
        step_seconds, model_seconds: from step to step while there was work, and of that in the decoder. The difference
            is what the host costs: planning, batch tensors, sampling, committing, sending events.
        queued, queued_tokens: requests not yet scheduled, or whose grammar is not compiled, and their prompt tokens.
        oldest_queued_seconds: age of the oldest of them.
        blocked: those of them that no free row would help: their grammar is not compiled, or there is no slot for their
            adapter, or for one that is before them.
        running: requests in the batch.
        kv_pages_used: those that requests hold; what is kept for later ones is free.
        corrupted: requests that ended because their logits were not numbers: a fault of weights, kernels or memory.
        prefix_cache_query_tokens, prefix_cache_hit_tokens: tokens of the prompts that have been started, and how many
            of them needed no computation. Pre-empted requests do not count again.
        draft_tokens, accepted_draft_tokens: guesses that were computed beside a known token, and those that were right.
        prefill_tokens_per_second, decode_tokens_per_second: moving averages over the last seconds of work.
        step_times, batch_tokens: how long steps took and how many tokens they computed, in the buckets of
            `engine.costs`; of those steps that computed something.
        step_cost: what a step costs by what it computes.
    """

    steps: int = 0
    step_seconds: float = 0.0
    model_seconds: float = 0.0
    queued: int = 0
    queued_tokens: int = 0
    oldest_queued_seconds: float = 0.0
    blocked: int = 0
    running: int = 0
    max_batch_size: int = 0
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    corrupted: int = 0
    prefix_cache_query_tokens: int = 0
    prefix_cache_hit_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    step_times: Distribution = Distribution()
    batch_tokens: Distribution = Distribution()
    step_cost: StepCost = StepCost()


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a loaded engine that its owner and clients may ask for.

    Attributes:
        weight_bytes: on one device; where several share the model, on the first of them.
        device_name, device_bytes: of a GPU, as its driver calls it, and of its memory.
    """

    vocab_size: int
    max_model_len: int
    max_batch_size: int
    max_batch_tokens: int
    page_size: int
    kv_pages: int
    dtype: str
    device: str
    architecture: str
    num_parameters: int
    weight_bytes: int
    load_seconds: float
    max_loras: int = 0
    device_name: str = ""
    device_bytes: int = 0


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a loaded LoRA adapter.

    Attributes:
        rank: the highest of its matrices.
        nbytes: of its matrices, in host memory and in a slot.
    """

    name: str
    rank: int
    nbytes: int


def validate_request(request: Request, info: EngineInfo) -> None:
    """Check a request against the engine's limits; what passes here can be scheduled and will end.

    Raises:
        InvalidRequestError: names the field, the value and the limit.
    """
    prompt, limit = request.prompt_token_ids, info.max_model_len
    _check(len(prompt) > 0, "prompt", "0 tokens", "must have at least one token")
    _check(len(prompt) < limit, "prompt", f"{len(prompt)} tokens", f"must be fewer than the context of {limit} tokens")
    if min(prompt) < 0 or max(prompt) >= info.vocab_size:
        bad = next(i for i, token in enumerate(prompt) if not 0 <= token < info.vocab_size)
        rule = f"{prompt[bad]} must be between 0 and {info.vocab_size - 1}"
        raise InvalidRequestError(f"prompt_token_ids[{bad}]", rule)
    _check(abs(request.priority) <= MAX_INT, "priority", request.priority, f"must be between -{MAX_INT} and {MAX_INT}")
    _check(
        len(request.cache_salt) <= MAX_CACHE_SALT,
        "cache_salt",
        f"{len(request.cache_salt)} characters",
        f"must have at most {MAX_CACHE_SALT}",
    )
    request.sampling.validate(info.vocab_size)
    if (top := request.sampling.prompt_logprobs) is not None:
        _check(
            len(prompt) * (1 + top) <= MAX_PROMPT_LOGPROBS,
            "prompt_logprobs",
            f"{top} with a prompt of {len(prompt)} tokens",
            f"makes {len(prompt) * (1 + top)} logprobs, but at most {MAX_PROMPT_LOGPROBS} are served",
        )
    # The last token is never computed: nothing comes after it.
    computed = min(len(prompt) + request.sampling.max_tokens, limit) - 1
    pages = -(-computed // info.page_size)
    _check(
        pages <= info.kv_pages,
        "max_tokens",
        f"{request.sampling.max_tokens} with a prompt of {len(prompt)} tokens",
        f"needs {pages} KV pages of {info.page_size} tokens, but there are {info.kv_pages}",
    )


def _check(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise InvalidRequestError(field, f"{value} {rule}")


def _check_range(field: str, value: float, low: float, high: float) -> None:
    _check(math.isfinite(value) and low <= value <= high, field, value, f"must be between {low:g} and {high:g}")
