"""Which predictions of one model are evaluated in which call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Call = tuple[list[str], str | None]  # the conditional predictions, and the unconditional one beside them


class Around(NamedTuple):
    """What predictions are measured from.

    Attributes:
        base: the key of the base: of the unconditional itself, or of a pair's negative term.
        references: the key of each relative term's prediction, and of the one that it is measured from.
        terms: the keys of what the terms predict.
    """

    base: str
    references: Sequence[tuple[str, str]] = ()
    terms: Collection[str] = ()


def calls(keys: Sequence[str], around: Around, beside: str | None, batches: bool, reads_index: bool) -> list[Call]:
    """The calls that evaluate these predictions, as few as may be.

    Args:
        keys: which.
        around: what each is measured from, which counts as the unconditional prediction of its call.
        beside: the unconditional prediction that a call wants beside it where the base is not among the keys.
        batches: whether one call may hold several conditional predictions.
        reads_index: whether something of the model has to see every prediction beside what it is measured from.
    """
    uncond = around.base if around.base in keys else beside
    terms = [key for key in keys if key != around.base]
    if len(terms) < 2 or batches:
        return [(terms, uncond)]
    # One by one, each beside what it is measured from, as stock guidance evaluates two.
    pairs = [(key, other) for key, other in around.references if key in terms and other in terms]
    references = {other for _, other in pairs}
    terms = [key for key in terms if key in around.terms or key not in references]
    found: list[Call] = []
    known: set[str | None] = set(terms)
    for key in terms:
        for number, other in enumerate([other for own, other in pairs if own == key] or [uncond]):
            if reads_index:  # also where one of the two is known
                found.append(([key], other))
            elif number == 0 or other not in known:
                found.append(([key] if number == 0 else [], None if other in known else other))
            known.add(other)
    if uncond in keys and uncond not in known:
        found.append(([], uncond))
    return found


def with_stock_indices(options: dict[str, Any], uncond: int | None) -> dict[str, Any]:
    """Options under which patches see only the indices they know: 0 for every term, 1 for the unconditional.

    Args:
        options: a model's options.
        uncond: the unconditional's place among the conditionings of the call, if it is among them.
    """
    previous = options.get("model_function_wrapper")

    def call(apply_model: Any, args: dict[str, Any]) -> Tensor:
        indices = [1 if index == uncond else 0 for index in args["cond_or_uncond"]]
        args["cond_or_uncond"] = indices
        args["c"]["transformer_options"]["cond_or_uncond"] = indices[:]
        if previous is not None:
            return previous(apply_model, args)
        return apply_model(args["input"], args["timestep"], **args["c"])

    return {**options, "model_function_wrapper": call}
