"""POST /tokenize, POST /detokenize and GET /tokenizer_info, as vLLM has them."""

from __future__ import annotations

import asyncio

import msgspec

from service.errors import ServiceError, invalid
from service.host import Host
from service.http.openai.conversation import ChatMessage, ChatTool, as_written, conversation_of
from service.names import adapter_of
from service.text.chat import Conversation

INLINE_TOKENS = 4096  # turned into text within a millisecond; more go to a thread


class TokenizeBody(msgspec.Struct, kw_only=True):
    """A `prompt`, or `messages` of a chat as the model would see them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[ChatTool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


class DetokenizeAnswer(msgspec.Struct):
    prompt: str


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """What clients that count or cut tokens themselves must know. Texts of `bos_token` and `eos_token` are names: as
    text in a prompt they are ordinary characters."""

    bos_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    vocab_size: int
    model_max_length: int


async def tokenize(host: Host, body: TokenizeBody) -> TokenizeAnswer:
    """Raises ServiceError."""
    adapter_of(host, body.model or "")
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "or messages must be given, and not both")
    prompt: str | Conversation
    if body.messages is None:
        assert body.prompt is not None
        prompt = body.prompt
    else:
        if body.add_generation_prompt is False and not body.continue_final_message:
            raise invalid("add_generation_prompt", "must be the opposite of continue_final_message")
        prompt = conversation_of(
            body.messages, body.tools or [], None, continue_final=bool(body.continue_final_message)
        )
    try:
        tokens = await host.tokenize(prompt, add_bos=body.add_special_tokens is not False)
    except ServiceError as error:
        raise as_written(error, {} if body.messages is None else {"prompt": "messages"}) from error
    return TokenizeAnswer(
        count=len(tokens),
        max_model_len=host.info.max_model_len,
        tokens=tokens,
        token_strs=[host.token_name(token) for token in tokens] if body.return_token_strs else None,
    )


def tokenizer_info(host: Host) -> TokenizerInfo:
    """Raises ServiceError(UNAVAILABLE)."""
    bos, eos = host.text_ends
    return TokenizerInfo(
        bos_token=None if bos is None else host.token_name(bos),
        eos_token=None if eos is None else host.token_name(eos),
        bos_token_id=bos,
        eos_token_id=eos,
        vocab_size=host.info.vocab_size,
        model_max_length=host.info.max_model_len,
    )


async def detokenize(host: Host, body: DetokenizeBody) -> DetokenizeAnswer:
    """Raises ServiceError."""
    adapter_of(host, body.model or "")
    if len(body.tokens) <= INLINE_TOKENS:
        return DetokenizeAnswer(host.detokenize(body.tokens))
    return DetokenizeAnswer(await asyncio.to_thread(host.detokenize, body.tokens))
