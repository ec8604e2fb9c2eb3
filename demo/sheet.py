"""The contact sheet: every image of a run under the name of its workflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, MARGIN, LINE = 224, 16, 18
PAPER, INK, FAINT = (250, 250, 248), (28, 28, 28), (120, 120, 120)


@dataclass(frozen=True)
class Entry:
    """One row of the sheet: a workflow, its images with their labels, and how long it took."""

    workflow: str
    images: tuple[tuple[str, Path], ...]
    seconds: float


def contact_sheet(entries: Sequence[Entry], caption: str, columns: int = 3) -> Image.Image:
    """Return a sheet of all images below a caption, `columns` wide, each below its workflow's name and label."""
    cells = [(e, label, path) for e in entries for label, path in e.images]
    rows = -(-len(cells) // columns)
    step_x, step_y = CELL + MARGIN, CELL + 2 * LINE + 2 * MARGIN
    top = 2 * MARGIN + LINE
    sheet = Image.new("RGB", (MARGIN + columns * step_x, top + rows * step_y), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    draw.text((MARGIN, MARGIN), caption, INK, font)
    for index, (entry, label, path) in enumerate(cells):
        x, y = MARGIN + index % columns * step_x, top + index // columns * step_y
        draw.text((x, y), entry.workflow, INK, font)
        draw.text((x, y + LINE - 2), f"{label}   {entry.seconds:.1f} s".strip(), FAINT, font)
        picture = fitted(path, CELL)
        sheet.paste(picture, (x + (CELL - picture.width) // 2, y + 2 * LINE))
    return sheet


def fitted(path: Path, size: int) -> Image.Image:
    """Return an image file's picture scaled, up or down, to fit a square of `size`."""
    with Image.open(path) as image:
        return ImageOps.contain(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)


def side_by_side(paths: Sequence[Path], width: int = 512) -> Image.Image:
    """Return the images in one row no wider than `width`: a workflow's thumbnail."""
    gap = 4
    each = (width - gap * (len(paths) - 1)) // len(paths)
    pictures = [fitted(path, min(each, 384)) for path in paths]
    total = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (total, max(p.height for p in pictures)), PAPER)
    x = 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + gap
    return row
