"""The networks of an evaluation, and the prompts that they read: each is read when it is needed, and kept."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..gcfg.concept_file import compact, describe, unet_in_ldm_keys
from ..gcfg.errors import GuidanceError
from ..gcfg.null_text import is_null_text
from ..gcfg.safetensors_file import LazyStateDict, read_header
from ..gcfg.safetensors_header import stated_number
from ..gcfg.unet_keys import ldm_to_diffusers
from ..training.attention import share_prompts
from ..training.concept import null_text_features, to_null_text
from ..training.methods.textual_inversion import LearnedToken, add_word, read_embedding
from ..training.objective import Objective
from ..training.prior.architecture import FAMILY_NAMES, family_of
from ..training.prior.model import Prior, open_prior
from ..training.prior.text_encoder import Conditions, encode_ids, load_text_models, token_ids
from ..training.prior.unet import find_unet, load_unet
from .config import Config
from .controlnet import load_controlnet
from .recipe import PRIOR, Recipe
from .sampling import Guidance, Predictor, take_hints

if TYPE_CHECKING:
    from ..training.prior.vae import Autoencoder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TRAINED = "gcfg.trained_parameters"  # in the metadata of what `gcfg train` exports


class Texts:
    """The conditions of prompts, each encoded once, by a text encoder that is read once.

    Args:
        prior: whose UNet reads them.
        text_encoder: where it is, if not in the prior's checkpoint.
        tokenizer: folder with vocab.json and merges.txt, if not beside the text encoder.
        place: device and dtype of the UNets.
    """

    def __init__(self, prior: Prior, text_encoder: Path | None, tokenizer: Path | None, place: torch.Tensor) -> None:
        self._prior, self._place = prior, place
        self._path = text_encoder or prior.path
        self._tokenizer = tokenizer or self._path / "tokenizer"
        self._source = prior.source("text_encoder", text_encoder)
        self._known: dict[tuple[str, str], Conditions] = {}

    def conditions(self, prompt: str, word: LearnedToken | None = None) -> Conditions:
        """Return the conditions of a prompt, in which a learned word may stand; always the same object."""
        key = (prompt, word.text if word and word.text in prompt else "")
        if key not in self._known:
            text = self._encoded(prompt, word if key[1] else None)
            self._prior.refuse_other_widths(text, self._source)
            self._known[key] = Conditions(text.context.to(self._place), text.pooled)
        return self._known[key]

    @cached_property
    def without_text(self) -> Conditions:
        """Conditions of a null-text UNet, which reads no text; SDXL's needs the pooled empty prompt all the same."""
        pooled = self.conditions("").pooled if self._prior.pooled_dim else None
        none = Conditions.without_text(self._prior.context_dim, pooled)
        return Conditions(none.context.to(self._place), none.pooled)

    @cached_property
    def _models(self) -> list[nn.Module]:
        return load_text_models(self._path, self._prior.family, self._source)

    def _encoded(self, prompt: str, word: LearnedToken | None) -> Conditions:
        ids = token_ids(prompt, self._tokenizer, word.text if word else "", self._prior.section)
        if word is None:
            return encode_ids(self._models, self._prior.family, ids)
        if self._prior.family == "sdxl":
            raise GuidanceError(f"{word.text!r} is a word for one text encoder, but {self._source} has SDXL's two.")
        (model,) = self._models
        plain = model.get_input_embeddings()  # type: ignore[operator]
        add_word(model, word, self._source)
        try:
            return encode_ids([model], self._prior.family, ids)
        finally:
            model.set_input_embeddings(plain)  # type: ignore[operator]


class Models:
    """What a config's recipes name.

    Args:
        config: the evaluation's.
        device: where the networks run.

    Raises: GuidanceError: one sentence, naming the setting whose file is missing or does not fit.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self.device = config, device
        self._dtype = _DTYPES[config.sampling.precision]
        self.prior = _open(config)
        self.objective = Objective.of(self.prior.prediction, self.prior.zero_terminal_snr)
        place = torch.empty(0, device=device, dtype=self._dtype)
        settings = config.prior
        self._texts = Texts(self.prior, config.path(settings.text_encoder), config.path(settings.tokenizer), place)
        self._unets: dict[str, nn.Module] = {}
        self._words: dict[str, LearnedToken] = {}

    @cached_property
    def vae(self) -> Autoencoder:
        """The autoencoder, in float32."""
        vae = self.prior.load_vae(self._config.path(self._config.prior.vae))
        vae.to(self.device)
        vae.to(memory_format=torch.channels_last)  # a CPU decodes half as fast again
        return vae

    @cached_property
    def control(self) -> tuple[nn.Module, nn.Module]:
        """The ControlNet, and its layers that read images, see `take_hints`."""
        path = self._config.path(self._config.prior.controlnet)
        assert path  # whoever asks has looked
        source = self.prior.source("controlnet", path)
        controlnet = load_controlnet(path, self.prior.unet.config, source)
        nn.Module.to(controlnet, self.device, self._dtype)  # diffusers' own `to` warns of any dtype
        share_prompts(controlnet, keep=True)
        return controlnet, take_hints(controlnet)

    def guidance(self, recipe: Recipe, weights: tuple[float, ...], prompt: str = "") -> Guidance:
        """Return a recipe's networks and what they read.

        Args:
            recipe: the method's.
            weights: one for each term.
            prompt: the task's, for '{prompt}'.
        """
        return Guidance(
            self._prediction(recipe.base, recipe.unconditional, control=False),
            tuple(self._prediction(term.model, term.reads(prompt), term.control) for term in recipe.terms),
            weights,
        )

    def keep(self, names: Collection[str]) -> None:
        """Let go of all UNets but these and the prior's."""
        for name in set(self._unets) - {*names, PRIOR}:
            del self._unets[name]

    def _prediction(self, name: str, prompt: str, control: bool) -> Predictor:
        word = self._word(name)
        unet = self._unet(PRIOR if word else name)
        text = self._texts.without_text if is_null_text(unet) else self._texts.conditions(prompt, word)
        # A ControlNet is the prior's: it reads text beside a null-text UNet too.
        return Predictor(unet, text, self._texts.conditions(prompt, word) if control else None)

    def _word(self, name: str) -> LearnedToken | None:
        model = self._config.models.get(name)
        if model is None or not model.embedding:
            return None
        if name not in self._words:
            path = self._config.path(model.embedding)
            assert path
            self._words[name] = read_embedding(path, model.token, f"models.{name}.embedding {str(path)!r}")
        return self._words[name]

    def _unet(self, name: str) -> nn.Module:
        if name not in self._unets:
            path = self._config.path(self._config.models[name].unet) if name != PRIOR else None
            unet = read_unet(path, self.prior, f"models.{name}.unet {str(path)!r}") if path else self.prior.load_unet()
            nn.Module.to(unet, self.device, self._dtype).requires_grad_(False)
            share_prompts(unet, keep=True)
            self._unets[name] = unet
        return self._unets[name]


def read_unet(path: Path, prior: Prior, source: str) -> nn.Module:
    """Read a UNet of the prior's family, in whatever form its file has.

    Raises: GuidanceError: if there is none, or one of another family.
    """
    header = None if os.path.isdir(path) else read_header(path, source)
    if header is None or describe(LazyStateDict(path), header.metadata, source).form == "ordinary":
        found = find_unet(path, source)
        if (family_of(found.config), found.config["cross_attention_dim"]) != (prior.family, prior.context_dim):
            raise _another_architecture(source, prior)
        unet: nn.Module = load_unet(found)
        return unet
    return _read_null_text(path, prior, source)


def trained_parameters(path: Path, source: str) -> int | None:
    """Return the number of trained parameters that a model's file states, or None."""
    if os.path.isdir(path):
        return None
    return stated_number(read_header(path, source).metadata, _TRAINED)


def _read_null_text(path: Path, prior: Prior, source: str) -> nn.Module:
    unet: nn.Module = prior.load_unet()
    to_null_text(unet, null_text_features(unet, "zero"))
    lazy = LazyStateDict(path)
    weights = compact(unet_in_ldm_keys(lazy, describe(lazy, source=source)))
    own = unet.state_dict()
    weights = {key: value for key, value in ldm_to_diffusers(weights, own).items() if key in own}
    try:
        unet.load_state_dict(weights)
    except RuntimeError as error:
        raise _another_architecture(source, prior) from error
    return unet


def _open(config: Config) -> Prior:
    checkpoint = config.path(config.prior.checkpoint)
    if checkpoint is None:
        raise GuidanceError("prior.checkpoint is not set, expected an SD1.x, SD2.x or SDXL checkpoint; set it.")
    prior = open_prior(checkpoint, "prior")
    stated = config.prior.prediction
    return prior if stated == "auto" else replace(prior, prediction=stated)


def _another_architecture(source: str, prior: Prior) -> GuidanceError:
    return GuidanceError(
        f"{source} is of another architecture than the {FAMILY_NAMES[prior.family]} prior {prior.path.name!r}; use a "
        "model that was trained from this prior."
    )
