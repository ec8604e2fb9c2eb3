"""How a term's weight changes over the sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from .errors import GuidanceError, short

CURVES = ("constant", "linear", "cosine", "points")
MAX_WEIGHT = 100.0  # either way
MAX_POINTS = 100
MAX_NUMBER = 40  # characters

_BISECTIONS = 24  # a percent to within 6e-8


@dataclass(frozen=True)
class WeightCurve:
    """The shape of a weight between its term's start and end.

        constant    w(p) = weight
        linear      w(p) = weight + (end_weight - weight) t           # t = (p - start) / (end - start)
        cosine      w(p) = weight + (end_weight - weight) (1 - cos(pi t)) / 2
        points      w(p) = straight lines through (percent, weight); level before the first and after the last

    Attributes:
        kind: one of `CURVES`.
        end_weight: the weight at the end of a linear or cosine curve, -100 to 100.
        points: (percent, weight) pairs of rising percent in 0..1, at least one where `kind` is "points".
    """

    kind: str = "constant"
    end_weight: float = 0.0
    points: tuple[tuple[float, float], ...] = ()

    def at(self, percent: float, weight: float, start: float, end: float) -> float:
        """The weight at `percent` of the sampling, for a term of this weight that acts from `start` to `end`."""
        if self.kind == "constant":
            return weight
        if self.kind == "points":
            return _through(self.points, percent)
        t = min(max((percent - start) / (end - start), 0.0), 1.0) if end > start else 0.0
        if self.kind == "cosine":
            t = (1.0 - math.cos(math.pi * t)) / 2.0
        return weight + (self.end_weight - weight) * t

    def pulls(self, weight: float) -> bool:
        """Whether the weight is anywhere other than 0."""
        if self.kind == "points":
            return any(value != 0.0 for _, value in self.points)
        return weight != 0.0 or (self.kind != "constant" and self.end_weight != 0.0)


CONSTANT = WeightCurve()


def make_curve(kind: str, end_weight: float, points: str, name: str) -> WeightCurve:
    """The curve that a node's widgets describe; what its kind does not use is not looked at.

    Args:
        kind: one of `CURVES`.
        end_weight: for linear and cosine.
        points: for points, such as `0: 7.5, 0.5: 3, 100%: 0`.
        name: the node, for errors.

    Raises:
        GuidanceError: if the kind is unknown, the end weight is outside -100..100, or the points cannot be read.
    """
    if kind not in CURVES:
        raise GuidanceError(f"{name}: curve is '{short(kind)}', expected one of {', '.join(CURVES)}; choose one.")
    if kind == "points":
        return WeightCurve(kind, points=parse_points(points, name))
    if kind == "constant":
        return CONSTANT
    check_weight(end_weight, f"{name}: end_weight")
    return WeightCurve(kind, end_weight)


def check_weight(weight: float, name: str) -> None:
    """Refuse a weight beyond what an image can bear, and one that is no number.

    Args:
        weight: of a guidance.
        name: node and input, for the error.

    Raises:
        GuidanceError: if it is not within -100..100.
    """
    if not abs(weight) <= MAX_WEIGHT:
        raise GuidanceError(
            f"{name} is {weight}, expected a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}; type one, such as 1.5."
        )


def parse_points(text: str, name: str) -> tuple[tuple[float, float], ...]:
    """Read `percent: weight` pairs, separated by commas or lines; a percent is 0..1, or 0%..100%.

    Args:
        text: such as `0: 7.5, 0.5: 3, 100%: 0`.
        name: the node, for errors.

    Raises:
        GuidanceError: if there is no pair, more than `MAX_POINTS`, one cannot be read, a weight is outside -100..100,
            or percents do not rise; names the pair.
    """
    pairs = [pair.strip() for pair in text.replace("\n", ",").split(",")]
    points: list[tuple[float, float]] = []
    for number, pair in enumerate(filter(None, pairs), start=1):
        if number > MAX_POINTS:
            raise GuidanceError(f"{name}: points has more than {MAX_POINTS} pairs, expected fewer; take some out.")
        percent, colon, weight = pair.partition(":")
        point = (_percent(percent), read_number(weight))
        where = f"{name}: points: pair {number} is '{short(pair)}'"
        if not colon or not all(map(math.isfinite, point)):
            raise GuidanceError(f"{where}, expected percent: weight, such as 0.5: 3; correct it.")
        if not 0.0 <= point[0] <= 1.0:
            raise GuidanceError(f"{where}, expected a percent from 0 to 1 (or 0% to 100%); correct it.")
        check_weight(point[1], f"{name}: points: the weight of pair {number}")
        if points and point[0] <= points[-1][0]:
            raise GuidanceError(f"{where}, expected a percent above {points[-1][0]:g}; sort the pairs.")
        points.append(point)
    if not points:
        raise GuidanceError(f"{name}: points is empty, expected percent: weight pairs, such as 0: 7.5, 1: 0; add some.")
    return tuple(points)


def percent_at(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The percent of the sampling at which a model has this noise level: the inverse of `percent_to_sigma`.

    Args:
        sigma: noise level.
        percent_to_sigma: ComfyUI's convention, falling from the largest sigma at 0 to 0 at 1.
    """
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if float(percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return high


def _through(points: tuple[tuple[float, float], ...], percent: float) -> float:
    if percent <= points[0][0]:
        return points[0][1]
    for (p0, w0), (p1, w1) in pairwise(points):
        if percent <= p1:
            return w0 + (w1 - w0) * (percent - p0) / (p1 - p0)
    return points[-1][1]


def _percent(text: str) -> float:
    text = text.strip()
    return read_number(text[:-1]) / 100.0 if text.endswith("%") else read_number(text)


def read_number(text: str) -> float:
    """The number that a text is; NaN where it is none, or longer than `MAX_NUMBER` characters."""
    if len(text.strip()) > MAX_NUMBER:
        return math.nan
    try:
        return float(text)
    except ValueError:
        return math.nan
