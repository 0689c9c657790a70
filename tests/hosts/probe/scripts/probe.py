"""An extension, for tests, that tells what the host does and, in its hooks, does what it is told to.

POST /probe takes {hook: deed} and forgets what was noted. GET /probe tells what was: "seen", the hooks in their order;
"calls", timestep and rows of each evaluation of the network; "told", what deeds have to say.
"""

import gradio as gr
import torch
from fastapi import HTTPException
from modules import prompt_parser, script_callbacks, scripts, shared
from modules.ui_components import InputAccordion

HOOKS = {}
SEEN, CALLS, TOLD = [], [], []


def fire(hook, *args, **kwargs):
    SEEN.append(hook)
    if hook in HOOKS:
        DEEDS[HOOKS[hook]](*args, **kwargs)


# Deeds, each for one hook or for any


def fail(*args, **kwargs):
    raise ValueError("<oh>")


def fail_later(p, *args):
    p.init = fail


def refuse_later(p, *args):
    def init(*args):
        raise HTTPException(422, detail="not so")

    p.init = init


def fail_for_the_second_seed(p, *args):
    if p.seed == 2:
        p.init = fail


def tell_arguments(p, *args):
    TOLD.append(list(args))


def tell_pass(p, *args, x, noise, **kwargs):
    sampler = p.sampler
    untied = [sampler.p, sampler.eta, sampler.sampler_extra_args, sampler.model_wrap_cfg.p] == [None] * 4
    TOLD.append(
        {
            "x is noise": x is noise,
            "std": float(x.std()),
            "size": list(x.shape[2:]),
            "inference mode": torch.is_inference_mode_enabled(),
            "grad mode": torch.is_grad_enabled(),
            "untied": untied,
            "hires": p.is_hr_pass,
            "sampler": id(sampler),
            "x is the latent": x is getattr(p, "init_latent", None),
        }
    )


def shrink_noise(p, *args, x, **kwargs):
    x.mul_(0.9)


def tell_gradient(p, *args, x, c, uc, **kwargs):
    """‖Δ‖ of A1111's network, the size of its gradient, and the same by finite differences."""
    _, cond = prompt_parser.reconstruct_multicond_batch(c, 0)
    uncond = prompt_parser.reconstruct_cond_batch(uc, 0)
    sigma = p.sampler.get_sigmas(p, p.steps)[0]
    inner = p.sampler.model_wrap_cfg.inner_model

    def magnitude(y):
        concat = p.txt2img_image_conditioning(y)
        a, b = (
            inner(y * sigma, sigma * y.new_ones(len(y)), cond={"c_crossattn": [z], "c_concat": [concat]})
            for z in (cond, uncond)
        )
        return (a - b).norm() / sigma

    with torch.enable_grad():
        y = x.clone().requires_grad_(True)
        value = magnitude(y)
        (gradient,) = torch.autograd.grad(value, y)
    direction = 0.01 * gradient / gradient.norm()
    numeric = (magnitude(x + direction) - magnitude(x - direction)) / 0.02
    TOLD.append([float(sigma), float(value), float(gradient.norm()), float(numeric)])


def uncond_for_cond(params):
    params.text_cond = params.text_uncond[:1].expand(len(params.text_cond), -1, -1)


def unconditional_rows_only(params):
    n = len(params.text_uncond)
    params.x, params.sigma, params.image_cond = params.x[-n:], params.sigma[-n:], params.image_cond[-n:]
    params.text_cond = params.text_cond[:0]


def scale_zero(params):
    params.denoiser.cond_scale_miltiplier = 0.0


def interrupt(params):
    shared.state.interrupt()


def tell_rows(params):
    TOLD.append(len(params.x))


def write_infotext(p, enabled, tau):
    p.extra_generation_params.update(
        {
            "Probe tau": tau,
            "Probe none": None,
            "Probe list": ["a, b", "c"],
            "Probe call": lambda p, index, **kwargs: f"image {index}",
        }
    )


DEEDS = {
    "fail": fail,
    "fail later": fail_later,
    "refuse later": refuse_later,
    "fail for the second seed": fail_for_the_second_seed,
    "tell arguments": tell_arguments,
    "tell pass": tell_pass,
    "shrink noise": shrink_noise,
    "tell gradient": tell_gradient,
    "uncond for cond": uncond_for_cond,
    "unconditional rows only": unconditional_rows_only,
    "scale zero": scale_zero,
    "interrupt": interrupt,
    "tell rows": tell_rows,
    "write infotext": write_infotext,
}


def count(module, args, kwargs):
    """Forward hook of the network."""
    timesteps = args[1] if len(args) > 1 else kwargs["timesteps"]
    CALLS.append([float(timesteps.flatten()[0]), len(args[0])])


def watch_network():
    model = shared.sd_model
    patched = hasattr(model, "forge_objects")
    network = model.forge_objects.unet.model.diffusion_model if patched else model.model.diffusion_model
    if not hasattr(network, "is_watched_by_probe"):
        network.is_watched_by_probe = True
        network.register_forward_pre_hook(count, with_kwargs=True)


def add_route(demo, app):
    SEEN.append("app_started")

    def tell():
        return {"seen": SEEN, "calls": CALLS, "told": TOLD}

    def begin(hooks: dict):
        HOOKS.clear()
        HOOKS.update(hooks)
        for noted in (SEEN, CALLS, TOLD):
            noted.clear()

    app.add_api_route("/probe", tell, methods=["GET"])
    app.add_api_route("/probe", begin, methods=["POST"])


for event in ("cfg_denoiser", "cfg_denoised", "cfg_after_cfg"):
    getattr(script_callbacks, f"on_{event}")(lambda params, event=event: fire(event, params))
script_callbacks.on_before_ui(lambda: SEEN.append("before_ui"))
script_callbacks.on_app_started(add_route)
script_callbacks.on_ui_settings(
    lambda: shared.opts.add_option(
        "probe_level", shared.OptionInfo(3, "Level", section=("probe", "Probe")).info("0 to 5")
    )
)


class Script(scripts.Script):
    def title(self):
        return "Probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        SEEN.append("ui")
        with InputAccordion(False, label="Probe", elem_id=self.elem_id("enabled")) as enabled:
            tau = gr.Slider(0, 999, value=900, step=1, label="tau", elem_id=self.elem_id("tau"))
        self.infotext_fields = [(enabled, lambda d: "Probe tau" in d), (tau, "Probe tau")]
        self.on_after_component(lambda x: SEEN.append(x.component.elem_id), elem_id="generation_info_txt2img")
        return [enabled, tau]

    def setup(self, p, *args):
        fire("setup", p, *args)

    def before_process(self, p, *args):
        fire("before_process", p, *args)

    def process(self, p, *args):
        watch_network()
        fire("process", p, *args)

    def process_batch(self, p, *args, **kwargs):
        fire("process_batch", p, *args, **kwargs)

    def process_before_every_sampling(self, p, *args, **kwargs):
        fire("sampling", p, *args, **kwargs)

    def post_sample(self, p, ps, *args):
        fire("post_sample", p, ps, *args)

    def postprocess(self, p, processed, *args):
        fire("postprocess", p, processed, *args)
