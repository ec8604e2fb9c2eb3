"""Prompts as the UNet reads them, in two spellings that mean the same: 77 tokens, and one of all that only pad."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...testkit.word_encoder import word_encoder
from ...training.prior.text_encoder import END, LENGTH, START, clip_config
from ..text import tokenizer

_LENGTHS = 8  # multiples of it: a compiled UNet is compiled once for each length


class Prompts:
    """Encodes prompts with the world's text encoder, each beginning of one once, and remembers it.

    The text encoder looks back only, so that a token's vector depends on the tokens before it alone.
    """

    def __init__(self) -> None:
        weights = word_encoder()
        bare = {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in weights.items()}
        self._model = CLIPTextModel(CLIPTextConfig(**clip_config(bare, "quick_gelu"))).eval()
        flat = not any(name.startswith("text_model.") for name in self._model.state_dict())  # since transformers 5.6
        self._model.load_state_dict({n.removeprefix("text_model.") if flat else n: w for n, w in weights.items()})
        self._tokenizer = CLIPTokenizer.from_pretrained(str(tokenizer()), local_files_only=True)
        self._ids: dict[str, tuple[int, ...]] = {}
        self._vectors: dict[tuple[int, ...], Tensor] = {}
        self._padding = self._encode([(START, END)])[0, 1]

    def short(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the padding's vector and each prompt's tokens, and what is added to attention's logits.

        Returns: (B, L, 768) and (B, 1, L): the logarithm of how many paddings there are, 0 for each token, and minus
            infinity behind the last one. L is a multiple of 8.
        """
        ids = [self._known(text) for text in texts]
        length = -(-(1 + max(map(len, ids))) // _LENGTHS) * _LENGTHS
        tokens, bias = torch.zeros(len(ids), length, len(self._padding)), torch.full((len(ids), 1, length), -math.inf)
        tokens[:, 0] = self._padding
        for i, own in enumerate(ids):
            tokens[i, 1 : len(own) + 1] = self._vectors[own]
            bias[i, 0, 1 : len(own) + 1] = 0
            bias[i, 0, 0] = math.log(LENGTH - len(own))
        return tokens, bias

    def _known(self, text: str) -> tuple[int, ...]:
        if text not in self._ids:
            own = (START, *self._tokenizer(text, add_special_tokens=False)["input_ids"])
            if own not in self._vectors:
                self._vectors[own] = self._encode([own])[0]
            self._ids[text] = own
        return self._ids[text]

    @torch.no_grad()
    def _encode(self, ids: Sequence[Sequence[int]]) -> Tensor:
        hidden: Tensor = self._model(torch.tensor(ids)).last_hidden_state
        return hidden


class ShortText:
    """diffusers' attention, with a bias on the logits of cross-attention that stands for the padding left out.

    Attributes:
        bias: of the next call, from `Prompts.short`; None if the UNet gets all 77 tokens.
    """

    def __init__(self) -> None:
        self.bias: Tensor | None = None

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor:
        """Return softmax(q k / sqrt(d) + bias) v, projected."""
        text = encoder_hidden_states
        q = attn.to_q(hidden_states)
        k, v = (layer(hidden_states if text is None else text) for layer in (attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.transpose(-1, -2) * attn.scale
        if text is not None and self.bias is not None:
            logits = logits + self.bias[:, None]
        out = functional.softmax(logits, -1) @ v
        result: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(-2))
        return result


def read_short_text(unet: nn.Module) -> ShortText:
    """Make a diffusers UNet read short prompts, once; return where their bias goes before each call."""
    known = next(iter(unet.attn_processors.values()))  # type: ignore[operator]
    if isinstance(known, ShortText):  # another one would be compiled again
        return known
    processor = ShortText()
    unet.set_attn_processor(processor)  # type: ignore[operator]
    return processor
