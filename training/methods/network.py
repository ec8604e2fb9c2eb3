"""The network that mode 'prompt' trains, by `model.method`, and the ordinary UNet that its trained weights make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..attention import share_prompts
from ..config import ModelConfig
from ..prior.model import Prior
from ..prior.text_encoder import padded_ids, token_ids
from .adapters import add_lora, add_oft, merge_adapters
from .textual_inversion import InvertedUNet, LearnedToken, initial_vector

CROSS_ATTENTION = ("attn2.to_k.weight", "attn2.to_v.weight")  # what text becomes first; Kumari et al. 2022, section 3.1


def prompted(prior: Prior, model: ModelConfig, seed: int) -> nn.Module:
    """Return the prior's UNet, read anew, made ready for a method: only what it learns requires a gradient.

    The seed decides what starts neither at 0 nor at the prior's weights.

    Raises: GuidanceError: if the method does not fit the prior.
    """
    unet: nn.Module = prior.load_unet()
    share_prompts(unet, keep=False)
    if model.method == "textual_inversion":
        return _inverted(unet, prior, model)
    if model.method == "lora":
        add_lora(unet, model.rank, seed)
    elif model.method == "oft":
        add_oft(unet, model.oft_block_size)
    elif model.method == "cross_attention":
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name.endswith(CROSS_ATTENTION))
    return unet


def ordinary_unet(prior: Prior, model: ModelConfig, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict, in diffusers' keys, of the UNet that computes what a method has learned.

    That is the prior's with the weights `trained`, by their names in the run's network. Textual Inversion has none.

    Raises: GuidanceError: if a merged weight is NaN or infinite.
    """
    unet = prompted(prior, model, seed=0)
    own = unet.state_dict()
    for name, tensor in trained.items():
        own[name].copy_(tensor)
    merge_adapters(unet)
    return unet.state_dict()


def _inverted(unet: nn.Module, prior: Prior, model: ModelConfig) -> InvertedUNet:
    place = Path(model.text_encoder) if model.text_encoder else prior.path
    tokenizer = Path(model.tokenizer) if model.tokenizer else place / "tokenizer"
    encoder = prior.load_text_model(place)
    word = LearnedToken(model.token, initial_vector(encoder, model.initializer, tokenizer))
    ids = padded_ids(token_ids(model.prompt, tokenizer, model.token), prior.family)
    return InvertedUNet(unet, encoder, ids, word)
