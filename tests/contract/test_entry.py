"""Whatever is handed to the extension, at every entry: an answer or one sentence, and never an image that was to be
mitigated and is not."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib_memnoise.settings import SPECS, type_of
from tests.anything import HARMLESS, TEXTS, VALUES, is_sentence
from tests.contract.conftest import Studio
from tests.contract.test_compare import PATTERN, file_of
from tests.contract.test_requests import plot_controls
from tests.contract.test_scores import SMALL

HUGE = int("9" * 400)
NASTY: list[Any] = [HUGE, -HUGE, math.nan, math.inf, "\ud800", "x" * 100_000, {"\ud800": HUGE}, [[[[]]]]]
NAMES = [repr(value)[:12] for value in NASTY]


def sent(studio: Studio, path: str, body: Any) -> Any:
    """The answer to a body that a careful client would not send."""
    return studio.host.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


def refused(answer: Any) -> str:
    assert answer.status_code == 422, answer.text[:500]
    detail = str(answer.json()["detail"])
    assert is_sentence(detail)
    return detail


def generation(studio: Studio, **body: Any) -> Any:
    return sent(studio, "/sdapi/v1/txt2img", {"prompt": "a fox", **SMALL, **body})


def with_memnoise(studio: Studio, entry: Any) -> Any:
    return generation(studio, alwayson_scripts={"memnoise": entry})


# Settings of a generation


@pytest.mark.parametrize("value", NASTY, ids=NAMES)
@pytest.mark.parametrize("name", ["gamma", "steps", "lr", "method", "hires"])
def test_no_value_of_a_setting_leaves_an_image_unmitigated(studio: Studio, name: str, value: Any) -> None:
    assert f"{name} = " in refused(with_memnoise(studio, {"args": [True, {name: value}]}))


@pytest.mark.parametrize("value", NASTY, ids=NAMES)
def test_nothing_in_place_of_the_settings_does(studio: Studio, value: Any) -> None:
    refused(with_memnoise(studio, {"args": [True, {str(value) if isinstance(value, str) else "taw": value}]}))
    refused(with_memnoise(studio, {"args": [value, {}]}))
    if not isinstance(value, dict):
        refused(with_memnoise(studio, {"args": [True, value]}))
    refused(with_memnoise(studio, {"args": [True, {}, value]}))


ENTRIES = [
    (None, "alwayson_scripts.memnoise = null is not valid"),
    ([True, {}], "alwayson_scripts.memnoise = [true, {}] is not valid; it must be a dict such as"),
    ({"enabled": True}, 'alwayson_scripts.memnoise = {"enabled": true} has no args'),
    ({"args": None}, "args = null is not valid; it must be a list"),
    ({"args": {"tau": 500}}, 'args = {"tau": 500} is not valid; it must be a list'),
    ({"args": "true"}, 'args = "true" is not valid; it must be a list'),
    ({"args": [True], "tau": 500}, "tau stands beside args; settings belong within it"),
    ({"args": [True, {"tau": 500}, None, 0.5]}, "the argument 0.5 is one too many"),
    ({"args": [{"tau": 500}, None, None, "x"]}, 'the argument "x" is one too many'),
    ({"args": [True, *[None] * 60, 7]}, "the argument 7 is one too many"),
]


@pytest.mark.parametrize(("entry", "words"), ENTRIES, ids=[str(entry)[:40] for entry, _ in ENTRIES])
def test_what_the_host_would_drop_is_refused(studio: Studio, entry: Any, words: str) -> None:
    assert words in refused(with_memnoise(studio, entry))


@pytest.mark.parametrize("entry", [{}, {"args": []}])
def test_nothing_at_all_is_off(studio: Studio, entry: Any) -> None:
    answer = with_memnoise(studio, entry)
    assert answer.status_code == 200 and "Memnoise" not in answer.json()["info"]


def test_the_script_is_named_once(studio: Studio) -> None:
    on, off = {"args": [True, {}]}, {"args": [False]}
    for first, second in itertools.permutations((on, off)):
        detail = refused(generation(studio, alwayson_scripts={"memnoise": first, "Memnoise": second}))
        assert '"memnoise" and "Memnoise", which are one script' in detail
    for title in ("memnoise", "Memnoise", "MEMNOISE"):
        answer = generation(studio, alwayson_scripts={title: on})
        assert answer.status_code == 200 and "Memnoise: batch_wise" in answer.json()["info"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"Method": "none"}, 'no setting "Method" (did you mean "method"?)'),
        ({"Guidance starts at timestep τ": 9}, '(did you mean "tau"?)'),
        ({"method": "Static transition point"}, '(did you mean "static"?)'),
        ({"preset": "Custom"}, '(did you mean "custom"?)'),
    ],
)
def test_the_likeliest_name_is_told(studio: Studio, settings: dict[str, Any], words: str) -> None:
    assert words in refused(with_memnoise(studio, {"args": [True, settings]}))


# Plots


def plotted(studio: Studio, axis: int, kind: str, text: Any, chosen: Any, *, as_text: bool = False) -> Any:
    """A plot with one axis, the first (0) to the third."""
    controls = plot_controls(studio)
    nothing = controls[0]["choices"].index("Nothing")
    axes = [nothing, "", []] * 3
    axes[3 * axis : 3 * axis + 3] = [controls[0]["choices"].index(kind), text, chosen]
    rest = [control["value"] for control in controls[9:]]
    rest[-1] = as_text
    return generation(
        studio,
        script_name="x/y/z plot",
        script_args=[*axes, *rest],
        alwayson_scripts={"memnoise": {"args": [True, {}]}},
    )


CHOICES = [f"[Memnoise] {SPECS[name].label}" for name in SPECS if type_of(name) in (str, bool) and name != "enabled"]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("text", "chosen", "as_text", "words"),
    [
        (
            "batch_wise",
            [],
            False,
            'has no values; the text "batch_wise" is read only where the plot is told to',
        ),
        ("", [], False, "the axis [Memnoise] Method has no values."),
        ("", None, False, "the axis [Memnoise] Method has no values."),
        ("batch_wise", None, False, "has no values"),
        ("", "batch_wise", False, '[Memnoise] Method = "batch_wise" is not valid; it must be a list of values.'),
        ("", {"a": 1}, False, "is not valid; it must be a list of values."),
        ("", ["Batch-wise"], False, 'method = "Batch-wise" is not valid (did you mean "batch_wise"?)'),
        ("", [HUGE], False, "method = 99999999999999999999... (400 digits) is not valid"),
        ("", ["\ud800"], False, 'method = "\\ud800" is not valid'),
        ("", [], True, "the axis [Memnoise] Method has no values; each must be one of batch_wise"),
        (None, [], True, "the values null of method are not valid; they must be a text."),
        (3, [], True, "the values 3 of method are not valid; they must be a text."),
        ("magic", ["batch_wise"], True, 'method = "magic" is not valid'),
        ("\ud800", [], True, 'method = "\\ud800" is not valid'),
        ("x" * 200_000, [], True, "characters; 100000 is the most."),
    ],
)
def test_a_plot_of_no_values_or_bad_ones_is_refused(
    studio: Studio, axis: int, text: Any, chosen: Any, as_text: bool, words: str
) -> None:
    assert words in refused(plotted(studio, axis, "[Memnoise] Method", text, chosen, as_text=as_text))


@pytest.mark.parametrize("label", ["[Memnoise] Enabled", *CHOICES])
def test_every_axis_with_choices_needs_some(studio: Studio, label: str) -> None:
    for chosen in ([], None):
        assert f"the axis {label} has no values" in refused(plotted(studio, 0, label, "", chosen))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("9" * 400, "tau = "),
        ("1e999", 'tau = "1e999" is not valid'),
        ("nan", 'tau = "nan" is not valid'),
        ("0-999 (+0)", "its step leads away from its end"),
        ("0-999 [99999999999]", "it must be from 1 to 1000 values"),
        ("0-999 (+0.0000001)", "it must be from 1 to 1000 values"),
        ("1..2-3", 'tau = "1..2-3" is not valid'),
        (900, "the values 900 of tau are not valid; they must be a text."),
        (None, "the values null of tau are not valid"),
        ("", "has no values; each must be a number from 0 to 999."),
    ],
)
def test_no_text_of_numbers_leaves_a_plot_without_end_or_sentence(studio: Studio, text: Any, words: str) -> None:
    assert words in refused(plotted(studio, 0, f"[Memnoise] {SPECS['tau'].label}", text, []))


def test_small_numbers_are_values_of_an_axis(studio: Studio) -> None:
    """The host takes the sign in 1e-05 for that of a range."""
    controls = plot_controls(studio)
    choices = controls[0]["choices"]
    axes = [
        choices.index(f"[Memnoise] {SPECS['lr'].label}"),
        "0.00001, 0.5",
        [],
        *[choices.index("Nothing"), "", []] * 2,
    ]
    answer = studio.answer(
        [True, {"method": "per_sample", "max_steps": 1}],
        script_name="x/y/z plot",
        script_args=[*axes, *(control["value"] for control in controls[9:])],
    )
    assert answer.status == 200, answer.detail


def test_a_comparison_is_no_plot(studio: Studio) -> None:
    """Its first argument is true, which is no number of a script."""
    answer = sent(studio, "/memnoise/v1/compare", {**SMALL, "prompt": "a fox", "seeds": [7], "methods": ["none"]})
    assert answer.status_code == 200
    if studio.is_real:
        assert "Error running setup" not in studio.host.log_text()
    else:
        assert studio.host.reports == []


# Scores, calibrations, comparisons, traces


@pytest.mark.parametrize("value", NASTY, ids=NAMES)
@pytest.mark.parametrize("path", ["score", "calibrate", "compare"])
def test_no_value_of_a_request_is_a_fault(studio: Studio, path: str, value: Any) -> None:
    fields = ["prompt", "prompts", "negative_prompt", "width", "height", "sampler_name", "scheduler", "steps"]
    fields += ["cfg_scale", "styles", *(["seed", "seeds"] if path != "calibrate" else [])]
    fields += ["words"] if path == "score" else ["methods", "reference"] if path == "compare" else []
    for field in fields:
        if path == "calibrate" and field in ("prompt", "prompts") and isinstance(value, str) and value.isascii():
            continue
        prompt = {} if field == "prompts" else {"prompt": "a fox"}
        detail = refused(sent(studio, f"/memnoise/v1/{path}", {**SMALL, **prompt, field: value}))
        assert field in detail
    refused(sent(studio, f"/memnoise/v1/{path}", value))
    refused(sent(studio, f"/memnoise/v1/{path}", {"prompt": "a fox", "\ud800": value}))
    if path == "compare":
        body = {**SMALL, "prompt": "a fox"}
        assert "gamma = " in refused(sent(studio, "/memnoise/v1/compare", {**body, "methods": [{"gamma": value}]}))
        if not isinstance(value, dict):
            refused(sent(studio, "/memnoise/v1/compare", {**body, "methods": ["none", value]}))


def test_a_calibration_has_seeds_of_its_own(studio: Studio) -> None:
    for name in ("seed", "seeds", "words"):
        detail = refused(sent(studio, "/memnoise/v1/calibrate", {**SMALL, name: 1}))
        assert f'there is no "{name}" in a calibration; it may have prompt, prompts, negative_prompt, width' in detail


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("(" * 51, "prompt has 51 brackets within one another; it may have 50."),
        ("[" * 4000 + "a" + ":0.5]" * 900, "prompt has 4000 brackets within one another"),
        ("((a:1.1):" * 500, "prompt has 501 brackets within one another"),
        ("[a|b]" * 200, "prompt has 200 square brackets; it may have 100."),
    ],
)
def test_brackets_that_would_keep_the_host_busy_are_refused(studio: Studio, prompt: str, words: str) -> None:
    for field in ("prompt", "negative_prompt"):
        body = {**SMALL, "prompt": "a fox", field: prompt}
        assert words.replace("prompt", field) in refused(sent(studio, "/memnoise/v1/score", body))


@pytest.mark.parametrize(
    "prompt", ["(" * 20, "(a) " * 99, "\\(" * 60, ":) :( " * 20, "[a:b:0.5] " * 5, ")" * 60 + "((a))"]
)
def test_other_brackets_are_a_prompts(studio: Studio, prompt: str) -> None:
    assert sent(studio, "/memnoise/v1/score", {**SMALL, "prompt": prompt}).status_code == 200


@pytest.mark.parametrize("depth", [400, 5_000, 200_000])
def test_deep_nesting_is_no_fault(studio: Studio, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    for path in ("score", "calibrate", "compare"):
        for body in (deep, f'{{"prompt": {deep}}}', f'{{"prompt": "a fox", "methods": [{deep}]}}'):
            answer = studio.host.post(
                f"/memnoise/v1/{path}", content=body, headers={"Content-Type": "application/json"}
            )
            assert answer.status_code in (400, 422) and len(answer.text) < 2000
    assert studio.run({}).images


@pytest.mark.parametrize("name", ["%ED%A0%80", "x" * 5000, "%00", "..%2f..%2fetc", "%22%0a"])
def test_no_name_of_a_trace_is_a_fault(studio: Studio, name: str) -> None:
    answer = studio.host.get(f"/memnoise/v1/trace/{name}")
    assert answer.status_code == 404 and len(answer.text) < 500


# In this process, with far more of them


@pytest.fixture(scope="module")
def double(running: Any) -> Iterator[Any]:
    if running.is_real:
        pytest.skip("in this process")
    running.activate()
    yield running


TITLES = st.sampled_from(["memnoise", "Memnoise", "other"])
FIELDS = st.sampled_from(
    ["prompt", "prompts", "seed", "seeds", "width", "steps", "cfg_scale", "styles", "scheduler", "methods", "reference"]
)
METHODS = st.lists(VALUES | st.dictionaries(st.sampled_from(list(SPECS)), VALUES, max_size=2), max_size=2)
BODIES = VALUES | st.fixed_dictionaries(
    {"prompt": st.just("a") | VALUES}, optional={"methods": METHODS, "seed": VALUES, "cfg_scale": VALUES}
) | st.dictionaries(FIELDS | TEXTS, VALUES, max_size=4)  # fmt: skip


@HARMLESS
@given(BODIES)
@example({"prompt": "a", "cfg_scale": HUGE})
@example({"prompt": "\ud800"})
def test_any_request_is_read_or_refused(double: Any, body: Any) -> None:
    from lib_memnoise.webui.services import calibrating, comparison, json_request

    for read in (json_request.parse, calibrating.parse, comparison.parse):
        try:
            read(body)
        except json_request.BadRequest as error:
            assert is_sentence(str(error), 2000)


@HARMLESS
@given(st.lists(VALUES, max_size=4) | st.dictionaries(st.sampled_from(list(SPECS)), VALUES).map(lambda d: [True, d]))
@example([True, {"gamma": HUGE}])
@example([True, "\ud800"])
def test_any_arguments_are_settings_or_refused(double: Any, args: list[Any]) -> None:
    from lib_memnoise.settings import Settings
    from lib_memnoise.webui import request

    slots = [*args, *[None] * (len(request.SLOTS) - len(args))]
    found = request.requested(SimpleNamespace(), slots)
    if isinstance(found, request.Refusal):
        assert found.status_code == 422 and is_sentence(str(found.detail)) and not str(found).startswith("memnoise")
    else:
        assert isinstance(found, Settings)


@HARMLESS
@given(
    VALUES
    | st.dictionaries(
        st.sampled_from(["memnoise", "Memnoise", "other"]), VALUES | st.fixed_dictionaries({"args": VALUES})
    )
)
def test_any_scripts_of_a_request_are_taken_or_refused(double: Any, scripts: Any) -> None:
    from lib_memnoise.webui import payload, request

    try:
        payload.check(scripts)
    except request.Refusal as refusal:
        assert is_sentence(str(refusal.detail))


@HARMLESS
@given(VALUES, VALUES, VALUES)
@example(HUGE, 1, 64)
@example(7, math.nan, 64)
def test_any_values_of_the_page_are_taken_or_refused(double: Any, seed: Any, count: Any, width: Any) -> None:
    from lib_memnoise.webui.services import json_request
    from lib_memnoise.webui.ui import buttons

    try:
        json_request.parse({**buttons.seeded({"seed": seed, "batch_size": count}), "prompt": "a", "width": width})
    except json_request.BadRequest as error:
        assert is_sentence(str(error), 2000)


def test_a_fault_in_reading_settings_is_no_unmitigated_image(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_memnoise.webui import request

    def broken(given: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(request, "from_mapping", broken)
    answer = Studio(double).answer([True, {}])
    assert answer.status == 500 and answer.detail == "memnoise: the settings could not be read (ZeroDivisionError)."


def test_an_upload_of_gradio_4_is_a_path(double: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_memnoise.webui.services import json_request, reference_picture
    from lib_memnoise.webui.ui import buttons

    file = tmp_path / "upload.png"
    file.write_bytes(file_of(PATTERN, "PNG"))
    found = reference_picture.opened(buttons.as_sent(SimpleNamespace(path=str(file), url=None)))
    assert found is not None and found.tobytes() == PATTERN.tobytes()
    assert buttons.as_sent(None) is None and buttons.as_sent("data:") == "data:"
    monkeypatch.setattr(reference_picture, "MOST_BYTES", 1000)
    for path in (file, tmp_path / "none.png", tmp_path):
        with pytest.raises(json_request.BadRequest, match="memnoise: reference "):
            reference_picture.opened(buttons.as_sent(SimpleNamespace(path=str(path))))
    with pytest.raises(json_request.BadRequest, match="memnoise: reference "):
        reference_picture.opened(buttons.as_sent(SimpleNamespace(path=None)))


def test_saved_styles_and_schedules_are_known(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules import sd_schedulers, shared

    from lib_memnoise.webui.services import json_request

    monkeypatch.setitem(shared.prompt_styles.styles, "Watercolour", None)
    assert json_request.parse({"prompt": "a", "styles": "Watercolour"}).styles == ("Watercolour",)
    with pytest.raises(json_request.BadRequest, match=r'"watercolor" is not valid \(did you mean "Watercolour"\?\)'):
        json_request.parse({"prompt": "a", "styles": ["Watercolour", "watercolor"]})
    for one in sd_schedulers.schedulers:
        for name in (one.name, one.label):
            assert json_request.parse({"prompt": "a", "scheduler": name}).scheduler == name
    # Forge Classic has neither list.
    monkeypatch.setitem(sys.modules, "modules.sd_schedulers", None)
    monkeypatch.delattr(shared, "prompt_styles")
    found = json_request.parse({"prompt": "a", "scheduler": "anything", "styles": ["any"]})
    assert (found.scheduler, found.styles) == ("anything", ("any",))
