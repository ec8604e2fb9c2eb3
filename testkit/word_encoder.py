"""A CLIP-L whose weights are written down by a rule: each word's own vector, and a little of the words before it.

A UNet that is trained from scratch wants no more of a text encoder than that words differ and that order shows. Every
padding token comes out as one and the same vector, so 77 tokens can be attended to at the cost of the prompt's own.
"""

from __future__ import annotations

import math

import torch

from . import layouts
from .models import StateDict

START, END = 49406, 49407
LAYERS = 1  # that do anything; `with_all_layers` adds those that loaders want
_SEED = 18
_CONTEXT = 1.0  # what the words before weigh, against the word's own vector
_SHARP = 0.75  # the padding's attention to the start token: logit 96, so that the others' share is below 1e-30
_MARKS = 4  # the first channels say which token starts and which one ends a prompt; words are zero there


def word_encoder() -> StateDict:
    """Return the text encoder in Hugging Face keys, `text_model.` first, with one layer.

    word token i:    LayerNorm(e_i + c R mean_{j <= i} e_j)
    padding tokens:  LayerNorm(e_end + c R e_start)
    """
    shapes = {name: shape for name, shape in layouts.clip_l().items() if ".layers." not in name or ".layers.0." in name}
    out = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name in out:
        if "norm" in name and name.endswith("weight"):
            out[name] = torch.ones_like(out[name])
    tokens, width = out["text_model.embeddings.token_embedding.weight"].shape
    generator = torch.Generator().manual_seed(_SEED)
    words = torch.randn(tokens, width, generator=generator)
    words[:, :_MARKS] = 0
    words[:, _MARKS:] -= words[:, _MARKS:].mean(1, keepdim=True)  # a layer norm then only scales
    mark = 2 * math.sqrt(width)
    words[END, :2] = torch.tensor([mark, -mark])
    words[START, 2:_MARKS] = torch.tensor([mark, -mark])
    out["text_model.embeddings.token_embedding.weight"] = words
    layer = "text_model.encoder.layers.0."
    for head in range(0, width, 64):
        for side, first in (("q", 0), ("k", 2)):
            out[f"{layer}self_attn.{side}_proj.weight"][head, first : first + 2] = torch.tensor([_SHARP, -_SHARP])
    turn = torch.linalg.qr(torch.randn(width - _MARKS, width - _MARKS, generator=generator))[0]
    turn -= turn.mean(0, keepdim=True)
    out[f"{layer}self_attn.v_proj.weight"][_MARKS:, _MARKS:] = turn
    out[f"{layer}self_attn.out_proj.weight"] = _CONTEXT * torch.eye(width)
    return out
