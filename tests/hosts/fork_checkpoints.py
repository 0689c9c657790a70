"""Checkpoints with random weights that Forge and reForge load, one per kind of model.

    <reForge's or AUTOMATIC1111's python> fork_checkpoints.py WEBUI_DIR FOLDER [NAME ...]

WEBUI_DIR: a WebUI with `repositories/stable-diffusion-stability-ai`, which Forge has not; it loads the same files. Both
forks read the U-Net's depth and width multipliers from the weights' shapes, and then require a few fixed values (in
their lists of supported models). What they fix is fixed here; the rest is as small as it goes. Text encoder and
autoencoder are not read from shapes but built in full size; weights are stored in half precision.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.hosts import checkpoints

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "sd1": {"seed": 1},
    "sd1-b": {"seed": 2},
    # Both forks take the prediction type from the .yaml beside the weights.
    "sd2-v": {"seed": 3, "parameterization": "v", "text_share": 0.2},
    "sd1-inpainting": {"seed": 4, "in_channels": 9},
    # Matched as KOALA_700M, whose class is SDXL's with fewer transformers.
    "sdxl": {"seed": 5, "sdxl": True},
}
# Required by both: context_dim 768, model_channels 320, a 1x1 convolution as proj_in, no label_emb, no time_stack.
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [1, 2],
    "num_res_blocks": 1,
    "channel_mult": [1, 1],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 768,
    "use_checkpoint": False,
    "legacy": False,
}
# Required by both: context_dim 2048, model_channels 320, a linear proj_in, adm_in_channels 2816 and, on the way
# down, one of a few lists of transformer depths, of which [0, 2, 5] is the shortest.
UNET_XL = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [2, 4],
    "num_res_blocks": 1,
    "channel_mult": [1, 1, 1],
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "transformer_depth": [0, 2, 5],
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "spatial_transformer_attn_type": "softmax",
    "use_checkpoint": False,
    "legacy": False,
}
CLIP_G = {"width": 1280, "heads": 20, "layers": 32}
# The rest are zero: they hand their input on, and the file system stores no zeros.
CLIP_G_RANDOM_LAYERS = 2
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def make_checkpoints(folder: Path, webui_dir: Path, python: Path) -> None:
    """Build what the folder lacks; five to six minutes for all.

    Raises:
        RuntimeError: this WebUI has not what it takes, or building failed.
    """
    missing = [name for name in CHECKPOINTS if not (folder / f"{name}.safetensors").exists()]
    if not missing:
        return
    if not (webui_dir / "repositories" / "stable-diffusion-stability-ai").is_dir():
        raise RuntimeError(
            f"{webui_dir} cannot build checkpoints; build them with another WebUI's Python "
            f"(see {Path(__file__).name}) and name their folder in SD_WEBUI_CHECKPOINTS"
        )
    done = subprocess.run(
        [str(python), str(Path(__file__).resolve()), str(webui_dir), str(folder), *missing],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"building {', '.join(missing)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def config(name: str) -> dict[str, Any]:
    """What reForge reads as the model's configuration; Forge reads only `parameterization` from it."""
    spec = checkpoints.config("sd1" if CHECKPOINTS[name].get("sdxl") else name, Path())
    params = spec["model"]["params"]
    params["unet_config"]["params"] = {**UNET, "in_channels": CHECKPOINTS[name].get("in_channels", 4)}
    params["first_stage_config"]["params"]["ddconfig"] = DDCONFIG
    params["cond_stage_config"] = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    return spec


# Ten channels are one group of the last GroupNorm: the first four groups carry the input, a pair (x, -x) each.
GROUP = 10
CARRIED = 4 * GROUP


def _pass_input_through(unet: Any, gain: float) -> None:
    """As in `checkpoints`, for groups of ten channels of which eight are silent."""
    first, last, (norm, _, out) = unet.input_blocks[0][0], unet.output_blocks[-1], unet.out
    block = last[0]
    rows = slice(0, CARRIED)
    for layer in (first, block.skip_connection, block.out_layers[-1], *(part.proj_out for part in last[1:])):
        layer.weight[rows] = 0
        layer.bias[rows] = 0
    norm.bias[rows] = 0
    out.weight[:, rows] = 0
    skipped = block.skip_connection.weight.shape[1] - first.weight.shape[0]
    for latent in range(4):
        for offset, sign in ((0, 1), (1, -1)):
            channel = latent * GROUP + offset
            first.weight[channel, latent, 1, 1] = sign
            block.skip_connection.weight[channel, skipped + channel, 0, 0] = 1
            out.weight[latent, channel, 1, 1] = sign * gain / math.sqrt(GROUP / 2)


def _calibrate_unet(unet: Any, evaluate: Any, texts: tuple[Any, Any], std: float, share: float) -> float:
    """Scale the network's part of the output, and the text's, to the shares wanted; return the text's."""
    out = unet.out[2]
    network = out.weight[:, CARRIED:].clone()
    out.bias.zero_()
    gates = [m.attn2.to_out[0] for m in unet.modules() if hasattr(m, "attn2")]
    original = [gate.weight.clone() for gate in gates]

    def measure(gain: float) -> float:
        for gate, weight in zip(gates, original, strict=True):
            gate.weight.copy_(weight * gain)
        out.weight[:, CARRIED:] = 0
        through = evaluate(texts[0])
        out.weight[:, CARRIED:] = network
        out.weight[:, CARRIED:] *= std / (evaluate(texts[0]) - through).std()
        a, b = evaluate(texts[0]), evaluate(texts[1])
        return float((a - b).norm() / a.norm())

    low, high = -3.0, 5.0
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(math.exp(middle)) < share else (low, middle)
    return measure(math.exp((low + high) / 2))


def _clip_g() -> Any:
    import torch
    from open_clip.model import CLIP as OpenCLIP
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=1, width=64, patch_size=32, image_size=32)
    model = OpenCLIP(1280, vision, CLIPTextCfg(**CLIP_G), quick_gelu=False).eval()
    del model.visual
    checkpoints._randomise(model)
    model.token_embedding.weight += 0.3
    for layer in model.transformer.resblocks[CLIP_G_RANDOM_LAYERS:]:
        for weight in layer.parameters():
            torch.nn.init.zeros_(weight)
    return model


def _write(weights: dict[str, Any], file: Path) -> None:
    """Safetensors in half precision; blocks of zeros become holes."""
    from safetensors.torch import save_file

    partial, sparse = file.with_name(f".{file.stem}.partial"), file.with_name(f".{file.stem}.sparse")
    save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in weights.items()}, partial)
    with partial.open("rb") as source, sparse.open("wb") as target:
        while chunk := source.read(1 << 16):
            if chunk.count(0) == len(chunk):
                target.seek(len(chunk), os.SEEK_CUR)
            else:
                target.write(chunk)
        target.truncate()
    partial.unlink()
    sparse.replace(file)


def build(name: str, folder: Path) -> str:
    import open_clip
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    kind = CHECKPOINTS[name]
    sdxl = bool(kind.get("sdxl"))
    spec = config(name)
    params = spec["model"]["params"]
    scale = 0.13025 if sdxl else params["scale_factor"]
    torch.manual_seed(kind["seed"])
    with torch.no_grad():
        if sdxl:
            from sgm.modules.diffusionmodules.openaimodel import UNetModel

            unet = UNetModel(**UNET_XL).eval()
        else:
            from ldm.modules.diffusionmodules.openaimodel import UNetModel

            unet = UNetModel(**params["unet_config"]["params"]).eval()
        vae = checkpoints._instantiate(params["first_stage_config"]).eval()
        text = CLIPTextModel(CLIPTextConfig(**CLIP)).eval()
        for part in (unet, vae, text):
            checkpoints._randomise(part)
        text_g = None
        if sdxl:
            # SDXL takes the text before the final norm, which gives it the mean it needs elsewhere.
            text.text_model.embeddings.token_embedding.weight += 0.3
            text_g = _clip_g()
        is_v = kind.get("parameterization") == "v"
        _pass_input_through(unet, 0.0 if is_v else 1.0)
        checkpoints._calibrate_autoencoder(vae, scale)

        x = torch.randn(4, 4, 8, 8)
        t = torch.tensor([981, 661, 341, 21])
        if kind.get("in_channels") == 9:
            x = torch.cat([x, torch.ones(4, 1, 8, 8), torch.zeros(4, 4, 8, 8)], 1)

        def condition(prompt: str) -> dict[str, Any]:
            tokens = open_clip.tokenize([prompt])
            padded = tokens.clone()
            padded[:, int(tokens.argmax()) :] = 49407  # open_clip pads with 0, CLIP-L's tokenizer with the end token
            result = text(input_ids=padded, output_hidden_states=True)
            if text_g is None:
                return {"context": result.last_hidden_state.repeat(4, 1, 1)}
            from sgm.modules.diffusionmodules.util import timestep_embedding

            seen: list[Any] = []
            hook = text_g.transformer.resblocks[-2].register_forward_hook(lambda m, i, o: seen.append(o))
            pooled = text_g.encode_text(tokens)
            hook.remove()
            hidden = seen[0] if seen[0].shape[0] == 1 else seen[0].transpose(0, 1)
            sizes = timestep_embedding(torch.tensor([64, 64, 0, 0, 64, 64]), 256).reshape(1, -1)
            return {
                "context": torch.cat([result.hidden_states[-2], hidden], 2).repeat(4, 1, 1),
                "y": torch.cat([pooled, sizes], 1).repeat(4, 1),
            }

        def evaluate(text: dict[str, Any]) -> Any:
            return unet(x, t, **text)

        texts = (condition("a photograph of a cat in the garden"), condition(""))
        share = _calibrate_unet(
            unet,
            evaluate,
            texts,
            0.7 if is_v else checkpoints.NETWORK_SHARE,
            kind.get("text_share", checkpoints.TEXT_SHARE),
        )
        output = evaluate(texts[0])
        assert torch.isfinite(output).all()
        line = (
            f"{name}: output std {output.std():.3f}, text's share {share:.3f}, "
            f"cosine with x {torch.cosine_similarity(output.flatten(), x[:, :4].flatten(), 0):.3f}"
        )

    parts = {"model.diffusion_model.": unet, "first_stage_model.": vae}
    if sdxl:
        parts |= {"conditioner.embedders.0.transformer.": text, "conditioner.embedders.1.model.": text_g}
    else:
        parts["cond_stage_model.transformer."] = text
    weights = {prefix + key: v for prefix, part in parts.items() for key, v in part.state_dict().items()}
    counts = ", ".join(f"{p} {sum(v.numel() for v in m.state_dict().values()) / 1e6:.1f}M" for p, m in parts.items())
    file = folder / f"{name}.safetensors"
    if not sdxl:  # both recognise SDXL by its weights
        file.with_suffix(".yaml").write_text(json.dumps(spec, indent=1), encoding="utf-8")
    _write(weights, file)
    disk = file.stat().st_blocks * 512
    return f"{line}; {counts}; {file.stat().st_size / 1e6:.0f} MB, {disk / 1e6:.0f} MB on disk"


def main(webui_dir: str, folder: str, *names: str) -> None:
    checkpoints._prepare_imports(Path(webui_dir).absolute())
    target = Path(folder).absolute()
    target.mkdir(parents=True, exist_ok=True)
    for name in names or CHECKPOINTS:
        print(build(name, target), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
