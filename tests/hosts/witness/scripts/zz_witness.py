"""A second extension, for tests: works out on its own what the adjusted noise should be, and can break the network.

Its two arguments are JSON texts. The first holds the settings to reproduce; the distance between the noise that
memnoise left and its own goes into the infotext. The second names a fault for evaluations outside of sampling;
"none" replaces the network's function by one that does the same.
"""

from __future__ import annotations

import contextlib
import copy
import json

import gradio as gr
import torch
from modules import prompt_parser, rng, scripts, sd_samplers_common, shared


def patched():
    """The U-Net of hosts that patch one; None elsewhere."""
    objects = getattr(shared.sd_model, "forge_objects", None)
    return None if objects is None else objects.unet.model


def scaling():
    return patched().predictor if hasattr(patched(), "predictor") else patched().model_sampling


class Differences:
    """cond − uncond of denoised latents or of ε, an image at a time and a row at a time."""

    def __init__(self, p, c, uc, image_cond):
        self.inner = p.sampler.model_wrap_cfg.inner_model
        self.parts, self.cond = prompt_parser.reconstruct_multicond_batch(c, 0)
        self.uncond = prompt_parser.reconstruct_cond_batch(uc, 0)
        self.image_cond = image_cond
        if patched() is not None:
            # A network of its own, and nothing of it made in inference mode.
            self.network = copy.deepcopy(patched()).requires_grad_(False)
            self.cond, self.uncond = self.own(self.cond), self.own(self.uncond)

    def own(self, value):
        return {k: v.clone() for k, v in value.items()} if isinstance(value, dict) else value.clone()

    def row(self, value, i):
        return {k: v[i] for k, v in value.items()} if isinstance(value, dict) else value[i]

    def one(self, x, sigma, text, concat):
        if patched() is None:
            text = {k: v[None] for k, v in text.items()} if isinstance(text, dict) else {"c_crossattn": [text[None]]}
            return self.inner(x[None], sigma.reshape(1), cond={**text, "c_concat": [concat[None]]})[0]
        crossattn, given = (text["crossattn"], {"y": text["vector"][None]}) if isinstance(text, dict) else (text, {})
        if concat.shape[1:] == x.shape[1:]:
            given["c_concat"] = concat[None]
        given = {"c_crossattn": crossattn[None], "transformer_options": {}, **given}
        # What the network overwrites is kept as it was.
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(), lambda saved: saved):
            return self.network.apply_model(x[None], sigma.reshape(1), **given)[0]

    def __call__(self, sigma, x_in):
        total = torch.zeros_like(x_in)
        for i, rows in enumerate(self.parts):
            base = self.one(x_in[i], sigma, self.row(self.uncond, i), self.image_cond[i])
            for k, weight in rows:
                total[i] += weight * (self.one(x_in[i], sigma, self.row(self.cond, k), self.image_cond[i]) - base)
        return total


def network_of(p, c, uc, x, seconds):
    """Δ of the batch at the pass's first step, as a function of its noise, and whether the network predicts v."""
    v = shared.sd_model.parameterization == "v" if patched() is None else is_v()
    image_cond = (p.image_conditioning if seconds else p.txt2img_image_conditioning(x)).expand(len(x), -1, -1, -1)
    difference = Differences(p, c, uc, image_cond.clone())
    steps, taken = sd_samplers_common.setup_img2img_steps(p) if seconds else (p.steps, 0)
    clean = x.clone() if seconds else torch.zeros_like(x)
    if hasattr(p.sampler, "get_timesteps"):
        times = p.sampler.get_timesteps(p, steps)
        t = times[taken - 1] if seconds else times[-1]
        bars = shared.sd_model.alphas_cumprod.clone()
        bar = bars[times[taken]] if seconds else torch.zeros(())
        if patched() is None:
            to_native = 1 / bars[int(t)].sqrt() if v else 1.0
            return (lambda z: difference(t.float(), bar.sqrt() * clean + (1 - bar).sqrt() * z) * to_native), v
        sigma = ((1 - bars[int(t)]) / bars[int(t)]).sqrt()
        grow = (1 + sigma**2).sqrt()
        to_native = -1 / sigma * (grow if v else 1.0)
        return (lambda z: difference(sigma, (bar.sqrt() * clean + (1 - bar).sqrt() * z) * grow) * to_native), v
    sigmas = p.sampler.get_sigmas(p, steps)
    sigma = (sigmas[steps - taken - 1] if seconds else sigmas[0]).clone()
    to_native = -1 / sigma * ((1 + sigma**2).sqrt() if v else 1.0)
    return (lambda z: difference(sigma, clean + z * sigma) * to_native), v


def is_v():
    one = torch.ones(1, 1, 1, 1)
    return float(scaling().calculate_denoised(torch.ones(1), 0 * one, one)) == 0.5


def expected_noise(p, c, uc, x, settings, seconds):
    """Algorithm 1 or Figure 7, written out."""
    channels = getattr(shared.sd_model, "latent_channels", 4)
    noise = rng.ImageRNG((channels, p.height // 8, p.width // 8), p.seeds).next()
    delta, v = network_of(p, c, uc, x, seconds)
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
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox("", visible=False, label="settings"), gr.Textbox("", visible=False, label="fault")]

    put = None
    """The function that stands for the network's, and what it is put into."""

    def take_back(self):
        if self.put is not None:
            model, function = self.put
            if model.__dict__.get("apply_model") is function:
                del model.__dict__["apply_model"]

    def process_batch(self, p, settings, fault, **kwargs):
        model = patched() or shared.sd_model
        self.take_back()
        self.weights = [(weight, weight.requires_grad) for weight in self.all_weights()]
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
        self.put = model, apply_model

    def all_weights(self):
        return list((patched() or shared.sd_model.model).parameters())

    def process_before_every_sampling(self, p, settings, fault, *, x, noise, c, uc, **kwargs):
        if getattr(p, "is_hr_pass", False):
            return
        self.take_back()
        if settings:
            seconds = hasattr(p, "init_images")
            left = getattr(p, "modified_noise", None)  # where the host has a place for it
            left = noise if left is None else left
            apart = contextlib.nullcontext() if patched() is None else torch.inference_mode(False)
            with apart, torch.no_grad():
                expected = expected_noise(p, c, uc, x.clone(), json.loads(settings), seconds)
                difference = (left.clone() - expected).flatten(1).norm(dim=1)
                p.extra_generation_params["Witness"] = f"{float((difference / left.flatten(1).norm(dim=1)).max()):.3g}"
        changed = [a is not b or a.requires_grad != before for a, (b, before) in zip(self.all_weights(), self.weights)]
        p.extra_generation_params["Frozen"] = sum(changed)
