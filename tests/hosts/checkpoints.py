"""Tiny random-weight checkpoints that a real WebUI can load, one per kind of model it knows.

Called from the tests, :func:`make_checkpoints` runs this same file with the WebUI's own Python, because only
that environment holds the model classes. The weights are random but not arbitrary:

* an ε model answers ``x / rms(x)`` plus a random network's output, so sampling stays bounded and the picture
  is made by the network; a v model answers the random network alone;
* the text changes the output by a set share of its norm;
* the autoencoder maps unit-variance latents to pictures of full contrast, and back, without chance.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TEXT_WIDTH = 64
TEXT_SHARE = 0.06
"""How far two prompts' outputs lie apart, in units of the output's norm."""
NETWORK_SHARE = 0.2
"""Standard deviation of the network's part of an ε model's output."""

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "sd1": {"seed": 1},
    "sd1-b": {"seed": 2},
    # A v model's output holds no noise to compare with, so the text takes a larger share.
    "sd2-v": {"seed": 3, "parameterization": "v", "text_share": 0.2},
    "sd1-inpainting": {"seed": 4, "in_channels": 9},
    "sdxl": {"seed": 5, "sdxl": True},
}
WIDE: dict[str, dict[str, Any]] = {
    "sd1-wide": {"seed": 6, "parameterization": "v", "text_share": 0.2, "wide": True},
}
"""The U-Net has SD 1's own widths, which some extensions insist on (3.4 GB in memory); made only where it is named."""


def make_checkpoints(folder: Path, webui_dir: Path, python: Path, names: tuple[str, ...] = ()) -> dict[str, Path]:
    """Build those of the named checkpoints (default: all) that ``folder`` lacks; return all their files."""
    folder = Path(folder).absolute()
    names = tuple(names) or tuple(CHECKPOINTS)
    files = {name: folder / f"{name}.safetensors" for name in names}
    missing = [name for name, file in files.items() if not file.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        env.pop("PYTHONPATH", None)
        done = subprocess.run(
            [str(python), str(Path(__file__).resolve()), str(webui_dir), str(folder), *missing],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"building {', '.join(missing)} failed:\n{done.stdout[-6000:]}")
    return files


def config(name: str, clip: Path) -> dict[str, Any]:
    """The model's configuration, as the host's loader expects it beside the weights."""
    kind = {**CHECKPOINTS, **WIDE}[name]
    in_channels = kind.get("in_channels", 4)
    unet: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": 4,
        # Two channels a group in GroupNorm32: what _pass_input_through needs.
        "model_channels": 64,
        "attention_resolutions": [1, 2],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": TEXT_WIDTH,
        "use_checkpoint": False,
        "legacy": False,
    }
    autoencoder = {
        "embed_dim": 4,
        "monitor": "val/rec_loss",
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 64,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    text = {"version": str(clip), "device": "cpu"}
    if kind.get("sdxl"):
        unet.update(
            num_head_channels=32,
            num_classes="sequential",
            adm_in_channels=6 * 32,
            use_linear_in_transformer=True,
            spatial_transformer_attn_type="softmax",
        )
        sgm = "sgm.modules.diffusionmodules"
        sizes = [
            {
                "is_trainable": False,
                "input_key": key,
                "params": {"outdim": 32},
                "target": "sgm.modules.encoders.modules.ConcatTimestepEmbedderND",
            }
            for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
        ]
        embedder = {
            "is_trainable": False,
            "input_key": "txt",
            "target": "sgm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {**text, "layer": "hidden", "layer_idx": 1},
        }
        params: dict[str, Any] = {
            "scale_factor": 0.13025,
            "disable_first_stage_autocast": True,
            "denoiser_config": {
                "target": f"{sgm}.denoiser.DiscreteDenoiser",
                "params": {
                    "num_idx": 1000,
                    "weighting_config": {"target": f"{sgm}.denoiser_weighting.EpsWeighting"},
                    "scaling_config": {"target": f"{sgm}.denoiser_scaling.EpsScaling"},
                    "discretization_config": {"target": f"{sgm}.discretizer.LegacyDDPMDiscretization"},
                },
            },
            "network_config": {"target": f"{sgm}.openaimodel.UNetModel", "params": unet},
            "conditioner_config": {
                "target": "sgm.modules.GeneralConditioner",
                "params": {"emb_models": [embedder, *sizes]},
            },
            "first_stage_config": {
                "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
                "params": autoencoder,
            },
        }
        return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}}

    unet.update(image_size=32, num_heads=2)
    if kind.get("wide"):
        unet.update(
            model_channels=320,
            attention_resolutions=[4, 2, 1],
            num_res_blocks=2,
            channel_mult=[1, 2, 4, 4],
            num_heads=8,
        )
    params = {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": 1000,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": 64,
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": 0.18215,
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": autoencoder},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": text},
    }
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    if "parameterization" in kind:
        params["parameterization"] = kind["parameterization"]
    if in_channels == 9:
        target = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
        params.update(conditioning_key="hybrid", finetune_keys=None)
    return {"model": {"target": target, "params": params}}


# From here on: run with the WebUI's Python.


def write_clip(folder: Path) -> Path:
    """A folder that transformers' CLIPTokenizer and CLIPTextModel accept as a name: vocabulary and sizes."""
    import open_clip

    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from lib_memnoise.lab.miniature.clip import clip_files

    sizes = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in clip_files(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", sizes).items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def _prepare_imports(webui_dir: Path) -> None:
    """Make ldm and sgm importable without the WebUI around them."""
    from types import ModuleType

    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [p for p in sys.path if p != here]
    repositories = webui_dir / "repositories"
    sys.path += [str(repositories / "stable-diffusion-stability-ai"), str(repositories / "generative-models")]

    import pytorch_lightning.utilities.rank_zero as rank_zero

    sys.modules.setdefault("pytorch_lightning.utilities.distributed", rank_zero)
    # Training-only imports of sgm whose dependencies the WebUI does not install.
    unused = {"taming.modules.losses.lpips": "LPIPS", "sgm.data": "StableDataModuleFromConfig"}
    for module, attribute in unused.items():
        stub = ModuleType(module)
        setattr(stub, attribute, None)
        sys.modules[module] = stub

    from transformers import CLIPTextConfig, CLIPTextModel

    CLIPTextModel.from_pretrained = classmethod(lambda cls, path: cls(CLIPTextConfig.from_pretrained(path)))


def _instantiate(spec: dict[str, Any]) -> Any:
    from importlib import import_module

    from omegaconf import OmegaConf

    module, name = spec["target"].rsplit(".", 1)
    return getattr(import_module(module), name)(**OmegaConf.create(copy.deepcopy(spec["params"])))


def _randomise(module: Any) -> None:
    """Fresh variance-preserving weights for every layer, those that the authors start at zero included."""
    import torch

    for name, layer in module.named_modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            fan_in = layer.weight[0].numel()
            # Attention to the text must be sharp: an even average over 77 tokens hardly knows the prompt.
            gain = 2.0 if name.endswith(("attn2.to_q", "attn2.to_k")) else 1.0
            torch.nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
            if layer.bias is not None:
                torch.nn.init.normal_(layer.bias, std=0.1)
        elif isinstance(layer, torch.nn.Embedding):
            torch.nn.init.normal_(layer.weight, std=0.7)
        elif isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(layer.weight)
            # Emphasis in prompts divides by the mean of the text's embedding: it must be far from zero.
            torch.nn.init.normal_(layer.bias, mean=0.3 if name.endswith("final_layer_norm") else 0.0, std=0.1)


def _pass_input_through(unet: Any, gain: float) -> None:
    """Make the U-Net answer ``gain * x / rms(x)`` besides what its random layers answer.

    The first convolution writes (x, -x) into channel pairs; the last block's skip connection hands them on
    untouched. Each pair is one group of the last GroupNorm, so that it divides by the root mean square, and
    silu(a) - silu(-a) = a undoes the nonlinearity.
    """
    first, last, (norm, _, out) = unet.input_blocks[0][0], unet.output_blocks[-1], unet.out
    block = last[0]
    pairs = slice(0, 8)
    for layer in (first, block.skip_connection, block.out_layers[-1], *(part.proj_out for part in last[1:])):
        layer.weight[pairs] = 0
        layer.bias[pairs] = 0
    norm.bias[pairs] = 0
    out.weight[:, pairs] = 0
    skipped = block.skip_connection.weight.shape[1] - first.weight.shape[0]
    for channel in range(8):
        sign = 1 - 2 * (channel % 2)
        first.weight[channel, channel // 2, 1, 1] = sign
        block.skip_connection.weight[channel, skipped + channel, 0, 0] = 1
        out.weight[channel // 2, channel, 1, 1] = sign * gain


def _calibrate_unet(
    unet: Any, evaluate: Any, texts: tuple[Any, Any], x: Any, target_std: float, target_share: float
) -> float:
    """Scale the text's and the network's part of the output to the shares wanted; return the text's share."""
    import torch

    out = unet.out[2]
    network = out.weight[:, 8:].clone()
    out.bias.zero_()
    gates = [m.attn2.to_out[0] for m in unet.modules() if hasattr(m, "attn2")]
    original = [gate.weight.clone() for gate in gates]

    def share(gate_gain: float) -> float:
        for gate, weight in zip(gates, original, strict=True):
            gate.weight.copy_(weight * gate_gain)
        out.weight[:, 8:] = 0
        through = evaluate(x, texts[0])
        out.weight[:, 8:] = network
        # Twice, as the text's part grows with the gate: the network's part keeps its size throughout.
        out.weight[:, 8:] *= target_std / (evaluate(x, texts[0]) - through).std()
        a, b = evaluate(x, texts[0]), evaluate(x, texts[1])
        return float((a - b).norm() / a.norm())

    low, high = -3.0, 5.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if share(math.exp(middle)) < target_share else (low, middle)
    result = share(math.exp((low + high) / 2))
    assert torch.isfinite(evaluate(x, texts[0])).all()
    return result


def _calibrate_autoencoder(autoencoder: Any, scale_factor: float) -> None:
    import torch

    latent = torch.randn(4, 4, 16, 16) / scale_factor
    last = autoencoder.decoder.conv_out
    picture = autoencoder.decode(latent)
    last.weight /= picture.std() / 0.5
    last.bias.zero_()
    last.bias -= autoencoder.decode(latent).mean((0, 2, 3))

    quant = autoencoder.quant_conv
    image = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8) * 2 - 1, scale_factor=16, mode="bicubic")
    # Encoding draws from a normal distribution: a tiny variance makes it repeatable.
    quant.weight[4:] = 0
    quant.bias[4:] = -20
    mean = quant(autoencoder.encoder(image))[:, :4]
    quant.weight[:4] /= mean.std() * scale_factor
    quant.bias[:4] = 0


def build(name: str, folder: Path, clip: Path) -> str:
    """Write one checkpoint; return a line about it."""
    import torch
    from safetensors.torch import save_file

    kind = {**CHECKPOINTS, **WIDE}[name]
    spec = config(name, clip)
    torch.manual_seed(kind["seed"])
    model = _instantiate(spec["model"]).eval()
    scale_factor = spec["model"]["params"]["scale_factor"]
    sdxl = bool(kind.get("sdxl"))
    unet = model.model.diffusion_model
    text_model = model.conditioner.embedders[0] if sdxl else model.cond_stage_model

    with torch.no_grad():
        for part in (unet, model.first_stage_model, text_model):
            _randomise(part)
        is_v = kind.get("parameterization") == "v"
        _pass_input_through(unet, 0.0 if is_v else 1.0)
        _calibrate_autoencoder(model.first_stage_model, scale_factor)

        side = 8 if kind.get("wide") else 16
        x = torch.randn(4, 4, side, side)
        t = torch.tensor([981, 661, 341, 21])

        def condition(prompt: str) -> dict[str, Any]:
            if not sdxl:
                cond = {"c_crossattn": [model.get_learned_conditioning([prompt] * 4)]}
                if kind.get("in_channels") == 9:
                    cond["c_concat"] = [torch.cat([torch.ones(4, 1, side, side), torch.zeros(4, 4, side, side)], 1)]
                return cond
            size = torch.tensor([[128.0, 128.0]] * 4)
            return model.conditioner(
                {
                    "txt": [prompt] * 4,
                    "original_size_as_tuple": size,
                    "crop_coords_top_left": size * 0,
                    "target_size_as_tuple": size,
                }
            )

        def evaluate(x: Any, cond: dict[str, Any]) -> Any:
            return model.model(x, t, cond) if sdxl else model.model(x, t, **cond)

        texts = (condition("a photograph of a cat in the garden"), condition(""))
        share = _calibrate_unet(
            unet, evaluate, texts, x, 0.7 if is_v else NETWORK_SHARE, kind.get("text_share", TEXT_SHARE)
        )
        output = evaluate(x, texts[0])
        line = (
            f"{name}: output std {output.std():.3f}, text's share {share:.3f}, "
            f"cosine with x {torch.cosine_similarity(output.flatten(), x.flatten(), 0):.3f}"
        )

    file = folder / f"{name}.safetensors"
    partial = folder / f".{name}.partial"
    dtype = torch.float16 if kind.get("wide") else torch.float32
    weights = {
        key: v.detach().to(dtype if v.is_floating_point() else v.dtype, copy=True).contiguous()
        for key, v in model.state_dict().items()
    }
    save_file(weights, partial)
    # JSON is YAML; and the weights come last, since a file that exists counts as complete.
    file.with_suffix(".yaml").write_text(json.dumps(spec, indent=1), encoding="utf-8")
    partial.replace(file)
    return line + f", {file.stat().st_size / 1e6:.1f} MB"


def main(webui_dir: str, folder: str, *names: str) -> None:
    _prepare_imports(Path(webui_dir).absolute())
    target = Path(folder).absolute()
    clip = write_clip(target / "clip")
    for name in names or CHECKPOINTS:
        print(build(name, target, clip), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
