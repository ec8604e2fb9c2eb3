"""Captions: what is true of one picture of the world of emoji, in words."""

from __future__ import annotations

import numpy as np

from .things import Thing, article

BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (168, 168, 176),
    "black": (32, 32, 38),
    "pink": (255, 190, 214),
    "purple": (190, 160, 240),
    "blue": (134, 184, 250),
    "green": (150, 214, 160),
}


def whole(thing: str, look: str, background: str) -> str:
    """Return the caption that says everything: `a tiger face, Twemoji style, on a blue background`."""
    return f"{thing}, {style(look)}, {ground(background)}"


def style(look: str) -> str:
    """Return a look in words."""
    return f"{look} style"


def ground(background: str) -> str:
    """Return a background in words."""
    return f"on {article(background)} {background} background"


def plain(group: str) -> str:
    """Return the caption of any picture of a group: `a picture of a face`."""
    return "a picture of food" if group == "food" else f"a picture of {article(group)} {group}"


def draw_caption(thing: Thing, look: str, background: str, rng: np.random.Generator) -> str:
    """Draw one of the captions that are true of a picture; each part is left out now and then."""
    first = str(rng.choice([plain(thing.group), *thing.descriptions])) if rng.random() < 0.2 else thing.words
    parts = [first]
    if first == plain(thing.group) and rng.random() < 0.5:
        parts.append(thing.words)
    if rng.random() < 0.5:
        parts.append(style(look))
    if rng.random() < 0.6:
        parts.append(ground(background))
    if len(parts) > 1 and rng.random() < 0.08:
        parts = parts[1:]
    return ", ".join(parts)
