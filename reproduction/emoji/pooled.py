"""Both tables of a concept over all seeds: each number is the mean of its trainings, with the least and the most."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ...evaluation.report import words
from ...evaluation.results import RESULTS, read_result
from ...training.files import whole_file
from .evaluation import HELD_OUT

# Column -> where its numbers are: a task of `gcfg evaluate`, or the held-out measurement, and the number's name there.
_UNCONDITIONAL = {"FID ↓": ("fid", "fid")}
_GUIDED = {
    "alignment ↑": ("alignment", "alignment"),
    "second judge ↑": ("held out", "second"),
    "held out: alignment ↑": ("held out", "alignment"),
    "held out: distance ↓": ("held out", "distance"),
    "FID of these ↓": ("alignment", "fid"),
    "edge F1 ↑": ("canny", "f1"),
    "edge difference ↓": ("canny", "mae"),
}
METHODS = ("prior", "textual_inversion", "dreambooth", "custom_diffusion", "oft", "lora", "ours")

Numbers = dict[tuple[str, str, str], list[float]]  # by task, method and name: one of each seed


def read_numbers(folder: Path, concept: str, seeds: Sequence[int]) -> tuple[Numbers, dict[str, str]]:
    """Read what was measured of a concept.

    Returns: the numbers, and the methods' titles.
    """
    numbers: Numbers = {}
    titles: dict[str, str] = {}
    for seed in seeds:
        evaluation = folder / "evaluation" / f"{concept}-{seed}"
        for path in sorted((evaluation / RESULTS).glob("*-*.json")):
            if result := read_result(path):
                titles[result["method"]] = result["title"]
                for name, value in result["numbers"].items():
                    numbers.setdefault((result["task"], result["method"], name), []).append(value)
        if (evaluation / HELD_OUT).is_file():
            found = json.loads((evaluation / HELD_OUT).read_text(encoding="utf-8"))
            for method, values in found["methods"].items():
                for name, value in values.items():
                    numbers.setdefault(("held out", method, name), []).append(value)
            numbers.setdefault(("held out", "truth", "distance"), []).append(found["truth"])
    return numbers, titles


def tables(folder: Path, concept: str, seeds: Sequence[int]) -> str:
    """Return both tables in Markdown."""
    numbers, titles = read_numbers(folder, concept, seeds)
    parts = []
    for columns in (_UNCONDITIONAL, _GUIDED):
        rows = [
            [titles[method], *(spread(numbers.get((task, method, name), [])) for task, name in columns.values())]
            for method in METHODS
            if method in titles
        ]
        parts.append(words.table(["method", *columns], rows))
    truth = spread(numbers.get(("held out", "truth", "distance"), []))
    parts.append(f"{len(seeds)} trainings of each method: mean (least .. most). Real pictures' own distance: {truth}.")
    return "\n\n".join(parts) + "\n"


def write_tables(folder: Path, concept: str, seeds: Sequence[int]) -> None:
    """Write both tables as `evaluation/CONCEPT.md`."""
    with whole_file(folder / "evaluation" / f"{concept}.md") as beside:
        beside.write_text(tables(folder, concept, seeds), encoding="utf-8")


def spread(values: Sequence[float]) -> str:
    """Return the mean of some trainings with the least and the most, `1.50 (1.00 .. 2.00)`."""
    if not values:
        return words.ABSENT
    digits = 1 if fmean(values) >= 10 else 3
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"
