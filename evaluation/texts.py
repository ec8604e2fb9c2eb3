"""Every prompt of an evaluation, encoded once, by a text encoder that is read once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..gcfg.errors import GuidanceError
from ..training.methods.textual_inversion import LearnedToken, add_word
from ..training.prior.model import Prior
from ..training.prior.text_encoder import Conditions, encode_ids, load_text_models, token_ids


class Texts:
    """The conditions of prompts, kept.

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
