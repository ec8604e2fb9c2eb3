"""Relations between terms: what a term adds where it looks at what other terms add.

A relation sees deltas as they were evaluated, never as another term's relation left them, so the order of terms does
not matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import GuidanceError

MAX_AMOUNT = 100.0


@dataclass(frozen=True)
class Relation(ABC):
    """One relation of one term.

    Attributes:
        against: the label of the term that it looks at; "" for all others together.
        amount: how much, 0 to 100; what of, its class says.

    Raises:
        GuidanceError: if the amount is out of its range.
    """

    name: ClassVar[str]
    against: str = ""
    amount: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.amount <= MAX_AMOUNT:
            raise GuidanceError(f"Guidance Relation: amount is {self.amount:g}, expected 0 to 100; correct it.")

    @abstractmethod
    def applied(self, own: Tensor, other: Tensor, sigma: float) -> Tensor:
        """What the term adds in place of `own`.

        Args:
            own: its weighted delta, w_i m_i (D_i - R_i), (B, C, *spatial); only read.
            other: that of the term (or the sum of those of the terms) that it looks at, of the same shape.
            sigma: noise level, above 0.
        """


class Perpendicular(Relation):
    """Take out what lies along another term (Perp-Neg, Armandpour et al. 2023, arXiv 2304.04968, Eq. 5).

        own' = own - amount <own, other> / |other|^2 other          # for each sample

    So a negative prompt that shares something with the positive one does not take it away. `amount` 1 takes out all.
    """

    name = "perpendicular"

    def applied(self, own: Tensor, other: Tensor, sigma: float) -> Tensor:
        """See `Relation`."""
        along = _dot(own, other) / _dot(other, other).clamp_min(torch.finfo(torch.float32).tiny)
        return own - (self.amount * along * _wide(other)).to(own)


class Limit(Relation):
    """Let a term pull at most `amount` times as strongly as another one.

    own' = own min(1, amount |other| / |own|)                   # for each sample
    """

    name = "limit"

    def applied(self, own: Tensor, other: Tensor, sigma: float) -> Tensor:
        """See `Relation`."""
        ratio = _dot(other, other).sqrt() / _dot(own, own).sqrt()
        return own * (self.amount * ratio).nan_to_num(1.0).clamp_max(1.0).to(own)


class Saliency(Relation):
    """Let a term act only where it is what stands out (saliency-adaptive noise fusion, Wang et al. 2023, 2311.10329).

        S(d) = softmax over positions of blur(mean over channels of |d / sigma|)
        own' = own where S(own) >= amount S(other), else 0          # for each sample

    With `amount` 1 two terms that look at each other divide the picture between them.
    """

    name = "saliency"

    def applied(self, own: Tensor, other: Tensor, sigma: float) -> Tensor:
        """See `Relation`."""
        return own * (_salience(own, sigma) >= self.amount * _salience(other, sigma)).to(own)


RELATIONS: dict[str, type[Relation]] = {relation.name: relation for relation in (Perpendicular, Limit, Saliency)}


def related(relations: Sequence[Relation], own: Tensor, others: Sequence[Tensor | None], sigma: float) -> Tensor:
    """What a term adds after all of its relations, in their order.

    Args:
        relations: of the term.
        own: its weighted delta, (B, C, *spatial).
        others: what each looks at; None where that term does not act, so that the relation rests.
        sigma: noise level.
    """
    for relation, other in zip(relations, others, strict=True):
        if other is not None and sigma > 0.0:
            own = relation.applied(own, other, sigma)
    return own


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample: (B, 1, ...)."""
    return (_wide(a) * _wide(b)).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def _wide(values: Tensor) -> Tensor:
    """In float32 at least, so that squares of half precision do not overflow."""
    return values if values.dtype == torch.float64 else values.float()


def _salience(delta: Tensor, sigma: float) -> Tensor:
    """(B, 1, *spatial), of sum 1 for each sample."""
    strength = (_wide(delta) / sigma).abs().mean(dim=1, keepdim=True)
    size = strength.shape[2:]
    blurred = _blurred(strength.reshape(-1, 1, *size[-2:])) if len(size) > 1 else strength
    return blurred.reshape(len(delta), -1).softmax(dim=1).reshape(strength.shape)


def _blurred(pictures: Tensor) -> Tensor:
    """Means of 3 x 3 positions; at the border of those that there are. (N, 1, h, w)."""
    return F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
