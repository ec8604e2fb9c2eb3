"""The page's pictures: plots of the numbers, and sheets of generated images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log, log10
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ...gcfg.errors import GuidanceError
from ...training.picture_grid import labelled_grid
from ..config import METHODS
from ..images import picture, read_image_of
from ..results import Result, Results, Sweep
from . import words

_MARKED, _OTHERS = "#d55e00", "#0072b2"  # told apart by colour-blind people too
_DPI = 110
_COLUMNS = 10  # of a sheet
_SIDE = 72  # pixels of an image on a sheet, so that it fits a page

# (title, FID, alignment, trained parameters, whether it is marked)
Point = tuple[str, float, float, float, bool]


def tradeoff_points(results: Results, marked: str = "") -> list[Point]:
    """Return the methods of the tables that have both numbers, one of them marked."""
    points = []
    for method in results.of_group(METHODS):
        fid, aligned = results.number("fid", method, "fid"), results.number("alignment", method, "alignment")
        if fid is not None and aligned is not None:
            size = results.parameters(method) or 0
            points.append((results.title(method), fid, aligned, float(size), method == marked))
    return points


def draw_tradeoff(results: Results, path: Path) -> None:
    """Fidelity against control."""
    draw_panels({"": tradeoff_points(results)}, path)


def draw_panels(panels: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Fidelity against control, a panel for each title."""
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _scatter(axes, points, title)
    _save(figure, path)


def _scatter(axes: Axes, points: Sequence[Point], title: str) -> None:
    for place, (name, fid, aligned, size, marked) in enumerate(sorted(points, key=lambda point: point[1])):
        x = -log(fid / 100)
        diameter = 5 + 2.2 * log10(1 + size)
        axes.plot(x, aligned, "o", markersize=diameter, alpha=0.75, color=_MARKED if marked else _OTHERS)
        side = 1 if place % 2 == 0 else -1  # neighbours' names above and below
        axes.annotate(
            name,
            (x, aligned),
            xytext=(0, side * (diameter / 2 + 3)),
            textcoords="offset points",
            ha="center",
            va="bottom" if side > 0 else "top",
            fontsize=8,
        )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("fidelity: -log(FID / 100)")
    axes.set_ylabel("alignment")
    axes.set_ylim(0, 1.12)
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)


def draw_plane(sweep: Sweep, path: Path) -> None:
    """FID and alignment over two weights, as heat maps."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = (("fid", "FID (lower is better)", "viridis_r"), ("alignment", "alignment", "viridis"))
    for axes, (number, title, colours) in zip(figure.subplots(1, 2), panels, strict=True):
        _heat_map(axes, sweep, number, title, colours)
    _save(figure, path)


def plane_values(sweep: Sweep, number: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return a number over the plane, (first weight, second weight)."""
    rows, columns = (len(axis["weights"]) for axis in sweep.axes)
    return np.array([cell[number] for cell in sweep.search]).reshape(rows, columns)


def _heat_map(axes: Axes, sweep: Sweep, number: str, title: str, colours: str) -> None:
    rows, columns = (axis["weights"] for axis in sweep.axes)
    values = plane_values(sweep, number)
    axes.imshow(values, cmap=colours, aspect="auto")
    middle = (values.min() + values.max()) / 2
    dark_above = colours.endswith("_r")
    if values.size <= 100:
        for (down, across), value in np.ndenumerate(values):
            colour = "white" if (value > middle) == dark_above else "black"
            axes.text(across, down, words.number(value), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows], fontsize=8)
    axes.set_xlabel(f"weight of {sweep.axes[1]['label']}")
    axes.set_ylabel(f"weight of {sweep.axes[0]['label']}")
    axes.set_title(title, fontsize=10)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def draw_sheet(results: Sequence[Result], folder: Path, path: Path, conditions: Callable[[], Tensor]) -> None:
    """Write a sheet of the same images of several results of one task: a row for each, from the same seeds.

    Args:
        results: its rows.
        folder: of the evaluation's output.
        path: of the picture; it stays as it is if the images are gone.
        conditions: gives the edge maps that images of 'canny' were guided by, (N, H, W) bool, for a row of their own.

    Raises: GuidanceError: if the images are gone and there is no picture yet.
    """
    first = results[0]
    try:
        rows = [
            (each.title, [picture(read_image_of(folder / each.images, *place)) for place in _places(each)])
            for each in results
        ]
        if first.task == "canny":
            drawn = [picture(edges.byte().mul(255).expand(3, -1, -1)) for edges in conditions()[:_COLUMNS]]
            rows.insert(0, ("The edges that were asked for", drawn))
    except GuidanceError:
        if path.is_file():
            return
        raise
    small = [(title, [image.resize((_SIDE, _SIDE)) for image in row]) for title, row in rows]
    prompts = [first.details[prompt]["prompt"] for prompt, _ in _places(first)] if first.task == "alignment" else []
    labelled_grid(small, prompts, line=16, gap=3).save(path, quality=90)


def _places(result: Result) -> list[tuple[int, int]]:
    """Return prompt and number of the images on a result's row."""
    if result.task == "canny":
        each = int(result.config["canny"]["per_condition"])
        return [(0, number) for number in range(0, result.count, each)][:_COLUMNS]
    if result.task == "alignment":
        prompts = len(result.details)
        return sorted((place % prompts, place // prompts) for place in range(min(_COLUMNS, result.count)))
    first = result.count // max(1, len(result.details))  # of the first prompt
    return [(0, number) for number in range(min(_COLUMNS, first))]


def copy_picture(source: Path, path: Path) -> None:
    """Take over a picture that the evaluation drew; it stays as it is if the source is gone.

    Raises: GuidanceError: if both are gone.
    """
    if source.is_file():
        Image.open(source).convert("RGB").save(path, quality=88)
    elif not path.is_file():
        raise GuidanceError(f"{str(source)!r} is gone, expected the picture of gcfg evaluate sweep; run it again.")
