"""The world of emoji on disk: drawings, concept folders, autoencoder, judges, prior, second style and ControlNet."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ...gcfg.unet_keys import diffusers_to_ldm
from ...testkit.models import save_checkpoint
from ...testkit.word_encoder import word_encoder
from ...training.files import whole_file, whole_folder
from ...training.prior.model import open_prior
from .. import text
from ..autoencoder import from_taesd, new_autoencoder, to_taesd
from ..world import controlnet_to_ldm
from .folders import write_concept
from .judge import Judge, SecondJudge, judge_loss
from .learned_autoencoder import DECODER_CHANNELS, autoencoder_loss, decoder_loss
from .learned_controlnet import controlnet_loss, new_controlnet
from .learned_prior import new_unet, prior_loss, read_latents, write_latents
from .loop import Loss, Plan, train
from .pictures import Drawing, Drawings, flat, read_drawings, write_drawings
from .prompts import Prompts
from .settings import World as Settings
from .vendors import INK, THREE_D

CONCEPTS = ("face", "animal")
AUTOENCODER, PRIOR, STYLE = "autoencoder.safetensors", "prior.safetensors", "ink.safetensors"
CONTROLNET, TOKENIZER = "controlnet.safetensors", "tokenizer"
JUDGE, SECOND_JUDGE = "judge.safetensors", "second_judge.safetensors"
_ENCODED = "encoder.safetensors"  # the autoencoder as it was when its encoder was settled


class World:
    """What the world's own networks learn from, and the stages that make them.

    Args:
        folder: of the reproduction; each stage writes its file there, whole or not at all, and goes on after a kill.
        settings: how much of everything.
        cache: of the npm packages.
    """

    def __init__(self, folder: Path, settings: Settings, cache: Path) -> None:
        self._folder, self._settings, self._cache = folder, settings, cache

    @property
    def _bf16(self) -> bool:
        return self._settings.precision == "bf16"

    @cached_property
    def drawings(self) -> Drawings:
        """All drawings, rendered at the first call."""
        place = self._folder / "drawings"
        if not place.exists():
            write_drawings(self._cache, place)
        return read_drawings(place)

    @cached_property
    def prompts(self) -> Prompts:
        """The text encoder."""
        return Prompts()

    def draw(self) -> None:
        """Render the drawings, and write the concepts' folders and the tokenizer."""
        for group in CONCEPTS:
            if not (self._folder / "concepts" / group).exists():
                write_concept(self.drawings, group, self._settings.concept_variants, self._folder / "concepts" / group)
        if not (self._folder / TOKENIZER).exists():
            with whole_folder(self._folder / TOKENIZER) as beside:
                for name in ("vocab.json", "merges.txt"):
                    shutil.copyfile(text.tokenizer() / name, beside / name)

    def train_autoencoder(self) -> None:
        """Train the autoencoder."""
        torch.manual_seed(0)
        vae = new_autoencoder(DECODER_CHANNELS)
        plan = Plan(self._settings.autoencoder_steps, 1.5e-3, decay=0.998, bf16=self._bf16)
        self._train("autoencoder", vae, autoencoder_loss(self.drawings), plan)
        _write(to_taesd(vae), self._folder / _ENCODED)

    def train_decoder(self) -> None:
        """Train the decoder further, and put it into the prior's checkpoint; the encoder, which made latents, stays."""
        vae = from_taesd(load_file(self._folder / _ENCODED))
        vae.encoder.requires_grad_(False)
        plan = Plan(self._settings.decoder_steps, 1e-3, decay=0.998, seed=1, bf16=self._bf16)
        self._train("decoder", vae, decoder_loss(self.drawings), plan)
        weights = to_taesd(vae)
        _write(weights, self._folder / AUTOENCODER)
        prior = load_file(self._folder / PRIOR)
        _write(prior | {f"first_stage_model.{name}": w for name, w in weights.items()}, self._folder / PRIOR)

    def train_judges(self) -> None:
        """Train the two networks that measure."""
        torch.manual_seed(0)
        plan = Plan(self._settings.judge_steps, 2e-3, cooldown=0.5, decay=0.99, seed=2)
        first, second = Judge(), SecondJudge()
        self._train("judge", first, judge_loss(self.drawings, lambda _: True), plan)
        _write(first.state_dict(), self._folder / JUDGE)
        plan = Plan(self._settings.judge_steps, 1e-3, cooldown=0.5, decay=0.99, seed=3)
        shown = judge_loss(self.drawings, lambda row: row.look != THREE_D or not row.thing.held_out)
        self._train("second judge", second, shown, plan)
        _write(second.state_dict(), self._folder / SECOND_JUDGE)

    def train_prior(self) -> None:
        """Train the UNet on the flat looks, and write the prior as one checkpoint in SD1.x's layout."""
        torch.manual_seed(0)
        unet = new_unet()
        plan = Plan(
            self._settings.prior_steps, self._settings.prior_learning_rate, cooldown=0.25, seed=4, bf16=self._bf16
        )
        if self._settings.compiled:
            unet.compile(dynamic=False)
        self._train("prior", unet, self._prior_loss("flat", flat), plan)
        self._write_checkpoint(unet, _ENCODED, PRIOR)

    def train_style(self) -> None:
        """Train the whole prior on with drawings in ink: somebody's stylised checkpoint."""
        unet = open_prior(self._folder / PRIOR).load_unet()
        rate = self._settings.prior_learning_rate / 4
        plan = Plan(self._settings.style_steps, rate, cooldown=0.5, seed=5, bf16=self._bf16)
        self._train("ink", unet, self._prior_loss("ink", lambda row: row.look == INK), plan)
        self._write_checkpoint(unet, AUTOENCODER, STYLE)

    def train_controlnet(self) -> None:
        """Train a canny ControlNet around the prior."""
        unet = open_prior(self._folder / PRIOR).load_unet()
        torch.manual_seed(0)
        control = new_controlnet(unet)
        rows = self.drawings.choose(flat)
        latents = read_latents(rows, self._settings.variants, self._folder / "latents-flat.safetensors")
        loss = controlnet_loss(unet, latents, self.drawings, self.prompts, _device())
        rate = self._settings.controlnet_learning_rate
        plan = Plan(self._settings.controlnet_steps, rate, cooldown=0.5, seed=6, bf16=self._bf16)
        self._train("ControlNet", control, loss, plan)
        _write(controlnet_to_ldm(control.state_dict()), self._folder / CONTROLNET)

    def _prior_loss(self, name: str, wanted: Callable[[Drawing], bool]) -> Loss:
        """Encode drawings, unless it was done, and return the loss of a UNet that learns them."""
        rows, path = self.drawings.choose(wanted), self._folder / f"latents-{name}.safetensors"
        if not path.exists():
            write_latents(self.drawings, rows, self._settings.variants, self._folder / _ENCODED, path)
        return prior_loss(read_latents(rows, self._settings.variants, path), self.prompts, _device())

    def _train(self, name: str, network: nn.Module, loss: Loss, plan: Plan) -> None:
        """Train a network, from where an earlier command left it; it comes back on the CPU."""
        network.to(_device(), memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        state = self._folder / "states" / f"{name.replace(' ', '-')}.pt"
        state.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(total=plan.steps, desc=name, unit="step", mininterval=1) as bar:

            def counted(network: nn.Module, *random: object) -> Tensor:
                bar.update()
                return loss(network, *random)  # type: ignore[arg-type]

            train(network, counted, plan, state)
        network.cpu().eval()

    def _write_checkpoint(self, unet: UNet2DConditionModel, autoencoder: str, name: str) -> None:
        vae = load_file(self._folder / autoencoder)
        with whole_file(self._folder / name) as beside:
            save_checkpoint(beside, _contiguous(diffusers_to_ldm(unet.state_dict())), vae, word_encoder())


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    with whole_file(path) as beside:
        save_file(_contiguous(tensors), beside)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
