from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_memnoise.core.report import HIRES_KEYS, REPORT_KEYS, ImageReport, report_infotext
from lib_memnoise.lab.ddim import ddim_timesteps
from lib_memnoise.registry import METHODS
from lib_memnoise.settings import (
    DECIDING,
    DEFAULTS,
    PRESET_VALUES,
    SPECS,
    SettingError,
    Settings,
    check,
    deciders,
    from_infotext,
    from_mapping,
    from_text,
    infotext_key,
    is_open,
    is_used,
    json_schema,
    preset_for,
    requirement,
    size_factor,
    to_infotext,
    type_of,
    used_settings,
)


def valid(name: str) -> st.SearchStrategy[Any]:
    spec, kind = SPECS[name], type_of(name)
    if spec.choices is not None:
        return st.sampled_from(list(spec.choices))
    if kind is bool:
        return st.booleans()
    assert spec.low is not None and spec.high is not None
    return st.integers(int(spec.low), int(spec.high)) if kind is int else st.floats(spec.low, spec.high)


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, Any]:
    method = draw(st.sampled_from(list(METHODS)))
    deciding = {"method": method, **{name: draw(valid(name)) for name in DECIDING if name != "method"}}
    if METHODS[method].module == "transition" and deciding["guidance"] == "first":
        deciding["guidance"] = "method"
    deciding = {name: value for name, value in deciding.items() if is_used(name, deciding)}
    names = [n for n in SPECS if n not in (*DECIDING, "enabled") and is_used(n, deciding)]
    chosen = draw(st.lists(st.sampled_from(names), unique=True))
    return {"enabled": True, **deciding, **{name: draw(valid(name)) for name in chosen}}


@given(mappings(), st.sampled_from(list(PRESET_VALUES)))
def test_infotext_restores_the_settings(given_: dict[str, Any], preset: str) -> None:
    settings = from_mapping(given_)
    text = {key: str(value) for key, value in to_infotext(settings.pinned(preset)).items()}
    read, problems = from_infotext(text)
    assert problems == []
    again = from_mapping(read)

    def used(s: Settings) -> dict[str, Any]:
        values = used_settings(s.resolved(preset))
        return {name: value for name, value in values.items() if name != "preset"}

    assert used(again) == used(settings)
    # spelled-out values mean the same on any checkpoint
    if again.preset == "custom":
        assert used(again) == {n: v for n, v in used_settings(again.resolved("relative")).items() if n != "preset"}


@settings(deadline=None)
@given(mappings())
def test_everything_accepted_satisfies_the_published_schema(given_: dict[str, Any]) -> None:
    from_mapping(given_)
    jsonschema.validate(given_, json_schema())


def test_the_schema_is_a_schema_and_names_every_setting() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert list(json_schema()["properties"]) == [field.name for field in dataclasses.fields(Settings)] == list(SPECS)


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, [], {}, "x", object(), -1e9, 1e9, 2**70])
def test_bad_values_name_the_setting_the_value_and_the_bounds(name: str, value: Any) -> None:
    with pytest.raises(SettingError) as error:
        check(name, value)
    sentence = str(error.value)
    assert sentence.startswith(f"memnoise: {name} = ") and requirement(name) in sentence
    assert sentence.count("\n") == 0 and len(sentence) < 400


@pytest.mark.parametrize("name", [n for n in SPECS if type_of(n) in (int, float)])
def test_booleans_are_not_numbers_and_bounds_are_inclusive(name: str) -> None:
    with pytest.raises(SettingError):
        check(name, True)
    assert check(name, SPECS[name].low) == SPECS[name].low
    assert check(name, SPECS[name].high) == SPECS[name].high


def test_other_mistakes() -> None:
    with pytest.raises(
        SettingError, match=r'no setting "taw" \(did you mean "tau"\?\); the settings are enabled, method'
    ):
        from_mapping({"taw": 900})
    with pytest.raises(
        SettingError,
        match=r"lr = 0.1 belongs to the methods per_sample, prompt_embedding and sail, but the method is batch_wise",
    ):
        from_mapping({"lr": 0.1})
    with pytest.raises(
        SettingError, match=r'method = "wise" is not valid; it must be one of batch_wise, per_sample, repulsion, static'
    ):
        from_mapping({"method": "wise"})
    with pytest.raises(SettingError, match=r"tau = 900 is used only where guidance is tau, but it is first\."):
        from_mapping({"method": "per_sample", "tau": 900})
    assert from_mapping({"method": "per_sample", "guidance": "tau", "tau": 900}).start == "tau"
    with pytest.raises(SettingError, match=r"tau = 900 is used only where guidance is tau, but it is transition\."):
        from_mapping({"guidance": "transition", "tau": 900})
    with pytest.raises(SettingError, match=r"threshold = 2 is used only where when is flagged, but it is always\."):
        from_mapping({"threshold": 2})
    with pytest.raises(SettingError, match=r"steps = 1\.5"):
        from_mapping({"steps": 1.5})
    with pytest.raises(SettingError, match="there is no setting 3"):
        from_mapping({3: 3})  # type: ignore[dict-item]


def test_what_decides_whether_a_setting_is_used() -> None:
    assert deciders("gamma") == ("method", "rule") and deciders("steps") == ("method",)
    assert deciders("threshold") == ("when",) and deciders("hires") == ()
    assert deciders("tau") == ("method", "guidance")  # by default guidance starts where the method has it
    assert {other for name in SPECS for other in deciders(name)} == set(DECIDING)


def test_text() -> None:
    assert from_text("tau", " 917.449 ") == 917.449
    assert from_text("hires", "False") is False and from_text("hires", "true") is True
    assert from_text("steps", "4") == 4 and isinstance(from_text("steps", "4.0"), int)
    for name, text in (("hires", "yes"), ("tau", "abc"), ("steps", "1.5"), ("tau", "nan"), ("method", "")):
        with pytest.raises(SettingError, match=name):
            from_text(name, text)


def test_malformed_infotext_is_reported_not_raised() -> None:
    given_, problems = from_infotext({"Memnoise": "batch_wise", "Memnoise gamma": "abc", "Memnoise tau": "880"})
    assert given_ == {"enabled": True, "method": "batch_wise", "tau": 880.0}
    assert problems == ['memnoise: gamma = "abc" is not valid; it must be a number from 0 to 10.']
    assert from_infotext({"Steps": "20"}) == ({"enabled": False}, [])


def test_what_is_told_of_an_image_is_no_setting() -> None:
    """Report keys in an infotext change nothing that is restored from it, whatever they say."""
    first = ImageReport(before=1.5, after=0.5, steps=3, norm=1.0, forward_rows=9, backward_rows=6, threshold=2.0)
    first.used, first.prompt, first.failed, first.transition = {"tau": 880.0, "T": 981.0}, "a fox", "it broke", 700.0
    first.calibration = "120 built-in prompts at timestep 981"
    first.note("steps: 4")
    first.hires = replace(first, notes=["again"], hires=None)
    told = report_infotext(first)
    assert set(told) == {f"Memnoise {key}" for key in REPORT_KEYS + HIRES_KEYS} and None not in told.values()
    assert not set(told) & {infotext_key(name) for name in SPECS}
    settings = to_infotext(from_mapping({"hires": True, "tau": 500}).pinned("sd1"))
    text = {key: str(value) for key, value in settings.items()}
    assert from_infotext({**text, **{key: str(value) for key, value in told.items()}}) == from_infotext(text)
    assert told["Memnoise rows"] == 18 and told["Memnoise backward rows"] == 12  # of both passes
    assert told["Memnoise note"] == "steps: 4; hires pass: again"


def test_only_what_differs_is_written() -> None:
    assert to_infotext(from_mapping({"enabled": True}).pinned("sd1")) == {"Memnoise": "batch_wise"}
    assert to_infotext(from_mapping({"rho": 50, "gamma": 0.7}).pinned("sd1")) == {"Memnoise": "batch_wise"}
    text = to_infotext(from_mapping({"tau": 880}).pinned("sd1"))
    assert text["Memnoise preset"] == "custom" and text["Memnoise tau"] == 880


@pytest.mark.parametrize("name", ["tau", "latest"])
def test_a_timestep_that_was_asked_for_stays_one_in_metadata_and_others_stay_shares(name: str) -> None:
    guidance = {"guidance": "tau" if name == "tau" else "transition"}
    value = getattr(DEFAULTS.resolved("sd1"), name)
    for given_, share in (
        ({}, True),
        ({"gamma": 0.5}, True),
        ({name: value}, False),
        ({name: value, "gamma": 0.5}, False),
        ({name: value, "tau_of": 990}, True),
        ({"preset": "custom"}, False),
        ({"preset": "custom", "tau_of": 990}, True),
    ):
        settings = from_mapping({**guidance, **given_})
        text = {key: str(text) for key, text in to_infotext(settings.pinned("sd1")).items()}
        again = from_mapping(from_infotext(text)[0])
        for one in (settings, again):
            assert bool(one.resolved("sd1").tau_of) == share, (given_, text)
            assert one.resolved("sd1").tau_of == settings.resolved("sd1").tau_of


def test_presets_are_the_papers() -> None:
    sd1 = DEFAULTS.resolved("sd1")
    assert (sd1.gamma, sd1.rho, sd1.steps, sd1.tau, sd1.lr, sd1.target) == (0.7, 50, 2, 900, 0.01, 0.9)
    sd2 = DEFAULTS.resolved("sd2_v")
    assert (sd2.steps, sd2.tau) == (4, 917.449)
    # DDIM and Euler with 50 steps begin there.
    assert (sd1.tau_of, sd2.tau_of) == (ddim_timesteps(50)[0], 999)
    for values in PRESET_VALUES.values():
        for name, value in values.items():
            assert check(name, value) == value


SD14 = "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556"
SD20_V = "bfcaf0755797b0c30eb00a3787e8b423eb1f5decd8de76c4d824ac2dd27e139f"


def test_a_published_target_is_for_the_checkpoint_it_was_published_for() -> None:
    def found(parameterization: str, family: str, sha256: str | None, method: str) -> tuple[Any, ...]:
        preset = preset_for(parameterization=parameterization, family=family, sha256=sha256)
        values = Settings(method=method).resolved(preset)
        return values.target, values.target_kind, values.gamma, values.lr

    assert found("eps", "sd1", SD14, "per_sample") == (0.9, "absolute", 0.7, 0.01)
    assert found("eps", "sd1", SD14, "prompt_embedding") == (1.581, "absolute", 0.7, 0.05)
    assert found("eps", "sd1", SD14, "sail") == (8.2, "absolute", 0.7, 0.05)
    assert found("v", "sd2", SD20_V, "per_sample") == (10, "absolute", 0.0479, 0.00684)
    # γ̃, ρ, M, τ and the learning rate are those of the family all the same
    for family, sha256 in (("sd1", None), ("sd1", "0" * 64), ("sd1", SD20_V), ("sd2", SD14[:-1]), ("other", SD14)):
        for method, lr in (("per_sample", 0.01), ("prompt_embedding", 0.05), ("sail", 0.05)):
            assert found("eps", family, sha256, method) == (0.5, "fraction", 0.7, lr)
    for family, sha256 in (("sd2", None), ("sd1", SD14), ("other", "0" * 64)):
        for method, lr in (("per_sample", 0.00684), ("prompt_embedding", 0.05), ("sail", 0.05)):
            assert found("v", family, sha256, method) == (0.5, "fraction", 0.0479, lr)
    for name, value in PRESET_VALUES["sd1_like"].items():
        assert name in ("target", "target_kind") or value == PRESET_VALUES["sd1"][name]
    for name, value in PRESET_VALUES["sd2_v_like"].items():
        assert name in ("target", "target_kind") or value == PRESET_VALUES["sd2_v"][name]
    # named presets stay the paper's on every checkpoint
    for preset in PRESET_VALUES:
        assert Settings(method="per_sample", preset="sd1").resolved(preset).target == 0.9
        assert Settings(method="per_sample", preset="sd2_v").resolved(preset).target == 10
    # an absolute target is the kind's own
    absolute = Settings(method="per_sample", target_kind="absolute")
    assert [absolute.resolved(preset).target for preset in ("sd1_like", "sd2_v_like", "relative")] == [0.9, 10, 0.9]
    assert Settings(method="sail", target_kind="absolute").resolved("sd2_v_like").target == 8.2


CALIBRATED = {"gamma": 0.3, "target": 2.5, "target_kind": "absolute", "threshold": 7.0}


def test_what_a_calibration_has_a_say_in() -> None:
    def found(kind: str, method: str = "per_sample", **given: Any) -> tuple[Any, ...]:
        values = Settings(method=method, **given).resolved(kind, CALIBRATED)
        return values.target, values.target_kind, values.gamma

    assert found("sd1") == (0.9, "absolute", 0.7)
    assert found("sd1_like") == (2.5, "absolute", 0.7)  # the target alone
    assert found("sd2_v_like") == (2.5, "absolute", 0.0479)
    assert found("relative") == found("sd1_like", preset="calibrated") == (2.5, "absolute", 0.3)
    assert found("sd1_like", preset="sd1") == (0.9, "absolute", 0.7)
    assert found("sd1_like", "sail") == (0.5, "fraction", 0.7)  # its target is one for its own loss


@given(mappings(), st.sampled_from(list(PRESET_VALUES)))
def test_infotext_restores_the_settings_on_a_calibrated_checkpoint(given_: dict[str, Any], preset: str) -> None:
    settings = from_mapping(given_)
    text = {key: str(value) for key, value in to_infotext(settings.pinned(preset, CALIBRATED)).items()}
    again = from_mapping(from_infotext(text)[0])

    def used(s: Settings) -> dict[str, Any]:
        values = used_settings(s.resolved(preset, CALIBRATED))
        return {name: value for name, value in values.items() if name != "preset"}

    assert used(again) == used(settings)


def test_a_target_and_its_kind_go_together() -> None:
    sdxl = from_mapping({"method": "per_sample", "target": 0.9}).resolved("relative")
    assert (sdxl.target, sdxl.target_kind) == (0.9, "absolute")
    sd1 = from_mapping({"method": "per_sample", "target_kind": "fraction"}).resolved("sd1")
    assert (sd1.target, sd1.target_kind) == (0.5, "fraction")
    both = from_mapping({"method": "per_sample", "target_kind": "fraction", "target": 0.3}).resolved("sd1")
    assert (both.target, both.target_kind) == (0.3, "fraction")


def test_a_threshold_is_the_calibrations_or_the_users() -> None:
    """No preset has one: nothing is published."""
    own = from_mapping({"when": "flagged", "threshold": 2})
    for preset in PRESET_VALUES:
        assert "threshold" not in PRESET_VALUES[preset]
        found = from_mapping({"when": "flagged"}).resolved(preset)
        assert found.threshold is None and found.is_by_score
        assert own.resolved(preset).threshold == 2 and not own.is_by_score
        calibrated = {"threshold": 3.0, "gamma": 1.0, "target": 3.0, "target_kind": "absolute"}
        assert from_mapping({"when": "flagged"}).resolved(preset, calibrated).threshold == 3
        assert own.resolved(preset, calibrated).threshold == 2
    entry = json_schema()["properties"]["threshold"]
    assert "x-presets" not in entry and "default" not in entry
    assert is_open("threshold") and not is_open("gamma") and not is_open("latest")
    assert to_infotext(own.pinned("sd1")) == {
        "Memnoise": "batch_wise",
        "Memnoise when": "flagged",
        "Memnoise threshold": 2,
    }


def test_size_factor() -> None:
    assert size_factor(16384, "eps") == 1 and size_factor(36864, "v") == 1
    assert size_factor(1024, "eps") == 0.25
