"""The autoencoder from a checkpoint, a VAE file in LDM or diffusers keys, or a diffusers folder."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import LazyStateDict, read_header
from .architecture import FAMILY_NAMES, Config, Family, Shapes
from .components import UNET_WEIGHTS, component, weight_files

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SCALING_FACTOR: dict[Family, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
LATENT_CHANNELS = 4

_PREFIXES = ("first_stage_model.", "vae.", "")
_FIRST = "encoder.conv_in.weight"
_BLOCK = re.compile(r"encoder\.(?:down\.(\d+)\.block|down_blocks\.(\d+)\.resnets)\.(\d+)\.conv1\.weight")
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def vae_config(shapes: Shapes, family: Family) -> Config:
    """Return the AutoencoderKL configuration of a VAE in bare LDM or diffusers keys."""
    widths: dict[int, int] = {}
    layers = 0
    for key, shape in shapes.items():
        if match := _BLOCK.match(key):
            widths[int(match[1] or match[2])] = shape[0]
            layers = max(layers, int(match[3]) + 1)
    return {
        "in_channels": shapes[_FIRST][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": [widths[level] for level in sorted(widths)],
        "layers_per_block": layers,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "scaling_factor": SCALING_FACTOR[family],
    }


def load_vae(path: Path, family: Family, source: str) -> AutoencoderKL:
    """Load the autoencoder in float32, in evaluation mode and without gradients.

    Args:
        path: a checkpoint, a VAE file or a diffusers folder.
        family: the prior's; it decides the scaling factor where the file does not say (a folder does).
        source: start of every error: "model.vae 'path'".

    Raises: GuidanceError: if there is none, or one of another kind (TAESD, a video or 16-channel VAE).
    """
    vae = _from_folder(path, source) if path.is_dir() else _from_file(path, family, source)
    channels = vae.config.latent_channels
    if channels != LATENT_CHANNELS:
        raise GuidanceError(
            f"{source} makes latents of {channels} channels, expected {LATENT_CHANNELS}; "
            f"use the VAE of an {FAMILY_NAMES[family]} model."
        )
    return vae.eval().requires_grad_(False)


def _from_file(path: Path, family: Family, source: str) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    shapes = read_header(path, source).shapes
    prefix = next((prefix for prefix in _PREFIXES if prefix + _FIRST in shapes), None)
    if prefix is None:
        raise GuidanceError(_no_vae(shapes, source))
    bare = {key.removeprefix(prefix): key for key in shapes if key.startswith(prefix)}
    bare = {name: key for name, key in bare.items() if re.match(r"(encoder|decoder|(post_)?quant_conv)\.", name)}
    try:
        config = vae_config({name: shapes[key] for name, key in bare.items()}, family)
        config |= {
            "use_quant_conv": "quant_conv.weight" in bare,
            "use_post_quant_conv": "post_quant_conv.weight" in bare,
        }
        lazy = LazyStateDict(path)
        weights = {_renamed(name): lazy[key].to(torch.float32, copy=True) for name, key in bare.items()}
        with tempfile.TemporaryDirectory() as folder:  # a local config, or diffusers would look one up by guessing
            with torch.device("meta"):
                AutoencoderKL.from_config(config).save_config(folder)
            vae: AutoencoderKL = AutoencoderKL.from_single_file(weights, config=folder, local_files_only=True)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise _another_kind(source) from error
    if any(tensor.is_meta for tensor in vae.state_dict().values()):
        raise _another_kind(source)
    return vae


def _from_folder(path: Path, source: str) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    folder = component(path, "vae", "AutoencoderKL", source)
    variant, _ = weight_files(folder, UNET_WEIGHTS, source)
    try:
        vae, info = AutoencoderKL.from_pretrained(
            str(folder),
            variant=variant,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _another_kind(source) from error
    if info["missing_keys"]:
        raise GuidanceError(
            f"{source} lacks weights of its VAE, first {info['missing_keys'][0]!r}; download the folder again."
        )
    loaded: AutoencoderKL = vae
    return loaded


def _renamed(name: str) -> str:
    """Return today's name of an attention tensor of early diffusers files."""
    for old, new in _OLD_ATTENTION.items():
        if "mid_block.attentions" in name:
            name = name.replace(old, new)
    return name


def _no_vae(keys: Shapes, source: str) -> str:
    if any("taesd" in key for key in keys) or "encoder.layers.0.weight" in keys:
        return f"{source} holds a TAESD, a preview VAE; set model.vae to the full VAE of the same family."
    return (
        f"{source} holds no VAE: expected '{_FIRST}', bare or below 'first_stage_model.'; "
        "set model.vae to a VAE file or a diffusers folder of the same family."
    )


def _another_kind(source: str) -> GuidanceError:
    return GuidanceError(
        f"{source} holds a VAE of another kind, expected one of SD1.x, SD2.x or SDXL; set model.vae to such a one."
    )
