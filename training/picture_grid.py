"""Pictures of one size in a grid, with names on its rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    columns: Sequence[str] = (),
    title: str = "",
    *,
    left: int = 0,
    line: int = 14,
    gap: int = 0,
) -> Image.Image:
    """Return one picture with a labelled row for each entry.

    Args:
        rows: label and pictures of each; all pictures have one size.
        columns: what stands above the columns, cut to a picture's width.
        title: a line above all.
        left: width in pixels of the margin that holds the rows' labels; 0 for a line above each row.
        line: height in pixels of a line of text.
        gap: pixels between pictures.
    """
    width, height = rows[0][1][0].size
    across, header, above = width + gap, line * (bool(title) + bool(columns)), 0 if left else line
    down = above + height + gap
    size = (left + max(len(pictures) for _, pictures in rows) * across + gap, header + len(rows) * down)
    whole = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(whole)
    draw.text((2, 1), title, fill="black")
    for place, text in enumerate(columns):
        draw.text((left + gap + place * across + 2, header - line + 1), _fitting(draw, text, width), fill="dimgrey")
    for number, (label, pictures) in enumerate(rows):
        top = header + number * down
        draw.text((gap + 2, top + height // 2 - 6 if left else top + 1), label, fill="black")
        for place, picture in enumerate(pictures):
            whole.paste(picture, (left + gap + place * across, top + above))
    return whole


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text
