"""An extension for tests: is the gradient that the noise was adjusted by that of the network which samples?

For the first image of a batch it takes the way that memnoise moved its noise, and measures how steeply ‖Δ‖ changes
along it: by a finite difference, which needs no gradient, and by differentiation, through the sampler's own network
wrapper both times. And it takes one step on the sphere itself. The infotext's `Slope` has the two slopes, and how far
the step is from memnoise's, in lengths of the step; what could not be differentiated is `none`. Its argument is
per-sample's `lr`.
"""

import gradio as gr
import torch
from modules import prompt_parser, rng, scripts, shared


def differences(p, c, uc, image_cond):
    """Δ of the batch's first image as the sampler's wrapper has it, up to a factor."""
    inner = p.sampler.model_wrap_cfg.inner_model
    parts, cond = prompt_parser.reconstruct_multicond_batch(c, 0)
    uncond = prompt_parser.reconstruct_cond_batch(uc, 0)
    if hasattr(p.sampler, "get_timesteps"):
        sigma, scale = p.sampler.get_timesteps(p, p.steps)[-1].float(), 1.0
    else:
        sigma = p.sampler.get_sigmas(p, p.steps)[0]
        scale = sigma

    def some(value, rows):
        return {k: v[rows] for k, v in value.items()} if isinstance(value, dict) else value[rows]

    def ask(x, text):
        text = text if isinstance(text, dict) else {"c_crossattn": [text]}
        count = len(next(iter(text.values()))[0]) if "c_crossattn" in text else len(text["crossattn"])
        given = {**text, "c_concat": [image_cond[:1].expand(count, *image_cond.shape[1:])]}
        return inner(x[None].expand(count, *x.shape), sigma.expand(count), cond=given)

    rows, weights = [row for row, _ in parts[0]], [weight for _, weight in parts[0]]
    prompts, empty = some(cond, rows), some(uncond, [0])

    def delta(x):
        """The rows in the calls that the host has them in."""
        if cond.shape[1] == uncond.shape[1]:
            together = (
                {k: torch.cat([v, empty[k]]) for k, v in prompts.items()}
                if isinstance(prompts, dict)
                else torch.cat([prompts, empty])
            )
            out = ask(x * scale, together)
            outs, base = out[:-1], out[-1:]
        else:
            outs, base = ask(x * scale, prompts), ask(x * scale, empty)
        return sum(weight * (out - base[0]) for weight, out in zip(weights, outs)) / scale

    return delta


class Slope(scripts.Script):
    def title(self):
        return "Slope"

    def show(self, is_img2img):
        return False if is_img2img else scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox("", visible=False, label="lr")]

    def process_before_every_sampling(self, p, lr, *, x, c, uc, **kwargs):
        if not lr:
            return
        channels = getattr(shared.sd_model, "latent_channels", 4)
        drawn = rng.ImageRNG((channels, p.height // 8, p.width // 8), p.seeds).next()[0]
        image_cond = p.txt2img_image_conditioning(x)
        delta = differences(p, c, uc, image_cond)
        gradient = None
        try:
            with torch.enable_grad():
                leaf = drawn.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(delta(leaf).norm(), leaf)
        except Exception as error:
            p.extra_generation_params["Slope error"] = str(error).splitlines()[0]
        way = x[0] - drawn
        if not way.any():
            way = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0)).to(drawn)
        along = way / way.norm()
        h = 0.01 * drawn.norm()
        with torch.no_grad():
            finite = float((delta(drawn + h * along).norm() - delta(drawn - h * along).norm()) / (2 * h))
        differentiated, apart = "none", "none"
        if gradient is not None:
            differentiated = f"{float((gradient * along).sum()):.5g}"
            step = drawn - float(lr) * drawn.numel() ** 0.5 * gradient / gradient.norm()
            step = step * (drawn.norm() / step.norm())
            apart = f"{float((x[0] - step).norm() / (step - drawn).norm()):.3g}"
        p.extra_generation_params["Slope"] = f"{finite:.5g} {differentiated} {apart}"
