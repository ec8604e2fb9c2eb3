"""One guidance of the sum: a weight, and what is weighted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .curves import CONSTANT, WeightCurve, check_weight
from .errors import GuidanceError, short
from .guidance_cache import CacheRule
from .masks import check_mask
from .relations import Relation

MAX_LABEL = 200  # characters; it is in every message to the editor


@dataclass(frozen=True, eq=False)
class GuidanceTerm:
    """One weighted guidance delta, w_i (D_i - R_i): with R_i = D_0 that of Eq. 3 of Cao et al. 2023.

    Where a relative model or conditioning is given, R_i is its prediction: of the term's own model with that
    conditioning, of that model with the term's conditioning, or of both.

    Attributes:
        weight: guidance weight w_i, -100 to 100; negative pushes away.
        start_percent: where in the sampling the term begins to act, 0 (pure noise) to 1 (clean).
        end_percent: where it stops, at least `start_percent`; there it acts no more, but for 1, the very end.
        model: the model that predicts it, or None for the unconditional model. Opaque to this library.
        conditioning: its conditioning, or None for the unconditional one. Opaque to this library.
        mask: where the delta acts: (N, H, W) in [0, 1], or None for everywhere; kept as one mask per stream.
        label: the user's name for it, as `label_text` shows it.
        curve: how the weight changes between start and end; constant by default.
        cache_rule: when its delta is carried on in place of being evaluated; None, the default: never.
        stream_weights: factors of the weight by the stream of a latent that holds several, such as video and audio.
        relations: what its delta is changed by, where it looks at other terms.
        relative_model: the model that predicts R_i, or None. Opaque to this library.
        relative_conditioning: the conditioning of R_i, or None. Opaque to this library.

    Raises:
        GuidanceError: if the weight is outside -100..100, a percent outside 0..1, start is after end, or the mask is no
            mask.
    """

    weight: float
    start_percent: float = 0.0
    end_percent: float = 1.0
    model: Any = None
    conditioning: Any = None
    mask: Any = None
    label: str = ""
    curve: WeightCurve = CONSTANT
    cache_rule: CacheRule | None = None
    stream_weights: Mapping[str, float] = field(default_factory=dict)
    relative_model: Any = None
    relative_conditioning: Any = None
    relations: tuple[Relation, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", label_text(self.label))
        name = f"Guidance Term '{self.label}'" if self.label else "Guidance Term"
        check_weight(self.weight, f"{name}: weight")
        for percent in ("start_percent", "end_percent"):
            if not 0.0 <= getattr(self, percent) <= 1.0:
                raise GuidanceError(
                    f"{name}: {percent} is {getattr(self, percent):g}, expected 0 (pure noise) to 1 (the clean image); "
                    f"correct it."
                )
        if self.start_percent > self.end_percent:
            raise GuidanceError(
                f"{name}: start_percent is {self.start_percent:g} and end_percent is {self.end_percent:g}, expected "
                f"start_percent <= end_percent; swap them."
            )
        if self.mask is not None:
            object.__setattr__(self, "mask", check_mask(self.mask, name))

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """A mask (N, H, W) for each of the first streams of the latent."""
        return self.mask or ()

    @property
    def everywhere(self) -> bool:
        """Whether it acts on the whole latent alike."""
        return not self.masks and not self.stream_weights

    @property
    def relative(self) -> bool:
        """Whether its delta is measured from a prediction of its own, R_i, and not from the base."""
        return self.relative_model is not None or self.relative_conditioning is not None

    @property
    def pulls(self) -> bool:
        """Whether its weight is anywhere other than 0."""
        return self.curve.pulls(self.weight)

    def weight_at(self, percent: float) -> float:
        """The weight at `percent` of the sampling, 0 (pure noise) to 1 (clean); 0 outside its interval."""
        ended = percent >= self.end_percent and self.end_percent < 1.0
        if percent < self.start_percent or ended:
            return 0.0
        return self.curve.at(percent, self.weight, self.start_percent, self.end_percent)


def find_term(terms: Sequence[GuidanceTerm], label: str, name: str) -> int:
    """The place of the one term of this label.

    Args:
        terms: all terms of the run.
        label: the label; a term without one is called by its place, "1", "2" ...
        name: node and input, for errors.

    Raises:
        GuidanceError: if no term or more than one has it.
    """
    labels = [term.label or str(place) for place, term in enumerate(terms, start=1)]
    label = label_text(label)
    found = [index for index, other in enumerate(labels) if other == label]
    if len(found) != 1:
        how_many = "no connected term has" if not found else f"{len(found)} connected terms have"
        raise GuidanceError(
            f"{name} is '{label}', and {how_many} that label, expected exactly one of {', '.join(map(repr, labels))}; "
            f"{'give each Guidance Term its own label' if found else 'correct it'}."
        )
    return found[0]


def looked_at(terms: Sequence[GuidanceTerm]) -> dict[str, int]:
    """The places of the terms that relations look at, by their labels.

    Raises:
        GuidanceError: if a relation names no term, or the term itself.
    """
    found: dict[str, int] = {}
    for place, term in enumerate(terms):
        for against in filter(None, (relation.against for relation in term.relations)):
            found[against] = find_term(terms, against, "Guidance Relation: against")
            if found[against] == place:
                raise GuidanceError(
                    f"Guidance Relation: against is '{short(against)}', the label of the term that has the relation, "
                    f"expected another term's; correct it."
                )
    return found


def label_text(label: str) -> str:
    """A label as messages, charts and logs show it: on one line, without what they trip over, not too long."""
    return short(label, MAX_LABEL)
