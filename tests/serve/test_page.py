"""The playground in Chromium, in front of a server with a small folded model and its source."""

import asyncio
import copy
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import find_browser

pytest.importorskip("playwright", reason="playwright must be installed")
pytest.importorskip("uvicorn", reason="uvicorn must be installed")

import uvicorn
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from refold.conversion.convert import ConvertOptions, convert
from refold.engine.engine import Engine
from refold.engine.settings import EngineSettings
from refold.engine.thresholds import ExitThreshold, Thresholds, ToleranceLevel, model_fingerprint
from refold.modeling.load import load_model
from refold.serve.app import make_app
from refold.serve.host import EngineHost
from refold.serve.link import ThreadLink
from refold.serve.served import ServedModel
from refold.serve.settings import ServeSettings
from refold.studies.shipped import shipped_model

pytestmark = pytest.mark.long

EXITS = (4, 7, 9, 11)
"""Numbers of depths before the exits, of 12."""
LEVELS = {0.01: 0.97, 0.05: 0.75, 0.2: 0.4}
"""Tolerances that the page offers, with a threshold for all exits: nothing is promised by them."""

PROMPT = "def read_config(path):\n    "
ANSWERED = "#stop:disabled"
Visit = Callable[..., Page]
SHIFTS = """
window.shifts = 0;
new PerformanceObserver((list) => list.getEntries().forEach((each) => { window.shifts += each.value; }))
  .observe({type: "layout-shift", buffered: true});
"""
CONTRASTS = """
() => {
  const pixel = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const read = (colour) => {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = colour;
    pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = read(colour).map((each) => each / 255)
      .map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (read(colour)[3] > 250) return colour;
    }
    return "white";
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = {};
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest(":disabled, noscript, .unseen, select")) continue;
    if (!element.checkVisibility()) continue;
    const [one, two] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
    found[element.tagName + "." + element.className + " " + walker.currentNode.textContent.trim().slice(0, 30)] =
      (one + 0.05) / (two + 0.05);
  }
  return found;
}
"""
HIDE = """
(value) => {
  Object.defineProperty(document, "hidden", {value, configurable: true});
  document.dispatchEvent(new Event("visibilitychange"));
}
"""
NAMELESS = """
() => [...document.querySelectorAll("input, select, textarea, button, summary, canvas, [tabindex='0']")]
  .filter((each) => !each.ariaLabel && !(each.labels?.length) && !each.textContent.trim()).map((each) => each.outerHTML)
"""


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with exits, and thresholds beside it."""
    folder = tmp_path_factory.mktemp("page") / "folded"
    recipe = {"exits": {"at": [depths - 1 for depths in EXITS]}}
    convert(shipped_model(), folder, recipe, options=ConvertOptions(allow_larger=True))
    levels = [
        ToleranceLevel(
            tolerance=tolerance,
            exits=tuple(
                ExitThreshold(depths=depths, threshold=threshold, leaves=0, differs=0, bound=1) for depths in EXITS
            ),
            live=None,
        )
        for tolerance, threshold in LEVELS.items()
    ]
    Thresholds(
        measure="top1",
        kv="recompute",
        tolerance=0.05,
        confidence=0.9,
        levels=tuple(levels),
        documents=1,
        tokens=1,
        context=1,
        corpus="",
        model=model_fingerprint(load_model(folder, device="cpu")),
    ).write(folder)
    return folder


@pytest.fixture(scope="module")
def address(folded: Path) -> Iterator[str]:
    """A server of the model, once more with a chat template, once without thresholds, and of its source."""
    rows = {"max_rows": 4, "max_context": 512, "weights": "float32"}
    calibrated = Engine(folded, EngineSettings(exits="calibrated", **rows))
    engines = [calibrated, Engine(folded, EngineSettings(**rows)), Engine(shipped_model(), EngineSettings(**rows))]
    template = copy.deepcopy(calibrated.tokenizer)
    assert template is not None
    template.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    servers: list[Any] = []

    async def serve() -> None:
        links = [ThreadLink(lambda send, engine=engine: EngineHost(engine, send)) for engine in engines]
        for link in links:
            await link.start()
        models = [
            ServedModel("folded", links[0], calibrated.tokenizer),
            ServedModel("chat", links[0], template),
            ServedModel("uncalibrated", links[1], calibrated.tokenizer),
            ServedModel("plain", links[2], calibrated.tokenizer),
            ServedModel("source", links[2], calibrated.tokenizer, role="source"),
        ]
        config = uvicorn.Config(make_app(models, ServeSettings()), log_level="warning", timeout_graceful_shutdown=1)
        servers.append(uvicorn.Server(config))
        await servers[0].serve(sockets=[listening])
        for link in links:
            await link.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    servers[0].should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Visit]:
    """Opens the page; at the end no script may have failed and no rule of the policy may have been broken."""
    pages, faults = [], []

    def hear(message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            faults.append(message.text)

    def open_page(fragment: str = "", width: int = 1280, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        page = context.new_page()
        page.set_default_timeout(60000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", hear)
        page.goto(f"{address}/{fragment}")
        page.wait_for_selector("#legend li")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert faults == []


def run(page: Page, prompt: str = PROMPT, tokens: int = 24) -> None:
    """Asks, and waits for the end of the answers."""
    page.fill("#max_tokens", str(tokens))
    page.fill("#prompt", prompt)
    page.click("#run")
    page.wait_for_selector("#pane-model .token, #pane-model > .trouble:visible, #connection:visible")
    for place in ("#pane-model > .trouble", "#connection"):
        expect(page.locator(place)).to_have_text("")
    page.wait_for_selector(ANSWERED)


def text_of(page: Page, pane: str = "model") -> str:
    return "".join(page.locator(f"#pane-{pane} .token").all_text_contents())


def depths_of(page: Page) -> set[str]:
    return set(
        page.eval_on_selector_all("#pane-model .token", "all => all.map((e) => getComputedStyle(e).backgroundColor)")
    )


def test_an_answer_comes_in_the_colours_of_its_depths(visit: Visit) -> None:
    page = visit()
    assert page.locator("#legend li").count() == 5
    run(page, tokens=48)
    assert page.locator("#pane-model .token").count() == 48
    assert len(depths_of(page)) >= 2
    shares = [int(each.rstrip("%")) for each in page.locator("#legend .count").all_text_contents()]
    assert 95 <= sum(shares) <= 105
    assert sum(share > 0 for share in shares) >= 2
    saved = page.text_content("#pane-model [data-figure=saved]")
    assert saved is not None
    assert int(saved.rstrip("%")) > 0
    for name in ("rate", "tokens", "depth", "bytes"):
        assert re.search(r"\d", page.text_content(f"#pane-model [data-figure={name}]") or "")
    assert "48 tokens" in (page.text_content("#say") or "")
    expect(page.locator("#live-rate")).not_to_have_text("–")
    expect(page.locator("#live-depth")).to_have_text(re.compile(r"/ 12"))


def test_hover_shows_depth_probability_and_alternatives(visit: Visit) -> None:
    page = visit()
    run(page)
    page.hover("#pane-model .token >> nth=3")
    tip = page.locator("#tip")
    expect(tip).to_contain_text(re.compile(r"left at depth \d+ of 12, probability \d"))
    assert tip.locator("li").count() == 5
    widths = tip.locator(".bar i").evaluate_all("all => all.map((each) => each.offsetWidth)")
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 0
    page.hover("#tip")
    page.wait_for_timeout(300)
    assert tip.is_visible()
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_everything_works_by_keyboard(visit: Visit) -> None:
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+A")
    page.keyboard.type("import os")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#pane-model .token")
    page.wait_for_selector(ANSWERED)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "text":
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.place") == "1"
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    expect(page.locator("#tip")).to_contain_text("left at depth")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.place") == "95"
    page.keyboard.press("ArrowUp")
    assert int(page.evaluate("document.activeElement.dataset.place")) < 95
    page.keyboard.press("Escape")
    page.fill("#max_tokens", "400")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#pane-model.busy .token >> nth=3")
    page.keyboard.press("Escape")
    page.wait_for_selector(ANSWERED)
    assert page.locator("#pane-model .token").count() < 400
    expect(page.locator("#pane-model .end")).to_have_text("Stopped.")


def test_the_slider_goes_on_from_the_text_so_far(visit: Visit) -> None:
    page = visit("#exit=0&compare=no")
    page.fill("#max_tokens", "300")
    page.fill("#prompt", PROMPT)
    page.click("#run")
    page.wait_for_selector("#pane-model .token >> nth=8")
    assert len(depths_of(page)) == 1
    page.focus("#exit")
    page.keyboard.press("End")
    page.wait_for_selector("#pane-model .token.change")
    at = page.eval_on_selector("#pane-model .token.change", "each => Number(each.dataset.place)")
    before = page.locator("#pane-model .token").all_text_contents()[:at]
    page.wait_for_selector(ANSWERED)
    assert page.locator("#pane-model .token").count() == 300
    assert len(depths_of(page)) >= 2
    run_at_once = visit("#exit=0&compare=no")
    run(run_at_once, tokens=at)
    assert run_at_once.locator("#pane-model .token").all_text_contents() == before


def test_the_slider_answers_anew_after_the_end(visit: Visit) -> None:
    page = visit("#exit=0&compare=no")
    run(page)
    assert len(depths_of(page)) == 1
    full = text_of(page)
    page.focus("#exit")
    move_and_wait(page, "End")
    assert len(depths_of(page)) >= 2
    move_and_wait(page, "Home")
    assert text_of(page) == full


def move_and_wait(page: Page, key: str) -> None:
    """Moves the slider, and waits for another answer."""
    page.eval_on_selector("#pane-model .token", "each => each.classList.add('old')")
    page.keyboard.press(key)
    page.wait_for_selector(".old", state="detached")
    page.wait_for_selector(ANSWERED)


def test_the_source_answers_beside(visit: Visit) -> None:
    page = visit("#exit=0.2")
    run(page, tokens=48)
    assert page.locator("#pane-source .token").count() == 48
    found = re.fullmatch(
        r"First difference at token (\d+)\. (\d+) of 48 tokens agree with the source \(\d+%\)\.",
        page.text_content("#agreement") or "",
    )
    assert found is not None
    first, agreed = int(found[1]) - 1, int(found[2])
    texts = [page.locator(f"#pane-{pane} .token").all_text_contents() for pane in ("model", "source")]
    assert texts[0][:first] == texts[1][:first]
    assert texts[0][first] != texts[1][first]
    for pane in ("model", "source"):
        assert page.get_attribute(f"#pane-{pane} .token.first", "data-place") == str(first)
        assert page.locator(f"#pane-{pane} .token.other").count() == 48 - agreed
        assert re.search(r"MB", page.text_content(f"#pane-{pane} [data-figure=bytes]") or "")
    page.uncheck("#compare")
    assert page.locator("#pane-source").is_hidden()
    page.check("#compare")
    page.focus("#exit")
    move_and_wait(page, "Home")
    expect(page.locator("#agreement")).to_have_text("The same tokens. 48 of 48 tokens agree with the source (100%).")
    assert page.locator(".token.other, .token.first").count() == 0


def test_models_without_tolerances_or_exits_say_so(visit: Visit) -> None:
    page = visit("#compare=no&model=uncalibrated")
    expect(page.locator("#exit-label")).to_have_text("Exit depth")
    expect(page.locator("#exit-value")).to_have_text("12 of 12 depths")
    page.focus("#exit")
    page.keyboard.press("End")
    expect(page.locator("#exit-value")).to_have_text("4 of 12 depths")
    run(page)
    expect(page.locator("#pane-model [data-figure=depth]")).to_have_text("4.0 / 12")
    page.select_option("#model", "plain")
    expect(page.locator("#exit-note")).to_have_text("This model has no exits: every token runs all 12 depths.")
    assert page.locator("#exit").is_hidden()
    assert page.locator("#pane-model .token").count() == 0


def test_a_link_holds_the_settings(visit: Visit, address: str) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    values = {"max_tokens": "17", "temperature": "0.7", "top_p": "0.9", "seed": "5", "stops": "\\n\\n\nclass"}
    for name, value in values.items():
        page.fill(f"#{name}", value)
    page.fill("#prompt", "x = {'ä': 1}  # a&b=c")
    page.focus("#exit")
    page.keyboard.press("End")
    page.uncheck("#compare")
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text("Copied ✓")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{address}/#")
    assert link == page.url
    expect(page.locator("#copy")).to_have_text("Copy link")
    page.reload()
    other = visit("#" + link.partition("#")[2])
    for each in (page, other):
        each.wait_for_selector("#legend li")
        for name, value in values.items():
            assert each.input_value(f"#{name}") == value
        assert each.input_value("#prompt") == "x = {'ä': 1}  # a&b=c"
        assert each.input_value("#exit") == each.get_attribute("#exit", "max")
        assert not each.is_checked("#compare")
        assert each.locator(".token").count() == 0
    assert all("#" not in each and "seed" not in each for each in asked if "state" in each)


def test_a_broken_link_is_no_harm(visit: Visit) -> None:
    page = visit("#turns=[{]&model=../../etc&exit=abc&max_tokens=%3Cb%3E&prompt=%3Cimg%20src=x%20onerror=alert(1)%3E")
    assert page.input_value("#prompt") == "<img src=x onerror=alert(1)>"
    assert page.input_value("#model") == "folded"
    run(page)
    assert page.locator("img").count() == 0


def test_a_conversation(visit: Visit) -> None:
    page = visit("#compare=no&model=chat")
    page.check("#mode-chat", force=True)
    run(page, "import os")
    answer = text_of(page)
    expect(page.locator("#turns li")).to_have_text(["youimport os"])
    assert page.input_value("#prompt") == ""
    run(page, "import sys")
    turns = page.locator("#turns li").all_text_contents()
    assert turns == ["youimport os", f"model{answer}", "youimport sys"]
    page.reload()
    page.wait_for_selector("#turns li")
    assert page.locator("#turns li").all_text_contents() == turns
    page.fill("#max_tokens", "200")
    page.click("#run")
    page.wait_for_selector("#pane-model.busy .token >> nth=5")
    page.focus("#exit")
    page.keyboard.press("Home")
    page.wait_for_selector("#pane-model .token.change")
    page.click("#stop")
    page.click("#forget")
    assert page.locator("#turns").is_hidden()


def test_a_model_without_a_template_cannot_chat(visit: Visit) -> None:
    page = visit()
    assert page.is_disabled("#mode-chat")
    assert page.locator("#chat-note").is_visible()


def test_faults_are_told_at_their_place(visit: Visit) -> None:
    page = visit()
    page.fill("#temperature", "9")
    page.click("#run")
    expect(page.locator("#temperature-error")).to_contain_text("temperature")
    assert page.get_attribute("#temperature", "aria-invalid") == "true"
    expect(page.locator("#pane-model .trouble")).to_contain_text("temperature")
    page.fill("#temperature", "0")
    run(page)
    assert page.locator("#temperature-error").is_hidden()
    assert page.get_attribute("#temperature", "aria-invalid") is None
    page.fill("#prompt", "def " * 5000)
    page.click("#run")
    expect(page.locator("#prompt-error")).to_contain_text("prompt")


def fulfil(status: int, body: str, **headers: str) -> Callable[[Route], None]:
    return lambda route: route.fulfill(status=status, body=body, headers=headers)


def test_a_busy_server_a_lost_engine_and_a_lost_connection_are_told(visit: Visit) -> None:
    page = visit("#compare=no")
    trouble = page.locator("#pane-model .trouble")
    busy = fulfil(429, '{"error": {"message": "queue: full", "param": null}}', **{"Retry-After": "3"})
    page.route("**/v1/completions", busy)
    page.click("#run")
    expect(trouble).to_have_text("queue: full (try again in 3 s)")
    token = '{"choices": [{"refold_tokens": [{"id": 1, "text": "a", "depth": 4}]}]}'
    lost = f'data: {token}\n\ndata: {{"error": {{"message": "engine: it stopped"}}}}\n\n'
    page.unroute("**/v1/completions")
    page.route("**/v1/completions", fulfil(200, lost, **{"Content-Type": "text/event-stream"}))
    page.click("#run")
    expect(trouble).to_have_text("engine: it stopped (after 1 tokens)")
    page.unroute("**/v1/completions")
    page.route("**/v1/completions", fulfil(200, f"data: {token}\n\n", **{"Content-Type": "text/event-stream"}))
    page.click("#run")
    expect(trouble).to_have_text("The connection was lost while the answer came. (after 1 tokens)")
    page.unroute("**/v1/completions")
    page.route("**/v1/completions", fulfil(502, "<html>"))
    page.click("#run")
    expect(trouble).to_contain_text("The server answered 502")
    page.route("**/state", lambda route: route.abort())
    expect(page.locator("#connection")).to_have_text(
        "The server cannot be reached. Is it still running? This page goes on trying."
    )
    page.unroute("**/state")
    expect(page.locator("#connection")).to_be_hidden(timeout=10000)
    page.route("**/health", fulfil(503, '{"error": {"message": "engine: a running engine is required"}}'))
    expect(page.locator("#connection")).to_contain_text("a running engine is required")


def test_a_key_is_asked_for_and_never_in_the_link(visit: Visit) -> None:
    page = visit()

    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            fulfil(401, '{"error": {"message": "authorization: a key is required"}}')(route)

    page.route("**/state", guard)
    expect(page.locator("#key-form")).to_be_visible()
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    page.click("#copy")
    assert "secret" not in page.url
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read(visit: Visit, width: int, scheme: str) -> None:
    page = visit("#exit=0.2", width=width, color_scheme=scheme)
    page.evaluate(SHIFTS)
    run(page, tokens=64)
    print("\n".join(page.evaluate("window.told ?? []")))
    assert page.evaluate("window.shifts") < 0.02
    for table in page.locator("details.tokens summary").all():
        table.click()
    assert page.locator("#pane-model table tr").count() == 65
    token = page.locator("#pane-model .token").nth(-2)
    token.scroll_into_view_if_needed()
    page.wait_for_timeout(200)  # scrolling hides what a token tells
    token.hover()
    expect(page.locator("#tip")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 60
    assert {name: found for name, found in contrasts.items() if found < 4.5} == {}
    assert page.evaluate(NAMELESS) == []
    box = page.locator("#tip").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_the_switch_goes_over_the_system(visit: Visit) -> None:
    page = visit(color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.select_option("#theme", "dark")
    dark = page.evaluate(ground)
    assert light != dark
    page.reload()
    page.wait_for_selector("#legend li")
    assert page.evaluate(ground) == dark
    page.select_option("#theme", "")
    assert page.evaluate(ground) == light


def test_a_hidden_page_asks_for_nothing(visit: Visit) -> None:
    page = visit()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(1500)
    assert len(asked) >= 2
    page.evaluate(HIDE, True)
    page.wait_for_timeout(500)
    asked.clear()
    page.wait_for_timeout(1000)
    assert asked == []
    page.evaluate(HIDE, False)
    page.wait_for_timeout(1000)
    assert asked


def test_the_strip_moves_unless_the_reader_wants_none(visit: Visit) -> None:
    pictures = {}
    for motion in ("no-preference", "reduce"):
        page = visit("#compare=no", reduced_motion=motion)
        run(page)
        found = set()
        for _ in range(5):
            found.add(page.evaluate("document.querySelector('#strip').toDataURL()"))
            page.wait_for_timeout(400)
        pictures[motion] = len(found)
    assert pictures["no-preference"] >= 3
    assert pictures["reduce"] <= 2
