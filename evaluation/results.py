"""Results: numbers with all that decided them, each in one JSON file, looked up by task, method and group."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..training.files import whole_file
from .config import METHODS, TASKS
from .recipe import PRIOR

FORMAT = 1
RESULTS = "results"  # the folder of their files
SWEEP = "sweep"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What the files of all results hold.

    Attributes:
        format: of the file, `FORMAT`.
        task: what was measured.
        method: its name in the config.
        title: its name for the reader.
        group: 'methods', or the ablation that it is a part of.
        parameters: that were trained; None if that is unknown.
        recipe: with the weights that were used.
        search: the weights that were tried, each with its numbers.
        numbers: of all images.
        count: of these images.
        seed: of the sampling.
        config: the whole evaluation's.
        files: path and sha256 by the setting that names a file.
        versions: of what computed it.
        fingerprint: of all that decided it.
        seconds: that all of it took, of all processes together.
    """

    format: int = FORMAT
    task: str
    method: str
    title: str
    group: str
    parameters: int | None
    recipe: Mapping[str, Any]
    search: Sequence[Mapping[str, Any]]
    numbers: Mapping[str, float]
    count: int
    seed: int
    config: Mapping[str, Any]
    files: Mapping[str, Mapping[str, str]]
    versions: Mapping[str, str]
    fingerprint: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Result(Stored):
    """The result of a method in a task.

    Attributes:
        rule: by which weights were chosen, in words; empty if they were given.
        details: the numbers of each prompt.
        images: their folder, below the output's.
    """

    rule: str
    details: Sequence[Mapping[str, Any]]
    images: str

    @property
    def terms(self) -> Sequence[Mapping[str, Any]]:
        """Of its recipe, with the weights that were used."""
        found: Sequence[Mapping[str, Any]] = self.recipe["terms"]
        return found

    @property
    def grids(self) -> list[list[float]]:
        """The weights of each term from which the search could choose."""
        written = self.config["methods"][self.method][self.task]["terms"]
        return [term["weight"] if isinstance(term["weight"], list) else [term["weight"]] for term in written]


@dataclass(frozen=True, kw_only=True)
class Sweep(Stored):
    """The plane of two weights.

    Attributes:
        axes: label and weights of each.
        prompt: of all images.
        grid: the picture of all pairs, below the output's folder.
    """

    axes: Sequence[Mapping[str, Any]]
    prompt: str
    grid: str


def result_of(values: Mapping[str, Any]) -> Result | Sweep:
    """Return a result from what its file holds."""
    return Sweep(**values) if values["task"] == SWEEP else Result(**values)


def write_result(path: Path, result: Stored) -> None:
    """Write a result's file, whole or not at all."""
    with whole_file(path) as beside:
        beside.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> dict[str, Any] | None:
    """Return what a result's file holds; None if it is none of this format."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and values.get("format") == FORMAT else None


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return what all results' files in a folder hold, by file name."""
    found = (read_result(path) for path in sorted(folder.glob("*.json")))
    return [values for values in found if values]


class Results:
    """All results of an evaluation, in the order in which its config names the methods.

    Args:
        stored: what their files hold.
    """

    def __init__(self, stored: Sequence[Mapping[str, Any]]) -> None:
        known = [result_of(values) for values in stored]
        self.sweeps = [each for each in known if isinstance(each, Sweep)]
        results = [each for each in known if isinstance(each, Result)]
        named = list(dict.fromkeys(name for each in results for name in each.config["methods"]))
        tasks: list[str] = list(TASKS)
        self._results = sorted(results, key=lambda each: (named.index(each.method), tasks.index(each.task)))
        self.everything: list[Stored] = [*self._results, *self.sweeps]

    def __iter__(self) -> Iterator[Result]:
        return iter(self._results)

    @cached_property
    def groups(self) -> list[str]:
        """The groups of ablations, in the order of their methods."""
        return [group for group in dict.fromkeys(each.group for each in self) if group != METHODS]

    def get(self, task: str, method: str) -> Result | None:
        """Return one result, None if there is none."""
        return next((each for each in self if (each.task, each.method) == (task, method)), None)

    def number(self, task: str, method: str, name: str) -> float | None:
        """Return one number, None where it was not measured."""
        found = self.get(task, method)
        return found.numbers.get(name) if found else None

    def of_task(self, task: str, group: str | None = None) -> list[Result]:
        """Return the results of a task, of one group or of all."""
        return [each for each in self if each.task == task and group in (None, each.group)]

    def of_group(self, group: str) -> list[str]:
        """Return the names of a group's methods."""
        return list(dict.fromkeys(each.method for each in self if each.group == group))

    def title(self, method: str) -> str:
        """Return a method's name for the reader."""
        return next(each.title for each in self if each.method == method)

    def parameters(self, method: str) -> int | None:
        """Return how many parameters were trained, None if that is unknown; for the prior, none."""
        if method == PRIOR:
            return 0
        return next((each.parameters for each in self if each.method == method), None)
