"""The equation: a weighted sum of guidance deltas around one unconditional prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from .errors import GuidanceError
from .masks import repeated
from .plan import WEIGHT_TOLERANCE, ActiveTerm, needs_base, total_weight


class ShapeError(GuidanceError):
    """Predictions that are to be combined have different shapes."""


class Delta(NamedTuple):
    """What one term adds to the sum at one noise level, w_i m_i (D_i - R_i), in its parts.

    Attributes:
        prediction: D_i, (B, C, *spatial).
        term: its weight, mask and label.
        reference: R_i, what a relative term's delta is measured from, of the same shape; None: the base.
    """

    prediction: Tensor
    term: ActiveTerm
    reference: Tensor | None = None


def combine(base: Tensor | None, deltas: Sequence[Delta]) -> Tensor:
    """Weighted guidance sum around one unconditional prediction.

        denoised = base + sum_i w_i m_i (D_i - R_i),   R_i = base unless given    # GCFG, Cao et al. 2023, Eq. 3

    The coefficients sum to one, so the same formula holds for `denoised` and for `eps` at one `x` and `sigma`, and any
    prediction may be the base. Where the unconditional one's coefficient, `1 - sum_i w_i` over the terms that are
    measured from it, is 0 it is not needed, and the prediction of the smallest weight among them is the base, which
    makes two terms of weights `w` and `1 - w` exactly stock classifier-free guidance with a negative prompt (Eq. 7).

    Args:
        base: unconditional prediction, (B, C, *spatial), or None where its coefficient is 0.
        deltas: one per term; a mask scales the *delta* of its term.

    Returns:
        The combined prediction, (B, C, *spatial).

    Raises:
        ShapeError: if shapes differ; names the term's label.
        GuidanceError: if there is nothing to combine, or the base is missing although it is needed.
    """
    measured_from, added = _base_of(base, deltas)
    _check_shapes(measured_from, deltas)
    return _sum(measured_from, ((difference(one, measured_from), one.term.weight) for one in added))


def effective_cond(base: Tensor, deltas: Sequence[Delta], weight: float | None = None) -> tuple[Tensor, float]:
    """The one conditional prediction and scale that stand for all terms in classifier-free guidance.

        cond = base + sum_i (w_i / W) m_i (D_i - R_i)           # W = sum_i w_i is the scale, and
        base + W (cond - base)                                  # is Eq. 3 again

    Hooks written for two predictions (rescale, thresholding, perturbed attention) see these. W is over the terms that
    are measured from the base, so that a relative term changes the conditional prediction and not the scale. Where the
    weights cancel (W is about 0) the scale is 1 and `cond` carries the whole sum.

    Args:
        base: unconditional prediction, (B, C, *spatial).
        deltas: one per term.
        weight: W, where it is not the sum of these weights (a term's own rule has its weight in its prediction).

    Returns:
        `cond` of the base's shape, and the scale.

    Raises:
        ShapeError: if shapes differ; names the term's label.
    """
    _check_shapes(base, deltas)
    weight = total_weight([one.term for one in deltas]) if weight is None else weight
    if len(deltas) == 1:
        prediction, term, reference = deltas[0]
        if reference is None and term.mask is None and term.weight == weight:
            return prediction, weight
    scale = weight if abs(weight) > WEIGHT_TOLERANCE else 1.0
    return _sum(base, ((difference(one, base), one.term.weight / scale) for one in deltas)), scale


def difference(delta: Delta, base: Tensor) -> Tensor:
    """A term's unweighted delta, m_i (D_i - R_i): a new tensor of the predictions' shape.

    Args:
        delta: of the term.
        base: R_i where the term has no reference of its own.
    """
    prediction, term, reference = delta
    out = prediction - (base if reference is None else reference)
    return out if term.mask is None else out.mul_(repeated(term.mask, len(out)).to(out))


def _sum(base: Tensor, deltas: Iterable[tuple[Tensor, float]]) -> Tensor:
    """`base + sum_i w_i delta_i`, written into the deltas; the base is only read.

    Each product and each sum is rounded by itself, as in stock guidance: `add(..., alpha=w)`, `addcmul` and `lerp`
    would save a pass and round otherwise.
    """
    total: Tensor | None = None
    for step, weight in deltas:
        step.mul_(weight)
        total = step.add_(base) if total is None else total.add_(step)
    return base if total is None else total


def base_index(terms: Sequence[ActiveTerm]) -> int:
    """The term that deltas are measured from where there is no unconditional prediction.

    It is the one of the smallest weight that is not relative; of equal weights the later one, which is the negative
    prompt where users write one.
    """
    return min((i for i, term in enumerate(terms) if not term.relative), key=lambda i: (terms[i].weight, -i))


def pair(terms: Sequence[ActiveTerm]) -> tuple[ActiveTerm, ActiveTerm] | None:
    """The positive and the negative of two terms that are stock guidance with a negative prompt; None for others.

    D_neg + w (D_pos - D_neg) = w D_pos + (1 - w) D_neg         # Eq. 7, weights w and 1 - w, no masks
    """
    if len(terms) != 2 or any(term.relative or term.weight == 0.0 for term in terms) or needs_base(terms):
        return None
    negative = base_index(terms)
    return terms[1 - negative], terms[negative]


def _base_of(base: Tensor | None, deltas: Sequence[Delta]) -> tuple[Tensor, Sequence[Delta]]:
    """The prediction that deltas are measured from, and what is left to add."""
    if base is not None:
        return base, deltas
    if not deltas:
        raise GuidanceError("combine: nothing to combine, expected a base or at least one prediction, got neither.")
    terms = [one.term for one in deltas]
    if needs_base(terms):
        raise GuidanceError(
            f"combine: base is None, expected a prediction because its coefficient is not 0 everywhere "
            f"(the unmasked weights sum to {total_weight(terms):g}); evaluate the unconditional model."
        )
    lowest = base_index(terms)
    return deltas[lowest].prediction, [*deltas[:lowest], *deltas[lowest + 1 :]]


def _check_shapes(base: Tensor, deltas: Sequence[Delta]) -> None:
    for prediction, term, reference in deltas:
        for found in (prediction, prediction if reference is None else reference):
            if found.shape != base.shape:
                raise ShapeError(
                    f"Guidance Term '{term.label}': prediction has shape {tuple(found.shape)}, expected "
                    f"{tuple(base.shape)} like the unconditional model's; use models of one latent family."
                )
