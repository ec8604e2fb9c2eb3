"""The page's tables, each a function of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scipy.stats import binomtest

from ..config import PRIOR
from . import words
from .stored import METHODS, Result, Results

# Cells of methods by the heading of their column.
Columns = Mapping[str, Mapping[str, str]]
NOTHING: Columns = {}

# (task, number, heading, lowest is best); the tables of ablations show those that were measured.
_NUMBERS = (
    ("fid", "fid", "FID ↓", True),
    ("alignment", "alignment", "alignment ↑", False),
    ("alignment", "fid", "FID, text-guided ↓", True),
    ("canny", "f1", "edge F1 ↑", False),
    ("canny", "mae", "edge difference ↓", True),
    ("diversity", "diversity", "diversity ↑", False),
    ("diversity", "vendi", "Vendi score ↑", False),
)


def unconditional(results: Results, beside: Columns = NOTHING, below: Sequence[Sequence[str]] = ()) -> str:
    """Unconditional generation, with more columns and rows if they are given."""
    methods = [each.method for each in results.of_task("fid", METHODS)]
    fids = [results.number("fid", method, "fid") for method in methods]
    ranked = [value if method != PRIOR else None for value, method in zip(fids, methods, strict=True)]
    shown = words.best(ranked, [words.number(value) for value in fids], lowest=True)
    rows = [
        [results.title(method), words.parameters(results.parameters(method)), fid, *_cells(beside, method)]
        for method, fid in zip(methods, shown, strict=True)
    ]
    return words.table(["method", "trained parameters", "FID ↓", *beside], [*rows, *below])


def guided(results: Results, beside: Columns = NOTHING) -> str:
    """Text-guided and spatially guided generation, with more columns if they are given."""
    tasks = ("alignment", "canny")
    methods = [name for name in results.of_group(METHODS) if any(results.get(task, name) for task in tasks)]
    columns = [
        ("alignment ↑", "alignment", "alignment", False),
        ("FID of these ↓", "alignment", "fid", True),
        ("CLIP score ↑", "alignment", "clip_score", False),
        ("edge F1 ↑", "canny", "f1", False),
        ("edge difference ↓", "canny", "mae", True),
    ]
    columns = [each for each in columns if any(results.number(each[1], name, each[2]) is not None for name in methods)]
    shown = [_column(results, methods, *each[1:]) for each in columns]
    rows = [
        [results.title(method), *(column[place] for column in shown), *_cells(beside, method)]
        for place, method in enumerate(methods)
    ]
    return words.table(["method", *(each[0] for each in columns), *beside], rows)


def ablation(results: Results, group: str, reference: Sequence[str]) -> str:
    """Methods of an ablation, with every number that one of them has, below those that they are compared with."""
    own = results.of_group(group)
    columns = [
        (heading, *place)
        for *place, heading, _ in _NUMBERS
        if any(results.number(place[0], method, place[1]) is not None for method in own)
    ]
    measured = [
        method
        for method in dict.fromkeys([*reference, *own])
        if any(results.number(task, method, number) is not None for _, task, number in columns)
    ]
    rows = [
        [results.title(method), *(_cell(results, task, method, number) for _, task, number in columns)]
        for method in measured
    ]
    return words.table(["", *(heading for heading, *_ in columns)], rows)


def weights_table(results: Results) -> str:
    """The weights that each method uses, and from how many they were chosen."""
    rows = []
    for each in results:
        if not each.terms:
            continue
        used = ", ".join(f"{_name(term)} {words.weight(term['weight'])}" for term in each.terms)
        around = "" if each.recipe["base"] == PRIOR else f" around {each.recipe['base']}"
        rows.append(
            [each.title, each.task, used + around, str(len(each.search)) if each.search else "given", _edge(each)]
        )
    return words.table(["method", "task", "weights", "tried", ""], rows).replace("---:", "---")


def stages_table(stages: Mapping[str, float]) -> str:
    """Minutes of each stage."""
    rows = [[stage, f"{seconds / 60:.1f}"] for stage, seconds in stages.items()]
    return words.table(["stage", "minutes"], [*rows, ["**all**", f"**{sum(stages.values()) / 60:.1f}**"]])


def files_table(results: Results) -> str:
    """Every file that a number depends on."""
    known = {(key, file["path"], file["sha256"]) for each in results.everything for key, file in each.files.items()}
    rows = [[f"`{key}`", f"`{path}`", f"`{sha256[:16]}`"] for key, path, sha256 in sorted(known)]
    return words.table(["setting", "file or folder", "SHA-256, first 16 digits"], rows).replace("---:", "---")


def _cells(beside: Columns, method: str) -> list[str]:
    return [cells.get(method, words.ABSENT) for cells in beside.values()]


def _column(results: Results, methods: Sequence[str], task: str, number: str, lowest: bool) -> list[str]:
    values = [results.number(task, method, number) for method in methods]
    ranked = [value if method != PRIOR else None for value, method in zip(values, methods, strict=True)]
    return words.best(ranked, [_cell(results, task, method, number) for method in methods], lowest)


def _cell(results: Results, task: str, method: str, number: str) -> str:
    found = results.get(task, method)
    value = found.numbers.get(number) if found else None
    if found is None or value is None:
        return words.ABSENT
    if number == "alignment":
        bounds = binomtest(round(value * found.count), found.count).proportion_ci(0.95, method="wilson")
        return f"{words.share(value)} ({words.share(bounds.low)} .. {words.share(bounds.high)})"
    return f"{value:.3f}" if number in ("f1", "mae") else words.number(value)


def _name(term: Mapping[str, object]) -> str:
    return str(term["label"] or term["model"])


def _edge(result: Result) -> str:
    """Whether the search may have stopped short."""
    ends = [
        _name(term)
        for term, grid in zip(result.terms, result.grids, strict=True)
        if len(grid) > 1 and term["weight"] in (min(grid), max(grid))
    ]
    return f"at the grid's edge: {', '.join(ends)}" if ends else ""
