"""The concepts on disk: folders of pictures without any text, which `gcfg cache` and `gcfg train` read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ...training.files import whole_folder
from .pictures import Drawing, Drawings, compose, draw_placement
from .vendors import THREE_D

TRAINING, AGAIN, HELD_OUT = "training", "again", "held-out"
_SEEDS = {TRAINING: 21, HELD_OUT: 22, AGAIN: 23}


def write_concept(drawings: Drawings, group: str, variants: int, folder: Path) -> None:
    """Write one group's 3D pictures: `training/`, `again/` (the same things elsewhere) and `held-out/`.

    Args:
        drawings: of the world.
        group: face or animal.
        variants: placements of each thing in each part.
        folder: new.
    """
    with whole_folder(folder) as beside:
        for part, seed in _SEEDS.items():
            rows = drawings.choose(
                lambda row, out=part == HELD_OUT: (  # type: ignore[misc]
                    row.look == THREE_D and row.thing.group == group and row.thing.held_out == out
                )
            )
            (beside / part).mkdir()
            _write(drawings, rows, variants, seed, beside / part)


def _write(drawings: Drawings, rows: list[Drawing], variants: int, seed: int, folder: Path) -> None:
    for row in rows:
        places = [
            draw_placement(row, np.random.default_rng((seed, row.number, variant))) for variant in range(variants)
        ]
        for variant, picture in enumerate(compose(drawings, [row] * variants, places)):
            name = f"{row.thing.name}-{variant:02d}-{places[variant].background}.png"
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name)
