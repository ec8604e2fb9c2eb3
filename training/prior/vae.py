"""The autoencoder, full or TAESD, from a checkpoint, a VAE file in LDM or diffusers keys, or a diffusers folder."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from torch import Tensor, nn

from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import LazyStateDict, read_header
from .architecture import FAMILY_NAMES, Config, Family, Shapes
from .components import UNET_WEIGHTS, component, load_component, read_json

SCALING_FACTOR: dict[Family, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
LATENT_CHANNELS = 4

# What building a network of tensors that do not fit each other ends in.
_MISFITS = (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError)
_PREFIXES = ("first_stage_model.", "vae.", "")
_FIRST = "encoder.conv_in.weight"
_TAESD_FIRST = ("taesd_encoder.0.weight", "taesd_decoder.1.weight")  # the latter is ComfyUI's mark of one
_TAESD_KEY = re.compile(r"taesd_(encoder|decoder)\.(\d+)\.(.+)")
_CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
_PART = re.compile(r"(encoder|decoder|(post_)?quant_conv)\.")
_BLOCK = re.compile(r"encoder\.(?:down\.(\d+)\.block|down_blocks\.(\d+)\.resnets)\.(\d+)\.conv1\.weight")
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class TinyAutoencoder(nn.Module):
    """A TAESD (github.com/madebyollin/taesd) seen like any other autoencoder; what it encodes has no spread.

    latent = encoder(picture) / vae_scale + vae_shift          picture = decoder((latent - vae_shift) vae_scale)

    ComfyUI keeps `vae_scale` in the file, so that its latents are on the scale of the full VAE's: 0.18215 where the
    tiny encoder was made for what SD1.x's UNet sees. diffusers keeps no such factor and calls the scaling factor 1; the
    UNet sees the same latents either way.
    """

    def __init__(
        self, tiny: AutoencoderTiny, scaling_factor: float, vae_scale: float = 1.0, vae_shift: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder = _ScaledEncoder(tiny.encoder, vae_scale, vae_shift)
        self.decoder = tiny.decoder
        self.config = FrozenDict({"latent_channels": tiny.config.latent_channels, "scaling_factor": scaling_factor})

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.encoder.vae_scale.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.encoder.vae_scale.device

    def encode(self, pictures: Tensor) -> SimpleNamespace:
        """Return the latents of pictures (B, 3, H, W) in [-1, 1] as diffusers' AutoencoderKL does, with spread 0."""
        mean = self.encoder(pictures)
        moments = torch.cat((mean, torch.zeros_like(mean)), dim=1)
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(moments, deterministic=True))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Return pictures, (B, 3, H, W) in [-1, 1]."""
        encoder = self.encoder
        return DecoderOutput(sample=self.decoder((latents - encoder.vae_shift) * encoder.vae_scale))


class _ScaledEncoder(nn.Module):
    """The encoder with the scale of its latents, which are then a part of its state and of its fingerprint."""

    vae_scale: Tensor
    vae_shift: Tensor

    def __init__(self, encoder: nn.Module, vae_scale: float, vae_shift: float) -> None:
        super().__init__()
        self.tiny = encoder
        self.register_buffer("vae_scale", torch.tensor(vae_scale))
        self.register_buffer("vae_shift", torch.tensor(vae_shift))

    def forward(self, pictures: Tensor) -> Tensor:
        latents: Tensor = self.tiny(pictures) / self.vae_scale + self.vae_shift
        return latents


Autoencoder: TypeAlias = AutoencoderKL | TinyAutoencoder


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
    for marks, read in (((_FIRST,), _full), (_TAESD_FIRST, _tiny)):
        for prefix in _PREFIXES:
            if all(prefix + mark in shapes for mark in marks):
                try:
                    return read(LazyStateDict(path), shapes, prefix, SCALING_FACTOR[family])
                except GuidanceError:
                    raise
                except _MISFITS as error:
                    raise _another_kind(source) from error
    raise GuidanceError(_no_vae(shapes, source))


def _full(lazy: LazyStateDict, shapes: Shapes, prefix: str, scaling_factor: float) -> AutoencoderKL:
    bare = {key.removeprefix(prefix): key for key in shapes if key.startswith(prefix)}
    bare = {name: key for name, key in bare.items() if _PART.match(name)}
    config = _full_config({name: shapes[key] for name, key in bare.items()}, scaling_factor)
    weights = {_renamed(name): lazy[key].to(torch.float32, copy=True) for name, key in bare.items()}
    with tempfile.TemporaryDirectory() as folder:  # a local config, or diffusers would look one up by guessing
        with torch.device("meta"):
            AutoencoderKL.from_config(config).save_config(folder)
        vae: AutoencoderKL = AutoencoderKL.from_single_file(weights, config=folder, local_files_only=True)
    missing = [name for name, tensor in vae.state_dict().items() if tensor.is_meta]
    if missing:
        raise KeyError(missing[0])
    return vae


def _full_config(shapes: Shapes, scaling_factor: float) -> Config:
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
        "scaling_factor": scaling_factor,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _renamed(name: str) -> str:
    """Return today's name of an attention tensor of early diffusers files."""
    for old, new in _OLD_ATTENTION.items():
        if "mid_block.attentions" in name:
            name = name.replace(old, new)
    return name


def _tiny(lazy: LazyStateDict, shapes: Shapes, prefix: str, scaling_factor: float) -> TinyAutoencoder:
    """Read a TAESD in ComfyUI's keys; diffusers does not count the clamp before the decoder."""
    weights = {}
    for key in shapes:
        if key.startswith(prefix) and (match := _TAESD_KEY.fullmatch(key.removeprefix(prefix))):
            number = int(match[2]) - (match[1] == "decoder")
            weights[f"{match[1]}.layers.{number}.{match[3]}"] = lazy[key].to(torch.float32, copy=True)
    encoder, decoder = (shapes[prefix + mark][0] for mark in _TAESD_FIRST)  # 64 in every published file
    with torch.device("meta"):
        tiny = AutoencoderTiny(
            latent_channels=shapes[prefix + _TAESD_FIRST[1]][1],
            encoder_block_out_channels=(encoder,) * 4,
            decoder_block_out_channels=(decoder,) * 4,
        )
    tiny.load_state_dict(weights, assign=True)
    # ComfyUI's defaults where a file states none.
    stated = {name: float(lazy[prefix + name]) for name in ("vae_scale", "vae_shift") if prefix + name in shapes}
    return TinyAutoencoder(tiny, scaling_factor, **stated)


def _from_folder(path: Path, source: str) -> Autoencoder:
    folder = component(path, "vae", tuple(_CLASSES), source)
    name = read_json(folder / "config.json", source)["_class_name"]
    vae, missing = load_component(_CLASSES[name], folder, UNET_WEIGHTS, source, lambda _: _another_kind(source))
    if missing:
        raise GuidanceError(f"{source} lacks weights of its VAE, first {missing[0]!r}; download the folder again.")
    found: Autoencoder = TinyAutoencoder(vae, vae.config.scaling_factor) if isinstance(vae, AutoencoderTiny) else vae
    return found


def _no_vae(keys: Shapes, source: str) -> str:
    if "encoder.layers.0.weight" in keys:
        return (
            f"{source} holds the weights of a diffusers AutoencoderTiny (TAESD) without its config.json; "
            "set model.vae to the folder that holds both."
        )
    if any("taesd" in key for key in keys) or "1.conv.0.weight" in keys:
        return (
            f"{source} holds half a TAESD: expected its encoder and decoder in one file, {_TAESD_FIRST[0]!r} and "
            f"{_TAESD_FIRST[1]!r}; set model.vae to such a file or to a diffusers folder."
        )
    return (
        f"{source} holds no VAE: expected '{_FIRST}', bare or below 'first_stage_model.'; "
        "set model.vae to a VAE file or a diffusers folder of the same family."
    )


def _another_kind(source: str) -> GuidanceError:
    return GuidanceError(
        f"{source} holds a VAE of another kind, expected one of SD1.x, SD2.x or SDXL; set model.vae to such a one."
    )
