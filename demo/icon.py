"""The registry's icon and banner: three guidances around one unconditional prediction, and their sum.

python -m comfyui_gcfg.demo.icon docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ICON = 400  # pixels; the registry takes at most 800
BANNER = (1680, 720)  # 21 : 9
_SCALE = 4  # drawn larger, then reduced: smooth edges
_PAPER, _INK = (24, 27, 34), (240, 240, 235)
# Points and steps are complex numbers, in shares of the side.
_TERMS = ((0.42 - 0.06j, (230, 159, 0)), (-0.02 - 0.40j, (86, 180, 233)), (-0.14 - 0.22j, (0, 190, 140)))
_ORIGIN = 0.36 + 0.82j


def icon(size: int = ICON) -> Image.Image:
    """Return the square picture."""
    side = size * _SCALE
    image = Image.new("RGB", (side, side), _PAPER)
    draw = ImageDraw.Draw(image)
    for step, colour in _TERMS:
        _arrow(draw, step, colour, 0.03, side)
    _arrow(draw, sum(step for step, _ in _TERMS), _INK, 0.045, side)
    draw.circle((_ORIGIN.real * side, _ORIGIN.imag * side), 0.05 * side, fill=_INK)
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


def _arrow(draw: ImageDraw.ImageDraw, step: complex, colour: tuple[int, int, int], thick: float, side: int) -> None:
    """An arrow from the origin."""
    head = 3 * thick * step / abs(step)
    tip = _ORIGIN + step
    neck, wing = tip - head, 0.6j * head
    shaft, point = (
        [(side * z.real, side * z.imag) for z in zs] for zs in ((_ORIGIN, neck), (tip, neck + wing, neck - wing))
    )
    draw.line(shaft, fill=colour, width=round(thick * side))
    draw.polygon(point, fill=colour)


def main() -> None:
    """Write both into the folder of the command line."""
    folder = Path(sys.argv[1])
    icon().save(folder / "icon.png", optimize=True)
    banner().save(folder / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
