"""CLIP-L's forward pass, for the one embedding the small concept model is made from: the empty prompt's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

START, END, LENGTH, HEADS = 49406, 49407, 77, 12


def empty_prompt(clip: Mapping[str, Tensor]) -> Tensor:
    """Return the embedding that SD1.x gives an empty prompt, (1, 77, 768): start, then end to the full length."""
    return encode(clip, torch.tensor([START] + [END] * (LENGTH - 1)))


@torch.no_grad()
def encode(clip: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Return CLIP-L's last hidden state after the final norm, (1, tokens, 768).

    Args:
        clip: Hugging Face keys, `text_model.` first, of any dtype; computed in float32.
        tokens: (77,).
    """
    sd = {name.removeprefix("text_model."): w.float() for name, w in clip.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, sd[f"{name}.weight"], sd[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"])

    x = sd["embeddings.token_embedding.weight"][tokens] + sd["embeddings.position_embedding.weight"][: len(tokens)]
    for i in range(12):
        layer = f"encoder.layers.{i}"
        y = norm(f"{layer}.layer_norm1", x)
        q, k, v = (linear(f"{layer}.self_attn.{p}_proj", y).unflatten(-1, (HEADS, -1)).transpose(0, 1) for p in "qkv")
        y = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        x = x + linear(f"{layer}.self_attn.out_proj", y.transpose(0, 1).flatten(1))
        y = linear(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", x))
        x = x + linear(f"{layer}.mlp.fc2", y * torch.sigmoid(1.702 * y))
    return norm("final_layer_norm", x)[None]
