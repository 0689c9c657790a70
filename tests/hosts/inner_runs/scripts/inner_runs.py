"""An extension, for tests, that generates inside of a generation, in the ways of those that mend details.

Its argument says how: "img2img" works on each finished picture with everything the outer run has, its infotext's dict
included, and calls the scripts' hooks out of turn with copies of `p`; "txt2img" makes another picture, with an
infotext of its own. The outer pictures stay as they are; the inner ones come behind them in the answer. The selectable
script runs img2img after a txt2img, not inside of it.
"""

from copy import copy

import gradio as gr
from modules import processing, scripts

DETAIL = {"prompt": "a detailed face", "negative_prompt": "blurry", "batch_size": 1, "n_iter": 1}


def inner_run(p, image, index, how):
    """Process `image` as the outer run `p` would, with all of its scripts and their arguments."""
    same = {name: getattr(p, name) for name in ("sampler_name", "steps", "cfg_scale", "width", "height", "sd_model")}
    same.update(DETAIL, seed=p.all_seeds[index] + 100, do_not_save_samples=True, do_not_save_grid=True)
    if how == "img2img":
        inner = processing.StableDiffusionProcessingImg2Img(
            **same, init_images=[image], denoising_strength=0.6, extra_generation_params=p.extra_generation_params
        )
    else:
        inner = processing.StableDiffusionProcessingTxt2Img(**same)
    inner.is_inner_run, inner.is_api = True, p.is_api
    inner.scripts, inner.script_args = copy(p.scripts), copy(p.script_args)
    try:
        return processing.process_images(inner)
    finally:
        inner.close()


class InnerRuns(scripts.Script):
    def title(self):
        return "Inner runs"

    def show(self, is_img2img):
        return False if is_img2img else scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox("", visible=False, label="how")]

    def postprocess_image(self, p, pp, how):
        if not how or hasattr(p, "is_inner_run"):
            return
        if how == "img2img" and p.batch_index == 0:
            p.scripts.postprocess(copy(p), processing.Processed(p, [], p.seed, ""))
        done = inner_run(p, pp.image, p.iteration * p.batch_size + p.batch_index, how)
        p.inner_runs = [*getattr(p, "inner_runs", []), done]
        if how == "img2img" and p.batch_index == p.batch_size - 1:
            again = copy(p)
            p.scripts.before_process(again)
            p.scripts.process(again)

    def postprocess(self, p, processed, how):
        for done in getattr(p, "inner_runs", []):
            processed.images.append(done.images[0])
            processed.infotexts.append(done.infotexts[0])


class RunAfterwards(scripts.Script):
    def title(self):
        return "Run afterwards"

    def show(self, is_img2img):
        return not is_img2img

    def ui(self, is_img2img):
        return []

    def run(self, p):
        first = processing.process_images(p)
        done = inner_run(p, first.images[0], 0, "img2img")
        first.images.append(done.images[0])
        first.infotexts.append(done.infotexts[0])
        return first
