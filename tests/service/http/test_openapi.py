"""The document that describes the port, and the page that shows it."""

from __future__ import annotations

import re

from service.http.management import management_routes
from tests.service.fakes import FakeHost
from tests.service.http.ports import serving
from tests.service.test_management import PACKAGE


async def test_the_document_names_what_bodies_have_and_every_reference_is_there() -> None:
    host = FakeHost()
    async with serving(host, routes=management_routes(host, lambda: PACKAGE)) as port:
        response = await port.http.get("/openapi.json")
        found = response.json()
        for path, methods in found["paths"].items():  # every route that it names is served
            for method in methods:
                there = await port.http.request(method, path.replace("{model}", "fake"), json={})
                assert there.status_code in (200, 400), path
                told = methods[method]["responses"][str(there.status_code)]["content"]
                assert there.headers["content-type"].partition(";")[0] in told, path
    assert found["openapi"] == "3.1.0"
    chat = found["components"]["schemas"]["ChatBody"]
    assert chat["required"] == ["messages"]
    assert {"temperature", "tools", "response_format", "top_k", "stream_options"} <= set(chat["properties"])
    named = set(re.findall(r'"#/components/schemas/(\w+)"', response.text))
    assert named <= set(found["components"]["schemas"])


async def test_the_page_needs_nothing_from_elsewhere() -> None:
    async with serving(FakeHost()) as port:
        page = await port.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert re.findall(r"https?://", page.text) == []
