"""The host's own controls that are made as scripts."""

from __future__ import annotations

from typing import Any

import gradio as gr
from modules import scripts, sd_models, sd_samplers, sd_schedulers
from modules.infotext_utils import PasteField
from modules.ui_components import FormRow, InputAccordion


class ScriptRefiner(scripts.ScriptBuiltinUI):
    section = "accordions"
    create_group = False

    def title(self) -> str:
        return "Refiner"

    def ui(self, is_img2img: bool) -> Any:
        with InputAccordion(False, label="Refiner", elem_id=self.elem_id("enable")) as enable:
            checkpoint = gr.Dropdown(
                label="Checkpoint", elem_id=self.elem_id("checkpoint"), choices=sd_models.checkpoint_tiles(), value=""
            )
            switch_at = gr.Slider(
                value=0.8, label="Switch at", minimum=0.01, maximum=1.0, step=0.01, elem_id=self.elem_id("switch_at")
            )

        def title(d: dict) -> str | None:
            info = sd_models.get_closet_checkpoint_match(d.get("Refiner"))
            return None if info is None else info.title

        self.infotext_fields = [
            PasteField(enable, lambda d: "Refiner" in d),
            PasteField(checkpoint, title, api="refiner_checkpoint"),
            PasteField(switch_at, "Refiner switch at", api="refiner_switch_at"),
        ]
        return enable, checkpoint, switch_at

    def setup(self, p: Any, *args: Any) -> None:
        enabled, checkpoint, switch_at = args
        on = enabled and checkpoint not in (None, "", "None")
        p.refiner_checkpoint, p.refiner_switch_at = (checkpoint, switch_at) if on else (None, None)


class ScriptSampler(scripts.ScriptBuiltinUI):
    section = "sampler"

    def title(self) -> str:
        return "Sampler"

    def ui(self, is_img2img: bool) -> Any:
        names, schedules = sd_samplers.visible_sampler_names(), [x.label for x in sd_schedulers.schedulers]
        with FormRow(elem_id=f"sampler_selection_{self.tabname}"):
            sampler = gr.Dropdown(
                label="Sampling method", elem_id=f"{self.tabname}_sampling", choices=names, value=names[0]
            )
            scheduler = gr.Dropdown(
                label="Schedule type", elem_id=f"{self.tabname}_scheduler", choices=schedules, value=schedules[0]
            )
            self.steps = gr.Slider(
                minimum=1, maximum=150, step=1, elem_id=f"{self.tabname}_steps", label="Sampling steps", value=20
            )
        self.infotext_fields = [
            PasteField(self.steps, "Steps", api="steps"),
            PasteField(sampler, sd_samplers.get_sampler_from_infotext, api="sampler_name"),
            PasteField(scheduler, sd_samplers.get_scheduler_from_infotext, api="scheduler"),
        ]
        return self.steps, sampler, scheduler

    def setup(self, p: Any, *args: Any) -> None:
        p.steps, p.sampler_name, p.scheduler = args


class ScriptSeed(scripts.ScriptBuiltinUI):
    section = "seed"
    create_group = False

    def title(self) -> str:
        return "Seed"

    def ui(self, is_img2img: bool) -> Any:
        with gr.Row(elem_id=self.elem_id("seed_row")):
            seed = gr.Number(label="Seed", value=-1, elem_id=self.elem_id("seed"), precision=0)
            extra = gr.Checkbox(label="Extra", elem_id=self.elem_id("subseed_show"), value=False)
            subseed = gr.Number(label="Variation seed", value=-1, elem_id=self.elem_id("subseed"), precision=0)
            strength = gr.Slider(
                0, 1, step=0.01, value=0.0, label="Variation strength", elem_id=self.elem_id("subseed_strength")
            )
        self.infotext_fields = [
            PasteField(seed, "Seed", api="seed"),
            PasteField(extra, lambda d: "Variation seed" in d),
            PasteField(subseed, "Variation seed", api="subseed"),
            PasteField(strength, "Variation seed strength", api="subseed_strength"),
        ]
        return seed, extra, subseed, strength

    def setup(self, p: Any, *args: Any) -> None:
        seed, extra, subseed, strength = args
        p.seed = seed
        if extra and strength > 0:
            p.subseed, p.subseed_strength = subseed, strength
