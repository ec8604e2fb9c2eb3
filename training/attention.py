"""Cross-attention to a prompt that the whole batch shares: keys and values are computed once, not for each image."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class SharedPromptAttention:
    """A diffusers attention processor for one text, expanded over the batch.

    Keys and values depend on the text alone; the queries of all images attend to them as one long sequence, which
    changes no row's softmax. At 8 x 8 latents this is half of a UNet's work.

    Args:
        keep: keep keys and values from call to call; the module's weights may not change meanwhile.
    """

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        # By place in memory. The text is kept with them, so that no other tensor comes to lie there.
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return what diffusers' own processor does, (B, N, C), for hidden_states (B, N, C) and one text (B, T, D)."""
        if encoder_hidden_states.stride(0) and len(encoder_hidden_states) > 1:
            raise ValueError("the texts of a batch differ, expected one text expanded over the batch")
        key, value = self._keys_and_values(attn, encoder_hidden_states)
        batch, length, _ = hidden_states.shape
        query = _heads(attn.to_q(hidden_states).flatten(0, 1)[None], attn)  # [1, heads, B N, C / heads]
        mixed = scaled_dot_product_attention(query, key, value)
        mixed = mixed[0].transpose(0, 1).reshape(batch, length, -1)
        output: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return output

    def _keys_and_values(self, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        place = text.data_ptr()
        if self._keep and place in self._kept:
            _, key, value = self._kept[place]
            return key, value
        key, value = _heads(attn.to_k(text[:1]), attn), _heads(attn.to_v(text[:1]), attn)
        if self._keep:
            self._kept[place] = (text, key, value)
        return key, value


def share_prompts(unet: Any, keep: bool) -> None:
    """Let a diffusers UNet or ControlNet take one text for each whole batch, as `concept.predict` gives it.

    Keys and values are kept from call to call where `keep` is set; not while weights change.
    """
    processors = unet.attn_processors  # none of a null-text block, which is no attention
    shared = {name: SharedPromptAttention(keep) if ".attn2." in name else each for name, each in processors.items()}
    unet.set_attn_processor(shared)


def _heads(sequence: Tensor, attn: Any) -> Tensor:
    batch, length, width = sequence.shape
    return sequence.view(batch, length, attn.heads, width // attn.heads).transpose(1, 2)  # [1, heads, T, C / heads]
