"""The small world on disk: pictures, autoencoder, prior, ControlNet and classifier, each made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..evaluation.metrics.canny import edges
from ..gcfg.unet_keys import diffusers_to_ldm
from ..testkit.models import save_checkpoint
from ..training.files import whole_file, whole_folder
from ..training.prior.model import open_prior
from . import text
from .autoencoder import as_tensor, encode, train_autoencoder
from .classifier import train_classifier
from .prior import train_controlnet, train_prior
from .scans import read_scans, write_scans
from .scenes import draw_world
from .settings import World as Settings

AUTOENCODER, PRIOR, CONTROLNET = "autoencoder.safetensors", "prior.safetensors", "controlnet.safetensors"
CLASSIFIER, SCANS, TOKENIZER = "classifier.safetensors", "scans", "tokenizer"
_SEED = 1
_EMPTY = ""


class World:
    """What the world's own networks learn from, drawn when first needed.

    Args:
        folder: of the reproduction; each stage writes its file there, whole or not at all.
        settings: how much of everything.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._folder, self._settings = folder, settings

    def draw(self) -> None:
        """Draw the captioned pictures, and write the scans and the tokenizer as files."""
        pictures, self._scenes = draw_world(self._settings.pictures, _SEED)
        self._pictures = as_tensor(pictures)
        self._prompts = [_EMPTY, *sorted({caption for scene in self._scenes for caption in scene.captions})]
        numbers = {prompt: number for number, prompt in enumerate(self._prompts)}
        self._captions = [[numbers[caption] for caption in scene.captions] for scene in self._scenes]
        if not (self._folder / SCANS).exists():
            with whole_folder(self._folder / SCANS) as beside:
                write_scans(beside)
        if not (self._folder / TOKENIZER).exists():
            with whole_folder(self._folder / TOKENIZER) as beside:
                for name in ("vocab.json", "merges.txt"):
                    shutil.copyfile(text.tokenizer() / name, beside / name)

    def train_autoencoder(self) -> None:
        """Train the autoencoder on the drawn pictures."""
        with _bar("autoencoder", self._settings.autoencoder_steps) as tick:
            vae = train_autoencoder(self._pictures, self._settings.autoencoder_steps, tick=tick, device=_device())
        _write(vae, self._folder / AUTOENCODER)

    def train_classifier(self) -> None:
        """Train the classifier on the training scans and on drawn pictures."""
        scans, digits = read_scans()
        with _bar("classifier", self._settings.classifier_steps) as tick:
            network = train_classifier(
                *training_part(as_tensor(scans), digits),
                self._pictures,
                self._scenes,
                self._settings.classifier_steps,
                tick=tick,
                device=_device(),
            )
        _write(network, self._folder / CLASSIFIER)

    def train_prior(self) -> None:
        """Train the UNet, and write the prior as one checkpoint in SD1.x's layout."""
        vae, clip = self._encode()
        with _bar("prior", self._settings.prior_steps) as tick:
            unet = train_prior(
                self._latents,
                self._captions,
                self._embeddings,
                self._settings.prior_steps,
                self._settings.prior_batch,
                self._settings.prior_learning_rate,
                tick,
                _device(),
            )
        with whole_file(self._folder / PRIOR) as beside:
            save_checkpoint(beside, _contiguous(diffusers_to_ldm(unet)), vae, clip)

    def train_controlnet(self) -> None:
        """Train a canny ControlNet around the prior."""
        if not hasattr(self, "_latents"):
            self._encode()
        with _bar("ControlNet", self._settings.controlnet_steps) as tick:
            control = train_controlnet(
                open_prior(self._folder / PRIOR).load_unet(),
                self._latents,
                edges(self._pictures),
                self._captions,
                self._embeddings,
                self._settings.controlnet_steps,
                self._settings.prior_batch,
                self._settings.controlnet_learning_rate,
                tick,
                _device(),
            )
        _write(controlnet_to_ldm(control), self._folder / CONTROLNET)

    def _encode(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Turn pictures and prompts into what the UNet reads; return autoencoder and text encoder."""
        vae, clip = load_file(self._folder / AUTOENCODER), text.text_encoder()
        self._latents = encode(vae, self._pictures, _device())
        self._embeddings = text.encode(clip, self._prompts)
        return vae, clip


def training_part(scans: Tensor, digits: list[int]) -> tuple[Tensor, list[int]]:
    """Return the scans that networks may learn from."""
    from .scans import TRAINING

    return scans[:TRAINING], digits[:TRAINING]


def controlnet_to_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a diffusers ControlNet in the keys of published ControlNet files, `control_model.` first."""
    own = {name: tensor for name, tensor in state_dict.items() if name.startswith("control")}
    ldm = diffusers_to_ldm({name: tensor for name, tensor in state_dict.items() if name not in own})
    hints = sum(name.startswith("controlnet_cond_embedding.blocks.") and name.endswith("weight") for name in own)
    for name, tensor in own.items():
        part, _, kind = name.rpartition(".")
        match part.split("."):
            case ["controlnet_cond_embedding", "conv_in"]:
                place = "input_hint_block.0"
            case ["controlnet_cond_embedding", "blocks", number]:
                place = f"input_hint_block.{2 * int(number) + 2}"
            case ["controlnet_cond_embedding", "conv_out"]:
                place = f"input_hint_block.{2 * hints + 2}"
            case ["controlnet_down_blocks", number]:
                place = f"zero_convs.{number}.0"
            case _:
                place = "middle_block_out.0"
        ldm[f"{place}.{kind}"] = tensor
    return {f"control_model.{name}": tensor for name, tensor in ldm.items()}


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    with whole_file(path) as beside:
        save_file(_contiguous(tensors), beside)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to(torch.float32, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _bar(name: str, steps: int) -> Iterator[Callable[..., object]]:
    with tqdm(total=steps, desc=name, unit="step", mininterval=1) as bar:
        yield lambda *_: bar.update()
