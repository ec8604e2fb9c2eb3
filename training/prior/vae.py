"""The autoencoder, full or TAESD, from a checkpoint, a VAE file in LDM or diffusers keys, or a diffusers folder."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import LazyStateDict, read_header
from .architecture import FAMILY_NAMES, Config, Family, Shapes
from .components import TAESD_FIRST, UNET_WEIGHTS, component, read_json, weight_files

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from .taesd import TinyAutoencoder

    Autoencoder: TypeAlias = AutoencoderKL | TinyAutoencoder

SCALING_FACTOR: dict[Family, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
LATENT_CHANNELS = 4

# What building a network of tensors that do not fit each other ends in.
_MISFITS = (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError)
_PREFIXES = ("first_stage_model.", "vae.", "")
_FIRST = "encoder.conv_in.weight"
_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
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


def load_vae(path: Path, family: Family, source: str) -> Autoencoder:
    """Load the autoencoder in float32, in evaluation mode and without gradients.

    Args:
        path: a checkpoint, a VAE file or a diffusers folder.
        family: the prior's; it decides the scaling factor where the file does not say (a folder does).
        source: start of every error: "model.vae 'path'".

    Raises: GuidanceError: if there is none, or one of another kind (a video or 16-channel VAE).
    """
    vae = _from_folder(path, source) if os.path.isdir(path) else _from_file(path, family, source)
    channels = vae.config.latent_channels
    if channels != LATENT_CHANNELS:
        raise GuidanceError(
            f"{source} makes latents of {channels} channels, expected {LATENT_CHANNELS}; "
            f"use the VAE of an {FAMILY_NAMES[family]} model."
        )
    return vae.eval().requires_grad_(False)


def _from_file(path: Path, family: Family, source: str) -> Autoencoder:
    shapes = read_header(path, source).shapes
    for marks, read in (((_FIRST,), _full_from_file), (TAESD_FIRST, _tiny_from_file)):
        for prefix in _PREFIXES:
            if all(prefix + mark in shapes for mark in marks):
                try:
                    return read(LazyStateDict(path), shapes, prefix, family)
                except GuidanceError:
                    raise
                except _MISFITS as error:
                    raise _another_kind(source) from error
    raise GuidanceError(_no_vae(shapes, source))


def _full_from_file(lazy: LazyStateDict, shapes: Shapes, prefix: str, family: Family) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    bare = {key.removeprefix(prefix): key for key in shapes if key.startswith(prefix)}
    bare = {name: key for name, key in bare.items() if re.match(r"(encoder|decoder|(post_)?quant_conv)\.", name)}
    config = vae_config({name: shapes[key] for name, key in bare.items()}, family)
    config |= {
        "use_quant_conv": "quant_conv.weight" in bare,
        "use_post_quant_conv": "post_quant_conv.weight" in bare,
    }
    weights = {_renamed(name): lazy[key].to(torch.float32, copy=True) for name, key in bare.items()}
    with tempfile.TemporaryDirectory() as folder:  # a local config, or diffusers would look one up by guessing
        with torch.device("meta"):
            AutoencoderKL.from_config(config).save_config(folder)
        vae: AutoencoderKL = AutoencoderKL.from_single_file(weights, config=folder, local_files_only=True)
    missing = [name for name, tensor in vae.state_dict().items() if tensor.is_meta]
    if missing:
        raise KeyError(missing[0])
    return vae


def _tiny_from_file(lazy: LazyStateDict, shapes: Shapes, prefix: str, family: Family) -> TinyAutoencoder:
    from .taesd import from_file

    return from_file(lazy, shapes, prefix, SCALING_FACTOR[family])


def _from_folder(path: Path, source: str) -> Autoencoder:
    import diffusers

    folder = component(path, "vae", _CLASSES, source)
    variant, _ = weight_files(folder, UNET_WEIGHTS, source)
    name = read_json(folder / "config.json", source)["_class_name"]
    try:
        vae, info = getattr(diffusers, name).from_pretrained(
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
    if name == "AutoencoderTiny":
        from .taesd import TinyAutoencoder

        return TinyAutoencoder(vae, vae.config.scaling_factor)
    loaded: AutoencoderKL = vae
    return loaded


def _renamed(name: str) -> str:
    """Return today's name of an attention tensor of early diffusers files."""
    for old, new in _OLD_ATTENTION.items():
        if "mid_block.attentions" in name:
            name = name.replace(old, new)
    return name


def _no_vae(keys: Shapes, source: str) -> str:
    if "encoder.layers.0.weight" in keys:
        return (
            f"{source} holds the weights of a diffusers AutoencoderTiny (TAESD) without its config.json; "
            "set model.vae to the folder that holds both."
        )
    if any("taesd" in key for key in keys) or "1.conv.0.weight" in keys:
        return (
            f"{source} holds half a TAESD: expected its encoder and decoder in one file, {TAESD_FIRST[0]!r} and "
            f"{TAESD_FIRST[1]!r}; set model.vae to such a file or to a diffusers folder."
        )
    return (
        f"{source} holds no VAE: expected '{_FIRST}', bare or below 'first_stage_model.'; "
        "set model.vae to a VAE file or a diffusers folder of the same family."
    )


def _another_kind(source: str) -> GuidanceError:
    return GuidanceError(
        f"{source} holds a VAE of another kind, expected one of SD1.x, SD2.x or SDXL; set model.vae to such a one."
    )
