"""The accordion's buttons, and the plot of a generation's trace.

The buttons read the tab's own controls, which the host makes before and after the accordion. So the controls are
collected as they are made, and connected when the last of them exists.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from modules import call_queue, images, processing, shared

from lib_memnoise.core.calibration import MOST, distinct
from lib_memnoise.registry import METHODS, USUAL
from lib_memnoise.settings import INFOTEXT
from lib_memnoise.webui import quirks
from lib_memnoise.webui.failures import FAILED_CELLS
from lib_memnoise.webui.services import json_request, scoring
from lib_memnoise.webui.services.traces import STORE

JS = "_js" if quirks.has("gradio 3") else "js"
INPUTS = {
    "prompt": "txt2img_prompt", "negative_prompt": "txt2img_neg_prompt", "styles": "txt2img_styles",
    "seed": "txt2img_seed", "batch_size": "txt2img_batch_size", "width": "txt2img_width", "height": "txt2img_height",
    "sampler_name": "txt2img_sampling", "scheduler": "txt2img_scheduler", "steps": "txt2img_steps",
    "cfg_scale": "txt2img_cfg_scale",
}  # fmt: skip
"""The values that a score depends on, and the ids of their elements; a host may lack some."""
SOURCE_LABELS = {"built-in": "built-in prompts", "recent": "my recent pictures' prompts", "own": "captions of my own"}
"""The labels of `calibration.SOURCES` in the page's dropdown."""
LAST = "generation_info_{tab}"
"""The id of the element that is made last. It changes with every generation; its text is the API's info."""


class Page:
    """One tab's plot, and in txt2img its buttons. It holds components, and no state of any generation."""

    def __init__(self, script: Any, tab: str) -> None:
        self.tab = tab
        self.has_buttons = tab == "txt2img"
        self.inputs: dict[str, Any] = {}
        for name, elem_id in INPUTS.items() if self.has_buttons else ():
            script.on_after_component(self._collector(name), elem_id=elem_id)
        script.on_after_component(self.connect, elem_id=LAST.format(tab=tab))

    def _collector(self, name: str) -> Callable[[Any], None]:
        def collect(event: Any) -> None:
            self.inputs[name] = event.component

        return collect

    def build(self, elem_id: Callable[[str], str]) -> None:
        """Build the components, at the end of the accordion."""
        if self.has_buttons:
            self._build_buttons(elem_id)
        self.plot = gr.Plot(label="Magnitude along the trajectory", visible=False, elem_id=elem_id("plot"))
        self.failed = gr.HTML("", elem_id=elem_id("failed"))

    def _build_buttons(self, elem_id: Callable[[str], str]) -> None:
        with gr.Row():
            self.check = gr.Button("Check prompt", elem_id=elem_id("check"))
            self.calibrate = gr.Button("Calibrate checkpoint", elem_id=elem_id("calibrate"))
            self.source = gr.Dropdown(
                choices=list(SOURCE_LABELS.values()),
                value=SOURCE_LABELS["built-in"],
                label="Calibrate with",
                elem_id=elem_id("source"),
            )
        self.captions = gr.Textbox(
            "",
            label="Captions such as you use, one a line, none of them memorised",
            lines=4,
            max_lines=12,
            elem_id=elem_id("captions"),
            elem_classes=["memnoise-captions"],
        )
        for component in (self.source, self.captions):
            component.do_not_save_to_config = True
        toggle = f"(label) => memnoiseSource({json.dumps(SOURCE_LABELS['own'])}, label)"
        self.source.change(fn=None, inputs=[self.source], outputs=[], **{JS: toggle})
        with gr.Accordion("Compare methods", open=False, elem_id=elem_id("comparison")):
            self.methods = gr.Dropdown(
                choices=[method.label for method in METHODS.values()],
                value=[METHODS[name].label for name in USUAL],
                multiselect=True,
                label="Methods, each by its preset",
                elem_id=elem_id("compared"),
            )
            self.reference = gr.Image(label="Picture that must not be copied (optional)", elem_id=elem_id("likeness"))
            # gradio would open the picture itself, in any format.
            self.reference.preprocess = as_sent
            self.compare = gr.Button("Compare methods", elem_id=elem_id("compare"))
            self.grid = gr.Image(label="The same seeds by every method", visible=False, elem_id=elem_id("grid"))
            for component in (self.methods, self.reference, self.grid):
                component.do_not_save_to_config = True
        self.verdict = gr.HTML("", elem_id=elem_id("verdict"))
        self.words = gr.HighlightedText(
            label="Words that guidance follows most", visible=False, show_legend=False, elem_id=elem_id("words")
        )
        self.task = gr.Textbox(visible=False)
        self.task.do_not_save_to_config = True

    def connect(self, event: Any) -> None:
        """Connect the buttons and the plot, when the host has made its last component."""
        if self.has_buttons:
            self._connect_buttons()
        event.component.change(
            fn=generation_outputs,
            inputs=[event.component],
            outputs=[self.plot, self.failed],
            show_progress=False,
            queue=False,
        )

    def _connect_buttons(self) -> None:
        names, components = tuple(self.inputs), list(self.inputs.values())
        more = {"source": self.source, "captions": self.captions}
        for button, run, inputs in ((self.check, checked, {}), (self.calibrate, calibrated, more)):
            function = call_queue.wrap_gradio_gpu_call(answering(run, (*names, *inputs)), extra_outputs=[gr.update()])
            button.click(
                fn=function,
                inputs=[self.task, *components, *inputs.values()],
                outputs=[self.words, self.verdict],
                show_progress=False,
                **{JS: "memnoiseTask"},
            )
        function = call_queue.wrap_gradio_gpu_call(comparing(names), extra_outputs=[gr.update()])
        self.compare.click(
            fn=function,
            inputs=[self.task, self.methods, self.reference, *components],
            outputs=[self.grid, self.verdict],
            show_progress=False,
            **{JS: "memnoiseTask"},
        )


Answer = tuple[list[tuple[str, float]], str]
"""Words with their significance, and HTML."""


def answering(run: Callable[[dict[str, Any]], Answer], names: Sequence[str]) -> Callable[..., list[Any]]:
    """A button's function, which passes its arguments by name and shows a sentence where `run` refuses."""

    def answer(task: Any, *values: Any) -> list[Any]:
        try:
            words, text = run(dict(zip(names, values)))
        except scoring.REFUSALS as error:
            words, text = [], refused(error)
        return [gr.update(value=words or None, visible=bool(words)), text]

    return answer


def as_sent(upload: Any) -> Any:
    """An uploaded picture as it was sent: a data URL in gradio 3, the path of a temporary file in gradio 4."""
    path = getattr(upload, "path", None)
    return Path(path) if path else upload


def refused(error: Exception) -> str:
    """One of `scoring.REFUSALS` as HTML."""
    return f"<div class='error'>{html.escape(scoring.sentence_of(error))}</div>"


def comparing(names: Sequence[str]) -> Callable[..., list[Any]]:
    """The function of "Compare methods"."""

    def answer(task: Any, methods: Any, reference: Any, *values: Any) -> list[Any]:
        from lib_memnoise.webui.services import comparison

        given = dict(zip(names, values))
        try:
            by_label = {method.label: name for name, method in METHODS.items()}
            chosen_labels = methods if isinstance(methods, list) else []
            names_of = [by_label.get(label, label) if isinstance(label, str) else label for label in chosen_labels]
            wanted = comparison.parse({**seeded(given), "methods": names_of, "reference": reference})
            result = comparison.compare(*wanted)
        except scoring.REFUSALS as error:
            return [gr.update(visible=False), refused(error)]
        if shared.opts.grid_save:
            images.save_image(
                result.grid, shared.opts.outdir_grids or shared.opts.outdir_txt2img_grids, "memnoise", grid=True,
                info=f"{wanted[0].prompts[0]}\nSteps: {wanted[0].steps}, Sampler: {wanted[0].sampler_name}, "
                f"CFG scale: {wanted[0].cfg_scale:g}, Seed: {result.cells[0].seed}, Script: Memnoise comparison",
            )  # fmt: skip
        sentences = [
            f"{METHODS[cell.method].label}, seed {cell.seed}: {cell.failed}" for cell in result.cells if cell.failed
        ]
        sentences += ["Interrupted: the other methods are missing"] if result.stopped else []
        return [
            gr.update(value=result.grid, visible=True),
            "".join(f"<p>{html.escape(text)}.</p>" for text in sentences),
        ]

    return answer


def seeded(given: dict[str, Any]) -> dict[str, Any]:
    """The values with the seeds of the batch that Generate would make, in place of its first seed and size."""
    count, seed = given.pop("batch_size", 1), given.pop("seed", -1)
    json_request.need(
        json_request.whole(count, 1, json_request.MOST_IMAGES), "batch_size", count, "a whole number from 1"
    )
    return {**given, "seeds": [first_seed(seed) + k for k in range(int(count))]}


def first_seed(value: Any) -> int:
    """The seed in the page's field as the host reads it. The field is -1 where it is empty or holds no number."""
    try:
        return int(processing.get_fixed_seed(value))
    except (TypeError, ValueError, OverflowError):
        json_request.need(False, "seed", value, "a whole number")
        raise


def checked(given: dict[str, Any]) -> Answer:
    """The words that contribute most to the scores of the batch that Generate would make, and a table of the scores."""
    answer = scoring.score_as_json(json_request.parse({**seeded(given), "words": True}))
    scored = answer["images"]
    significance = [sum(image["words"][k][1] for image in scored) / len(scored) for k in range(len(scored[0]["words"]))]
    words = [(f"{word} ", size) for (word, _), size in zip(scored[0]["words"], significance)]
    return words, table(answer)


def table(answer: dict[str, Any]) -> str:
    """The scores and their notes as HTML."""
    lines = ["<tr><th>Seed</th><th>Score</th><th>Percentile</th><th></th></tr>"]
    for image in answer["images"]:
        percentile = "" if image["percentile"] is None else f"{image['percentile']:.0f}"
        kind = " class='memnoise-flagged'" if image["flagged"] else ""
        lines.append(
            f"<tr{kind}><td>{image['seed']}</td><td>{image['score']:.4g}</td><td>{percentile}</td>"
            f"<td>{html.escape(image['verdict'])}</td></tr>"
        )
    rows = sum(image["rows"] for image in answer["images"])
    notes = [f"{against(answer)}, first timestep {answer['timestep']:g}; {rows} network rows."]
    notes += [f"{note[:1].upper()}{note[1:]}." for note in answer["notes"]]
    paragraphs = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<table class='memnoise-scores'>{''.join(lines)}</table>{paragraphs}"


def against(answer: dict[str, Any]) -> str:
    """The threshold that scores are compared with, in words."""
    known = answer["calibration"]
    if known is None:
        return "Not calibrated"
    return f"Threshold {answer['threshold']:.4g}, of {known['text']} ({known['promise']})"


def calibrated(given: dict[str, Any]) -> Answer:
    """Calibrate the checkpoint at the tab's size, sampler and steps, with the chosen prompts."""
    from lib_memnoise.webui.services import calibrating

    wanted = ("width", "height", "sampler_name", "scheduler", "steps", "cfg_scale")
    body = {name: given[name] for name in wanted if name in given}
    source = next(name for name, label in SOURCE_LABELS.items() if label == given["source"])
    if source == "own":
        body["prompts"] = distinct((given["captions"] or "").splitlines(), MOST)
    result = calibrating.calibrate_as_json(*calibrating.parse({**body, "source": source}))
    notes = "".join(f"<p>{html.escape(note[:1].upper() + note[1:])}.</p>" for note in result["notes"])
    return [], (
        f"<p>Calibrated at {result['width']}x{result['height']}: {result['text']} score {result['lowest']:.4g} to "
        f"{result['highest']:.4g}, half of them above {result['median']:.4g}. A score above {result['threshold']:.4g} "
        f"counts as memorised ({result['promise']}).</p>"
        f"{notes}"
    )


def generation_outputs(info: str) -> list[Any]:
    """What the page shows after a request: the plot of its trace if there is one, and why cells of an X/Y/Z failed."""
    try:
        params = json.loads(info)["extra_generation_params"]
        name, failed = params.get(f"{INFOTEXT} trace id"), params.get(FAILED_CELLS) or []
    except (ValueError, KeyError, TypeError, AttributeError):
        name, failed = None, []
    failures = "".join(f"<p class='error'>A cell failed: {html.escape(text)}</p>" for text in failed)
    return [plotted(name), failures]


def plotted(name: Any) -> Any:
    """The plot of the trace with this id."""
    trace = STORE.get(name) if isinstance(name, str) else None
    if trace is None:
        return gr.update(value=None, visible=False)
    from lib_memnoise.core import plots

    chart = plots.chart(trace)
    return gr.update(value=chart, visible=chart is not None)
