"""The cells of a weight sweep: which weights are tried, in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .curves import check_weight, read_number
from .errors import GuidanceError, short
from .terms import GuidanceTerm, find_term, label_text

MAX_CELLS = 400


@dataclass(frozen=True)
class SweptTerm:
    """A term and the weights that it takes.

    Attributes:
        index: its place among the terms.
        label: its label.
        weights: the weights, in the order of the user's list.
    """

    index: int
    label: str
    weights: tuple[float, ...]


def parse_weights(text: str, name: str) -> tuple[float, ...]:
    """Read a list of weights: numbers and ranges `start:stop:step` (stop included), separated by commas.

    Args:
        text: such as `0, 1.5, 3` or `0:2:0.25`.
        name: node and input, for errors.

    Raises:
        GuidanceError: if the list is empty, longer than `MAX_CELLS`, or something in it is neither a number within
            -100..100 nor a range.
    """
    weights: list[float] = []
    for part in filter(None, (part.strip() for part in text.replace("\n", ",").split(","))):
        numbers, where = [read_number(number) for number in part.split(":", 3)], f"{name}: '{short(part)}'"
        if not all(map(math.isfinite, numbers)) or len(numbers) not in (1, 3):
            raise GuidanceError(f"{where}, expected a number such as 1.5, or a range such as 0:2:0.25; correct it.")
        for number in numbers[:2]:
            check_weight(number, f"{name}: a weight of '{short(part)}'")
        weights += numbers if len(numbers) == 1 else _range(numbers, where)
        if len(weights) > MAX_CELLS:
            raise GuidanceError(f"{name} has more than {MAX_CELLS} weights, expected fewer; take some out.")
    if not weights:
        raise GuidanceError(
            f"{name} is empty, expected weights such as 0, 1.5, 3 or a range such as 0:2:0.25; add some."
        )
    return tuple(weights)


def find_swept(terms: Sequence[GuidanceTerm], label: str, name: str) -> int:
    """The place of the one term of this label, if its weight can be swept.

    Args:
        terms: all terms of the run.
        label: the label; a term without one is called by its place, "1", "2" ...
        name: node and input, for errors.

    Raises:
        GuidanceError: if no term or more than one has it, or its weight follows a list of points.
    """
    place = find_term(terms, label, name)
    if terms[place].curve.kind == "points":
        raise GuidanceError(
            f"{name} is '{label_text(label)}', whose weight follows a list of points, expected a constant, linear or "
            f"cosine curve whose weight can be replaced; choose another curve there."
        )
    return place


def cell_terms(terms: Sequence[GuidanceTerm], swept: Sequence[SweptTerm]) -> list[tuple[GuidanceTerm, ...]]:
    """The terms of every cell, row by row: the first swept term changes along a row, the second from row to row.

    Raises:
        GuidanceError: if there are more than `MAX_CELLS` cells.
    """
    count = math.prod(len(term.weights) for term in swept)
    if count > MAX_CELLS:
        raise GuidanceError(f"Weight Sweep: {count} cells, expected at most {MAX_CELLS}; shorten the lists of weights.")
    cells: list[tuple[GuidanceTerm, ...]] = [tuple(terms)]
    for term in reversed(swept):  # the last one varies slowest
        cells = [_with_weight(cell, term.index, weight) for cell in cells for weight in term.weights]
    return cells


def _with_weight(terms: tuple[GuidanceTerm, ...], index: int, weight: float) -> tuple[GuidanceTerm, ...]:
    return (*terms[:index], replace(terms[index], weight=weight), *terms[index + 1 :])


def _range(numbers: Sequence[float], where: str) -> list[float]:
    start, stop, step = numbers
    count = (stop - start) / step if step != 0.0 else -1.0
    if count < 0.0:
        raise GuidanceError(f"{where}, expected start:stop:step with a step that leads from start to stop; correct it.")
    if count > MAX_CELLS:
        raise GuidanceError(f"{where} is more than {MAX_CELLS} weights, expected fewer; take a larger step.")
    return [round(start + number * step, 9) for number in range(int(count + 1e-9) + 1)]
