from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from lib_memnoise.settings import SPECS, json_schema, requirement
from tests.contract.conftest import Studio

BAD: list[tuple[Any, list[str]]] = [
    ([True, {"gamma": 11}], ["gamma = 11", requirement("gamma")]),
    ([True, {"gamma": -0.1}], ["gamma = -0.1", requirement("gamma")]),
    ([True, {"gamma": None}], ["gamma = null", requirement("gamma")]),
    ([True, {"gamma": "high"}], ['gamma = "high"', requirement("gamma")]),
    ([True, {"gamma": True}], ["gamma = true", requirement("gamma")]),
    ([True, {"gamma": [1]}], ["gamma = [1]"]),
    ([True, {"tau": 1000}], ["tau = 1000", "from 0 to 999"]),
    ([True, {"steps": 2.5}], ["steps = 2.5", "a whole number from 0 to 50"]),
    ([True, {"method": "magic"}], ['method = "magic"', "batch_wise, per_sample"]),
    ([True, {"method": None}], ["method = null"]),
    (
        [True, {"method": "per_sample", "gamma": 0.5}],
        ["gamma = 0.5 is used only where rule is forward"],
    ),
    ([True, {"taw": 900}], ['no setting "taw" (did you mean "tau"?)']),
    ([True, {"enabled": "yes"}], ['enabled = "yes"', "true or false"]),
    ([True, {"hires": 1}], ["hires = 1", "true or false"]),
    ([True, "batch_wise"], ['the second argument = "batch_wise"']),
    ([True, {}, 0.7], ["the argument 0.7 is one too many"]),
    ([True, {}, None, None, None, "x"], ['the argument "x" is one too many']),
    ([True, ""], ['the second argument = "" is not valid']),
    (["yes"], ['the first argument = "yes"']),
    ([1], ["the first argument = 1"]),
    ([None], ["the first argument = null"]),
    ([{"enabled": True}, {"gamma": 0.5}], ["one too many"]),
]


@pytest.fixture(scope="module", autouse=True)
def loaded(running: Any) -> None:
    """Some hosts load the checkpoint for their first request."""
    Studio(running).run()


@pytest.mark.parametrize(("args", "words"), [bad for bad in BAD if bad[1]], ids=lambda v: json.dumps(v)[:60])
def test_bad_input_is_refused_in_one_sentence(studio: Studio, args: Any, words: list[str]) -> None:
    answer = studio.answer(args)
    assert answer.status == 422, (answer.status, answer.infotexts)
    for word in words:
        assert word in answer.detail
    assert answer.detail.count("\n") == 0 and len(answer.detail) < 500 and answer.seconds < 2


def test_bad_input_does_not_linger(studio: Studio) -> None:
    before = studio.run()
    assert studio.answer([True, {"gamma": 11}]).status == 422
    assert np.array_equal(studio.run().images[0], before.images[0])


def test_forms_of_arguments(studio: Studio) -> None:
    pictures = [
        studio.answer(args).images[0]
        for args in ([True, {"tau": 500}], [{"enabled": True, "tau": 500}], [{"tau": 500}], [True, {"tau": 500}, None])
    ]
    for other in pictures[1:]:
        assert np.array_equal(pictures[0], other)
    off = studio.run().images[0]
    for args in ([False], [False, {"tau": 500}], [{"enabled": False, "tau": 500}], [True, {"enabled": False}], []):
        assert np.array_equal(studio.answer(args).images[0], off)
    assert np.array_equal(studio.answer([True]).images[0], studio.answer([True, {}]).images[0])


@pytest.fixture
def reads_infotext(studio: Studio) -> None:
    if studio.host.txt2img({"infotext": "a fox\nSteps: 4, Sampler: DDIM, Size: 64x64"}).status != 200:
        pytest.skip("this host's API fails with any infotext")


@pytest.mark.usefixtures("reads_infotext")
def test_infotext_gives_the_same_picture_again(studio: Studio) -> None:
    for settings in (
        {},
        {"tau": 500, "gamma": 0.4},
        {"method": "per_sample", "target": 0.2, "lr": 0.02},
        {"hires": True},
    ):
        first = studio.run(settings, sampler_name="Euler a", batch_size=1)
        again = studio.host.txt2img(
            {
                "infotext": first.infotexts[0],
                "prompt": "",
                "seed": 7,
                "steps": 8,
                "cfg_scale": 6,
                "width": 64,
                "height": 64,
                "sampler_name": "Euler a",
                **{"prompt": "a red fox in the snow"},
            }
        )
        assert again.status == 200, again.detail
        assert np.array_equal(first.images[0], again.images[0]), settings


@pytest.mark.usefixtures("reads_infotext")
def test_malformed_infotext_is_refused(studio: Studio) -> None:
    text = (
        "a fox\nSteps: 8, Sampler: DDIM, CFG scale: 6, Seed: 7, Size: 64x64, Memnoise: batch_wise, Memnoise tau: soon"
    )
    answer = studio.host.txt2img({"infotext": text})
    assert answer.status == 422
    assert 'tau = "soon" is not valid' in answer.detail and requirement("tau") in answer.detail


def test_info_lists_what_happened_to_each_image(studio: Studio) -> None:
    run = studio.run({"method": "per_sample", "target_kind": "fraction", "target": 0.9}, batch_size=2, n_iter=2)
    params = run.info["extra_generation_params"]
    assert len(params["Memnoise magnitude"]) == 4 and len(set(params["Memnoise magnitude"])) == 4
    assert [str(v) for v in params["Memnoise rows"]] == [run.read("Memnoise rows", i) for i in range(4)]


def test_schema_endpoint(studio: Studio) -> None:
    answer = studio.host.get("/memnoise/v1/schema")
    assert answer.status_code == 200 and answer.json() == json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(answer.json())


AXES_BAD = [
    ("[Memnoise] Guidance starts at timestep τ", "900,2000", "tau = 2000"),
    ("[Memnoise] Guidance starts at timestep τ", "900,soon", 'tau = "soon"'),
    ("[Memnoise] Adjustments M", "1,2.5", "steps = 2.5"),
    ("[Memnoise] Method", ["batch_wise", "magic"], 'method = "magic"'),
    ("[Memnoise] Enabled", ["True", "maybe"], 'enabled = "maybe"'),
    ("[Memnoise] Learning rate", "0.01", "belongs to the methods per_sample"),
]


def plot(
    studio: Studio, x: tuple[str, Any], y: tuple[str, Any] = ("Nothing", ""), args: Any = None, **payload: Any
) -> Any:
    controls = plot_controls(studio)
    labels = controls[0]["choices"]

    def one(kind: str, values: Any) -> list[Any]:
        return [
            labels.index(kind),
            values if isinstance(values, str) else "",
            values if isinstance(values, list) else [],
        ]

    chosen = {"Draw legend": False, "Include Sub Images": True}
    axes = [*one(*x), *one(*y), *one("Nothing", "")]
    script_args = [*axes, *(chosen.get(rest["label"], rest["value"]) for rest in controls[len(axes) :])]
    return studio.answer(args, script_name="X/Y/Z plot", script_args=script_args, **payload)


def plot_controls(studio: Studio) -> list[dict[str, Any]]:
    """The plot's arguments, of which the forks have more."""
    for script in studio.host.get("/sdapi/v1/script-info").json():
        if script["name"] == "x/y/z plot" and not script["is_img2img"]:
            return script["args"]
    raise AssertionError("no X/Y/Z plot")


def test_axes_are_there_once(studio: Studio) -> None:
    labels = [label for label in plot_controls(studio)[0]["choices"] if label.startswith("[Memnoise]")]
    assert len(labels) == len(set(labels)) == len(SPECS)


@pytest.mark.parametrize(("axis", "values", "words"), AXES_BAD)
def test_bad_axis_values_are_refused_before_the_first_cell(studio: Studio, axis: str, values: Any, words: str) -> None:
    answer = plot(studio, (axis, values), args=[True, {}])
    assert answer.status == 422 and words in answer.detail


def test_bad_settings_are_refused_before_the_first_cell(studio: Studio) -> None:
    answer = plot(studio, ("Seed", "1,2"), args=[True, {"gamma": 11}])
    assert answer.status == 422 and "gamma = 11" in answer.detail


def test_plot_cells_are_the_single_generations(studio: Studio) -> None:
    tau = "[Memnoise] Guidance starts at timestep τ"
    answer = plot(studio, (tau, "999,500"), ("[Memnoise] Enabled", ["True", "False"]), args=[True, {"gamma": 0.3}])
    assert answer.status == 200, answer.detail
    cells, texts = answer.images[-4:], answer.infotexts[-4:]
    for (value, enabled), cell, text in zip(((999, 1), (500, 1), (999, 0), (500, 0)), cells, texts):
        single = studio.run({"gamma": 0.3, "tau": value} if enabled else None)
        assert np.array_equal(cell, single.images[0])
        assert ("Memnoise" in text) == bool(enabled)
        if value == 500 and enabled:
            assert "Memnoise tau: 500" in text


def test_plot_over_methods(studio: Studio) -> None:
    answer = plot(
        studio, ("[Memnoise] Method", ["batch_wise", "per_sample"]), ("[Memnoise] Enabled", ["True", "False"])
    )
    assert answer.status == 200, answer.detail
    assert np.array_equal(answer.images[-4], studio.run({}).images[0])
    assert np.array_equal(answer.images[-3], studio.run({"method": "per_sample"}).images[0])
    assert np.array_equal(answer.images[-2], studio.run().images[0])


def test_a_plot_over_all_methods_has_a_cell_for_each_that_can_be(studio: Studio) -> None:
    """One that cannot be done on this checkpoint leaves its own cell empty and says why; the others come."""
    names = ["none", "padding_fix", "random_tokens", "cross_attention"]
    values = ("[Memnoise] Method", names)
    if not studio.is_real:
        studio.host.load("sd2-v")  # which has no padding to fix
    answer = plot(studio, values, args=[True, {"fail_instead": True}])
    assert answer.status == 200, answer.detail
    cells = answer.images[-4:]
    for name, cell in zip(names, cells):
        single = studio.answer([True, {"method": name, "fail_instead": True}])
        if single.status == 200:
            assert np.array_equal(cell, single.images[0]), name
        else:
            assert name == "padding_fix" and not studio.is_real and cell.std() == 0
            assert "pads with token 0 already" in single.detail


OPPOSITE = {"method": "none", "guidance": "tau", "tau": 0, "opposite": 3, "fail_instead": True}


@pytest.mark.parametrize("scales", ["0,6", "6,0", "6,0,5"])
def test_why_a_cell_is_empty_is_told(studio: Studio, scales: str) -> None:
    """Opposite guidance cannot be had at a CFG scale of 0."""
    answer = plot(studio, ("CFG Scale", scales), args=[True, OPPOSITE], scheduler="SGM Uniform", sampler_name="Euler")
    assert answer.status == 200, answer.detail
    empty = [cell.std() == 0 for cell in answer.images[-len(scales.split(",")) :]]
    assert empty == [scale == "0" for scale in scales.split(",")]
    (reason,) = answer.info["extra_generation_params"]["Memnoise failed cells"]
    assert "opposite guidance needs a CFG scale other than 0" in reason
    assert all("failed cells" not in text for text in answer.infotexts[-len(empty) :] if text)


def test_many_requests_at_once(studio: Studio) -> None:
    from concurrent.futures import ThreadPoolExecutor

    alone = [studio.run(s).images[0] for s in (None, {}, {"tau": 300})]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda s: studio.run(s).images[0], [None, {}, {"tau": 300}] * 3))
    for number, picture in enumerate(together):
        assert np.array_equal(picture, alone[number % 3])
