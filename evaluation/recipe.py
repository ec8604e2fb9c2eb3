"""A recipe: how a method makes images, with the equation of the nodes, and what its terms read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Annotated

from pydantic import Field

from ..gcfg.errors import GuidanceError
from ..training.config import Section

PRIOR = "prior"  # the model that every config has
SEPARATOR = " | "  # between the parts of a task's prompt

Weight = float | Annotated[tuple[float, ...], Field(min_length=1)]


class Term(Section):
    """One guidance: w (model(prompt) - base)."""

    model: str = Field(PRIOR, description="Name below [models], or 'prior'.")
    prompt: str = Field(
        "",
        description="What the model reads; '{prompt}' gives way to the task's prompt, '{part1}' and '{part2}' to the "
        f"parts that '{SEPARATOR}' separates in it.",
    )
    weight: Weight = Field(1.0, description="Guidance weight, or a list of weights to search.")
    control: bool = Field(False, description="Apply the ControlNet to this term.")
    label: str = Field("", description="Name of the term in tables and plots.")

    @property
    def weights(self) -> tuple[float, ...]:
        """All weights to search, or the one."""
        return self.weight if isinstance(self.weight, tuple) else (self.weight,)

    def reads(self, prompt: str) -> str:
        """Return what the model reads for a task's prompt; the whole prompt has ', ' between its parts.

        Raises: GuidanceError: if the prompt has fewer parts than the term asks for.
        """
        parts = prompt.split(SEPARATOR)
        text = self.prompt.replace("{prompt}", ", ".join(parts))
        for number, part in enumerate(parts, 1):
            text = text.replace(f"{{part{number}}}", part)
        if re.search(r"{part\d+}", text):
            raise GuidanceError(
                f"A term's prompt is {self.prompt!r}, but the task's prompt {prompt!r} has {len(parts)} part(s), "
                f"expected more; separate them by '{SEPARATOR}'."
            )
        return text


class Recipe(Section):
    """How a method makes images: denoised = base(unconditional) + sum_i w_i (term_i - base)."""

    base: str = Field(PRIOR, description="The unconditional model: a name below [models], or 'prior'.")
    unconditional: str = Field("", description="The unconditional prompt.")
    terms: tuple[Term, ...] = Field((), description="The guidances; none: the base alone.")

    @property
    def searched(self) -> tuple[int, ...]:
        """Places of the terms whose weight is a list."""
        return tuple(place for place, term in enumerate(self.terms) if isinstance(term.weight, tuple))

    @property
    def models(self) -> dict[str, str]:
        """The names of its models, by the keys that name them."""
        return {"base": self.base} | {f"terms.{place}.model": term.model for place, term in enumerate(self.terms)}

    def grid(self) -> list[tuple[float, ...]]:
        """Return all combinations of its weights."""
        return list(product(*(term.weights for term in self.terms)))

    def weighted(self, weights: Sequence[float]) -> Recipe:
        """Return it with one weight for each term."""
        terms = (term.model_copy(update={"weight": w}) for term, w in zip(self.terms, weights, strict=True))
        return self.model_copy(update={"terms": tuple(terms)})
