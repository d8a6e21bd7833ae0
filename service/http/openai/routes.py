"""OpenAI's routes, vLLM's for tokens beside them, and clear words about those that are not served."""

from __future__ import annotations

from starlette.requests import Request
from starlette.routing import Route

from service.host import Host
from service.http.body import read
from service.http.openai.chat import ChatCompletions
from service.http.openai.completions import Completions
from service.http.openai.models import get_model, list_models
from service.http.openai.tokenize import DetokenizeBody, TokenizeBody, detokenize, tokenize, tokenizer_info
from service.http.reply import Json

# what is below these paths at OpenAI -> what to do instead
UNSERVED = {
    "/v1/embeddings": "the model has no embeddings; serve an embedding model elsewhere",
    "/v1/responses": "use /v1/chat/completions",
    "/v1/edits": "use /v1/chat/completions",
    "/v1/moderations": "nothing is moderated",
    "/v1/audio": "the model reads and makes text alone",
    "/v1/images": "the model reads and makes text alone",
}


def openai_routes(host: Host, max_body_bytes: int) -> list[Route]:
    async def models(request: Request) -> Json:
        return Json(list_models(host))

    async def model(request: Request) -> Json:
        return Json(get_model(host, request.path_params["model"]))

    async def tokens(request: Request) -> Json:
        return Json(await tokenize(host, await read(request, TokenizeBody, max_body_bytes)))

    async def text(request: Request) -> Json:
        return Json(await detokenize(host, await read(request, DetokenizeBody, max_body_bytes)))

    async def info(request: Request) -> Json:
        return Json(tokenizer_info(host))

    return [
        Route("/v1/chat/completions", ChatCompletions(host, max_body_bytes).create, methods=["POST"]),
        Route("/v1/completions", Completions(host, max_body_bytes).create, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/tokenize", tokens, methods=["POST"]),
        Route("/detokenize", text, methods=["POST"]),
        Route("/tokenizer_info", info),
    ]
