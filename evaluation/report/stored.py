"""Stored results, looked up by task, method and group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ..config import PRIOR, TASKS

METHODS = "methods"  # the group of the first tables
SWEEP = "sweep"


@dataclass(frozen=True)
class _Stored:
    recipe: Mapping[str, Any]
    search: Sequence[Mapping[str, Any]]
    count: int
    seed: int
    config: Mapping[str, Any]
    files: Mapping[str, Mapping[str, str]]
    versions: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class Result(_Stored):
    """The result of a method in a task, as far as the page tells it."""

    task: str
    method: str
    title: str
    group: str
    parameters: int | None
    rule: str
    numbers: Mapping[str, float]
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


@dataclass(frozen=True)
class Sweep(_Stored):
    """The plane of two weights."""

    axes: Sequence[Mapping[str, Any]]
    prompt: str
    grid: str


class Results:
    """All results of an evaluation, in the order in which its config names the methods."""

    def __init__(self, stored: Sequence[Mapping[str, Any]]) -> None:
        self._results = [_read(Result, values) for values in stored if values["task"] != SWEEP]
        self.sweeps = [_read(Sweep, values) for values in stored if values["task"] == SWEEP]
        named = [name for each in self._results for name in each.config["methods"]]
        order = {name: place for place, name in enumerate(dict.fromkeys(named))}
        tasks: list[str] = list(TASKS)
        self._results.sort(key=lambda each: (order[each.method], tasks.index(each.task)))

    def __iter__(self) -> Iterator[Result]:
        return iter(self._results)

    @property
    def everything(self) -> list[Result | Sweep]:
        """Results and sweeps."""
        return [*self._results, *self.sweeps]

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


def _read(kind: type[Any], values: Mapping[str, Any]) -> Any:
    return kind(**{field.name: values[field.name] for field in fields(kind)})
