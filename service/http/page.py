"""The page for people: `/` and its three kinds of files, read once, from nowhere but here."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "playground"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    # Nothing is loaded from elsewhere, whatever a model writes; the icon is in the page itself.
    "content-security-policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # an upgraded server must not meet the page of the last one
}


def page_routes() -> list[Route]:
    """`/`, and the files that it names under /playground/."""
    files = {path.name: path for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES}
    contents = {name: path.read_bytes() for name, path in files.items()}

    def answer(name: str) -> Response:
        if name not in contents:
            raise HTTPException(404)
        return Response(contents[name], media_type=MEDIA_TYPES[files[name].suffix], headers=HEADERS)

    async def page(request: Request) -> Response:
        return answer("index.html")

    async def file(request: Request) -> Response:
        return answer(request.path_params["name"])

    return [Route("/", page, methods=["GET"]), Route("/playground/{name}", file, methods=["GET"])]
