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

from scipy.stats import binomtest
from torch import Tensor

from ..gcfg.errors import GuidanceError
from ..training.files import whole_file, whole_folder
from .config import METHODS, Config
from .images import picture, read_image_of
from .results import RESULTS, Result, Results, read_results
from .tasks import TASKS

FOLDER = "abtest"
_FORMAT = 1
_PAGE = ("index.html", "abtest.css", "study.js", "page.js")
_TITLE, _QUESTION = "A comparison of images", "Which image is best?"


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


def trials_of(config: Config, methods: Sequence[str], count: int) -> list[Trial]:
    """Return trials over the images of stored results.

    Args:
        config: the evaluation's.
        methods: names; none for all of the tables, without the ablations.
        count: trials of each task; fewer where there are fewer images.

    Raises: GuidanceError: if no task has results of two methods.
    """
    results = Results(read_results(config.output_folder / RESULTS))
    trials: list[Trial] = []
    for task in ("fid", "alignment", "canny"):
        compared = [
            each for each in results.of_task(task) if (each.method in methods if methods else each.group == METHODS)
        ]
        if len(compared) > 1:
            trials += _trials(compared, config, count)
    if not trials:
        raise GuidanceError(
            f"{str(config.output_folder)!r} holds no results of two methods for one task, expected some; run `gcfg "
            "evaluate tables` first."
        )
    return trials


def _trials(results: Sequence[Result], config: Config, count: int) -> Iterator[Trial]:
    task = TASKS[results[0].task](config)
    places = [(prompt, number) for prompt, images in enumerate(task.counts(search=False)) for number in range(images)]
    for prompt, number in sorted(random.Random(config.sampling.seed).sample(places, min(count, len(places)))):
        images = {each.method: read_image_of(config.output_folder / each.images, prompt, number) for each in results}
        condition = task.hints(range(number, number + 1))[0].byte() * 255 if task.hints else None
        yield Trial(task.name, task.prompts[prompt], images, condition)


def write_page(trials: Sequence[Trial], folder: Path, seed: int = 0) -> Path:
    """Write the page into a new folder, which needs no server and names no method, and its key beside it.

    Returns: the page, folder/index.html.

    Raises: GuidanceError: if the folder exists.
    """
    if folder.exists():
        raise GuidanceError(f"{str(folder)!r} exists already, expected a new folder; remove it or name another.")
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
        shown = []
        for number, trial in enumerate(trials):
            images = {names[number, method]: image for method, image in trial.images.items()}
            condition = {} if trial.condition is None else {f"condition-{number:05d}.png": trial.condition}
            for name, pixels in (images | condition).items():
                picture(pixels).save(beside / name)
            # Sorted: in the methods' order they would tell them.
            shown.append({"prompt": trial.prompt, "condition": "".join(condition), "images": sorted(images)})
        page = {"id": test, "title": _TITLE, "question": _QUESTION, "trials": shown}
        (beside / "trials.js").write_text(f"const TEST = {json.dumps(page, indent=1)};\n", encoding="utf-8")
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
        for choice in saved["choices"]:
            trial, name = choice["trial"], choice["chosen"]
            if images.get(name, {}).get("trial") != trial:
                raise GuidanceError(f"{str(path)!r} chooses {name!r} in trial {trial!r}, which has no such image.")
            chosen[saved["session"], trial] = name
    methods: dict[int, list[str]] = defaultdict(list)
    for image in images.values():
        methods[image["trial"]].append(image["method"])
    wins, offered = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for (_, trial), name in chosen.items():
        task = images[name]["task"]
        wins[task, images[name]["method"]] += 1
        offered.update((task, method) for method in methods[trial])
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


def _read(path: Path, expected: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT or "test" not in values:
            raise ValueError("another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuidanceError(f"{str(path)!r} cannot be read ({error}), expected {expected}.") from error
    return dict(values)
