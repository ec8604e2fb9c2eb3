"""What the world of emoji holds: which things, in which group, with which attributes, and which are held out in 3D."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TABLES: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_name("things.toml").read_text(encoding="utf-8"))
GROUPS, HELD_OUT, ATTRIBUTES = (
    {name: words.split() for name, words in _TABLES[table].items()} for table in ("groups", "held_out", "attributes")
)

_SPOKEN = {"tears": "with tears", "tongue": "with tongue out", "sunglasses": "with sunglasses", "hat": "with a hat"}
_SPOKEN |= {"glasses": "with glasses", "horns": "with horns", "hearts": "with hearts"}
_SPOKEN |= {"halo": "with a halo", "mask": "with a mask", "hand": "with a hand"}
_REPHRASED = {
    "rolling-on-the-floor-laughing": "face rolling on the floor laughing",
    "star-struck": "star struck face",
}
_PLURALS = ("blueberries", "cherries", "french fries", "grapes", "pancakes", "peanuts")
_VOWELS = tuple("aeiou")


@dataclass(frozen=True)
class Thing:
    """One thing that vendors drew.

    Attributes:
        name: as in the packages, `smiling-face-with-sunglasses`.
        group: face, animal, food or plant.
        held_out: whether its 3D picture is kept back.
    """

    name: str
    group: str
    held_out: bool

    @property
    def words(self) -> str:
        """Its name with the article, `a smiling face with sunglasses`."""
        words = _REPHRASED.get(self.name, self.name.replace("-", " "))
        return words if words in _PLURALS else f"{article(words)} {words}"

    @property
    def attributes(self) -> tuple[str, ...]:
        """What else is true of it: smiling, sunglasses, ..."""
        return tuple(attribute for attribute, names in ATTRIBUTES.items() if self.name in names)

    @property
    def descriptions(self) -> tuple[str, ...]:
        """Its group with each of its attributes, `a face with sunglasses`, `a smiling face`."""
        return tuple(describe(self.group, attribute) for attribute in self.attributes)


def describe(group: str, attribute: str) -> str:
    """Return a group with one attribute, in words: `a face with sunglasses`, `a smiling face`."""
    if spoken := _SPOKEN.get(attribute):
        return f"{article(group)} {group} {spoken}"
    return f"{article(attribute)} {attribute} {group}"


def article(words: str) -> str:
    """Return `a` or `an`."""
    return "an" if words.startswith(_VOWELS) and not words.startswith("uni") else "a"


def things() -> list[Thing]:
    """Return every thing, in a fixed order."""
    return [Thing(name, group, name in HELD_OUT[group]) for group, names in GROUPS.items() for name in names]
