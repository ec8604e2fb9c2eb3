"""Sheets of generated images: a row for each method, from the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from ...gcfg.errors import GuidanceError
from ...training.picture_grid import labelled_grid
from ..images import picture, read_image_of
from .stored import Result

COLUMNS = 10
_SIDE = 72  # pixels of an image on the sheet, so that it fits a page


def draw_sheet(
    results: Sequence[Result], folder: Path, path: Path, conditions: Callable[[], Tensor] | None = None
) -> None:
    """Write a sheet of the same images of several results of one task.

    Args:
        results: its rows.
        folder: of the evaluation's output.
        path: of the picture; it stays as it is if the images are gone.
        conditions: gives the edge maps that the images were guided by, (N, H, W) bool, for a row of their own.

    Raises: GuidanceError: if the images are gone and there is no picture yet.
    """
    try:
        rows = [
            (each.title, [picture(read_image_of(folder / each.images, *place)) for place in places(each)])
            for each in results
        ]
        if conditions:
            rows.insert(
                0, ("The edges that were asked for", [_line_drawing(edges) for edges in conditions()[:COLUMNS]])
            )
    except GuidanceError:
        if path.is_file():
            return
        raise
    small = [(title, [image.resize((_SIDE, _SIDE)) for image in row]) for title, row in rows]
    labelled_grid(small, headings(results[0]), line=16, gap=3).save(path, quality=90)


def copy_picture(source: Path, path: Path) -> None:
    """Take over a picture that the evaluation drew; it stays as it is if the source is gone.

    Raises: GuidanceError: if both are gone.
    """
    if source.is_file():
        Image.open(source).convert("RGB").save(path, quality=88)
    elif not path.is_file():
        raise GuidanceError(f"{str(source)!r} is gone, expected the picture of gcfg evaluate sweep; run it again.")


def places(result: Result) -> list[tuple[int, int]]:
    """Return prompt and number of the images on a result's row."""
    if result.task == "canny":
        each = int(result.config["canny"]["per_condition"])
        return [(0, number) for number in range(0, result.count, each)][:COLUMNS]
    if result.task == "alignment":
        prompts = len(result.details)
        return sorted((place % prompts, place // prompts) for place in range(min(COLUMNS, result.count)))
    first = result.count // max(1, len(result.details))  # of the first prompt
    return [(0, number) for number in range(min(COLUMNS, first))]


def headings(result: Result) -> list[str]:
    """Return what stands above the columns: prompts, where they differ."""
    if result.task != "alignment":
        return []
    return [str(result.details[prompt]["prompt"]) for prompt, _ in places(result)]


def _line_drawing(edges: Tensor) -> Image.Image:
    return picture(edges.byte().mul(255).expand(3, -1, -1))
