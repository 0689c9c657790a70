"""A second extension, for tests: works out on its own what the adjusted noise should be, and can break the network.

Its two arguments are JSON texts. The first holds the settings to reproduce; the distance between the noise that
memnoise left and its own goes into the infotext. The second names a fault for evaluations outside of sampling;
"none" replaces the network's function by one that does the same.
"""

from __future__ import annotations

import json

import gradio as gr
import torch
from modules import prompt_parser, rng, scripts, shared


def denoised_difference(p, sigma, x_in, c, uc):
    """cond − uncond of what the sampler's own wrapper returns, an image at a time and a row at a time."""
    inner = p.sampler.model_wrap_cfg.inner_model
    parts, cond = prompt_parser.reconstruct_multicond_batch(c, 0)
    uncond = prompt_parser.reconstruct_cond_batch(uc, 0)
    image_cond = p.txt2img_image_conditioning(x_in)

    def one(x, text, concat):
        text = {k: v[None] for k, v in text.items()} if isinstance(text, dict) else {"c_crossattn": [text[None]]}
        return inner(x[None], sigma.reshape(1), cond={**text, "c_concat": [concat[None]]})[0]

    def row(value, i):
        return {k: v[i] for k, v in value.items()} if isinstance(value, dict) else value[i]

    total = torch.zeros_like(x_in)
    for i, rows in enumerate(parts):
        base = one(x_in[i], row(uncond, i), image_cond[i])
        for k, weight in rows:
            total[i] += weight * (one(x_in[i], row(cond, k), image_cond[i]) - base)
    return total


def expected_noise(p, c, uc, settings):
    """Algorithm 1 or Figure 7, written out."""
    channels = getattr(shared.sd_model, "latent_channels", 4)
    noise = rng.ImageRNG((channels, p.height // 8, p.width // 8), p.seeds).next()
    v = shared.sd_model.parameterization == "v"
    if hasattr(p.sampler, "get_timesteps"):
        t = p.sampler.get_timesteps(p, p.steps)[-1].float()
        to_native = 1 / shared.sd_model.alphas_cumprod[int(t)].sqrt() if v else 1.0

        def delta(x):
            return denoised_difference(p, t, x, c, uc) * to_native

    else:
        sigma = p.sampler.get_sigmas(p, p.steps)[0]
        to_native = -1 / sigma * ((1 + sigma**2).sqrt() if v else 1.0)

        def delta(x):
            return denoised_difference(p, sigma, x * sigma, c, uc) * to_native

    scale = (noise[0].numel() / (4 * 96 * 96 if v else 4 * 64 * 64)) ** 0.5
    result = []
    for i in range(len(noise)):
        # delta takes whole batches: the others are carried along
        x = noise.clone()
        if "gamma" in settings:
            for _ in range(settings["steps"]):
                d = delta(x)
                probe = x + torch.stack([e * (settings["rho"] * scale / e.norm()) for e in d])
                x = x - settings["gamma"] * (delta(probe) - d)
        else:
            m, s = torch.zeros_like(x), torch.zeros_like(x)
            for step in range(1, settings["max_steps"] + 1):
                with torch.enable_grad():
                    leaf = x.clone().requires_grad_()
                    loss = delta(leaf)[i].norm()
                (g,) = torch.autograd.grad(loss, leaf)
                x = x * (1 - settings["lr"] * 0.01)
                m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
                x = x - settings["lr"] * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
        result.append(x[i])
    return torch.stack(result)


def interrupt(gradient):
    shared.state.interrupted = True


BACKWARD_FAULTS = {"interrupt in backward": interrupt, "nan in backward": lambda gradient: gradient * float("nan")}


class Witness(scripts.Script):
    def title(self):
        return "Witness"

    def show(self, is_img2img):
        return False if is_img2img else scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox("", visible=False, label="settings"), gr.Textbox("", visible=False, label="fault")]

    def process_batch(self, p, settings, fault, **kwargs):
        model = shared.sd_model
        model.__dict__.pop("apply_model", None)
        if not fault:
            return
        original = model.apply_model
        calls = 0

        def apply_model(x, *args, **kw):
            nonlocal calls
            calls += 1
            if fault == "out of memory" or (fault.startswith("out of memory ") and calls <= int(fault.split()[3])):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            if fault == "error":
                raise RuntimeError("the network is not in the mood")
            if fault == "interrupt" and calls == 3:
                shared.state.interrupted = True
            if fault == "skip" and calls == 3:
                shared.state.skipped = True
            out = original(x, *args, **kw)
            if out.requires_grad and fault in BACKWARD_FAULTS:
                out.register_hook(BACKWARD_FAULTS[fault])
            return out * float("nan") if fault == "nan" else out

        model.__dict__["apply_model"] = apply_model

    def process_before_every_sampling(self, p, settings, fault, *, x, c, uc, **kwargs):
        shared.sd_model.__dict__.pop("apply_model", None)
        if settings:
            difference = (x - expected_noise(p, c, uc, json.loads(settings))).flatten(1).norm(dim=1)
            p.extra_generation_params["Witness"] = f"{float((difference / x.flatten(1).norm(dim=1)).max()):.3g}"
        weights = list(shared.sd_model.model.parameters())
        p.extra_generation_params["Frozen"] = sum(not weight.requires_grad for weight in weights)
