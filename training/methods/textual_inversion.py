"""Textual Inversion: one vector is learned, the meaning of a new word in the prompt; the network stays the prior's.

context = text_encoder(..., v, ...)          eps = UNet(x, t, context)          # Gal et al. 2022; only v is trained
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import LazyStateDict, read_header
from ..prior.text_encoder import LEARNED_ID, token_ids

TOKEN = "token"  # the trained weight's name
EMBEDDING_KEY = "emb_params"  # in the files that ComfyUI, A1111 and diffusers read


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
    """Teach a CLIPTextModel a word; its vector stays what it is, so a Parameter may be trained there.

    Raises: GuidanceError: if the word is one of a text encoder of another width; `source` is its start.
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
    """Read the file of a Textual Inversion, 'emb_params' (1, D), of a token that prompts write as `text`.

    Raises: GuidanceError: if it is none; `source` is its start: "models.inversion.embedding 'path'".
    """
    shapes = read_header(path, source).shapes
    if EMBEDDING_KEY not in shapes:
        raise GuidanceError(
            f"{source} holds no {EMBEDDING_KEY!r}, expected an SD1.x or SD2.x embedding; name the file that "
            "`gcfg train` wrote with model.method 'textual_inversion'."
        )
    return LearnedToken(text, LazyStateDict(path)[EMBEDDING_KEY].float().clone())


class InvertedUNet(nn.Module):
    """A UNet that reads one prompt through its text encoder at every call, called like the UNet alone."""

    ids: Tensor

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, ids: Tensor, word: LearnedToken) -> None:
        """Freeze UNet and text encoder, and give the latter the word, whose vector is then all that is trained.

        `ids` are the prompt's token numbers with the word among them, (1, 77).
        """
        super().__init__()
        self.token = nn.Parameter(word.vector.clone())
        self.unet = unet.requires_grad_(False)
        self.text_encoder = text_encoder.requires_grad_(False)
        add_word(text_encoder, LearnedToken(word.text, self.token), "The prior")
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **more: Any) -> Any:
        """Return the UNet's output for the prompt; of the context it is handed only the dtype counts."""
        context = self.text_encoder(self.ids).last_hidden_state.to(encoder_hidden_states)
        return self.unet(x, t, encoder_hidden_states=context.expand(len(x), -1, -1), **more)

    def enable_gradient_checkpointing(self) -> None:
        """Compute the UNet's activations twice to hold fewer of them."""
        self.unet.enable_gradient_checkpointing()  # type: ignore[operator]


@torch.no_grad()
def initial_vector(text_encoder: nn.Module, initializer: str, tokenizer: Path) -> Tensor:
    """Return what a known word means to a text encoder, (1, D).

    Raises: GuidanceError: if the tokenizer does not know it as one token.
    """
    ids = token_ids(initializer, tokenizer)
    if len(ids) != 1:
        raise GuidanceError(
            f"model.initializer {initializer!r} is {len(ids)} tokens to the text encoder, expected a word of one; "
            "choose a plain word."
        )
    known = text_encoder.get_input_embeddings()  # type: ignore[operator]
    vector: Tensor = known(torch.tensor(ids, device=known.weight.device))
    return vector.float()
