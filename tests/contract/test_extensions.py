"""Beside other extensions, in the real WebUI: those of the folder that SD_WEBUI_EXTENSIONS names, as far as known here.

Each is a folder of the name that its repository has, with its requirements installed in the WebUI's Python. Of each,
one or more uses are tried, a WebUI for each.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib_memnoise.settings import SPECS
from tests.contract.conftest import HOSTS, ROUNDING, Run, Studio, close
from tests.contract.test_requests import plot
from tests.hosts import extension_models, webui
from tests.hosts.checkpoints import make_checkpoints
from tests.hosts.response import encode_image

FOLDER = os.environ.get("SD_WEBUI_EXTENSIONS")
HELPERS = [Path(__file__).resolve().parents[1] / "hosts" / name for name in ("witness", "slope")]
MISSING = "SD_WEBUI_DIR and SD_WEBUI_EXTENSIONS must name a WebUI and a folder of extensions"

pytestmark = pytest.mark.skipif(not FOLDER or "webui" not in HOSTS, reason=MISSING)

BATCH_WISE = {"gamma": 0.2, "rho": 20, "steps": 1, "tau": 500}
PER_SAMPLE = {"method": "per_sample", "target_kind": "fraction", "target": 0.97, "max_steps": 3}
ONE_STEP = {"method": "per_sample", "lr": 0.01, "target": 0, "max_steps": 1, "rule": "sphere"}
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Use:
    """One way to use an extension, and what is to be seen of it."""

    folder: str
    script: str
    """What the API calls it."""
    args: dict[str | int, Any] | list[Any]
    """All arguments, or those that differ from the page's, by label or place."""
    infotext: str
    """What the extension itself writes."""
    name: str = ""
    payload: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = "sd1"
    samplers: tuple[str, ...] = ("DDIM", "Euler a")
    guidance: str = ""
    """Why guidance is not held back, if it is not."""
    batch: str = ""
    """The same for more than one image."""
    gradient: str = ""
    """Why there is no per-sample, if there is none."""
    outside: bool = False
    """It answers for the network itself, so that ‖Δ‖ is measured without it."""
    own_prompt: bool = False
    """It generates with the prompt itself, also where guidance is off."""

    @property
    def id(self) -> str:
        return self.folder + (f" ({self.name})" if self.name else "")


TILES: dict[str | int, Any] = {
    "Enable Tiled Diffusion": True, "Latent tile width": 16, "Latent tile height": 16, "Latent tile overlap": 8,
}  # fmt: skip
REGIONS = "a red fox in the snow BREAK a blue barn"

USES = [
    Use("adetailer", "adetailer", [True, False, {"ad_model": "anything.pt", "ad_mask_k": 1}], "ADetailer model",
        payload={"steps": 8}, own_prompt=True),
    Use("sd-webui-controlnet", "controlnet",
        [{"enabled": True, "module": "none", "model": "anything", "weight": 0.5, "image": encode_image(PICTURE)}],
        "ControlNet 0", checkpoint="sd1-wide", gradient="wrong gradient"),
    Use("sd-webui-controlnet", "controlnet",
        [{"enabled": True, "module": "reference_only", "image": encode_image(PICTURE)}],
        "ControlNet 0", "reference", checkpoint="sd1-wide", gradient="no gradient"),
    Use("sd-dynamic-thresholding", "dynamic thresholding (cfg scale fix)",
        {"Enable Dynamic Thresholding (CFG Scale Fix)": True, "Mimic CFG Scale": 3}, "Dynamic thresholding enabled",
        payload={"sampler_name": "Euler", "scheduler": "Simple"}, samplers=("Euler", "Euler a")),
    Use("sd-webui-cads", "cads", {"Active": True}, "CADS Active"),
    Use("sd-webui-incantations", "incantations", {12: True, 13: 3.0}, "PAG Active", "perturbed attention",
        guidance="another extension changed the batch"),
    Use("sd-webui-incantations", "incantations", {0: True}, "SEG Active", "smoothed energy"),
    Use("sd-webui-incantations", "incantations", {4: True}, "SCFG Active", "semantic CFG"),
    Use("sd-webui-neutral-prompt", "neutral prompt", [0.5], "CFG Rescale phi: 0.5",
        payload={"prompt": "a red fox in the snow AND_PERP a blue barn :0.8"}),
    Use("sd-webui-freeu", "freeu", {"Enable": True}, "FreeU Stages", payload={"width": 128, "height": 128},
        checkpoint="sd1-wide", gradient="no gradient"),
    Use("multidiffusion-upscaler-for-automatic1111", "tiled diffusion", TILES, "Tiled Diffusion", "MultiDiffusion",
        payload={"width": 192, "height": 192}, outside=True),
    Use("multidiffusion-upscaler-for-automatic1111", "tiled diffusion", {**TILES, "Method": "Mixture of Diffusers"},
        "Tiled Diffusion", "Mixture of Diffusers", payload={"width": 192, "height": 192}, gradient="no gradient"),
    Use("sd-webui-regional-prompter", "regional prompter", {"Regional Prompter": True}, "RP Active", "attention",
        payload={"prompt": REGIONS}, checkpoint="sd1-wide"),
    Use("sd-webui-regional-prompter", "regional prompter", {"Regional Prompter": True, "Generation Mode": "Latent"},
        "RP Active", "latent", payload={"prompt": REGIONS}, batch="another extension changed the batch"),
]  # fmt: skip
FOUND = [use for use in USES if FOLDER and (Path(FOLDER) / use.folder).is_dir()]


def inactive(use: Use) -> Use:
    """A request that does not use it. One of them is at work wherever its words are in the prompt."""
    payload = {} if use.script == "neutral prompt" else use.payload
    return replace(use, args=[], payload=payload)


class Beside:
    """A WebUI with an extension and two of the tests' own; short words for its generations."""

    def __init__(self, host: Any, use: Use) -> None:
        self.host = host
        self.use = use
        self.begin = len(host.log_text())
        self.args = self._args()

    def _args(self) -> list[Any]:
        if isinstance(self.use.args, list):
            return self.use.args
        every = self.host.get("/sdapi/v1/script-info").json()
        (found,) = [s for s in every if s["name"] == self.use.script and s["is_alwayson"] and not s["is_img2img"]]
        given = dict(self.use.args)
        args = [given.pop(place, given.pop(a["label"], a["value"])) for place, a in enumerate(found["args"])]
        assert not given, f"{self.use.script} has no {list(given)}"
        return args

    def scripts(self, memnoise: dict[str, Any] | None, active: bool, **helpers: list[str]) -> dict[str, Any]:
        scripts: dict[str, Any] = {name: {"args": args} for name, args in helpers.items()}
        if memnoise is not None:
            scripts["memnoise"] = {"args": [True, memnoise]}
        if active:
            scripts[self.use.script] = {"args": self.args}
        return scripts

    def payload(self, **changed: Any) -> dict[str, Any]:
        common = {"prompt": "a red fox in the snow", "seed": 7, "steps": 3, "cfg_scale": 6, "sampler_name": "DDIM"}
        return {**common, "width": 64, "height": 64, **self.use.payload, **changed}

    def run(self, memnoise: dict[str, Any] | None = None, *, active: bool = True, **changed: Any) -> Run:
        helpers = {name: changed.pop(name) for name in ("witness", "slope") if name in changed}
        scripts = self.scripts(memnoise, active, **helpers)
        answer = self.host.txt2img({**self.payload(**changed), "alwayson_scripts": scripts})
        assert answer.status == 200, answer.detail
        # Behind the pictures some extensions put what they were made of.
        count = changed.get("batch_size", 1)
        return Run(answer.images[:count], answer.infotexts[:count], answer.info, count)

    def complaints(self) -> list[str]:
        """What went wrong by the host's log, since the last time."""
        text = self.host.log_text()[self.begin :]
        self.begin += len(text)
        return [line for line in text.splitlines() if re.search(r"Traceback|^\*\*\*|Error:", line)]


class Kitchen:
    """Makes what the WebUIs need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root, self.python = webui.locate()  # type: ignore[misc]
        self._alone: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def host(self, use: Use | None, checkpoint: str, *, memnoise: bool = True) -> webui.WebUI:
        names = ("sd1", *({checkpoint} - {"sd1"}))
        files = make_checkpoints(self.folder / "checkpoints", self.root, self.python, names)
        kwargs: dict[str, Any] = {"extensions": HELPERS if use is None or memnoise else [], "timeout": 600}
        if use is not None:
            assert FOLDER is not None
            kwargs["extensions"] = [*kwargs["extensions"], Path(FOLDER).absolute() / use.folder]
            if use.folder == "adetailer":
                extension_models.make("detector", self.folder / "detectors" / "anything.pt", self.python)
                kwargs["settings"] = {"ad_extra_models_dir": str(self.folder / "detectors")}
                kwargs["extra_args"] = ["--ad-no-huggingface"]
            if use.folder == "sd-webui-controlnet":
                file = self.folder / "controls" / "anything.safetensors"
                extension_models.make("control", file, self.python, files[checkpoint])
                kwargs["extra_args"] = ["--controlnet-dir", str(file.parent)]
        kwargs["env"] = {"YOLO_CONFIG_DIR": str(self.folder)}
        if not memnoise:
            kwargs["repository"] = None
        return webui.WebUI(self.folder / "checkpoints", checkpoint, **kwargs)

    def without_others(self, use: Use) -> tuple[np.ndarray, np.ndarray]:
        """Pictures where the other extension is not installed: plain, and with memnoise."""
        if use.id not in self._alone:
            with self.host(None, use.checkpoint) as host:
                for one in FOUND:
                    if one.checkpoint == use.checkpoint:
                        run = Beside(host, inactive(one)).run
                        pictures = run(active=False).pictures[0], run(BATCH_WISE, active=False).pictures[0]
                        self._alone[one.id] = pictures
        return self._alone[use.id]

    def without_memnoise(self, use: Use) -> np.ndarray:
        """The picture of the active extension where memnoise is not installed."""
        with self.host(use, use.checkpoint, memnoise=False) as host:
            return Beside(host, use).run().pictures[0]


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Kitchen:
    return Kitchen(tmp_path_factory.mktemp("beside"))


@pytest.fixture(scope="module", params=FOUND or [None], ids=[use.id for use in FOUND] or ["none"])
def beside(request: pytest.FixtureRequest, kitchen: Kitchen) -> Iterator[Beside]:
    with kitchen.host(request.param, request.param.checkpoint) as host:
        yield Beside(host, request.param)


def check_log(test: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(test)
    def wrapped(beside: Beside, *args: Any, **kwargs: Any) -> None:
        beside.complaints()
        test(beside, *args, **kwargs)
        assert beside.complaints() == []

    return wrapped


def check_words(run: Run, use: Use, failure: str, image: int = 0) -> None:
    text = run.infotexts[image]
    assert use.infotext in text
    assert run.number("magnitude", image) > 0 and run.number("rows", image) > 0
    assert "T=" in str(run.read("Memnoise used", image))
    failed = run.read("Memnoise failed", image)
    assert (failed is None) if not failure else (failed is not None and failure in failed), failed


@check_log
def test_both_have_their_part(beside: Beside) -> None:
    plain, other, alone = beside.run(active=False), beside.run(), beside.run(BATCH_WISE, active=False)
    both, again = beside.run(BATCH_WISE), beside.run(BATCH_WISE)
    check_words(both, beside.use, beside.use.guidance)
    pictures = [run.pictures[0] for run in (plain, other, alone, both)]
    for index, picture in enumerate(pictures):
        for another in pictures[:index]:
            assert close(picture, another) > ROUNDING
    assert close(both.pictures[0], again.pictures[0]) < (ROUNDING if beside.use.own_prompt else 1e-9)
    assert np.array_equal(beside.run(active=False).pictures[0], plain.pictures[0])


def test_each_alone_is_as_if_the_other_were_not_installed(beside: Beside, kitchen: Kitchen) -> None:
    use = beside.use
    plain, mitigated = kitchen.without_others(use)
    alone = Beside(beside.host, inactive(use))
    assert np.array_equal(alone.run(active=False).pictures[0], plain)
    assert np.array_equal(alone.run(BATCH_WISE, active=False).pictures[0], mitigated)
    other = kitchen.without_memnoise(use)
    assert close(beside.run().pictures[0], other) <= (ROUNDING if use.own_prompt else 0)


@check_log
def test_the_prompt_is_not_heard_before_guidance_starts(beside: Beside) -> None:
    use, never = beside.use, {"method": "static", "tau": 0}
    prompt = beside.payload()["prompt"]
    other = prompt.replace("fox", "whale").replace("snow", "sea").replace("barn", "rose")
    # "Simple" is a schedule that does not step on 0, where guidance is on.
    one, two = (beside.run(never, prompt=text, scheduler="Simple") for text in (prompt, other))
    if use.guidance:
        assert use.guidance in str(one.read("Memnoise failed"))
        return
    assert one.read("Memnoise failed") is None
    if use.own_prompt:
        assert not np.array_equal(one.pictures[0], two.pictures[0])
    else:
        assert np.array_equal(one.pictures[0], two.pictures[0])


@check_log
def test_the_gradient_is_right_or_refused(beside: Beside) -> None:
    use, run = beside.use, beside.run(ONE_STEP, slope=[str(ONE_STEP["lr"])])
    failed, (finite, differentiated, apart) = run.read("Memnoise failed"), str(run.read("Slope")).split()
    if use.gradient:
        assert use.gradient in str(failed)
        return
    assert failed is None and run.number("magnitude after") < run.number("magnitude")
    # The way memnoise went is downhill for the network that samples.
    assert float(finite) < 0
    if use.outside:
        assert "without it" in str(run.read("Memnoise note"))
        return
    assert float(differentiated) == pytest.approx(float(finite), rel=0.02)
    assert float(apart) < 0.02


@check_log
def test_nothing_stale_is_handed_over(beside: Beside) -> None:
    use = beside.use
    if use.gradient:
        assert use.gradient in str(beside.run(PER_SAMPLE).read("Memnoise failed"))
        return
    traced = {**PER_SAMPLE, "trace": "on"}
    evaluated, short = beside.run(traced, witness=["", "none"]), beside.run(traced)
    assert short.read("Memnoise failed") is None
    assert close(short.pictures[0], evaluated.pictures[0]) < ROUNDING
    steps, is_ddim = beside.payload()["steps"], beside.payload()["sampler_name"] == "DDIM"
    # DDIM makes a call less where the steps divide the training's.
    calls = len(range(0, 1000, 1000 // steps)) - 1 if is_ddim else steps
    for run in (evaluated, short):
        points = beside.host.get(f"/memnoise/v1/trace/{run.read('Memnoise trace id')}").json()["images"][0]["points"]
        assert len(points) == (0 if use.outside else calls)


def test_batches_samplers_and_a_plot(beside: Beside) -> None:
    use = beside.use
    for sampler in use.samplers:
        run = beside.run(BATCH_WISE, batch_size=2, sampler_name=sampler)
        for image in range(2):
            check_words(run, use, use.guidance or use.batch, image)
        assert close(run.pictures[0], run.pictures[1]) > ROUNDING
    studio, one = Studio(beside.host), beside.run(BATCH_WISE)
    taus = (f"[Memnoise] {SPECS['tau'].label}", "500, 999")
    answer = plot(studio, taus, **beside.payload(), alwayson_scripts=beside.scripts(BATCH_WISE, True))
    assert answer.status == 200, answer.detail
    # The grid, and its two cells.
    first, second = answer.images[1:3]
    assert close(first, one.pictures[0]) < ROUNDING
    if not use.guidance:
        assert close(first, second) > ROUNDING
    assert beside.complaints() == []
