"""The paper's user study (D.3) for one's own friends: a page of same-seed images without names, and its win rates."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image
from scipy.stats import binomtest
from torch import Tensor

from ..gcfg.errors import GuidanceError
from ..training.files import whole_file, whole_folder

QUESTION = "Which image is best?"
_FORMAT = 1
_PAGE = ("index.html", "abtest.css", "study.js", "page.js")


@dataclass(frozen=True)
class Trial:
    """One choice: the images that several methods made from one seed.

    Attributes:
        task: under which the choice is counted, for example 'fid'; the page does not show it.
        prompt: shown above the images; empty for unconditional ones.
        images: by method, (3, H, W) uint8.
        condition: shown too, for spatial guidance, (3, H, W) uint8.
    """

    task: str
    prompt: str
    images: Mapping[str, Tensor]
    condition: Tensor | None = None


@dataclass(frozen=True)
class Wins:
    """How often a method was chosen, with the 95 % interval of Clopper and Pearson."""

    method: str
    wins: int
    trials: int

    @property
    def rate(self) -> float:
        """The paper's preference, from 0 to 1."""
        return self.wins / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Of the rate, as if the choices were independent."""
        bounds = binomtest(self.wins, self.trials).proportion_ci(0.95, method="exact")
        return float(bounds.low), float(bounds.high)


def key_of(folder: Path) -> Path:
    """Return where the key to a page's images lies: beside its folder, so that the folder can be given away."""
    return folder.with_name(f"{folder.name}-key.json")


def write_page(trials: Sequence[Trial], folder: Path, title: str = "A comparison of images", seed: int = 0) -> Path:
    """Write the page into a new folder, which needs no server and names no method, and its key beside it.

    Returns: the page, folder/index.html.

    Raises: GuidanceError: if the folder exists, or a trial has fewer than two images.
    """
    if folder.exists():
        raise GuidanceError(f"{str(folder)!r} exists already, expected a new folder; remove it or name another.")
    for trial in trials:
        if len(trial.images) < 2:
            raise GuidanceError(
                f"the A/B test of {trial.task!r} compares {len(trial.images)} method(s), expected two or more."
            )
    owners = [(number, method) for number, trial in enumerate(trials) for method in trial.images]
    random.Random(seed).shuffle(owners)  # a file's name tells nothing
    names = {owner: f"{place:05d}.png" for place, owner in enumerate(owners)}
    key = {
        names[number, method]: {"trial": number, "task": trials[number].task, "method": method}
        for number, method in sorted(owners)
    }
    test = hashlib.sha256(json.dumps([key, [trial.prompt for trial in trials]]).encode()).hexdigest()[:12]
    with whole_file(key_of(folder)) as beside:
        beside.write_text(json.dumps({"format": _FORMAT, "test": test, "images": key}, indent=1), encoding="utf-8")
    with whole_folder(folder) as beside:
        for name in _PAGE:
            (beside / name).write_bytes((files(__package__) / "abtest_page" / name).read_bytes())
        shown = [_shown(number, trial, names) for number, trial in enumerate(trials)]
        page = {"id": test, "title": title, "question": QUESTION, "trials": shown}
        for number, trial in enumerate(trials):
            _write_images(number, trial, names, beside)
        text = f"const TEST = {json.dumps(page, indent=1)};\n"
        (beside / "trials.js").write_text(text, encoding="utf-8")
    return folder / "index.html"


def win_rates(choices: Sequence[Path], key: Path) -> dict[str, list[Wins]]:
    """Count the choices that the page saved: by task, the methods from the most chosen to the least.

    A session saved twice counts once, its later file's choices.

    Raises: GuidanceError: if a file is none of this page.
    """
    known = _read(key, "the key that stands beside the page's folder")
    images: dict[str, dict[str, Any]] = known["images"]
    chosen: dict[tuple[str, int], str] = {}
    for path in choices:
        saved = _read(path, "a file that the page saved")
        if saved["test"] != known["test"]:
            raise GuidanceError(
                f"{str(path)!r} is of the page {saved['test']!r}, expected {known['test']!r}, that of {str(key)!r}."
            )
        chosen |= {(saved["session"], trial): name for trial, name in _choices(saved, images, path)}
    wins = Counter((images[name]["task"], images[name]["method"]) for name in chosen.values())
    methods: dict[tuple[str, int], list[str]] = defaultdict(list)
    for image in images.values():
        methods[image["task"], image["trial"]].append(image["method"])
    offered = Counter(
        (images[name]["task"], method)
        for (_, trial), name in chosen.items()
        for method in methods[images[name]["task"], trial]
    )
    rates: dict[str, list[Wins]] = defaultdict(list)
    for (task, method), count in sorted(offered.items()):
        rates[task].append(Wins(method, wins[task, method], count))
    return {task: sorted(each, key=lambda row: -row.rate) for task, each in rates.items()}


def summary(rates: Mapping[str, Sequence[Wins]]) -> str:
    """Return the win rates as the lines of a table."""
    if not rates:
        return "No choices."
    width = max(len(row.method) for rows in rates.values() for row in rows)
    lines = []
    for task, rows in rates.items():
        lines.append(f"{task}: chosen as the best (95 % interval)")
        for row in rows:
            low, high = row.interval
            share = f"{row.rate:6.1%} ({low:.1%} .. {high:.1%})"
            lines.append(f"  {row.method:{width}}  {share}  {row.wins} of {row.trials}")
    return "\n".join(lines)


def _shown(number: int, trial: Trial, names: Mapping[tuple[int, str], str]) -> dict[str, Any]:
    images = sorted(names[number, method] for method in trial.images)  # in the methods' order they would tell them
    condition = "" if trial.condition is None else f"condition-{number:05d}.png"
    return {"prompt": trial.prompt, "condition": condition, "images": images}


def _write_images(number: int, trial: Trial, names: Mapping[tuple[int, str], str], folder: Path) -> None:
    pictures = {names[number, method]: image for method, image in trial.images.items()}
    if trial.condition is not None:
        pictures[f"condition-{number:05d}.png"] = trial.condition
    for name, pixels in pictures.items():
        Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(folder / name)


def _choices(saved: Mapping[str, Any], images: Mapping[str, Any], path: Path) -> Iterator[tuple[int, str]]:
    for choice in saved["choices"]:
        trial, name = choice["trial"], choice["chosen"]
        if images.get(name, {}).get("trial") != trial:
            raise GuidanceError(f"{str(path)!r} chooses {name!r} in trial {trial!r}, which has no such image.")
        yield trial, name


def _read(path: Path, expected: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT or "test" not in values:
            raise ValueError("another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuidanceError(f"{str(path)!r} cannot be read ({error}), expected {expected}.") from error
    return dict(values)
