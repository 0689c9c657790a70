"""The X/Y/Z plot: one generation for every combination of up to three lists of values."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable
from copy import copy
from io import StringIO
from itertools import permutations, product
from typing import Any, NamedTuple

import gradio as gr
import modules.scripts as scripts
import numpy as np
from modules import errors, images, processing, sd_models, sd_samplers, sd_schedulers, shared
from modules.processing import Processed, process_images
from modules.shared import opts, state
from modules.ui_components import ToolButton
from PIL import Image


class AxisInfo(NamedTuple):
    axis: Any
    values: list


def apply_field(field: str) -> Callable:
    return lambda p, x, xs: setattr(p, field, x)


def apply_override(field: str, boolean: bool = False) -> Callable:
    def fun(p: Any, x: Any, xs: list) -> None:
        p.override_settings[field] = x.lower() == "true" if boolean else x

    return fun


def apply_prompt(p: Any, x: str, xs: list[str]) -> None:
    if xs[0] not in p.prompt and xs[0] not in p.negative_prompt:
        raise RuntimeError(f"neither prompt contains {xs[0]!r}")
    p.prompt = p.prompt.replace(xs[0], x)
    p.negative_prompt = p.negative_prompt.replace(xs[0], x)


def apply_checkpoint(p: Any, x: str, xs: list[str]) -> None:
    confirm_checkpoints(p, [x])
    p.override_settings["sd_model_checkpoint"] = sd_models.get_closet_checkpoint_match(x).name


def apply_size(p: Any, x: str, xs: list[str]) -> None:
    p.width, p.height = (int(part) for part in x.split("x"))


def confirm_samplers(p: Any, xs: list[str]) -> None:
    for x in xs:
        if x.lower() not in sd_samplers.samplers_map:
            raise RuntimeError(f"there is no sampler {x!r}")


def confirm_checkpoints(p: Any, xs: list[str]) -> None:
    for x in xs:
        if sd_models.get_closet_checkpoint_match(x) is None:
            raise RuntimeError(f"there is no checkpoint {x!r}")


def confirm_checkpoints_or_none(p: Any, xs: list[str]) -> None:
    confirm_checkpoints(p, [x for x in xs if x not in (None, "", "None", "none")])


def apply_order(p: Any, x: tuple[str, ...], xs: list) -> None:
    """Put these words, in this order, into the places that they have in the prompt."""
    places = sorted(x, key=p.prompt.find)
    pattern = "|".join(re.escape(word) for word in places)
    words = iter(x)
    p.prompt = re.sub(pattern, lambda match: next(words, match.group(0)), p.prompt)


def apply_styles(p: Any, x: str, xs: list[str]) -> None:
    p.styles.extend(x.split(","))


def apply_uni_pc_order(p: Any, x: int, xs: list[int]) -> None:
    p.override_settings["uni_pc_order"] = min(x, p.steps - 1)


def boolean_choice(reverse: bool = False) -> Callable:
    return lambda: ["False", "True"] if reverse else ["True", "False"]


def _rounded(x: Any) -> Any:
    return round(x, 8) if type(x) is float else x


def format_value_add_label(p: Any, opt: Any, x: Any) -> str:
    return f"{opt.label}: {_rounded(x)}"


def format_value(p: Any, opt: Any, x: Any) -> Any:
    return _rounded(x)


def format_value_join_list(p: Any, opt: Any, x: Any) -> str:
    return ", ".join(x)


def format_nothing(p: Any, opt: Any, x: Any) -> str:
    return ""


def do_nothing(p: Any, x: Any, xs: list) -> None:
    pass


def str_permutations(x: Any) -> Any:
    """As an axis's type: plot all orders of the values."""
    return x


def list_to_csv_string(data_list: Any) -> str:
    buffer = StringIO()
    csv.writer(buffer).writerow(data_list)
    return buffer.getvalue().strip()


def csv_string_to_list_strip(data_str: str) -> list[str]:
    return [x.strip() for row in csv.reader(StringIO(data_str), skipinitialspace=True) for x in row]


class AxisOption:
    def __init__(
        self,
        label: str,
        type: Any,
        apply: Callable,
        format_value: Callable = format_value_add_label,
        confirm: Callable | None = None,
        cost: float = 0.0,
        choices: Callable | None = None,
        prepare: Callable | None = None,
    ) -> None:
        self.label = label
        self.type = type
        self.apply = apply
        self.format_value = format_value
        self.confirm = confirm
        self.cost = cost
        self.choices = choices
        self.prepare = prepare


class AxisOptionImg2Img(AxisOption):
    is_img2img = True


class AxisOptionTxt2Img(AxisOption):
    is_img2img = False


def _sampler_names() -> list[str]:
    return sd_samplers.visible_sampler_names()


def _checkpoints() -> list[str]:
    return sorted(sd_models.checkpoints_list, key=str.casefold)


# The host's axes in the host's order, so that an index means the same axis.
axis_options = [
    AxisOption("Nothing", str, do_nothing, format_value=format_nothing),
    AxisOption("Seed", int, apply_field("seed")),
    AxisOption("Var. seed", int, apply_field("subseed")),
    AxisOption("Var. strength", float, apply_field("subseed_strength")),
    AxisOption("Steps", int, apply_field("steps")),
    AxisOptionTxt2Img("Hires steps", int, apply_field("hr_second_pass_steps")),
    AxisOption("CFG Scale", float, apply_field("cfg_scale")),
    AxisOptionImg2Img("Image CFG Scale", float, apply_field("image_cfg_scale")),
    AxisOption("Prompt S/R", str, apply_prompt, format_value=format_value),
    AxisOption("Prompt order", str_permutations, apply_order, format_value=format_value_join_list),
    AxisOptionTxt2Img(
        "Sampler",
        str,
        apply_field("sampler_name"),
        format_value=format_value,
        confirm=confirm_samplers,
        choices=_sampler_names,
    ),
    AxisOptionTxt2Img(
        "Hires sampler", str, apply_field("hr_sampler_name"), confirm=confirm_samplers, choices=_sampler_names
    ),
    AxisOptionImg2Img(
        "Sampler",
        str,
        apply_field("sampler_name"),
        format_value=format_value,
        confirm=confirm_samplers,
        choices=_sampler_names,
    ),
    AxisOption(
        "Checkpoint name",
        str,
        apply_checkpoint,
        format_value=format_value,
        confirm=confirm_checkpoints,
        cost=1.0,
        choices=_checkpoints,
    ),
    AxisOption("Negative Guidance minimum sigma", float, apply_field("s_min_uncond")),
    AxisOption("Sigma Churn", float, apply_field("s_churn")),
    AxisOption("Sigma min", float, apply_field("s_tmin")),
    AxisOption("Sigma max", float, apply_field("s_tmax")),
    AxisOption("Sigma noise", float, apply_field("s_noise")),
    AxisOption(
        "Schedule type", str, apply_field("scheduler"), choices=lambda: [x.label for x in sd_schedulers.schedulers]
    ),
    AxisOption("Schedule min sigma", float, apply_override("sigma_min")),
    AxisOption("Schedule max sigma", float, apply_override("sigma_max")),
    AxisOption("Schedule rho", float, apply_override("rho")),
    AxisOption("Beta schedule alpha", float, apply_override("beta_dist_alpha")),
    AxisOption("Beta schedule beta", float, apply_override("beta_dist_beta")),
    AxisOption("Eta", float, apply_field("eta")),
    AxisOption("Clip skip", int, apply_override("CLIP_stop_at_last_layers")),
    AxisOption("Denoising", float, apply_field("denoising_strength")),
    AxisOption("Initial noise multiplier", float, apply_field("initial_noise_multiplier")),
    AxisOption("Extra noise", float, apply_override("img2img_extra_noise")),
    AxisOptionTxt2Img(
        "Hires upscaler", str, apply_field("hr_upscaler"), choices=lambda: [*shared.latent_upscale_modes]
    ),
    AxisOptionImg2Img("Cond. Image Mask Weight", float, apply_field("inpainting_mask_weight")),
    AxisOption("VAE", str, apply_override("sd_vae"), cost=0.7, choices=lambda: ["Automatic", "None"]),
    AxisOption("Styles", str, apply_styles, choices=lambda: list(shared.prompt_styles.styles)),
    AxisOption("UniPC Order", int, apply_uni_pc_order, cost=0.5),
    AxisOption("Face restore", str, do_nothing, format_value=format_value),
    AxisOption("Token merging ratio", float, apply_override("token_merging_ratio")),
    AxisOption("Token merging ratio high-res", float, apply_override("token_merging_ratio_hr")),
    AxisOption(
        "Always discard next-to-last sigma",
        str,
        apply_override("always_discard_next_to_last_sigma", boolean=True),
        choices=boolean_choice(reverse=True),
    ),
    AxisOption(
        "SGM noise multiplier",
        str,
        apply_override("sgm_noise_multiplier", boolean=True),
        choices=boolean_choice(reverse=True),
    ),
    AxisOption(
        "Refiner checkpoint",
        str,
        apply_field("refiner_checkpoint"),
        format_value=format_value,
        confirm=confirm_checkpoints_or_none,
        cost=1.0,
        choices=lambda: ["None", *_checkpoints()],
    ),
    AxisOption("Refiner switch at", float, apply_field("refiner_switch_at")),
    AxisOption("RNG source", str, apply_override("randn_source"), choices=lambda: ["GPU", "CPU", "NV"]),
    AxisOption(
        "FP8 mode",
        str,
        apply_override("fp8_storage"),
        cost=0.9,
        choices=lambda: ["Disable", "Enable for SDXL", "Enable"],
    ),
    AxisOption("Size", str, apply_size),
]

# The host's fractions begin with any character: it reads 1e-05 as a range from 1e.
_NUMBER = r"\s*([+-]?\s*\d+(?:.\d*)?)\s*"
_RANGE = re.compile(rf"{_NUMBER}-{_NUMBER}(?:\(\s*([+-]\d+(?:.\d*)?)\s*\))?\s*")
_COUNT = re.compile(rf"{_NUMBER}-{_NUMBER}\[\s*(\d+)\s*\]\s*")


def _numbers(values: list[str], kind: type) -> list[Any]:
    """Single numbers, `1-5`, `1-5 (+2)` and `1-5 [3]`."""
    result: list[Any] = []
    for text in values:
        if not text.strip():
            continue
        step, count = _RANGE.fullmatch(text), _COUNT.fullmatch(text)
        if step:
            start, end = kind(step.group(1)), kind(step.group(2))
            stride = kind(step.group(3) or 1)
            numbers = range(start, end + 1, stride) if kind is int else np.arange(start, end + stride, stride).tolist()
            result += numbers
        elif count:
            ends = kind(count.group(1)), kind(count.group(2))
            result += [kind(x) for x in np.linspace(*ends, num=int(count.group(3))).tolist()]
        else:
            result.append(text)
    return result


class _Axis:
    """One of the three axes with its values, checked."""

    def __init__(self, opt: AxisOption, text: str, chosen: list[str], csv_mode: bool, p: Any, fixed: bool) -> None:
        self.opt = opt
        from_choices = opt.choices is not None and not csv_mode
        self.text = list_to_csv_string(chosen) if from_choices else text
        if opt.label == "Nothing":
            self.values: list[Any] = [0]
            return
        if from_choices:
            values: list[Any] = list(chosen)
        elif opt.prepare is not None:
            values = opt.prepare(text)
        else:
            values = csv_string_to_list_strip(text)
        if opt.type in (int, float):
            values = _numbers(values, opt.type)
        elif opt.type == str_permutations:
            values = list(permutations(values))
        self.values = [opt.type(x) for x in values]
        if opt.confirm:
            opt.confirm(p, self.values)
        self.seeds = opt.label in ("Seed", "Var. seed")
        if self.seeds and fixed:
            self.values = [random.randrange(4294967294) if x in (None, "", -1) else x for x in self.values]

    def note(self, params: dict[str, Any], name: str, fixed: bool) -> None:
        """Write the axis to the grid's infotext."""
        if self.opt.label == "Nothing":
            return
        params[f"{name} Type"], params[f"{name} Values"] = self.opt.label, self.text
        if self.seeds and fixed:
            params[f"Fixed {name} Values"] = ", ".join(str(x) for x in self.values)


class Script(scripts.Script):
    def title(self) -> str:
        return "X/Y/Z plot"

    def ui(self, is_img2img: bool) -> Any:
        self.current_axis_options = [x for x in axis_options if getattr(x, "is_img2img", is_img2img) == is_img2img]
        labels = [x.label for x in self.current_axis_options]
        controls: list[Any] = []
        fields: list[Any] = []
        for axis in "xyz":
            with gr.Row():
                default = labels[1] if axis == "x" else labels[0]
                kind = gr.Dropdown(
                    label=f"{axis.upper()} type",
                    choices=labels,
                    value=default,
                    type="index",
                    elem_id=self.elem_id(f"{axis}_type"),
                )
                values = gr.Textbox(label=f"{axis.upper()} values", lines=1, elem_id=self.elem_id(f"{axis}_values"))
                dropdown = gr.Dropdown(
                    label=f"{axis.upper()} values", visible=False, multiselect=True, interactive=True
                )
                ToolButton(value="\U0001f4d2", elem_id=f"xyz_grid_fill_{axis}_tool_button", visible=False)
            controls += [kind, values, dropdown]
            fields += [(kind, f"{axis.upper()} Type"), (values, f"{axis.upper()} Values")]
        self.infotext_fields = fields

        def checkbox(label: str, item: str, value: bool = False) -> Any:
            return gr.Checkbox(label=label, value=value, elem_id=self.elem_id(item))

        controls += [
            checkbox("Draw legend", "draw_legend", True),
            checkbox("Include Sub Images", "include_lone_images"),
            checkbox("Include Sub Grids", "include_sub_grids"),
            checkbox("Keep -1 for seeds", "no_fixed_seeds"),
            *(checkbox(f"Vary seeds for {axis.upper()}", f"vary_seeds_{axis}") for axis in "xyz"),
            gr.Slider(
                label="Grid margins (px)", minimum=0, maximum=500, value=0, step=2, elem_id=self.elem_id("margin_size")
            ),
            checkbox("Use text inputs instead of dropdowns", "csv_mode"),
        ]
        return controls

    def run(self, p: Any, *args: Any) -> Processed:
        axis_args, rest = args[:9], args[9:]
        _, lone_images, sub_grids, keep_minus_one, vary_x, vary_y, vary_z, _, csv_mode = rest
        fixed = not keep_minus_one
        if fixed:
            processing.fix_seed(p)
        if not opts.return_grid:
            p.batch_size = 1
        axes = []
        for n in range(3):
            kind, text, chosen = axis_args[3 * n : 3 * n + 3]
            axes.append(_Axis(self.current_axis_options[kind or 0], text, chosen, csv_mode, p, fixed))
        for name, axis in zip("xyz", axes):
            setattr(state, f"xyz_plot_{name}", AxisInfo(axis.opt, axis.values))
        xs, ys, zs = (axis.values for axis in axes)
        state.job_count = len(xs) * len(ys) * len(zs) * p.n_iter
        notes: dict[int, str] = {}  # 0: the whole plot; 1 + iz: the grid of one z

        def cell(ix: int, iy: int, iz: int) -> Processed:
            if state.interrupted or state.stopping_generation:
                return Processed(p, [], p.seed, "")
            pc = copy(p)
            pc.styles = pc.styles[:]
            for axis, i in zip(axes, (ix, iy, iz)):
                axis.opt.apply(pc, axis.values[i], axis.values)
            pc.seed += ix * vary_x + iy * vary_y * (len(xs) if vary_x else 1)
            pc.seed += iz * vary_z * (len(xs) if vary_x else 1) * (len(ys) if vary_y else 1)
            try:
                result = process_images(pc)
            except Exception as e:
                errors.display(e, "a cell of the plot")
                result = Processed(p, [], p.seed, "")
            if ix == 0 and iy == 0:
                pc.extra_generation_params = {**pc.extra_generation_params, "Script": self.title()}
                for name, axis in zip("XY", axes):
                    axis.note(pc.extra_generation_params, name, fixed)
                notes[1 + iz] = processing.create_infotext(pc, pc.all_prompts, pc.all_seeds, pc.all_subseeds)
                if iz == 0:
                    axes[2].note(pc.extra_generation_params, "Z", fixed)
                    notes[0] = processing.create_infotext(pc, pc.all_prompts, pc.all_seeds, pc.all_subseeds)
            return result

        # The axes that are slow to change go outside.
        outer = sorted(range(3), key=lambda n: (-axes[n].opt.cost, -n))
        results: dict[tuple[int, ...], Processed] = {}
        template: Processed | None = None
        try:
            for indices in product(*(range(len(axes[n].values)) for n in outer)):
                at = tuple(i for _, i in sorted(zip(outer, indices)))
                results[at] = cell(*at)
                template = template or results[at]
        finally:
            sd_models.reload_model_weights()
        if template is None or not any(x.images for x in results.values()):
            return Processed(p, [])
        return self._assemble(template, results, notes, (len(xs), len(ys), len(zs)), lone_images, sub_grids)

    def _assemble(
        self,
        template: Processed,
        results: dict,
        notes: dict[int, str],
        shape: tuple[int, int, int],
        lone_images: bool,
        sub_grids: bool,
    ) -> Processed:
        """The plot, then its grids and its cells where they are wanted; failed cells are empty."""
        nx, ny, nz = shape
        size = next(x.images[0].size for x in results.values() if x.images)
        order = [results[ix, iy, iz] for iz in range(nz) for iy in range(ny) for ix in range(nx)]
        pictures = [x.images[0] if x.images else Image.new("RGB", size) for x in order]
        grids = [images.image_grid(pictures[i * nx * ny : (i + 1) * nx * ny], rows=ny) for i in range(nz)]
        res = copy(template)
        res.images = [images.image_grid(grids, rows=1)]
        res.infotexts = [notes[0]]
        res.all_prompts, res.all_seeds = [], []
        res.index_of_first_image = 1
        if sub_grids:
            res.images += grids
            res.infotexts += [notes[1 + i] for i in range(nz)]
            res.all_prompts += [order[i * nx * ny].prompt for i in range(nz)]
            res.all_seeds += [order[i * nx * ny].seed for i in range(nz)]
        if lone_images:
            res.images += pictures
        res.infotexts += [x.infotexts[0] if x.images else None for x in order]  # type: ignore[misc]
        res.all_prompts += [x.prompt if x.images else None for x in order]
        res.all_seeds += [x.seed if x.images else None for x in order]
        return res
