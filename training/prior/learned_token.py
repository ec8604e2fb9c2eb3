"""A word that no tokenizer knows, by its vector in a text encoder's token embedding (Textual Inversion, Gal et al.)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import LazyStateDict, read_header

EMBEDDING_KEY = "emb_params"  # in the files that ComfyUI, A1111 and diffusers read
LEARNED_ID = 49408  # the first number after CLIP's vocabulary


@dataclass(frozen=True)
class LearnedToken:
    """A word and what it means.

    Attributes:
        text: how prompts write it, for example '<digit>'.
        vector: (1, D), D the width of the text encoder.
    """

    text: str
    vector: Tensor


class _ExtendedEmbedding(nn.Module):
    """A text encoder's token embedding with one token more, LEARNED_ID."""

    def __init__(self, embedding: nn.Module, vector: Tensor) -> None:
        super().__init__()
        self.known = embedding
        self.vector = vector

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors of token numbers (B, T), (B, T, D)."""
        learned = ids == LEARNED_ID
        known = self.known(ids.masked_fill(learned, 0))
        return torch.where(learned[..., None], self.vector.to(known), known)


def add_word(model: nn.Module, learned: LearnedToken, source: str) -> None:
    """Teach a text encoder a word; its vector stays what it is, so a Parameter may be trained there.

    Args:
        model: a CLIPTextModel, which is changed.
        learned: the word.
        source: start of the error: "model.text_encoder 'path'".

    Raises: GuidanceError: if the word is one of a text encoder of another width.
    """
    known = model.get_input_embeddings()  # type: ignore[operator]
    found, width = tuple(learned.vector.shape), known.embedding_dim
    if found != (1, width):
        raise GuidanceError(
            f"{source} has a text encoder of width {width}, for which the embedding of {learned.text!r} has the shape "
            f"{found}, expected (1, {width}); use the prior that it was trained on."
        )
    model.set_input_embeddings(_ExtendedEmbedding(known, learned.vector))  # type: ignore[operator]


def read_embedding(path: Path, text: str, source: str) -> LearnedToken:
    """Read the file of a Textual Inversion.

    Args:
        path: a .safetensors file with 'emb_params', (1, D).
        text: how prompts write the token.
        source: start of every error: "models.inversion.embedding 'path'".

    Raises: GuidanceError: if it is none.
    """
    shapes = read_header(path, source).shapes
    if EMBEDDING_KEY not in shapes:
        raise GuidanceError(
            f"{source} holds no {EMBEDDING_KEY!r}, expected an SD1.x or SD2.x embedding; name the file that "
            "`gcfg train` wrote with model.method 'textual_inversion'."
        )
    return LearnedToken(text, LazyStateDict(path)[EMBEDDING_KEY].float().clone())
