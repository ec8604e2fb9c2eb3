"""Null-text mode: every cross-attention output becomes one constant vector (arXiv 2312.08195, Eq. 4-6).

    F_img' = F_null + F_img,    F_null = W(Norm(V_null)),    V_null = to_v(empty-prompt embedding)

`W` is `to_out` with its bias. `Norm` is read in one of two ways: the mean over the tokens (`uniform_mean`, that is
uniform attention), or the mean of the real attention over pixels, latents and timesteps (`attention_mean`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GuidanceError

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


class RemovedProjectionError(GuidanceError, AttributeError):
    """A patch asked a null-text block for a projection it no longer has; also what `hasattr` expects."""


class ConstantCrossAttention(nn.Module):
    """Stands in for `attn2` and returns the block's constant, whatever the image and the text (Eq. 5-6).

    The constant is the parameter `null_text_feature` (1, 1, C), the key of the authors' files. It is cast to the
    image's device and dtype in each call, so it may stay in CPU memory while ComfyUI loads a model in parts.
    """

    null_text_feature: nn.Parameter

    def __init__(self, feature: Tensor) -> None:
        super().__init__()
        self.null_text_feature = nn.Parameter(feature.reshape(1, 1, -1), requires_grad=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the constant as a (B, T, C) view of one row for `x` (B, T, C)."""
        feature = self.null_text_feature.to(device=x.device, dtype=x.dtype)
        return feature.expand(*x.shape[:-1], -1)

    def __getattr__(self, name: str) -> Any:
        if name in PROJECTIONS:
            raise RemovedProjectionError(
                f"Null-text model: a patch asked for attn2.{name}, expected by IPAdapter and other cross-attention "
                "replacements, but a null-text model has no cross-attention; apply that patch to another model."
            )
        return super().__getattr__(name)


def cross_attention_blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """Return the transformer blocks of a UNet that read text, by module name.

    A block counts when it has `norm2` and an `attn2` with the four projections; this holds for ComfyUI's (LDM) and for
    diffusers' UNets. Blocks already in null-text mode do not count.
    """
    return {name: module for name, module in unet.named_modules() if _reads_text(module)}


def is_null_text(unet: nn.Module) -> bool:
    """Tell whether any block of the UNet is in null-text mode."""
    return any(isinstance(module, ConstantCrossAttention) for module in unet.modules())


def uniform_mean(null_text: Tensor, to_v: nn.Module, to_out: Iterable[nn.Module]) -> Tensor:
    """Null-text feature under uniform attention.

        F_null = W(mean_t to_v(e_t)) = W(to_v(mean_t e_t))         # Eq. 5; to_v is linear and has no bias

    The mean is taken first, so one vector passes through each layer. The layers' own forward is used, so patched
    (LoRA) and partly loaded weights count as they are.

    Args:
        null_text: embedding of the empty prompt, (1 or B, T, D), of the dtype and device the layers take.
        to_v: the block's value projection, D -> C.
        to_out: the block's output layers (linear, dropout), in order.

    Returns: F_null, (C,).
    Raises: GuidanceError: if `null_text` is not three-dimensional.
    """
    if null_text.ndim != 3:
        raise GuidanceError(
            f"null_text has the shape {tuple(null_text.shape)}, expected (batch, tokens, width); "
            "encode the empty prompt with the model's own CLIP."
        )
    precise = null_text.to(torch.promote_types(null_text.dtype, torch.float32))
    feature: Tensor = precise.mean(dim=(0, 1), keepdim=True).to(null_text.dtype)  # [1, 1, D]
    feature = to_v(feature)
    for layer in to_out:
        feature = layer(feature)
    return feature.reshape(-1)  # [C]


def uniform_means(null_text: Tensor, unet: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return `uniform_mean` of each named block, from its weights as they are now."""
    attn2 = {name: unet.get_submodule(f"{name}.attn2") for name in names}
    return {name: uniform_mean(null_text, a.to_v, a.to_out) for name, a in attn2.items()}  # type: ignore[arg-type]


def attention_means(unet: nn.Module, names: Iterable[str], runs: Iterable[Callable[[], object]]) -> dict[str, Tensor]:
    """Null-text features as the mean of the real cross-attention output.

        F_null = mean over all samples of all runs, and their pixels, of attn2(norm2(x), e_null)

    Args:
        unet: the UNet the runs evaluate.
        names: its cross-attention blocks.
        runs: each evaluates the UNet once, with the null text as context.

    Returns: F_null by block name, (C,) in float32.
    Raises: RuntimeError: if a run does not reach one of the blocks.
    """
    means: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: means[name].append(output.float().mean(dim=1))

    hooks = [unet.get_submodule(f"{name}.attn2").register_forward_hook(keep(name)) for name in means]
    try:
        for run in runs:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    unreached = [name for name, found in means.items() if not found]
    if unreached:
        raise RuntimeError(f"no run reached the cross-attention of {unreached}")
    return {name: torch.cat(found).mean(dim=0) for name, found in means.items()}


def replace_cross_attention(unet: nn.Module, features: Mapping[str, Tensor]) -> None:
    """Put the constants in place of attn2 and norm2, for good; the old modules and their weights are let go."""
    for name, feature in features.items():
        _make_null_text(unet.get_submodule(name), feature, nn.Identity())


def constants(features: Mapping[str, Tensor]) -> dict[str, ConstantCrossAttention]:
    """The modules that stand in for attn2, for repeated use with `null_text_blocks`."""
    return {name: ConstantCrossAttention(feature) for name, feature in features.items()}


@contextmanager
def null_text_blocks(unet: nn.Module, features: Mapping[str, Tensor | ConstantCrossAttention]) -> Iterator[None]:
    """Put the constants in place of attn2 and norm2 within the `with` block, and the same modules back after it.

    Nothing of q, k, v, out and norm2 is computed meanwhile, and no weight is touched, so a plain and a null-text use of
    one UNet may follow each other in one run. The modules come back after an exception too.

    Args:
        unet: the UNet.
        features: F_null by block name, or its `constants`, which saves making them each time.
    """
    originals: list[tuple[nn.Module, nn.Module, nn.Module]] = []
    no_norm = nn.Identity()
    try:
        for name, feature in features.items():
            block = _uncompiled(unet.get_submodule(name))
            originals.append((block, block.get_submodule("attn2"), block.get_submodule("norm2")))
            _make_null_text(block, feature, no_norm)
        yield
    finally:
        for block, attn2, norm2 in originals:
            block._modules["attn2"], block._modules["norm2"] = attn2, norm2


def _make_null_text(block: nn.Module, feature: Tensor | ConstantCrossAttention, no_norm: nn.Identity) -> None:
    # Through _modules, not setattr: the blocks of a compiled or hooked UNet may guard setattr.
    block._modules["attn2"] = ConstantCrossAttention(feature) if isinstance(feature, Tensor) else feature
    block._modules["norm2"] = no_norm


def _uncompiled(block: nn.Module) -> nn.Module:
    """The block that `torch.compile` was given: a compiled one hands out its parts and keeps what is put into it."""
    original = getattr(block, "_orig_mod", block)
    return original if isinstance(original, nn.Module) else block


def _reads_text(module: nn.Module) -> bool:
    attn2 = getattr(module, "attn2", None)
    return hasattr(module, "norm2") and attn2 is not None and all(hasattr(attn2, name) for name in PROJECTIONS)
