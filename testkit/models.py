"""Small models in the real file layouts: the stock loaders take them, a CPU samples them in seconds.

They are untrained. Their weights are drawn so that a run behaves like a run: the UNet predicts unit-variance noise that
follows its input, the text visibly changes it, and the autoencoder's latents are the picture's own colours.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import layouts
from .layouts import CHANNELS, FAMILIES
from .sparse import write_with_holes

StateDict = dict[str, Tensor]

# SD1.5's latent -> RGB map, as every preview uses it; rows are latent channels.
LATENT_RGB = (
    (0.3512, 0.2297, 0.3227),
    (0.3250, 0.4974, 0.2350),
    (-0.2829, 0.1762, 0.2721),
    (-0.2120, -0.2616, -0.7177),
)
VAE_SCALE = 0.18215

# What GroupNorm takes off the input's own features on their way to the output (measured), to be given back.
FOLLOW = {"sd15": 2.1, "sd15-full": 2.1, "sd21": 2.1, "sdxl": 3.8, "sdxl-full": 3.8}

# Gain over 1/sqrt(fan_in) by the end of the name; what is not listed gets 1.
GAINS = {
    "attn2.to_q.weight": 1.5,  # sharp enough that pixels attend to different words
    "attn2.to_k.weight": 1.5,
    "attn2.to_v.weight": 2.0,
    "token_embedding.weight": 0.5 * math.sqrt(768),
    "position_embedding.weight": 0.1 * math.sqrt(768),
    "out_layers.3.weight": 0.7,
    "proj_out.weight": 0.7,
    "out_proj.weight": 0.7,
    "mlp.fc2.weight": 0.7,
}
_BLUR = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16


def _noise(seed: int, name: str, *shape: int) -> Tensor:
    """Standard normal values that depend on the seed and the tensor's name only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode())))


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if len(shape) < 2:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    gain = next((g for ending, g in GAINS.items() if name.endswith(ending)), 1.0)
    if shape[2:] == (3, 3):  # every convolution also blurs: the blocks then add soft shapes, not more noise
        return (_noise(seed, name, *shape[:2]) * gain / math.sqrt(shape[1]))[:, :, None, None] * (2 * _BLUR)
    return _noise(seed, name, *shape) * (gain / math.sqrt(math.prod(shape[1:])))


def _draw_all(shapes: layouts.Shapes, seed: int) -> StateDict:
    return {name: _draw(name, shape, seed) for name, shape in shapes.items()}


def _centre(matrix: Tensor) -> Tensor:
    """A 3x3 convolution that applies `matrix` (out, in) to every pixel."""
    kernel = torch.zeros(*matrix.shape, 3, 3)
    kernel[:, :, 1, 1] = matrix
    return kernel


def _follow_input(sd: StateDict, seed: int, gain: float) -> None:
    """Make the output x / std(x) plus what the blocks add, so that sampling neither explodes nor stalls.

    The first layer writes each feature with both signs, the last skip connection carries it to the end, and
    silu(z) - silu(-z) = z turns it back.
    """
    channels = len(sd["input_blocks.0.0.weight"])
    half = _noise(seed, "follow", channels // 2, 4) / 2
    pairs = torch.stack((half, -half), 1).reshape(channels, 4)
    sd["input_blocks.0.0.weight"] = _centre(pairs)
    last = max(int(name.split(".")[1]) for name in sd if name.startswith("output_blocks."))
    skip = sd[f"output_blocks.{last}.0.skip_connection.weight"]
    skip[:, :channels] *= 0.7
    skip[:, channels:] = torch.eye(channels)[:, :, None, None]
    inverse = torch.linalg.pinv(half)
    back = torch.stack((inverse, -inverse), 2).reshape(4, channels)
    added = 0.5 * _noise(seed, "added", 4, channels) / math.sqrt(channels)
    sd["out.2.weight"] = gain * _centre(back) + added[:, :, None, None] * _BLUR


def unet_state_dict(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, channels: int = CHANNELS
) -> StateDict:
    """Return a UNet in bare LDM keys that ComfyUI detects as `family`.

    Args:
        family: "sd15" (25.8 M parameters), "sd21" or "sdxl"; "sd15-full" (859.5 M) and "sdxl-full"
            (2,567.5 M) are not small.
        seed: one seed, one set of weights, on every machine.
        dtype: of the returned tensors.
        channels: of its first resolution, a multiple of 64; with others than 320 stock loaders do not know it.
    """
    # Rounded one by one, so that a model of 2.6 G parameters is never held in fp32; these are still changed below.
    rounded_late = ("input_blocks.0.0.weight", "skip_connection.weight", "out.2.weight")
    sd = {
        name: _draw(name, shape, seed).to(torch.float32 if name.endswith(rounded_late) else dtype)
        for name, shape in layouts.unet(replace(FAMILIES[family], model_channels=channels)).items()
    }
    _follow_input(sd, seed, FOLLOW[family])
    return to_dtype(sd, dtype)


def null_text_features(sd: Mapping[str, Tensor], null_text: Tensor) -> StateDict:
    """Return F_null = to_out(mean over tokens of to_v(null_text)), paper Eq. 5, by block name.

    Args:
        sd: UNet in bare LDM keys.
        null_text: embedding of the empty prompt, (1, tokens, context_dim).
    """
    out = {}
    for name in sd:
        if name.endswith(".attn2.to_v.weight"):
            block = name.removesuffix(".attn2.to_v.weight")
            v = (null_text[0].float() @ sd[name].float().T).mean(0)
            w, bias = sd[f"{block}.attn2.to_out.0.weight"], sd[f"{block}.attn2.to_out.0.bias"]
            out[block] = w.float() @ v + bias.float()
    return out


def controlnet_state_dict(seed: int = 0, channels: int = CHANNELS) -> StateDict:
    """Return a ControlNet (LDM keys) for the small SD1.x UNet of these channels; its output layers are not zero."""
    return _draw_all(layouts.controlnet(replace(FAMILIES["sd15"], model_channels=channels)), seed)


def lora_state_dict(unet: Mapping[str, Tensor], seed: int = 0, rank: int = 4, strength: float = 0.5) -> StateDict:
    """Return a LoRA on every attention projection, in the kohya format that the stock LoraLoader reads."""
    out: StateDict = {}
    for name, w in unet.items():
        if ".attn" not in name or w.ndim != 2:
            continue
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        scale = strength * w.float().std() * rank**-0.5
        out[f"{key}.lora_up.weight"] = _noise(seed, f"{name}.up", w.shape[0], rank) * scale
        out[f"{key}.lora_down.weight"] = _noise(seed, f"{name}.down", rank, w.shape[1])
        out[f"{key}.alpha"] = torch.tensor(float(rank))
    return out


def vae_state_dict(dtype: torch.dtype = torch.float32) -> StateDict:
    """Return a TAESD whose latent is a picture's averaged colour: encode, then decode gives the blurred picture back.

    All residual blocks are identities; features are kept non-negative because every block ends in a ReLU.
    """
    sd = {name: torch.zeros(shape) for name, shape in layouts.vae().items()}
    rgb = torch.tensor(LATENT_RGB).T / 2  # (3, 4): colour in [-1/2, 1/2] of a latent
    halve, smooth = torch.zeros(3, 3), _BLUR
    halve[1:, 1:] = 0.25
    both_signs = torch.cat((torch.eye(4), -torch.eye(4)))

    sd["vae_scale"].fill_(VAE_SCALE)
    sd["taesd_encoder.0.weight"][:3] = _centre(torch.eye(3))
    for i in (2, 6, 10):
        sd[f"taesd_encoder.{i}.weight"][:3, :3] = torch.eye(3)[:, :, None, None] * halve
    to_latent = torch.linalg.pinv(rgb)
    sd["taesd_encoder.14.weight"][:, :3] = _centre(to_latent)
    sd["taesd_encoder.14.bias"] = -to_latent.sum(1) / 2
    sd["taesd_decoder.1.weight"][:8] = _centre(both_signs)
    for i in (7, 12, 17):
        sd[f"taesd_decoder.{i}.weight"][:8, :8] = torch.eye(8)[:, :, None, None] * smooth
    sd["taesd_decoder.19.weight"][:, :8] = _centre(rgb @ both_signs.T)
    sd["taesd_decoder.19.bias"].fill_(0.5)
    return to_dtype(sd, dtype)


def clip_l_state_dict(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 12) -> StateDict:
    """Return a CLIP-L text encoder (Hugging Face keys, `text_model.` first).

    Args:
        seed: one seed, one set of weights.
        dtype: of the returned tensors.
        layers: of the transformer; loaders other than the trainer's want 12, see `with_all_layers`.
    """
    shapes = {name: shape for name, shape in layouts.clip_l().items() if _layer(name) < layers}
    return to_dtype(_draw_all(shapes, seed), dtype)


def with_all_layers(clip: Mapping[str, Tensor]) -> StateDict:
    """Return the text encoder with CLIP-L's 12 layers: those it lacks are zeros, and pass on what they get."""
    dtype = clip["text_model.final_layer_norm.weight"].dtype
    return {
        name: clip[name] if name in clip else torch.zeros(shape, dtype=dtype)
        for name, shape in layouts.clip_l().items()
    }


def full_taesd(vae: Mapping[str, Tensor]) -> StateDict:
    """Return a narrower TAESD with the 64 channels that loaders want, filled up with zeros: there is no norm in it."""
    return {
        name: torch.nn.functional.pad(
            vae[name],
            [n for want, have in zip(shape[::-1], vae[name].shape[::-1], strict=True) for n in (0, want - have)],
        )
        for name, shape in layouts.vae().items()
    }


def _layer(name: str) -> int:
    return int(name.split(".")[3]) if ".layers." in name else -1


def to_dtype(sd: Mapping[str, Tensor], dtype: torch.dtype) -> StateDict:
    """Return contiguous copies in `dtype`."""
    return {name: w.to(dtype).contiguous() for name, w in sd.items()}


def save_checkpoint(
    path: Path,
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor] | None = None,
    clip: Mapping[str, Tensor] | None = None,
    clip_g: bool = False,
) -> None:
    """Write an LDM-keyed single-file checkpoint.

    Args:
        path: a `.safetensors` file.
        unet: bare LDM keys; written under `model.diffusion_model.`.
        vae: written under `first_stage_model.`.
        clip: CLIP-L, written where SD1.x has it, or where SDXL has it when `clip_g` is set.
        clip_g: add SDXL's second text encoder as zeros, stored as a hole in the file (1.4 GB that take no disk).
    """
    clip_prefix = "conditioner.embedders.0.transformer." if clip_g else "cond_stage_model.transformer."
    parts = (("model.diffusion_model.", unet), ("first_stage_model.", vae or {}), (clip_prefix, clip or {}))
    sd = {prefix + name: w for prefix, part in parts for name, w in part.items()}
    if clip_g:
        holes = {f"conditioner.embedders.1.model.{name}": shape for name, shape in layouts.clip_g().items()}
        write_with_holes(path, sd, holes)
    else:
        save_file(sd, path)
