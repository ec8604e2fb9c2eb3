"""The equation: a weighted sum of guidance deltas around one unconditional prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from .errors import GuidanceError
from .masks import repeated
from .plan import WEIGHT_TOLERANCE, ActiveTerm, needs_base, total_weight


class ShapeError(GuidanceError):
    """Predictions that are to be combined have different shapes."""


def combine(base: Tensor | None, predictions: Sequence[Tensor], terms: Sequence[ActiveTerm]) -> Tensor:
    """Weighted guidance sum around one unconditional prediction.

        denoised = base + sum_i w_i m_i (terms_i - base)        # GCFG, Cao et al. 2023, Eq. 3

    The coefficients sum to one, so the same formula holds for `denoised` and for `eps` at one `x` and `sigma`, and any
    prediction may be the base. Where the unconditional one's coefficient `1 - sum_i w_i` is 0 it is not needed, and the
    prediction of the smallest weight is the base, which makes two terms of weights `w` and `1 - w` exactly stock
    classifier-free guidance with a negative prompt (Eq. 7).

    Args:
        base: unconditional prediction, (B, C, *spatial), or None where its coefficient is 0.
        predictions: one conditional prediction per term, each of the base's shape.
        terms: weight, mask and label of each prediction; a mask scales the *delta* of its term.

    Returns:
        The combined prediction, (B, C, *spatial).

    Raises:
        ShapeError: if shapes differ; names the term's label.
        GuidanceError: if there is nothing to combine, or the base is missing although it is needed.
    """
    measured_from, deltas = _base_of(base, predictions, terms)
    _check_shapes(measured_from, predictions, terms)
    return _sum(measured_from, ((delta(prediction, measured_from, term), term.weight) for prediction, term in deltas))


def effective_cond(
    base: Tensor, predictions: Sequence[Tensor], terms: Sequence[ActiveTerm], weight: float | None = None
) -> tuple[Tensor, float]:
    """The one conditional prediction and scale that stand for all terms in classifier-free guidance.

        cond = base + sum_i (w_i / W) m_i (terms_i - base)      # W = sum_i w_i is the scale, and
        base + W (cond - base)                                  # is Eq. 3 again

    Hooks written for two predictions (rescale, thresholding, perturbed attention) see these. Where the weights cancel
    (W is about 0) the scale is 1 and `cond` carries the whole sum.

    Args:
        base: unconditional prediction, (B, C, *spatial).
        predictions: one conditional prediction per term.
        terms: weight, mask and label of each prediction.
        weight: W, where it is not the sum of these weights (a term's own rule has its weight in its prediction).

    Returns:
        `cond` of the base's shape, and the scale.

    Raises:
        ShapeError: if shapes differ; names the term's label.
    """
    _check_shapes(base, predictions, terms)
    weight = total_weight(terms) if weight is None else weight
    if len(terms) == 1 and terms[0].mask is None and terms[0].weight == weight:
        return predictions[0], weight
    scale = weight if abs(weight) > WEIGHT_TOLERANCE else 1.0
    pairs = zip(predictions, terms, strict=True)
    return _sum(base, ((delta(prediction, base, term), term.weight / scale) for prediction, term in pairs)), scale


def delta(prediction: Tensor, base: Tensor, term: ActiveTerm) -> Tensor:
    """A term's unweighted delta, m_i (D_i - D_0): a new tensor of the predictions' shape."""
    difference = prediction - base
    return difference if term.mask is None else difference.mul_(repeated(term.mask, len(difference)).to(difference))


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

    It is the one of the smallest weight; of equal weights the later one, which is the negative prompt where users
    write one.
    """
    return min(range(len(terms)), key=lambda i: (terms[i].weight, -i))


def pair(terms: Sequence[ActiveTerm]) -> tuple[ActiveTerm, ActiveTerm] | None:
    """The positive and the negative of two terms that are stock guidance with a negative prompt; None for others.

    D_neg + w (D_pos - D_neg) = w D_pos + (1 - w) D_neg         # Eq. 7, weights w and 1 - w, no masks
    """
    if len(terms) != 2 or needs_base(terms):
        return None
    negative = base_index(terms)
    return terms[1 - negative], terms[negative]


def _base_of(
    base: Tensor | None, predictions: Sequence[Tensor], terms: Sequence[ActiveTerm]
) -> tuple[Tensor, list[tuple[Tensor, ActiveTerm]]]:
    """The prediction that deltas are measured from, and the (prediction, term) pairs left to add."""
    pairs = list(zip(predictions, terms, strict=True))
    if base is not None:
        return base, pairs
    if not pairs:
        raise GuidanceError("combine: nothing to combine, expected a base or at least one prediction, got neither.")
    if abs(total_weight(terms) - 1.0) > WEIGHT_TOLERANCE or any(term.mask is not None for term in terms):
        raise GuidanceError(
            f"combine: base is None, expected a prediction because its coefficient is not 0 everywhere "
            f"(the unmasked weights sum to {total_weight(terms):g}); evaluate the unconditional model."
        )
    lowest = base_index(terms)
    return predictions[lowest], pairs[:lowest] + pairs[lowest + 1 :]


def _check_shapes(base: Tensor, predictions: Sequence[Tensor], terms: Sequence[ActiveTerm]) -> None:
    for prediction, term in zip(predictions, terms, strict=True):
        if prediction.shape != base.shape:
            raise ShapeError(
                f"Guidance Term '{term.label}': prediction has shape {tuple(prediction.shape)}, expected "
                f"{tuple(base.shape)} like the unconditional model's; use models of one latent family."
            )
