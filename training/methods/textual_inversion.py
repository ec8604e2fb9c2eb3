"""Textual Inversion: one vector is learned, the meaning of a new word in the prompt; the network stays the prior's.

context = text_encoder(..., v, ...)          eps = UNet(x, t, context)          # Gal et al. 2022; only v is trained
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...gcfg.errors import GuidanceError
from ..prior.learned_token import LearnedToken, add_word
from ..prior.text_encoder import token_ids

TOKEN = "token"  # the trained weight's name


class InvertedUNet(nn.Module):
    """A UNet that reads one prompt through its text encoder at every call, called like the UNet alone."""

    ids: Tensor

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, ids: Tensor, word: LearnedToken) -> None:
        """Freeze UNet and text encoder, and give the latter the word, whose vector is then all that is trained.

        Args:
            unet: the prior's.
            text_encoder: the prior's, a CLIPTextModel.
            ids: the prompt's token numbers with the word among them, (1, 77).
            word: with what it means at first.
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
