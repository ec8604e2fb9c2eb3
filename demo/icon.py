"""The registry's icon and banner: three guidances around one unconditional prediction, and their sum.

python -m comfyui_gcfg.demo.icon docs/images
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ICON = 400  # pixels; the registry takes at most 800
BANNER = (1680, 720)  # 21 : 9
_SCALE = 4  # drawn larger, then reduced: smooth edges
_PAPER, _INK = (24, 27, 34), (240, 240, 235)
_TERMS = (((0.42, -0.06), (230, 159, 0)), ((-0.02, -0.40), (86, 180, 233)), ((-0.14, -0.22), (0, 190, 140)))
_ORIGIN = (0.36, 0.82)


def icon(size: int = ICON) -> Image.Image:
    """Return the square picture."""
    side = size * _SCALE
    image = Image.new("RGB", (side, side), _PAPER)
    draw = ImageDraw.Draw(image)
    total = (sum(step[0] for step, _ in _TERMS), sum(step[1] for step, _ in _TERMS))
    for step, colour in _TERMS:
        _arrow(draw, _ORIGIN, step, colour, 0.03, side)
    _arrow(draw, _ORIGIN, total, _INK, 0.045, side)
    x, y, r = _ORIGIN[0] * side, _ORIGIN[1] * side, 0.05 * side
    draw.ellipse((x - r, y - r, x + r, y + r), fill=_INK)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """Return the wide picture: the icon, the name and the sum."""
    image = Image.new("RGB", BANNER, _PAPER)
    height = BANNER[1]
    image.paste(icon(height - 80), (60, 40))
    draw = ImageDraw.Draw(image)
    left = height + 20
    draw.text((left, 180), "GCFG", _INK, ImageFont.load_default(150))
    draw.text((left + 6, 365), "guidance from several models at once", _TERMS[0][1], ImageFont.load_default(50))
    draw.text((left + 6, 460), "D  =  D0 + w1 (D1 - D0) + w2 (D2 - D0) + ...", _INK, ImageFont.load_default(42))
    return image


def _arrow(
    draw: ImageDraw.ImageDraw,
    start: tuple[float, float],
    step: tuple[float, float],
    colour: tuple[int, int, int],
    thick: float,
    side: int,
) -> None:
    """An arrow from a point by a step, all in shares of the side."""
    length = math.hypot(*step)
    along = (step[0] / length, step[1] / length)
    head = 3 * thick
    neck = (start[0] + step[0] - head * along[0], start[1] + step[1] - head * along[1])
    tip = (start[0] + step[0], start[1] + step[1])
    across = (-along[1] * head * 0.6, along[0] * head * 0.6)
    scaled = [(side * x, side * y) for x, y in (start, neck)]
    draw.line(scaled, fill=colour, width=round(thick * side))
    wings = [(neck[0] + across[0], neck[1] + across[1]), (neck[0] - across[0], neck[1] - across[1])]
    draw.polygon([(side * x, side * y) for x, y in (tip, *wings)], fill=colour)


def main() -> None:
    """Write both into the folder of the command line."""
    folder = Path(sys.argv[1])
    icon().save(folder / "icon.png", optimize=True)
    banner().save(folder / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
