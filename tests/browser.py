"""The host's page in headless Chromium: what a person would do there, in short words."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS = 1000
PATIENCE = 30 * SECONDS

STAND_INS = """
function gradioApp() { return document; }
function onUiLoaded(callback) { (onUiLoaded.waiting ??= []).push(callback); }
function submit(...values) { return ["task(page)", ...values.slice(1)]; }
function randomId() { return "task(page)"; }
function showSubmitButtons(tab, show) {}
function requestProgress(id, place, gallery, atEnd) {}
function inputAccordionChecked(id, ticked) {
    const box = document.getElementById(`${id}-visible-checkbox`);
    const head = document.querySelector(`#${id} > .label-wrap`);
    box.checked = ticked;
    if (head.classList.contains("open") !== ticked) head.click();
}
onUiLoaded(() => {
    for (const accordion of document.querySelectorAll(".input-accordion")) {
        const value = document.querySelector(`#${accordion.id}-checkbox input`);
        const head = accordion.querySelector(".label-wrap");
        const box = Object.assign(document.createElement("input"), {
            type: "checkbox", id: `${accordion.id}-visible-checkbox`, checked: value.checked,
        });
        const tick = () => { if (value.checked !== box.checked) value.click(); };
        head.querySelector("span").prepend(box);
        const opening = new MutationObserver(() => { box.checked = head.classList.contains("open"); tick(); });
        opening.observe(head, { attributes: true, attributeFilter: ["class"] });
        box.addEventListener("click", (event) => { opening.disconnect(); event.stopPropagation(); });
        box.addEventListener("input", tick);
    }
});
new MutationObserver((_, observer) => {
    if (!document.getElementById("html_log_txt2img")) return;
    observer.disconnect();
    onUiLoaded.waiting.forEach((callback) => callback());
}).observe(document, { childList: true, subtree: true });
"""
"""What the double's page lacks of the host's own scripts, as far as an extension meets them."""


def missing(what: str) -> None:
    """No browser: a reason to skip, but not where the checks are meant to be complete."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, which CI needs")
    pytest.skip(what)


def chromium() -> str:
    named = os.environ.get("CHROMIUM")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None) or named
    if not found:
        missing("no chromium, chromium-browser or google-chrome on PATH, and CHROMIUM names none")
    return str(found)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    executable = chromium()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield running
        finally:
            running.close()


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """An ASGI application of this process on a free port."""
    import uvicorn

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        port = listening.getsockname()[1]
        # It answers from `listen` on; a connection waits until the server's thread is up.
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


def runs_something(url: str) -> bool:
    return any(part in url for part in ("/run/", "/queue/", "/api/"))


class HostPage:
    """The txt2img tab and the extension's accordion in it.

    `errors` are the page's uncaught exceptions, `calls` its requests that run something on the server.
    """

    def __init__(self, browser: Any, url: str, *, is_real: bool, loses_errors: bool = False) -> None:
        from playwright.sync_api import expect

        expect.set_options(timeout=PATIENCE)
        self.is_real = is_real
        self.loses_errors = loses_errors
        self.errors: list[str] = []
        self.calls: list[str] = []
        self._running: list[Any] = []
        self._answers: list[str] = []
        self.page = browser.new_page(viewport={"width": 1400, "height": 1600})
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._begin(request) if runs_something(request.url) else None)
        self.page.on("requestfinished", lambda request: self._end(request, request.post_data))
        self.page.on("requestfailed", lambda request: self._end(request, request.post_data))
        self.page.on("websocket", self._begin_queued)
        self.page.route("**/*", lambda route: self._route(route, url))
        self.page.goto(url, wait_until="domcontentloaded")
        self._completed()

    def _completed(self) -> None:
        # Made when the page is complete, by the host's script and by ours.
        self.box.wait_for(state="attached")
        self.accordion.locator(".memnoise-hidden").first.wait_for(state="attached")
        self.settle()

    def _begin(self, call: Any) -> None:
        self.calls.append(call.url)
        self._running.append(call)

    def _begin_queued(self, call: Any) -> None:
        self._begin(call)
        sent: list[str] = []
        call.on("framesent", lambda text: sent.append(str(text)))
        call.on("close", lambda _: self._end(call, "".join(sent)))

    def _end(self, call: Any, sent: str | None) -> None:
        if call in self._running:
            self._running.remove(call)
            self._answers.append(sent or "")

    def sent(self, mark: str) -> int:
        """How many of the page's calls sent a text with this in it."""
        return sum(mark in sent for sent in self._answers)

    @contextlib.contextmanager
    def answered(self, mark: str) -> Iterator[None]:
        """Wait for the server's answer to what is done here; the call is known by a text that it sends.

        The host's page calls for other things meanwhile, such as the number of tokens.
        """
        before, calls, quiet = self.sent(mark), len(self.calls), 0
        yield
        for _ in range(4 * PATIENCE // 20):
            self.page.wait_for_timeout(20)
            streaming = any("queue/data" in call.url for call in self._running)
            quiet = quiet + 1 if self.sent(mark) > before and not streaming else 0
            # gradio 4 answers at once, and opens a stream then, which ends with the last result.
            if quiet > (10 if any("queue/join" in call for call in self.calls[calls:]) else 0):
                return
        raise TimeoutError(f"no answer to {mark!r}")

    def settle(self) -> None:
        """Wait until nothing that the page called for runs any more."""
        # gradio asks a server of its own kind for news all the time, so the network is never idle.
        for _ in range(PATIENCE // 20):
            self.page.wait_for_timeout(20)
            if not self._running:
                return
        raise TimeoutError(f"still running: {[call.url for call in self._running]}")

    def _route(self, route: Any, url: str) -> None:
        request = route.request
        if not request.url.startswith((url, "data:", "blob:")):
            route.abort()
        elif not self.is_real and request.resource_type == "document":
            scripts = STAND_INS + "".join(
                path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "javascript").glob("*.js"))
            )
            style = (REPOSITORY / "style.css").read_text(encoding="utf-8")
            answer = route.fetch()
            head = f"<script>{scripts}</script><style>{style}</style></head>"
            route.fulfill(response=answer, body=answer.text().replace("</head>", head, 1))
        else:
            route.continue_()

    def reload(self, host_is_back: Callable[[], bool]) -> None:
        """Press the page's own button for it: the host loads its scripts again, then the page itself."""
        errors = len(self.errors)
        self.page.get_by_role("link", name="Reload UI").click()
        self.page.get_by_text("Reloading...").wait_for()
        for _ in range(4 * PATIENCE // 100):
            self.page.wait_for_timeout(100)
            if host_is_back():
                break
        else:
            raise TimeoutError("the host is not back")
        # Of the page that the host's own script has emptied.
        self._running.clear()
        del self.errors[errors:]
        self._completed()

    def close(self) -> None:
        self.page.close()

    # The accordion

    @property
    def accordion(self) -> Any:
        return self.page.locator("#script_txt2img_memnoise_enabled")

    @property
    def box(self) -> Any:
        return self.page.locator("#script_txt2img_memnoise_enabled-visible-checkbox")

    def control(self, name: str) -> Any:
        return self.page.locator(f"#script_txt2img_memnoise_{name}")

    def field(self, name: str) -> Any:
        """Where a control's value is: of a slider its number."""
        return self.control(name).locator("input:not([type=range]), textarea")

    def open(self) -> None:
        """Open the accordion, which ticks its box."""
        from playwright.sync_api import expect

        self.accordion.locator(".label-wrap").first.click()
        expect(self.control("method")).to_be_visible()
        expect(self.box).to_be_checked()

    def open_more(self) -> None:
        self.control("more").locator(".label-wrap").click()
        self.control("reference").wait_for()

    def choose(self, name: str, label: str) -> None:
        choose(self.control(name), label)

    def type(self, name: str, value: str) -> None:
        self.field(name).fill(value)
        self.field(name).blur()

    # The rest of the tab

    @property
    def infotext(self) -> Any:
        return self.page.locator("#html_info_txt2img").first

    @property
    def metadata(self) -> Any:
        """The pictures' metadata as JSON, which the page keeps out of sight."""
        return self.page.locator("#generation_info_txt2img textarea")

    @property
    def log(self) -> Any:
        return self.page.locator("#html_log_txt2img").first

    @property
    def error(self) -> Any:
        return self.log.locator(".error")

    @property
    def refusal(self) -> Any:
        """An error; a comment where the host loses errors."""
        return self.log.locator(".comments" if self.loses_errors else ".error")

    @property
    def pictures(self) -> Any:
        return self.page.locator("#txt2img_gallery img")

    def picture(self) -> np.ndarray:
        """The first picture's pixels."""
        fetched = self.pictures.first.evaluate(
            "async (image) => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"
        )
        return np.asarray(Image.open(io.BytesIO(bytes(fetched))).convert("RGB"))

    def prompt(self, text: str) -> None:
        self.page.locator("#txt2img_prompt textarea").fill(text)

    def small(self) -> None:
        """Settings of a picture that is quickly made."""
        from playwright.sync_api import expect

        # Pasted, since the host's page throws when a size is typed in (with or without extensions).
        self.paste("a red fox in the snow\nSteps: 4, Sampler: DDIM, CFG scale: 6, Seed: 7, Size: 64x64")
        for name, value in (("width", "64"), ("height", "64"), ("steps", "4")):
            expect(self.page.locator(f"#txt2img_{name} input[type=number]")).to_have_value(value)
        expect(self.page.locator("#txt2img_prompt textarea")).to_have_value("a red fox in the snow")

    def generate(self) -> None:
        with self.answered("task("):
            self.page.locator("#txt2img_generate").click()

    def generate_at_once(self) -> None:
        """As the host's Ctrl+Enter does: the field that is being typed into keeps the focus."""
        with self.answered("task("):
            if self.is_real:
                self.page.keyboard.press("Control+Enter")
            else:
                self.page.locator("#txt2img_generate").dispatch_event("click")

    def paste(self, infotext: str) -> None:
        """Put it into the prompt and press the button that reads it."""
        self.prompt(infotext)
        self.page.locator("#tab_txt2img #paste").click()

    def plot(self, axis: str, values: str) -> None:
        """Set up an X/Y/Z plot of one axis."""
        script = self.page.locator("#txt2img_script_container #script_list")
        kind = self.page.locator("#script_txt2img_xyz_plot_x_type")
        if script.locator("input").input_value() != "X/Y/Z plot":
            choose(script, "X/Y/Z plot")
            kind.wait_for()
        if kind.locator("input").input_value() != axis:
            # The host answers a change of axis with new values, which must not overwrite those typed in here.
            with self.answered(axis) if self.is_real else contextlib.nullcontext():
                choose(kind, axis)
        self.page.locator("#script_txt2img_xyz_plot_x_values textarea").fill(values)


def choose(dropdown: Any, label: str) -> None:
    from playwright.sync_api import expect

    dropdown.locator("input").click()
    # gradio 4 calls them options
    asked = (dropdown.get_by_role(role, name=label, exact=True) for role in ("button", "option"))
    next(asked).or_(next(asked)).click()
    expect(dropdown.locator("input")).to_have_value(label)
