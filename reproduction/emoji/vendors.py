"""The vendors' drawings as pictures with transparency: each SVG body rendered once, each 3D picture read once."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

from . import packages
from .packages import Package, fetch, read_member, read_members

RASTER = 192  # pixels of the stored pictures: twice what is trained on, so that moved ones stay sharp
LOOKS: dict[str, Package] = {
    "Noto": packages.NOTO,
    "Blob": packages.BLOB,
    "Twemoji": packages.TWEMOJI,
    "Fluent": packages.FLUENT,
    "EmojiOne": packages.EMOJIONE,
}
INK = "Ink"
THREE_D = "3D"
_INVISIBLE = ("-fe0f", "")  # variation selector 16 stands in some names and not in others


class Vectors:
    """One vendor's set of SVG bodies.

    Args:
        icons: `icons.json` of an iconify package.
        characters: its `chars.json`, code points -> name, where it has one.
    """

    def __init__(self, icons: Mapping[str, Any], characters: Mapping[str, str]) -> None:
        self._icons, self._characters = icons, characters

    @classmethod
    def of(cls, archive: Path) -> Vectors:
        """Read a package's archive."""
        return cls(json.loads(read_member(archive, "icons.json")), json.loads(read_member(archive, "chars.json")))

    def code_points(self, name: str) -> str | None:
        """Return the code points of a name, `1f436`, or None."""
        return next((code for code, other in self._characters.items() if other == name), None)

    def svg(self, name: str, code: str | None) -> str | None:
        """Return the drawing of a thing by its name, or else by its code points; None if the vendor drew none."""
        icon = self._icon(name) or self._icon(self._characters.get(code or "", ""))
        if icon is None:
            return None
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = (icon.get(side) or self._icons.get(side) or 16 for side in ("width", "height"))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )

    def _icon(self, name: str) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self._icons["icons"].get(name)
        if found is None and (alias := self._icons.get("aliases", {}).get(name)) and not alias.get("hFlip"):
            return self._icon(alias["parent"])
        return found


def render(svg: str, size: int = RASTER) -> NDArray[np.uint8]:
    """Return an SVG as RGBA, (size, size, 4)."""
    return _square(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)), size)


def read_pictures(cache: Path, names: list[str]) -> Iterator[tuple[str, str, NDArray[np.uint8]]]:
    """Yield look, name and RGBA picture, (192, 192, 4), of every drawing of the things that there is.

    Args:
        cache: where the packages are, or go.
        names: of the things, in Noto's words.
    """
    codes = Vectors.of(fetch(packages.NOTO, cache))
    for look, package in {**LOOKS, INK: packages.INK}.items():
        vectors = Vectors.of(fetch(package, cache))
        for name in names:
            if svg := vectors.svg(name, codes.code_points(name)):
                yield look, name, render(svg)
    solid = read_members(fetch(packages.FLUENT_3D, cache), "assets")
    for name in names:
        code = codes.code_points(name) or ""
        for spelling in (code, code + _INVISIBLE[0], code.replace(*_INVISIBLE)):
            if data := solid.get(f"{spelling}.webp"):
                yield THREE_D, name, _square(data, RASTER)
                break


def _square(data: bytes, size: int) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as picture:
        whole = picture.convert("RGBA")
    if whole.size != (size, size):
        whole = whole.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    return np.asarray(whole)
