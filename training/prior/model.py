"""The prior: the Stable Diffusion model that a run starts from, seen by the rest of the trainer as one small object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusers import UNet2DConditionModel
from torch import nn

from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import LazyStateDict, read_header
from .architecture import FAMILY_NAMES, Family, family_of, pooled_width
from .components import read_json
from .text_encoder import Conditions, encode_prompt, load_text_models
from .unet import UNetSource, find_unet, load_unet
from .vae import Autoencoder, load_vae

Prediction = Literal["eps", "v", "flow"]

_BY_NAME: dict[str, Prediction] = {
    "epsilon": "eps",
    "v": "v",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
# ComfyUI's rule for SD2.x: in v models this bias spreads wider than in eps models.
_SD2_MARK = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_SPREAD = 0.09


@dataclass(frozen=True)
class Prior:
    """A recognised prior, of which no weight is in memory yet.

    Attributes:
        path: the checkpoint or diffusers folder.
        unet: where its UNet is, with its configuration.
        prediction: what it predicts.
        zero_terminal_snr: whether its noise schedule ends at pure noise.
        section: of the config that names it, for errors.
    """

    path: Path
    unet: UNetSource
    prediction: Prediction
    zero_terminal_snr: bool
    section: str = "model"

    @property
    def family(self) -> Family:
        """SD1.x, SD2.x or SDXL, as 'sd1', 'sd2' or 'sdxl'."""
        return family_of(self.unet.config)

    @property
    def context_dim(self) -> int:
        """Width of the text embedding its UNet reads."""
        return int(self.unet.config["cross_attention_dim"])

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text vector its UNet reads (SDXL), 0 for none."""
        return pooled_width(self.unet.config)

    @property
    def fingerprint(self) -> str:
        """Name of the UNet's weights, see `fingerprint`."""
        return self.unet.fingerprint

    def load_unet(self) -> UNet2DConditionModel:
        """Read the UNet in float32, in evaluation mode."""
        return load_unet(self.unet)

    def load_vae(self, other: Path | None = None) -> Autoencoder:
        """Read the autoencoder, the prior's own or the one at `other`, in evaluation mode, without gradients."""
        return load_vae(other or self.path, self.family, self.source("vae", other))

    def encode_prompt(self, prompt: str, text_encoder: Path | None = None, tokenizer: Path | None = None) -> Conditions:
        """Encode a prompt with the prior's own text encoder, or the one at `text_encoder`; see `encode_prompt`.

        Raises: GuidanceError: also if the embedding is not of the widths that the UNet reads.
        """
        source = self.source("text_encoder", text_encoder)
        text = encode_prompt(text_encoder or self.path, self.family, prompt, source, tokenizer)
        self.refuse_other_widths(text, source)
        return text

    def refuse_other_widths(self, text: Conditions, source: str) -> None:
        """Check that an embedding is of the widths that the UNet reads.

        Raises: GuidanceError: if it is not; `source` is its start.
        """
        found = (text.context.shape[-1], 0 if text.pooled is None else text.pooled.shape[-1])
        if found != (self.context_dim, self.pooled_dim):
            raise GuidanceError(
                f"{source} gives text of the widths {found}, expected {(self.context_dim, self.pooled_dim)} for "
                f"the {FAMILY_NAMES[self.family]} prior {self.path.name!r}; use the text encoder of that prior."
            )

    def load_text_model(self, text_encoder: Path | None = None) -> nn.Module:
        """Read the one text encoder of SD1.x or SD2.x, the prior's own or the one at `text_encoder`.

        Raises: GuidanceError: if there is none, or the family has two.
        """
        source = self.source("text_encoder", text_encoder)
        models = load_text_models(text_encoder or self.path, self.family, source)
        if len(models) > 1:
            raise GuidanceError(
                f"{source} has two text encoders, expected the one of SD1.x or SD2.x to give a new word; "
                "use another method, or a prior of those families."
            )
        return models[0]

    def source(self, key: str, other: Path | None) -> str:
        """Return how the user knows the file of a part, the start of every error."""
        if other:
            return f"{self.section}.{key} {str(other)!r}"
        return f"{self.section}.checkpoint {str(self.path)!r}"


def open_prior(checkpoint: Path, section: str = "model") -> Prior:
    """Recognise a prior: a single-file checkpoint, a bare UNet file or a diffusers folder.

    Raises: GuidanceError: one sentence, naming the `checkpoint` of that section of the config.
    """
    source = f"{section}.checkpoint {str(checkpoint)!r}"
    unet = find_unet(checkpoint, source)
    prediction, zero_terminal_snr = _prediction(checkpoint, unet)
    return Prior(checkpoint, unet, prediction, zero_terminal_snr, section)


def _prediction(checkpoint: Path, unet: UNetSource) -> tuple[Prediction, bool]:
    """Return what the prior predicts, and whether its schedule has zero terminal SNR."""
    if os.path.isdir(checkpoint):
        path = checkpoint / "scheduler" / "scheduler_config.json"
        return _of_scheduler(read_json(path, unet.source), unet.source) if path.is_file() else ("eps", False)
    return _of_file(checkpoint, unet)


def _of_scheduler(config: Mapping[str, object], source: str) -> tuple[Prediction, bool]:
    if "FlowMatch" in str(config.get("_class_name")):
        return "flow", False
    name = str(config.get("prediction_type", "epsilon"))
    if name not in _BY_NAME:
        raise GuidanceError(f"{source} predicts {name!r}, expected 'epsilon', 'v_prediction' or 'flow_prediction'.")
    return _BY_NAME[name], bool(config.get("rescale_betas_zero_snr", False))


def _of_file(checkpoint: Path, unet: UNetSource) -> tuple[Prediction, bool]:
    header = read_header(checkpoint, unet.source)
    keys = header.shapes
    if any(key.startswith(("edm_mean", "edm_vpred.")) for key in keys):
        raise GuidanceError(f"{unet.source} was trained in the EDM way, expected an eps, v or flow model.")
    prediction = _BY_NAME.get(header.metadata.get("modelspec.prediction_type", ""))
    if "v_pred" in keys:
        prediction = "v"
    if prediction is None and family_of(unet.config) == "sd2" and _SD2_MARK in unet.keys:
        bias = LazyStateDict(checkpoint)[unet.keys[_SD2_MARK]].float()
        prediction = "v" if bias.std(unbiased=False) > _SD2_SPREAD else "eps"
    return prediction or "eps", "ztsnr" in keys
