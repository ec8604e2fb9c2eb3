"""Pictures that nodes give out, (N, H, W, 3) in 0..1: the plot of a report, and the contact sheet of a sweep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..gcfg.diagnostics import GuidanceReport, pairs
from ..gcfg.errors import GuidanceError, short

_PAPER, _INK = (250, 250, 248), (28, 28, 28)
_GAP = 6
_LABEL = 40  # characters


def report_figure(report: GuidanceReport) -> Tensor:
    """The pulls of all terms and of their sum over the evaluations, and the cosines between terms below.

    Returns:
        (1, H, W, 3) in 0..1.

    Raises:
        GuidanceError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GuidanceError(
            "Guidance Report: matplotlib is not installed, expected it for the plot; run pip install matplotlib in "
            "ComfyUI's Python environment."
        ) from error
    between = pairs(len(report.labels))
    figure = Figure(figsize=(8, 6 if between else 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2 if between else 1, sharex=True, squeeze=False, height_ratios=[3, 2] if between else [1])
    pull, evaluations = axes[0, 0], range(1, len(report.readings) + 1)
    names = [_plain(label) for label in report.labels]
    for number, (name, relative) in enumerate(itertools.zip_longest(names, report.relative, fillvalue="")):
        values = _values([r.pulls[number] if r.weights[number] else None for r in report.readings])
        legend = f"{name}, measured from {_plain(relative)}" if relative else name
        pull.plot(evaluations, values, marker=".", color=f"C{number}", label=legend)
    pull.plot(evaluations, _values([r.total for r in report.readings]), color="black", linestyle="--", label="sum")
    pull.set_ylabel("pull: |w · delta| / |eps of the base|")
    pull.set_ylim(bottom=0)
    pull.legend(loc="best", fontsize="small")
    if between:
        angle = axes[1, 0]
        for number, (i, j) in enumerate(between):
            values = _values([r.cosines[number] for r in report.readings])
            angle.plot(evaluations, values, marker=".", label=f"{names[i]} · {names[j]}")
        angle.axhline(0, color="grey", linewidth=0.8)
        angle.set_ylim(-1.05, 1.05)
        angle.set_ylabel("cosine between terms")
        angle.legend(loc="best", fontsize="small")
    axes[-1, 0].set_xlabel(f"evaluation ({report.steps} steps)")
    canvas.draw()
    return _image(numpy.asarray(canvas.buffer_rgba())[..., :3])


def _values(readings: Sequence[float | None]) -> numpy.ndarray:
    return numpy.array(readings, dtype=float)  # None becomes NaN, which is not drawn


def _plain(label: str) -> str:
    """A label that matplotlib prints as it is: no formula, not hidden for its underscore, not wider than the plot."""
    label = short(label, _LABEL)
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")


def labelled_sheet(images: Tensor, columns: Sequence[str], rows: Sequence[str]) -> Tensor:
    """Pictures in a grid, with a label over each column and before each row.

    Args:
        images: (rows * columns, H, W, 3), row by row.
        columns: the columns' labels.
        rows: the rows' labels; one empty label leaves them out.

    Returns:
        (1, H', W', 3).
    """
    height, width = images.shape[1:3]
    font = _font(max(12, min(height, width) // 12))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [measure.textbbox((0, 0), label, font) for label in [*rows, *columns]]
    line = math.ceil(max(box[3] for box in boxes)) + 2 * _GAP
    side = 0 if not any(rows) else math.ceil(max(box[2] for box in boxes[: len(rows)])) + 2 * _GAP
    step_x = math.ceil(max(width, *(box[2] for box in boxes[len(rows) :]))) + _GAP
    sheet = Image.new("RGB", (side + len(columns) * step_x + _GAP, line + len(rows) * (height + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, label in enumerate(columns):
        draw.text((side + _GAP + number * step_x + width // 2, line // 2), label, _INK, font, anchor="mm")
    for row, label in enumerate(rows):
        y = line + row * (height + _GAP)
        draw.text((_GAP, y + height // 2), label, _INK, font, anchor="lm")
        for column in range(len(columns)):
            pixels = images[row * len(columns) + column].clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
            sheet.paste(Image.fromarray(pixels), (side + _GAP + column * step_x, y))
    return _image(numpy.asarray(sheet))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()


def _image(pixels: numpy.ndarray) -> Tensor:
    return torch.from_numpy(pixels.astype(numpy.float32) / 255.0)[None]
