"""The console in a real browser on a real server: each tab does its job, and axe-core finds nothing in any of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from softbatch.prompt_store.manifest import PREVIEW_OF
from softbatch.prompt_store.soft_prompt_file import SoftPrompt, load, save
from tests.support.browser import Visitor, chromium, visiting
from tests.support.servers import Server, running_server
from tests.support.small_compressions import CONTEXT

KEY = "open-sesame"
MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def server(tiny_compressible: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Four slots, a key, and a model that compresses within seconds."""
    chromium()  # a server that nobody can visit is not started
    flags = ("--model", tiny_compressible, "--dtype", "float32", "--max-batch-size", "4", "--kv-cache-gib", "0.03")
    with running_server(tmp_path_factory.mktemp("console"), *flags, "--api-key", KEY) as server:
        yield server


@pytest.fixture(scope="module")
def visitor(server: Server) -> Iterator[Visitor]:
    """Somebody who has typed the key in, once."""
    with visiting(server.url) as visitor:
        visitor.expected = 10  # each request without a key, or with a wrong one, is a line in the browser's console
        visitor.open("now")
        visitor.page.get_by_label("API key").fill("wrong")
        visitor.page.get_by_role("button", name="Open the console").click()
        visitor.page.get_by_text("not one of the server's").wait_for()
        visitor.page.get_by_label("API key").fill(server.api_key or "")
        visitor.page.get_by_role("button", name="Open the console").click()
        visitor.page.get_by_role("heading", name="Running").wait_for()
        visitor.expected = 0
        yield visitor


class Load:
    """Clients that ask one long thing after the other, each until something else than an answer comes."""

    def __init__(self, server: Server, count: int) -> None:
        self.refusals: list[str] = []
        self.server = server
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def _ask(self, number: int) -> None:
        body = {"prompt": f"{MARKUP} number {number}", "max_tokens": 1800, "ignore_eos": True, "temperature": 0}
        url = f"{self.server.url}/v1/completions"
        while True:
            reply = httpx.post(url, json=body, headers=self.server.headers, timeout=300)
            if reply.status_code != 200:
                self.refusals.append(reply.json()["error"]["code"])
                return


def test_now_is_the_batch_live_and_whoever_looks_may_cancel(server: Server, visitor: Visitor) -> None:
    page = visitor.page
    visitor.open("now")
    load = Load(server, 6)
    running = page.get_by_role("table", name="Running")
    page.get_by_text("4 of 4 slots are busy, 2 requests wait.").wait_for()
    assert running.get_by_role("progressbar").count() == 4
    assert page.locator(".slots .decode, .slots .prefill").count() == 4

    running.get_by_role("button", expanded=False).first.click()
    page.get_by_text(MARKUP).wait_for()
    assert page.locator("img").count() == 0
    visitor.look("now")
    visit_all_tabs(visitor)
    assert events_within(server, 2) <= 11, "the first, and five a second"

    visitor.expected = 100  # one that has ended by itself meanwhile is not found any more
    while len(load.refusals) < 6:
        page.get_by_role("button", name="Cancel").first.click()
        page.get_by_role("button", name="Cancel the request").click()
        page.wait_for_timeout(300)
    visitor.expected = 0
    assert load.refusals == ["request_cancelled"] * 6
    page.get_by_text("0 of 4 slots are busy, nobody waits.").wait_for()
    page.wait_for_function("document.querySelector('.plot .figure').textContent !== '–'")
    server.wait_empty()


def visit_all_tabs(visitor: Visitor) -> None:
    """All of them on the one stream that there is."""
    streams = visitor.streams
    for tab, title in (("prompts", "Soft prompts"), ("compress", "Compress"), ("ask", "Ask"), ("now", "Now")):
        visitor.open(tab)
        visitor.page.get_by_role("heading", name=title, level=1).wait_for()
    assert visitor.streams == streams


def events_within(server: Server, seconds: float) -> int:
    until, count = time.monotonic() + seconds, 0
    with httpx.stream("GET", f"{server.url}/v1/queue/events", headers=server.headers) as reply:
        for line in reply.iter_lines():
            if time.monotonic() > until:
                return count
            count += line.startswith("data:")
    return count


@pytest.mark.parametrize(
    ("arrivals", "rate"),
    [
        ([(1, 0.4 + 0.0005 * i) for i in range(12)], None),  # all at once: the network's pace, not the model's
        ([(2, 0.5), (1, 0.53)], None),
        ([(1, 0.4 + i / 40) for i in range(20)], 40),
        ([(6, 0.4), *((1, 0.4 + i / 40) for i in range(1, 20))], 40),
    ],
)
def test_pace_is_told_where_it_can_be(visitor: Visitor, arrivals: list[tuple[int, float]], rate: float | None) -> None:
    visitor.open("ask")
    measure = """async (arrivals) => {
        const { Pace } = await import("/console/assets/pace.js");
        const pace = new Pace();
        for (const [tokens, at] of arrivals) pace.take(tokens, at);
        return pace.rate;
    }"""
    found = visitor.page.evaluate(measure, arrivals)
    assert found == (rate and pytest.approx(rate))


@pytest.mark.timeout(600)  # of which a compression on a busy machine takes most
def test_a_text_becomes_a_soft_prompt_that_is_asked_and_deleted(
    server: Server, visitor: Visitor, tmp_path: Path
) -> None:
    compress(visitor)
    read_the_report(visitor)
    ask(visitor)
    bring_it_back(server, visitor, tmp_path)
    bring_a_preview(server, visitor, tmp_path)
    assert server.http.get("/v1/soft_prompts").json()["data"] == []


def compress(visitor: Visitor) -> None:
    page = visitor.page
    visitor.open("compress")
    page.get_by_label("Text", exact=True).fill(CONTEXT)
    page.get_by_text("shorter as 64 virtual ones").wait_for()
    page.get_by_label("Name", exact=True).fill("no such / name")
    visitor.expected = 1
    page.get_by_role("button", name="Compress").click()
    page.get_by_role("alert").get_by_text("name").first.wait_for()
    page.get_by_label("Name", exact=True).fill("lamps")
    page.get_by_label("Length in virtual tokens: another number").fill("8")
    page.get_by_label("Time to learn: another number").fill("0.1")
    page.get_by_label("Preview").check()
    page.get_by_role("button", name="Compress").click()
    page.get_by_role("progressbar", name="Compression of lamps").wait_for()
    visitor.look("compress")


def read_the_report(visitor: Visitor) -> None:
    """Where the page turns to by itself."""
    page = visitor.page
    page.get_by_role("heading", name="lamps", level=1).wait_for(timeout=240_000)
    page.get_by_role("heading", name="Beside what else could stand there").wait_for()
    visitor.look("soft-prompt")
    page.get_by_role("link", name="Soft prompts").first.click()
    page.get_by_role("table", name="Soft prompts").get_by_text("lamps").wait_for()


def ask(visitor: Visitor) -> None:
    page = visitor.page
    page.get_by_role("link", name="lamps").click()
    page.get_by_role("link", name="Ask it").click()
    assert page.get_by_label("Full context").input_value() == CONTEXT, "what was compressed here need not be pasted"
    page.get_by_label("Question", exact=True).fill(f"{MARKUP} How many bulbs has the red lamp?")
    page.get_by_label("Tokens at most").fill("12")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("prompt tokens instead of").wait_for()
    columns = page.locator(".answer")
    paid = [int(text.replace(",", "")) for text in columns.locator(".paid").all_inner_texts()]
    assert len(paid) == 3
    soft, full, none = paid
    # The soft prompt's eight virtual tokens stand for the system turn that the template writes without one.
    assert full > 4 * soft
    assert none < full
    page.locator(".answer .tokens span").first.hover()
    assert "%" in page.locator(".tip:visible").inner_text()
    page.mouse.move(0, 0)
    columns.last.get_by_role("group").focus()  # what is beside it must follow into a narrower window
    page.keyboard.press("ArrowRight")
    assert page.locator(".tokens .on").count() == 1
    assert page.locator("img").count() == 0
    visitor.look("ask")


def bring_it_back(server: Server, visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    visitor.open("prompts/lamps")
    with page.expect_download() as downloading:
        page.get_by_role("button", name="Download").click()
    file = tmp_path / "lamps.safetensors"
    downloading.value.save_as(file)
    page.get_by_role("link", name="Soft prompts").first.click()
    page.get_by_label("File").set_input_files(file)
    visitor.expected = 1
    page.get_by_role("button", name="Register").click()
    page.get_by_role("alert").get_by_text("exists already").wait_for()
    visitor.look("soft-prompts")
    delete_lamps(visitor)
    page.get_by_label("File").set_input_files(file)
    page.get_by_role("button", name="Register").click()
    page.get_by_role("table", name="Soft prompts").wait_for()
    again = server.http.get("/v1/soft_prompts/lamps/content")
    assert again.content == file.read_bytes()
    assert page.get_by_text("preview", exact=True).count() == 0, "its compression has ended"
    delete_lamps(visitor)


def bring_a_preview(server: Server, visitor: Visitor, tmp_path: Path) -> None:
    """A list says what it is, and so do its page and the job that made it."""
    page, trained = visitor.page, load(tmp_path / "lamps.safetensors", 1 << 24)
    manifest = trained.manifest.model_copy(update={"training": {PREVIEW_OF: "cmpr-1"}})
    file = tmp_path / "preview.safetensors"
    save(SoftPrompt(manifest, **trained.tensors), file)
    assert server.upload("lamps", file).status_code == 201
    visitor.open("prompts")
    page.get_by_role("table", name="Soft prompts").get_by_text("preview", exact=True).wait_for()
    visitor.look("preview")
    page.get_by_role("link", name="lamps").click()
    page.get_by_text("A preview: requests may use it").wait_for()
    visitor.open("prompts")
    page.get_by_role("table", name="Soft prompts").wait_for()
    show = """async (preview) => {
        const { Jobs } = await import("/console/assets/jobs.js");
        const jobs = new Jobs(), job = { id: "cmpr-1", name: "lamps", status: "running", progress: null, preview };
        const element = jobs.make(job);
        jobs.cards.get("cmpr-1").show(job);
        const hint = [...element.querySelectorAll(".hint")].find((one) => one.textContent.includes("preview"));
        return !hint.hidden && hint.querySelector("a").getAttribute("href");
    }"""
    assert page.evaluate(show, "lamps") == "console#ask/lamps"
    assert page.evaluate(show, None) is False
    delete_lamps(visitor)


def delete_lamps(visitor: Visitor) -> None:
    """After a second thought."""
    page = visitor.page
    page.get_by_role("link", name="lamps").click()
    for answer in ("Keep it", "Delete it"):
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_role("button", name=answer).click()
    page.get_by_text("There is none yet.").wait_for()
