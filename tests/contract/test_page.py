"""The page in headless Chromium, of the double and of a real WebUI; and what the paste button does, without one."""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lib_memnoise.registry import METHODS
from lib_memnoise.settings import MITIGATED, PRESETS, SPECS, is_used, requirement
from tests import browser
from tests.browser import HostPage
from tests.contract.conftest import Studio
from tests.contract.test_compare import PATTERN, file_of

PICTURE = "a red fox in the snow\nSteps: 4, Sampler: DDIM, CFG scale: 6, Seed: 7, Size: 64x64"
PER_SAMPLE = (
    f"{PICTURE}, Memnoise: per_sample, Memnoise preset: custom, Memnoise lr: 0.02, Memnoise target: 0.5, "
    "Memnoise target kind: fraction, Memnoise reference: negative"
)
MALFORMED = f"{PICTURE}, Memnoise: batch_wise, Memnoise preset: custom, Memnoise gamma: 0.4, Memnoise tau: soon"
SOON = f'memnoise: tau = "soon" is not valid; it must be {requirement("tau")}.'
TAU_AXIS = f"[Memnoise] {SPECS['tau'].label}"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.browser() as running:
        yield running


@pytest.fixture
def page(chromium: Any, running: Any, address: str) -> Iterator[HostPage]:
    loses_errors = getattr(running, "loses_errors", False)
    opened = HostPage(chromium, address, is_real=running.is_real, loses_errors=loses_errors)
    yield opened
    # The host's own page raises this after any generation, with no extension installed.
    errors = [error for error in opened.errors if not (opened.is_real and "reading 'props'" in error)]
    opened.close()
    assert errors == []


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def check_visible(page: HostPage, method: str, *, custom: bool) -> None:
    for name, spec in SPECS.items():
        if spec.methods and not spec.advanced:
            visible = is_used(name, {"method": method}) and (custom or not spec.preset)
            expect(page.control(name)).to_be_visible(visible=visible)


def test_the_accordion_is_there_and_off(page: HostPage) -> None:
    expect(page.accordion).to_have_count(1)
    expect(page.accordion).to_be_visible()
    expect(page.box).not_to_be_checked()
    expect(page.control("method")).not_to_be_visible()
    ids = page.accordion.evaluate("root => [root, ...root.querySelectorAll('[id]')].map((node) => node.id)")
    # gradio numbers what is given no name, and names a dropdown's parts itself.
    own = {name for name in ids if "memnoise" in name}
    assert own >= {f"script_txt2img_memnoise_{name}" for name in SPECS}
    assert all(name.startswith("script_txt2img_memnoise_") for name in own)


def test_only_what_is_used_is_shown(page: HostPage) -> None:
    page.open()
    check_visible(page, "batch_wise", custom=False)
    expect(page.control("unreadable")).not_to_be_visible()
    page.open_more()
    expect(page.control("weight_decay")).not_to_be_visible()
    page.calls.clear()

    page.choose("preset", PRESETS["custom"])
    check_visible(page, "batch_wise", custom=True)
    page.choose("method", METHODS["per_sample"].label)
    check_visible(page, "per_sample", custom=True)
    expect(page.control("weight_decay")).to_be_visible()
    page.choose("preset", PRESETS["sd2_v"])
    check_visible(page, "per_sample", custom=False)
    hints = page.accordion.locator(".memnoise-hints p:visible")
    expect(hints).to_have_count(2)
    expect(hints.nth(1)).to_contain_text("target 10.0")
    page.choose("method", METHODS["batch_wise"].label)
    check_visible(page, "batch_wise", custom=False)
    expect(page.control("weight_decay")).not_to_be_visible()
    page.settle()
    # (The host's own slider calls for something where the pointer leaves a dropdown above it.)
    assert page.is_real or page.calls == []
    assert page.sent(METHODS["per_sample"].label) == page.sent(PRESETS["custom"]) == 0

    page.paste(PICTURE)  # the other way round: what does run on the server is noticed
    expect(page.box).not_to_be_checked()
    assert page.calls != []


def test_generating(page: HostPage) -> None:
    page.small()
    page.generate()
    expect(page.pictures.first).to_be_visible()
    expect(page.infotext).not_to_contain_text("Memnoise")
    expect(page.log).not_to_contain_text("Memnoise")

    page.open()
    page.generate()
    expect(page.infotext).to_contain_text("Memnoise: batch_wise")
    expect(page.infotext).not_to_contain_text("Memnoise tau: 500")
    expect(page.log).to_contain_text("Memnoise, image 1: batch-wise")

    page.choose("preset", PRESETS["custom"])
    page.type("tau", "500")
    page.generate()
    expect(page.infotext).to_contain_text("Memnoise tau: 500")
    expect(page.infotext).to_contain_text("Memnoise preset: custom")
    expect(page.error).to_have_count(0)


def test_pasting_brings_everything_back(page: HostPage) -> None:
    page.paste(PER_SAMPLE)
    expect(page.box).to_be_checked()
    expect(page.field("method")).to_have_value(METHODS["per_sample"].label)
    expect(page.field("preset")).to_have_value(PRESETS["custom"])
    expect(page.field("lr")).to_have_value("0.02")
    expect(page.field("target")).to_have_value("0.5")
    expect(page.field("target_kind")).to_have_value((SPECS["target_kind"].choices or {})["fraction"])
    check_visible(page, "per_sample", custom=True)
    page.open_more()
    expect(page.field("reference")).to_have_value((SPECS["reference"].choices or {})["negative"])
    expect(page.control("weight_decay")).to_be_visible()
    expect(page.control("unreadable")).not_to_be_visible()
    page.generate()
    for text in ("per_sample", "lr: 0.02", "target: 0.5", "target kind: fraction", "reference: negative"):
        expect(page.infotext).to_contain_text(f"Memnoise{':' if text == 'per_sample' else ''} {text}")

    page.paste(PICTURE)
    expect(page.box).not_to_be_checked()
    page.generate()
    expect(page.infotext).not_to_contain_text("Memnoise")
    expect(page.pictures.first).to_be_visible()


def test_pasting_what_cannot_be_read(page: HostPage) -> None:
    page.paste(MALFORMED)
    expect(page.box).to_be_checked()
    expect(page.control("unreadable")).to_be_visible()
    expect(page.field("unreadable")).to_have_value(SOON)
    expect(page.field("gamma")).to_have_value("0.4")
    check_visible(page, "batch_wise", custom=True)
    page.generate()
    expect(page.refusal).to_contain_text(f"Memnoise: the pasted infotext cannot be used: {SOON.split(': ', 1)[1]}")
    expect(page.pictures).to_have_count(0)

    page.type("unreadable", "")
    page.generate()
    expect(page.pictures.first).to_be_visible()
    expect(page.infotext).to_contain_text("Memnoise gamma: 0.4")
    expect(page.error).to_have_count(0)


def test_pasting_again_takes_the_complaint_away(page: HostPage) -> None:
    page.paste(MALFORMED)
    expect(page.control("unreadable")).to_be_visible()
    page.paste(PER_SAMPLE)
    expect(page.control("unreadable")).not_to_be_visible()
    expect(page.box).to_be_checked()
    check_visible(page, "per_sample", custom=True)
    page.generate()
    expect(page.infotext).to_contain_text("Memnoise: per_sample")


def test_a_bad_value_is_refused_in_a_sentence(page: HostPage) -> None:
    page.small()
    page.open()
    page.choose("preset", PRESETS["custom"])
    page.choose("method", METHODS["per_sample"].label)
    page.type("lr", "5")
    page.generate()
    expect(page.refusal).to_contain_text(
        re.compile(rf"^Memnoise: lr = 5(\.0)? is not valid; it must be {requirement('lr')}\.")
    )
    expect(page.pictures).to_have_count(0)

    page.choose("method", METHODS["batch_wise"].label)
    page.field("tau").fill("5000")  # gradio mends a slider's value once it has lost the focus
    page.generate_at_once()
    expect(page.refusal).to_contain_text(f"Memnoise: tau = 5000 is not valid; it must be {requirement('tau')}.")
    expect(page.pictures).to_have_count(0)

    page.type("tau", "500")
    page.generate()
    expect(page.infotext).to_contain_text("Memnoise tau: 500")
    expect(page.error).to_have_count(0)


def test_the_page_and_the_api_at_the_same_moment(page: HostPage, running: Any) -> None:
    studio = Studio(running)
    wanted: list[Any] = [None, {"tau": 300}, {"method": "per_sample", "target": 0.8, "target_kind": "fraction"}]
    alone = [studio.run(settings) for settings in wanted]
    page.small()
    page.open()
    page.choose("preset", PRESETS["custom"])

    def generate(tau: str) -> tuple[np.ndarray, str]:
        page.type("tau", tau)
        page.generate()
        expect(page.infotext).to_contain_text(f"Memnoise tau: {tau}")
        return page.picture(), json.loads(page.metadata.input_value())["infotexts"][0]

    picture, infotext = generate("500")
    other, _ = generate("999")
    assert not np.array_equal(picture, other)

    done = threading.Event()

    def keep_asking(order: list[int]) -> None:
        """Until the page has its picture."""
        for which in itertools.cycle(order):
            run, expected = studio.run(wanted[which]), alone[which]
            assert np.array_equal(run.images[0], expected.images[0]) and run.infotexts == expected.infotexts
            if done.is_set():
                return

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking, order) for order in ([0, 1, 2], [2, 1, 0])]
        try:
            together = generate("500")
        finally:
            done.set()
        for answer in asking:
            answer.result()
    assert np.array_equal(together[0], picture) and together[1] == infotext


def test_a_plot(page: HostPage) -> None:
    page.small()
    page.open()
    page.plot(TAU_AXIS, "900,soon")
    page.generate()
    expect(page.refusal).to_contain_text('Memnoise: tau = "soon" is not valid')
    expect(page.pictures).to_have_count(0)

    page.plot(TAU_AXIS, "900,500")
    page.generate()
    expect(page.metadata).to_have_value(re.compile(r"X Values: "))
    grid = json.loads(page.metadata.input_value())["infotexts"][0]
    assert f"X Type: {TAU_AXIS}, X Values: " in grid and "900,500" in grid
    expect(page.pictures.first).to_be_visible()
    width = "image => image.decode().then(() => image.naturalWidth)"
    assert page.pictures.first.evaluate(width) >= 2 * 64
    expect(page.error).to_have_count(0)


def test_bad_settings_end_a_plot_before_it_starts(page: HostPage) -> None:
    page.paste(MALFORMED)
    expect(page.box).to_be_checked()
    page.plot("CFG Scale", "5,6")
    page.generate()
    expect(page.refusal).to_contain_text(f"Memnoise: the pasted infotext cannot be used: {SOON.split(': ', 1)[1]}")
    expect(page.pictures).to_have_count(0)


def test_why_a_cell_is_empty_is_on_the_page(page: HostPage) -> None:
    page.small()
    page.open()
    page.choose("preset", PRESETS["custom"])
    page.choose("method", METHODS["opposite_guidance"].label)
    page.type("opposite", "3")
    page.open_more()
    page.control("fail_instead").locator("input").check()
    page.plot("CFG Scale", "0,6")
    page.generate()
    expect(page.control("failed").first).to_contain_text("opposite guidance needs a CFG scale other than 0")
    page.plot("CFG Scale", "5,6")
    page.generate()
    expect(page.control("failed").first).not_to_contain_text("A cell failed")


# The double alone, without a browser


@pytest.fixture
def double(running: Any) -> Any:
    if running.is_real:
        pytest.skip("the double's own way to the page")
    return running


def pressed(host: Any, infotext: str, **changed: Any) -> tuple[Any, ...]:
    """Paste, then Generate: pictures, metadata, infotext, log."""
    values = {name: value for name, value in host.paste(infotext).items() if "memnoise" in name}
    small = {"txt2img_width": 64, "txt2img_height": 64, "txt2img_steps": 4, "txt2img_prompt": "a red fox in the snow"}
    return host.page(**small, **{**values, **changed})


def test_pasting_without_a_browser(double: Any) -> None:
    pasted = double.paste(PER_SAMPLE)
    assert pasted["script_txt2img_memnoise_enabled-checkbox"] is True
    assert pasted["script_txt2img_memnoise_method"] == METHODS["per_sample"].label
    assert pasted["script_txt2img_memnoise_preset"] == PRESETS["custom"]
    assert pasted["script_txt2img_memnoise_target"] == 0.5
    assert pasted["script_txt2img_memnoise_reference"] == (SPECS["reference"].choices or {})["negative"]
    assert pasted["script_txt2img_memnoise_unreadable"] == ""
    pictures, _, infotext, log = pressed(double, PER_SAMPLE)
    assert len(pictures) == 1 and "Memnoise: per_sample" in infotext and "Memnoise, image 1: per-sample" in log

    pasted = double.paste(PICTURE)
    assert {name: value for name, value in pasted.items() if "memnoise" in name} == {
        "script_txt2img_memnoise_enabled-checkbox": False,
        "script_txt2img_memnoise_unreadable": "",
    }
    pictures, _, infotext, _ = pressed(double, PICTURE)
    assert len(pictures) == 1 and "Memnoise" not in infotext


def test_pasting_what_cannot_be_read_without_a_browser(double: Any) -> None:
    pasted = double.paste(MALFORMED)
    assert pasted["script_txt2img_memnoise_enabled-checkbox"] is True
    assert pasted["script_txt2img_memnoise_unreadable"] == SOON
    pictures, *_, log = pressed(double, MALFORMED)
    assert not pictures and "class='error'" in log and "tau = &quot;soon&quot; is not valid" in log
    pictures, _, infotext, log = pressed(double, MALFORMED, script_txt2img_memnoise_unreadable="")
    assert len(pictures) == 1 and "Memnoise gamma: 0.4" in infotext and "class='error'" not in log


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The host's thread for what the page asks for."""
    thread = ModuleType("modules_forge.main_thread")
    monkeypatch.setitem(sys.modules, "modules_forge", ModuleType("modules_forge"))
    monkeypatch.setitem(sys.modules, "modules_forge.main_thread", thread)
    monkeypatch.setattr(sys.modules["modules_forge"], "main_thread", thread, raising=False)
    return thread


def test_where_the_host_loses_errors(double: Any, losing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, *_, log = pressed(double, MALFORMED)
    assert not pictures and "class='error'" not in log and "tau = &quot;soon&quot; is not valid" in log
    monkeypatch.setattr(losing, "last_exception", None, raising=False)
    pictures, *_, log = pressed(double, MALFORMED)
    assert not pictures and "class='error'" in log and "tau = &quot;soon&quot; is not valid" in log


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("900,soon", "tau = &quot;soon&quot; is not valid"),
        ("100-2000 (+100)", "tau = 2000 is not valid"),
        ("900,500", None),
        ("500-900 [3]", None),
    ],
)
def test_a_plot_where_the_host_loses_errors(
    double: Any, losing: ModuleType, enabled: bool, values: str, told: str | None
) -> None:
    from modules import scripts

    plot = next(s for s in scripts.scripts_txt2img.selectable_scripts if s.title() == "X/Y/Z plot")
    pictures, *_, log = double.page(
        script_list=1 + scripts.scripts_txt2img.selectable_scripts.index(plot),
        script_txt2img_memnoise_enabled=enabled,
        script_txt2img_xyz_plot_x_type=[option.label for option in plot.current_axis_options].index(TAU_AXIS),
        script_txt2img_xyz_plot_y_type=0, script_txt2img_xyz_plot_z_type=0,
        script_txt2img_xyz_plot_x_values=values,
        txt2img_width=64, txt2img_height=64, txt2img_steps=4,
    )  # fmt: skip
    assert "class='error'" not in log
    if told is None and not enabled:
        told = "needs memnoise enabled"
    assert bool(pictures) is (told is None)
    assert (told or "Memnoise, image 1") in log


def verdict(page: HostPage) -> Any:
    return page.control("verdict").first  # gradio gives an HTML block and its content one id


def press(page: HostPage, name: str) -> None:
    with page.answered("task("):
        page.control(name).click()


def test_checking_a_prompt(page: HostPage) -> None:
    page.small()
    page.open()
    press(page, "check")
    expect(verdict(page)).to_contain_text("Not calibrated, first timestep")
    expect(verdict(page)).to_contain_text("Calibrate checkpoint")
    row = verdict(page).locator("tr").nth(1)
    expect(row.locator("td").first).to_have_text("7")
    score = row.locator("td").nth(1).inner_text()
    expect(page.control("words")).to_be_visible()
    words = page.control("words").locator(".textspan").all_inner_texts()
    assert len(words) == 6, words
    if page.is_real:  # the double has words of its own
        assert [word.strip() for word in words] == ["a", "red", "fox", "in", "the", "snow"]
    expect(page.pictures).to_have_count(0)

    page.generate()
    expect(page.infotext).to_contain_text(f"Memnoise magnitude: {score}")

    page.prompt("")
    press(page, "check")
    expect(verdict(page).locator(".error")).to_contain_text("an empty prompt has no score")
    expect(page.control("words")).not_to_be_visible()


def test_calibrating(page: HostPage) -> None:
    page.small()
    page.open()
    press(page, "calibrate")
    expect(verdict(page)).to_contain_text("Calibrated at 64x64: 120 built-in prompts at timestep")
    expect(verdict(page)).to_contain_text("1 % false positives asked; with 120 prompts 95 %: 0.021 % to 3.0 %")
    press(page, "check")
    expect(verdict(page)).to_contain_text("of 120 built-in prompts at timestep")
    expect(verdict(page).locator("tr").nth(1).locator("td").nth(2)).not_to_be_empty()

    expect(page.control("captions")).not_to_be_visible()
    page.choose("source", "captions of my own")
    page.field("captions").fill("a fox\na cat")
    press(page, "calibrate")
    expect(verdict(page).locator(".error")).to_contain_text("it takes 20 different prompts; these are 2.")
    page.field("captions").fill("\n".join(f"a fox, with {k} balloons" for k in range(25)))
    press(page, "calibrate")
    expect(verdict(page)).to_contain_text("25 prompts of the user's own")
    expect(verdict(page)).to_contain_text("If one of these is memorised, the threshold is too high")
    page.choose("source", "my recent pictures' prompts")
    expect(page.control("captions")).not_to_be_visible()
    press(page, "calibrate")
    expect(verdict(page)).to_contain_text("pictures of")  # as many as the host has saved
    page.choose("source", "built-in prompts")
    press(page, "calibrate")


def test_a_threshold_is_typed_in_or_left_open(page: HostPage) -> None:
    page.small()
    page.open()
    expect(page.control("threshold")).not_to_be_visible()
    page.choose("when", MITIGATED["flagged"])
    expect(page.field("threshold")).to_have_value("")
    page.generate()
    expect(page.infotext).to_contain_text("Memnoise when: flagged")
    expect(page.infotext).to_contain_text("prompts at timestep")
    page.type("threshold", "1000")
    page.generate()
    expect(page.infotext).to_contain_text("Memnoise threshold: 1000")
    expect(page.infotext).to_contain_text("Memnoise mitigated: False")
    page.type("threshold", "high")
    page.generate()
    expect(page.refusal).to_contain_text(
        f'Memnoise: threshold = "high" is not valid; it must be {requirement("threshold")}.'
    )
    page.paste(PICTURE + ", Memnoise: batch_wise, Memnoise when: flagged, Memnoise threshold: 2.5")
    expect(page.field("threshold")).to_have_value("2.5")
    page.paste(PICTURE + ", Memnoise: batch_wise, Memnoise when: flagged")
    expect(page.field("threshold")).to_have_value("")


def test_the_trace_is_plotted(page: HostPage) -> None:
    page.small()
    page.open()
    page.generate()
    expect(page.pictures.first).to_be_visible()
    expect(page.control("plot")).not_to_be_visible()
    page.open_more()
    page.choose("trace", (SPECS["trace"].choices or {})["compare"])
    page.generate()
    expect(page.control("plot")).to_be_visible()
    # A picture where the host has no altair.
    expect(page.control("plot").locator("canvas, svg.marks, img").first).to_be_visible()
    page.choose("trace", (SPECS["trace"].choices or {})["off"])
    page.generate()
    expect(page.control("plot")).not_to_be_visible()


def test_calibrating_can_be_interrupted(page: HostPage) -> None:
    if not page.is_real:
        pytest.skip("the double's page has no Interrupt")
    page.paste(PICTURE.replace("64x64", "256x256"))  # takes its time
    expect(page.page.locator("#txt2img_width input[type=number]")).to_have_value("256")
    page.open()
    with page.answered("task("):
        page.control("calibrate").click()
        expect(page.control("enabled").locator(".progressDiv")).to_be_visible()
        page.page.locator("#txt2img_interrupt").click()
    expect(verdict(page).locator(".error")).to_have_text("memnoise: interrupted.")
    expect(page.page.locator("#txt2img_interrupt")).not_to_be_visible()


def test_a_comparison_can_be_stopped(page: HostPage) -> None:
    """One click stops after the picture at hand, as the host's default options have it."""
    if not page.is_real:
        pytest.skip("the double's page has no Interrupt")
    page.paste(PICTURE.replace("64x64", "256x256"))  # takes its time
    expect(page.page.locator("#txt2img_width input[type=number]")).to_have_value("256")
    page.open()
    page.control("comparison").locator(".label-wrap").click()
    with page.answered("task("):
        page.control("compare").click()
        expect(page.control("enabled").locator(".progressDiv")).to_be_visible()
        page.page.locator("#txt2img_interrupt").click()
    expect(verdict(page)).to_contain_text("Interrupted: the other methods are missing.")
    expect(page.control("grid").locator("img")).to_be_visible()


def test_the_page_is_loaded_again_from_within(page: HostPage, running: Any) -> None:
    if not page.is_real:
        pytest.skip("the double's page has no Reload UI")
    page.small()
    page.open()
    page.generate()
    infotext, picture = page.infotext.inner_text(), page.picture()
    assert "Memnoise: batch_wise" in infotext
    starts = running.log_text().count("Startup time")
    page.reload(lambda: running.log_text().count("Startup time") > starts)

    expect(page.accordion).to_have_count(1)
    expect(page.box).not_to_be_checked()
    page.small()
    page.open()
    page.generate()
    assert page.infotext.inner_text() == infotext
    assert np.array_equal(page.picture(), picture)


def test_comparing_methods(page: HostPage) -> None:
    page.small()
    page.open()
    page.control("comparison").locator(".label-wrap").click()
    press(page, "compare")
    grid = page.control("grid").locator("img").first
    expect(grid).to_be_visible()
    width, height = grid.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
    assert width >= 64 and height >= 4 * 64  # a row for each of the four usual methods
    expect(verdict(page).locator(".error")).to_have_count(0)

    page.prompt("")
    press(page, "compare")
    expect(verdict(page).locator(".error")).to_contain_text("an empty prompt has no score")
    expect(grid).not_to_be_visible()


def test_the_picture_that_must_not_be_copied(page: HostPage) -> None:
    """It is opened as the API's is, not by the page's own library as whatever it is."""
    page.small()
    page.open()
    page.control("comparison").locator(".label-wrap").click()
    upload = page.control("likeness").locator("input[type=file]")
    whole = file_of(PATTERN, "PNG")
    for content, told in (
        (whole[:-200], "is damaged"),
        (file_of(PATTERN, "GIF"), "must be a PNG, JPEG or WebP picture"),
    ):
        upload.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": content})
        expect(page.control("likeness").locator("img").first).to_be_attached()
        press(page, "compare")
        expect(verdict(page).locator(".error")).to_contain_text("memnoise: reference is not valid")
        expect(verdict(page).locator(".error")).to_contain_text(told)
        expect(page.control("grid").locator("img")).to_have_count(0)
        page.control("likeness").get_by_label("Clear").or_(
            page.control("likeness").get_by_label("Remove Image")
        ).click()
    upload.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": whole})
    expect(page.control("likeness").locator("img").first).to_be_attached()
    press(page, "compare")
    expect(page.control("grid").locator("img").first).to_be_visible()
    expect(verdict(page).locator(".error")).to_have_count(0)
