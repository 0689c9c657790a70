"""No value gets past the schema, and the sentence about it can be written down; the host's parts are in contract/."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib_memnoise.errors import MOST, echo, likeliest
from lib_memnoise.settings import (
    SPECS,
    SettingError,
    check,
    from_infotext,
    from_mapping,
    from_text,
    infotext_key,
    json_schema,
    type_of,
)
from lib_memnoise.settings.axes import MOST_VALUES, axis_values
from tests.anything import HARMLESS, NUMBERS, TEXTS, VALUES, is_sentence

NAMES = st.sampled_from(list(SPECS))


@HARMLESS
@given(VALUES)
def test_any_value_can_be_repeated(value: Any) -> None:
    text = echo(value)
    text.encode("utf-8")
    assert text.isprintable() and 0 < len(text) <= MOST


@HARMLESS
@given(st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text(max_size=9) | st.lists(st.booleans()))
def test_a_short_value_is_repeated_as_json(value: Any) -> None:
    assert len(echo(value)) == MOST or json.loads(echo(value)) == value


def test_how_values_are_repeated() -> None:
    assert [echo(value) for value in (2.0, "a\n", ["", None], {"a": True}, ("x",), float("nan"))] == [
        "2", '"a\\n"', '["", null]', '{"a": true}', '["x"]', "NaN",
    ]  # fmt: skip
    assert echo(10**400) == "10000000000000000000... (401 digits)" and echo(-(10**5000)).endswith("... (5001 digits)")
    assert echo("\ud800") == '"\\ud800"' and echo("x" * 200) == f'"{"x" * 76}...'
    bottom: Any = None
    for _ in range(100_000):
        bottom = [bottom]
    assert echo(bottom) == "[" * 77 + "..."
    assert echo(object()) == "<object>"


def test_what_was_likely_meant() -> None:
    known = {name: spec.label for name, spec in SPECS.items()}
    for given_, name in (
        ("Method", "method"),
        ("Guidance starts at timestep τ", "tau"),
        ("Guidance starts at timestep", "tau"),
        ("[Memnoise] Guidance starts at timestep τ", "tau"),
        ("taw", "tau"),
        ("gama", "gamma"),
        ("max steps", "max_steps"),
        ("xyz", None),
        ("", None),
        (None, None),
        (["tau"], None),
    ):
        assert likeliest(given_, known) == name, given_
    methods = SPECS["method"].choices or {}
    for given_, name in (
        ("Static transition point", "static"),
        ("Per-sample", "per_sample"),
        ("batch-wise", "batch_wise"),
        ("batchwise", "batch_wise"),
        ("magic", None),
    ):
        assert likeliest(given_, methods) == name, given_


def test_a_name_goes_before_another_names_label() -> None:
    """The label of `rule` is "Steps"; whoever writes it with a capital means `steps`."""
    known = {name: spec.label for name, spec in SPECS.items()}
    assert known["rule"] == "Steps" and likeliest("Steps", known) == "steps"
    assert likeliest("Method", known) == "method" and likeliest("Step", known) == "steps"


@HARMLESS
@given(NAMES, VALUES)
@example("gamma", 10**400)
@example("steps", -(10**400))
@example("method", "\ud800")
def test_no_value_gets_past_a_setting(name: str, value: Any) -> None:
    try:
        taken = check(name, value)
    except SettingError as error:
        assert is_sentence(str(error)) and f" {name} = " in str(error)
    else:
        assert type(taken) is type_of(name)
        jsonschema.validate({name: taken}, json_schema())


@HARMLESS
@given(st.dictionaries(NAMES | TEXTS, VALUES, max_size=4))
@example({"\ud800": 1})
@example({"gamma": 10**400, "method": "batch_wise"})
def test_no_settings_get_past_validation(settings: dict[str, Any]) -> None:
    try:
        from_mapping(settings)
    except SettingError as error:
        assert is_sentence(str(error))
    else:
        jsonschema.validate(settings, json_schema())


@HARMLESS
@given(NAMES, TEXTS | NUMBERS.map(str).filter(lambda text: len(text) < 4000) | VALUES)
def test_no_text_gets_past_a_setting(name: str, text: Any) -> None:
    try:
        taken = from_text(name, text)
    except SettingError as error:
        assert is_sentence(str(error))
    else:
        assert check(name, taken) == taken


RANGES = st.builds(
    "{}-{} {}".format,
    st.sampled_from(["0", "1", "500.5", "1e3", "-1", "9" * 400, ".5", "1..2", "0.00001"]),
    st.sampled_from(["0", "1", "900", "9" * 400, "1.0.0", "50"]),
    st.sampled_from(
        ["", "(+1)", "(-1)", "(+0)", "(+0.0000001)", "[3]", "[0]", "[99999999999]", "[9", f"(+{'9' * 5000})"]
    ),
)


@HARMLESS
@given(NAMES, st.lists(TEXTS | RANGES, max_size=3).map(",".join) | VALUES)
@example("lr", "0.00001, 1e-5")
@example("tau", f"0-999 (+0.{'0' * 40}1)")
@example("steps", f"1-5 [{'9' * 5000}]")
def test_no_text_gets_past_an_axis(name: str, text: Any) -> None:
    try:
        values = axis_values(name, text)
    except SettingError as error:
        assert is_sentence(str(error))
    else:
        assert len(values) <= MOST_VALUES * 4
        for value in values:
            from_text(name, value)
            # The plot script reads ranges out of what has a sign within.
            assert type_of(name) not in (int, float) or value.replace(".", "").isdigit()


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("steps", "1-5", ["1", "2", "3", "4", "5"]),
        ("steps", "1-5 (+2), 7", ["1", "3", "5", "7"]),
        ("steps", "5-1 (-2)", ["5", "3", "1"]),
        ("steps", "1-5 [3]", ["1", "3", "5"]),
        ("eta", "0-1 (+0.3)", ["0.0", "0.3", "0.6", "0.9"]),
        ("eta", "0-0.3 (+0.1)", ["0.0", "0.1", "0.2", "0.3"]),
        ("tau", " 900,, 500.5 ,", ["900.0", "500.5"]),
        ("lr", "1e-5", ["0.00001"]),
        ("method", 'batch_wise, "none"', ["batch_wise", "none"]),
        ("method", "batch_wise\r\nnone", ["batch_wise", "none"]),
        ("hires", "True, false", ["True", "false"]),
        ("tau", "", []),
    ],
)
def test_the_values_of_an_axis(name: str, text: str, values: list[str]) -> None:
    assert axis_values(name, text) == values


@HARMLESS
@given(st.dictionaries(NAMES.map(infotext_key) | TEXTS, TEXTS, max_size=4))
@example({"Memnoise": "batch_wise", "Memnoise gamma": "9" * 400})
@example({"Memnoise": "\ud800"})
def test_no_infotext_gets_past_validation(params: dict[str, str]) -> None:
    given_, problems = from_infotext(params)
    assert all(is_sentence(problem) for problem in problems)
    for name, value in given_.items():
        assert check(name, value) == value
