"""The page for people, as a browser shows it and a keyboard drives it; the server is real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from tests import chromium
from tests.chromium import Page, browse
from tests.e2e.conftest import ServerProcess

pytestmark = pytest.mark.skipif(chromium.executable() is None, reason="no Chromium on the PATH (apt install chromium)")

ENTER, ESCAPE, TAB = ("Enter", 13, "\r"), ("Escape", 27), ("Tab", 9)


@pytest_asyncio.fixture
async def page(server: ServerProcess, tmp_path: Path) -> AsyncIterator[Page]:
    async with browse(tmp_path) as opened:
        await opened.go(f"http://{server.http_address}/")
        await opened.until("document.getElementById('phase').textContent === 'ready'")
        await opened.until("document.getElementById('model').options.length")
        yield opened
        assert opened.errors == []
        assert {url.split("/")[2] for url in opened.requests if url.startswith("http")} == {server.http_address}


async def sampling(page: Page, temperature: float, max_tokens: int) -> None:
    for name, value in (("temperature", temperature), ("max_tokens", max_tokens)):
        await page.evaluate(f"document.getElementById('{name}').value = {value}")


async def ask(page: Page, question: str) -> None:
    await page.type(question)  # the question has the focus, and Enter sends it
    await page.press(*ENTER)


async def test_a_question_by_keyboard_is_answered_and_goes_on(page: Page) -> None:
    await sampling(page, 0, 60)
    await ask(page, "What is the capital of France?")
    await page.until("document.querySelector('.assistant .facts').textContent.includes('tokens')")
    assert "Paris" in await page.evaluate("document.querySelector('.assistant .text').textContent")

    await ask(page, "And what did I ask you?")  # the focus stayed
    await page.until("document.querySelectorAll('.assistant .facts')[1]?.textContent.includes('tokens')")
    assert await page.evaluate("document.querySelectorAll('#messages li').length") == 4
    assert await page.evaluate("document.activeElement.id") == "question"


async def test_the_live_state_is_that_of_the_metrics(page: Page, server: ServerProcess) -> None:
    plots = "[...document.querySelectorAll('.plot output')].map((each) => each.value)"
    await page.until(f"{plots}.every((value) => /^\\d/.test(value))")
    with server.channel() as channel:
        sampling = pb.SamplingParameters(max_tokens=8000, ignore_eos=True)
        call = rpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest(prompt="One", sampling=sampling))
        await page.until(f"Number({plots}[1]) === 1")  # running
        await page.until(f"Number({plots}[3]) > 0")  # tokens/s
        call.cancel()
    await page.until(f"Number({plots}[1]) === 0")
    facts = await page.evaluate("document.getElementById('facts').innerText")
    assert "cpu" in facts  # in the profile's name


async def test_stop_cancels_the_request_and_keeps_what_was_said(page: Page, server: ServerProcess) -> None:
    await ask(page, "Tell me a very long story about a lighthouse.")
    await page.until("document.querySelector('.assistant .text').textContent.length > 20")
    await page.press(*ESCAPE)
    await page.until("document.querySelector('.assistant .facts').textContent.includes('stopped')")
    await asyncio.to_thread(server.until, "nothing running", lambda load: load.running_requests == 0)
    assert not await page.evaluate("document.getElementById('send').disabled")


async def test_a_refused_question_is_told_in_the_servers_words_and_may_be_sent_again(page: Page) -> None:
    await sampling(page, 999, 3)
    await ask(page, "Hello?")
    await page.until("document.querySelector('.facts.failure')?.textContent.includes('temperature')")
    await sampling(page, 0, 3)
    page.errors.clear()  # the browser logs the refusal itself
    await ask(page, "Hello?")
    await page.until("[...document.querySelectorAll('.facts')].at(-1).textContent.includes('3 tokens')")
    assert "cut at the limit" in await page.evaluate("[...document.querySelectorAll('.facts')].at(-1).textContent")


async def test_what_a_model_writes_is_text_and_never_markup(page: Page) -> None:
    await sampling(page, 0, 30)
    await ask(page, "<img src=x onerror=\"document.title='owned'\"><b>bold</b>")
    await page.until("document.querySelector('.assistant .facts').textContent.length")
    assert await page.evaluate("document.querySelector('#messages img, #messages b')") is None
    assert await page.evaluate("document.title") == "nemoserve"


@pytest.mark.parametrize(("width", "height"), [(360, 640), (1280, 800)])
async def test_it_fits_phones_and_desks(page: Page, width: int, height: int) -> None:
    await page.resize(width, height)
    await sampling(page, 0, 5)
    await ask(page, "x" * 300)
    await page.until("document.querySelector('.assistant .facts').textContent.length")
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
    small = "[...document.querySelectorAll('button:not([hidden])')].filter((each) => each.offsetHeight < 40).length"
    assert await page.evaluate(small) == 0


async def test_the_keyboard_reaches_everything_and_everything_has_a_name(page: Page) -> None:
    controls = "[...document.querySelectorAll('a, button, input, select, textarea')]"
    visible = f"{controls}.filter((each) => !each.hidden && !each.disabled)"
    reached = set()
    for _ in range(await page.evaluate(f"{visible}.length") + 2):
        await page.press(*TAB)
        reached.add(await page.evaluate(f"{controls}.indexOf(document.activeElement)"))
    assert len(reached - {-1}) == await page.evaluate(f"{visible}.length")
    named = "(each) => each.labels?.length || each.textContent.trim() || each.getAttribute('aria-label')"
    assert await page.evaluate(f"{controls}.every({named})")


async def test_a_server_that_is_gone_is_shown(own_server: ServerProcess, tmp_path: Path) -> None:
    async with browse(tmp_path) as page:
        await page.go(f"http://{own_server.http_address}/")
        await page.until("document.getElementById('phase').textContent === 'ready'")
        own_server.kill()
        await page.until("document.getElementById('phase').textContent === 'no connection'")
