"""Pictures of the world of emoji: the vendors' drawings, moved a little and set on a background of one colour."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...training.files import whole_folder
from .captions import BACKGROUNDS
from .things import Thing, things
from .vendors import INK, THREE_D, read_pictures

SIDE = 96  # pixels of every picture that a network sees
_MIRRORED = ("animal", "food", "plant")  # a face's hand and tears have their side
_LARGEST_TURN = math.radians(8)
_FILLS = (0.78, 0.98)  # of the side
_STRAYS = 0.04  # of the side, on top of what the size leaves room for


@dataclass(frozen=True)
class Drawing:
    """One vendor's drawing of one thing.

    Attributes:
        look: the vendor's, as captions name it.
        thing: what it shows.
        number: of its picture in `Drawings.rasters`.
    """

    look: str
    thing: Thing
    number: int


@dataclass(frozen=True)
class Drawings:
    """All drawings.

    Attributes:
        rasters: uint8, (N, 192, 192, 4), with transparency.
        rows: what each one is.
    """

    rasters: NDArray[np.uint8]
    rows: list[Drawing]

    def choose(self, wanted: Callable[[Drawing], bool]) -> list[Drawing]:
        """Return the drawings that fit."""
        return [row for row in self.rows if wanted(row)]


def flat(row: Drawing) -> bool:
    """Whether it is one of the looks that the prior learns."""
    return row.look not in (THREE_D, INK)


def shown_solid(row: Drawing) -> bool:
    """Whether it has the concept's look and is not held out."""
    return row.look == THREE_D and not row.thing.held_out


def write_drawings(cache: Path, folder: Path) -> None:
    """Render every drawing of every thing into a new folder."""
    by_name = {thing.name: thing for thing in things()}
    found = list(read_pictures(cache, list(by_name)))
    with whole_folder(folder) as beside:
        np.save(beside / "rasters.npy", np.stack([raster for _, _, raster in found]))
        (beside / "rows.json").write_text(json.dumps([(look, name) for look, name, _ in found]), encoding="utf-8")


def read_drawings(folder: Path) -> Drawings:
    """Read what `write_drawings` wrote; the pictures stay on disk until they are used."""
    by_name = {thing.name: thing for thing in things()}
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    rasters = np.load(folder / "rasters.npy", mmap_mode="r")
    return Drawings(rasters, [Drawing(look, by_name[name], i) for i, (look, name) in enumerate(rows)])


@dataclass(frozen=True)
class Placement:
    """How one drawing is set into its picture.

    Attributes:
        background: its name.
        fill: part of the side that the drawing takes.
        x: of its centre, in halves of the side, to the right.
        y: likewise, down.
        turn: in radians.
        mirrored: left for right.
    """

    background: str
    fill: float = 0.9
    x: float = 0.0
    y: float = 0.0
    turn: float = 0.0
    mirrored: bool = False


def draw_placement(row: Drawing, rng: np.random.Generator) -> Placement:
    """Draw a place for a drawing."""
    fill = float(rng.uniform(*_FILLS))
    room = 1 - fill + _STRAYS
    x, y = rng.uniform(-room, room, 2)
    turn = float(np.clip(rng.normal(0, _LARGEST_TURN / 2), -_LARGEST_TURN, _LARGEST_TURN))
    mirrored = bool(rng.random() < 0.5) and row.thing.group in _MIRRORED
    grounds = [name for name in BACKGROUNDS if row.look != INK or name != "black"]  # ink is black
    return Placement(str(rng.choice(grounds)), fill, float(x), float(y), turn, mirrored)


def compose(drawings: Drawings, rows: Sequence[Drawing], placements: Sequence[Placement], side: int = SIDE) -> Tensor:
    """Return the pictures of drawings in their places, uint8, (N, 3, side, side)."""
    pictures = [
        _compose(drawings.rasters[row.number], place, side) for row, place in zip(rows, placements, strict=True)
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _compose(raster: NDArray[np.uint8], place: Placement, side: int) -> NDArray[np.uint8]:
    layers = raster.astype(np.float32)
    layers[..., :3] *= layers[..., 3:] / 255  # so that what is transparent brings no colour to its neighbours
    cos, sin = math.cos(place.turn) * place.fill, math.sin(place.turn) * place.fill
    sign = -1 if place.mirrored else 1
    middle = (len(raster) - 1) / 2
    scale = 2 * side / len(raster)
    matrix = np.array([[sign * cos, -sin, 0], [sign * sin, cos, 0]]) * scale
    matrix[:, 2] = side - 0.5 + side * np.array([place.x, place.y]) - matrix[:, :2] @ (middle, middle)
    moved = cv2.warpAffine(layers, matrix, (2 * side, 2 * side), flags=cv2.INTER_LINEAR)
    moved = cv2.resize(moved, (side, side), interpolation=cv2.INTER_AREA)
    picture = moved[..., :3] + (1 - moved[..., 3:] / 255) * np.array(BACKGROUNDS[place.background], np.float32)
    return picture.round().clip(0, 255).astype(np.uint8)
