"""How far the null-text network starts from the prior it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..gcfg.null_text import null_text_blocks
from .concept import Noised, predict
from .objective import TIMESTEPS
from .prior.text_encoder import Conditions

BINS = 10


@dataclass(frozen=True)
class DriftRow:
    """One bin of timesteps.

    Attributes:
        first: the first timestep of the bin.
        last: its last timestep.
        samples: noised latents that fell into it.
        distance: relative RMS distance of the predictions, see `drift`.
    """

    first: int
    last: int
    samples: int
    distance: float


@torch.no_grad()
def drift(
    unet: nn.Module, constants: Mapping[str, Tensor], empty: Conditions, noised: Iterable[Noised]
) -> list[DriftRow]:
    """Compare the null-text network with the prior's empty-prompt prediction, per timestep bin.

        distance = sqrt( sum ||out_null - out_SD(x, t, "")||^2 / sum ||out_SD(x, t, "")||^2 )

    The outputs are compared as they are, whether they mean eps, v or flow: at small t a v output holds little of the
    noise, so the figures of models with different predictions are not comparable.

    Args:
        unet: the prior's UNet; it is as before afterwards.
        constants: F_null by block name, (C,).
        empty: conditions of the empty prompt.
        noised: batches of x and t.

    Returns: the bins that a sample fell into, by timestep.
    """
    width = TIMESTEPS // BINS
    sums = torch.zeros(BINS, 3, dtype=torch.float64)  # samples, squared difference, squared reference
    for x, t in noised:
        reference = predict(unet, x, t, empty).double()
        with null_text_blocks(unet, constants):
            difference = predict(unet, x, t, empty).double() - reference
        squares = (value.square().sum(dim=(1, 2, 3)).cpu() for value in (difference, reference))
        bins = (t.cpu() // width).long().clamp(max=BINS - 1)
        sums.index_add_(0, bins, torch.stack((torch.ones(len(x), dtype=torch.float64), *squares), dim=1))
    return [
        DriftRow(i * width, (i + 1) * width - 1, int(samples), (difference / reference) ** 0.5)
        for i, (samples, difference, reference) in enumerate(sums.tolist())
        if samples
    ]


def drift_table(rows: Iterable[DriftRow]) -> str:
    """Return the rows as lines for a person to read."""
    head = "timesteps  distance from the prior's empty-prompt prediction (0: the same)"
    return "\n".join([head, *(f"{row.first:>4}-{row.last:<4}  {row.distance:.4f}" for row in rows)])
