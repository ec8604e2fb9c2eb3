"""The prediction of a guidance, any number of networks around one base, and the images of its latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..gcfg.combine import Delta, combine
from ..gcfg.plan import ActiveTerm, needs_base
from ..training.concept import predict
from ..training.objective import Objective
from ..training.prior.text_encoder import Conditions
from ..training.sampling import Denoise

if TYPE_CHECKING:
    from ..training.prior.vae import Autoencoder

_DECODED_PIXELS = 1 << 18  # of the images that pass the VAE at once: 64 of 64 x 64, 1 of 512 x 512


@dataclass(frozen=True, eq=False)
class Predictor:
    """A network with what it reads: what makes one prediction of a step.

    Attributes:
        unet: the network.
        conditions: what it reads.
        control: what the ControlNet reads that is applied to it, or None for no ControlNet.
    """

    unet: nn.Module
    conditions: Conditions
    control: Conditions | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """Equal for two that predict the same."""
        return id(self.unet), id(self.conditions), id(self.control)


@dataclass(frozen=True)
class Guidance:
    """denoised = base + sum_i w_i (term_i - base)        # GCFG, Cao et al. 2023, Eq. 3.

    Attributes:
        base: the unconditional prediction.
        terms: the conditional ones.
        weights: one for each term; where it is 0 the term is not evaluated.
    """

    base: Predictor
    terms: tuple[Predictor, ...] = ()
    weights: tuple[float, ...] = ()


# The residuals of a ControlNet with its condition, for x, t, and what the ControlNet reads.
Control = Callable[[Tensor, Tensor, Conditions], Any]


def controlled(controlnet: nn.Module, hint: Tensor) -> Control:
    """Return the residuals that a ControlNet gives for one condition.

    Args:
        controlnet: a ControlNetModel without the layers that `take_hints` took.
        hint: what these made of the condition, (B, C, H / 8, W / 8).
    """

    def both(*args: Any, **kwargs: Any) -> tuple[Any]:
        return (controlnet(*args, controlnet_cond=hint.to(args[0]), **kwargs),)  # `predict` takes the first

    return partial(predict, both)  # type: ignore[arg-type]


def denoiser(guidance: Guidance, objective: Objective, control: Control | None = None) -> Denoise:
    """Return the guided prediction as a function of x and t; a step evaluates each network once, and only if it counts.

    The coefficients sum to one, so the networks' outputs are combined as they are: eps, v or flow.
    """
    active = [ActiveTerm(i, w, None, str(i + 1)) for i, w in enumerate(guidance.weights) if w]

    def denoised(x: Tensor, t: Tensor) -> Tensor:
        outputs: dict[tuple[int, int, int], Tensor] = {}
        residuals: dict[int, Any] = {}

        def output(of: Predictor) -> Tensor:
            if of.key not in outputs:
                outputs[of.key] = _output(of, x, t, control, residuals)
            return outputs[of.key]

        base = output(guidance.base) if needs_base(active) else None
        guided = combine(base, [Delta(output(guidance.terms[term.index]), term) for term in active])
        return objective.denoised(x, guided, t)

    return denoised


def _output(of: Predictor, x: Tensor, t: Tensor, control: Control | None, residuals: dict[int, Any]) -> Tensor:
    """Evaluate a network in its own number format; terms that read the same text share the ControlNet's residuals."""
    unet = of.unet
    x = x.to(next(unet.parameters()).dtype)
    if of.control is not None:
        if control is None:
            raise ValueError("a term asks for a ControlNet, and there is none")
        if id(of.control) not in residuals:
            residuals[id(of.control)] = control(x, t, of.control)
        down, middle = residuals[id(of.control)]
        unet = partial(unet, down_block_additional_residuals=down, mid_block_additional_residual=middle)  # type: ignore[assignment]
    return predict(unet, x, t, of.conditions).float()


def take_hints(controlnet: nn.Module) -> nn.Module:
    """Take the layers that read the condition out of a ControlNet: they need no t, so once a batch is enough."""
    layers: nn.Module = controlnet.controlnet_cond_embedding  # type: ignore[assignment]
    controlnet.controlnet_cond_embedding = nn.Identity()
    return layers


@torch.inference_mode()
def decode(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Return the images of latents in the UNet's scale, (B, 3, H, W) uint8, on the CPU."""
    pixels_each = 64 * latents.shape[-2] * latents.shape[-1]
    images = []
    for part in torch.split(latents / vae.config.scaling_factor, max(1, _DECODED_PIXELS // pixels_each)):
        pixels = vae.decode(part.to(vae.dtype).contiguous(memory_format=torch.channels_last)).sample.float()
        images.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    return torch.cat(images)
