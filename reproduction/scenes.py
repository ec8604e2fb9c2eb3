"""The open world the prior learns: printed digits and other drawn things in many colours, each with captions.

A concept's attributes occur in it (which digit, which colour); its look, handwriting, does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scans import SIDE

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (245, 210, 50),
}
SHAPES = ("circle", "square", "triangle", "scribble")
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)
_DIGIT_SHARE = 0.8
_FINER = 2  # drawn at twice the size, then averaged: smooth edges


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        thing: a digit's word or a shape.
        colour: of the thing.
        background: another colour.
    """

    thing: str
    colour: str
    background: str

    @property
    def captions(self) -> tuple[str, ...]:
        """Every caption that is true of the picture; training draws one of them."""
        everything = f"a {self.colour} {self.thing} on a {self.background} background"
        parts = (self.thing, f"a {self.colour} {self.thing}", f"{self.background} background")
        if self.thing not in DIGITS:
            return (everything, *parts, f"a photo of a {self.thing}", "a photo of a shape")
        of_a_digit = ("a photo of a digit", f"a photo of a digit, {self.thing}", f"a photo of a digit, {self.colour}")
        return (everything, everything, *parts, self.thing, *of_a_digit)


def draw_scene(rng: np.random.Generator) -> tuple[Image.Image, Scene]:
    """Draw one picture, 64x64 RGB, and say what it shows."""
    digit = rng.random() < _DIGIT_SHARE
    colour, background = rng.choice(list(COLOURS), 2, replace=False)
    scene = Scene(str(rng.choice(DIGITS if digit else SHAPES)), str(colour), str(background))
    picture = Image.new("RGB", (SIDE * _FINER, SIDE * _FINER), COLOURS[scene.background])
    pen = ImageDraw.Draw(picture)
    if digit:
        _print_digit(pen, scene, rng)
    else:
        _draw_shape(pen, scene, rng)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX), scene


def draw_world(count: int, seed: int) -> tuple[list[Image.Image], list[Scene]]:
    """Draw many pictures; one seed, one world."""
    rng = np.random.default_rng(seed)
    pairs = [draw_scene(rng) for _ in range(count)]
    return [picture for picture, _ in pairs], [scene for _, scene in pairs]


def _print_digit(pen: ImageDraw.ImageDraw, scene: Scene, rng: np.random.Generator) -> None:
    font = _font(str(rng.choice(FONTS)), int(rng.integers(50, 69)) * _FINER)
    place = rng.normal(SIDE / 2, 2, 2) * _FINER
    pen.text(tuple(place), str(DIGITS.index(scene.thing)), COLOURS[scene.colour], font, anchor="mm")


def _draw_shape(pen: ImageDraw.ImageDraw, scene: Scene, rng: np.random.Generator) -> None:
    x, y = rng.normal(SIDE / 2, 3, 2) * _FINER
    r = rng.uniform(12, 25) * _FINER
    colour = COLOURS[scene.colour]
    if scene.thing == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif scene.thing == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    elif scene.thing == "triangle":
        pen.polygon((x - r, y + r, x + r, y + r, x, y - r), fill=colour)
    else:
        _scribble(pen, (x, y), r, colour, rng)


def _scribble(
    pen: ImageDraw.ImageDraw,
    centre: tuple[float, float],
    r: float,
    colour: tuple[int, int, int],
    rng: np.random.Generator,
) -> None:
    """Draw a smooth closed line of random width: two circular motions of different speed."""
    angle = np.linspace(0, 2 * np.pi, 120)
    phases, speeds = rng.uniform(0, 2 * np.pi, 4), rng.integers(1, 4, 4)
    waves = [np.cos(speed * angle + phase) for speed, phase in zip(speeds, phases, strict=True)]
    x, y = centre[0] + r * (waves[0] + waves[1]) / 2, centre[1] + r * (waves[2] + waves[3]) / 2
    width = int(rng.integers(2, 7)) * _FINER
    pen.line(list(zip(x.tolist(), y.tolist(), strict=True)), colour, width, "curve")


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)
