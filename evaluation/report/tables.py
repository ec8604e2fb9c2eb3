"""The page's tables, each a function of the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy.stats import binomtest

from ..config import METHODS
from ..recipe import PRIOR
from ..results import Result, Results
from . import words

# Cells of methods by the heading of their column.
Beside = Mapping[str, Mapping[str, str]]
NOTHING: Beside = {}


class Column(NamedTuple):
    """A number of a task, and whether its lowest value is the best."""

    heading: str
    task: str
    number: str
    lowest: bool


_FID = Column("FID ↓", "fid", "fid", True)
_EDGES = (Column("edge F1 ↑", "canny", "f1", False), Column("edge difference ↓", "canny", "mae", True))
_GUIDED = (
    Column("alignment ↑", "alignment", "alignment", False),
    Column("FID of these ↓", "alignment", "fid", True),
    Column("CLIP score ↑", "alignment", "clip_score", False),
    *_EDGES,
)
_ABLATION = (
    _FID,
    Column("alignment ↑", "alignment", "alignment", False),
    Column("FID, text-guided ↓", "alignment", "fid", True),
    *_EDGES,
    Column("diversity ↑", "diversity", "diversity", False),
    Column("Vendi score ↑", "diversity", "vendi", False),
)


def unconditional(results: Results, beside: Beside = NOTHING, below: Sequence[Sequence[str]] = ()) -> str:
    """Unconditional generation, with more columns and rows if they are given."""
    methods = [each.method for each in results.of_task("fid", METHODS)]
    cells = {
        "method": map(results.title, methods),
        "trained parameters": [words.parameters(results.parameters(method)) for method in methods],
        _FID.heading: _best(results, methods, _FID),
        **_beside(beside, methods),
    }
    return words.table(list(cells), [*zip(*cells.values(), strict=True), *below])


def guided(results: Results, beside: Beside = NOTHING) -> str:
    """Text-guided and spatially guided generation, with more columns if they are given."""
    methods = [m for m in results.of_group(METHODS) if results.get("alignment", m) or results.get("canny", m)]
    cells = {
        "method": map(results.title, methods),
        **{each.heading: _best(results, methods, each) for each in _measured(results, methods, _GUIDED)},
        **_beside(beside, methods),
    }
    return words.table(list(cells), list(zip(*cells.values(), strict=True)))


def ablation(results: Results, group: str, reference: Sequence[str]) -> str:
    """Methods of an ablation, with every number that one of them has, below those that they are compared with."""
    own = results.of_group(group)
    columns = _measured(results, own, _ABLATION)
    methods = [method for method in dict.fromkeys([*reference, *own]) if _measured(results, [method], columns)]
    rows = [[results.title(method), *(_cell(results, method, each) for each in columns)] for method in methods]
    return words.table(["", *(each.heading for each in columns)], rows)


def weights_table(results: Results) -> str:
    """The weights that each method uses, and from how many they were chosen."""
    rows = []
    for each in results:
        if not each.terms:
            continue
        used = ", ".join(f"{_name(term)} {term['weight']:g}" for term in each.terms)
        around = "" if each.recipe["base"] == PRIOR else f" around {each.recipe['base']}"
        rows.append(
            [each.title, each.task, used + around, str(len(each.search)) if each.search else "given", _edge(each)]
        )
    return words.table(["method", "task", "weights", "tried", ""], rows, numbers=False)


def stages_table(stages: Mapping[str, float]) -> str:
    """Minutes of each stage."""
    rows = [[stage, f"{seconds / 60:.1f}"] for stage, seconds in stages.items()]
    return words.table(["stage", "minutes"], [*rows, ["**all**", f"**{sum(stages.values()) / 60:.1f}**"]])


def files_table(results: Results) -> str:
    """Every file that a number depends on."""
    known = {(key, file["path"], file["sha256"]) for each in results.everything for key, file in each.files.items()}
    rows = [[f"`{key}`", f"`{path}`", f"`{sha256[:16]}`"] for key, path, sha256 in sorted(known)]
    return words.table(["setting", "file or folder", "SHA-256, first 16 digits"], rows, numbers=False)


def _measured(results: Results, methods: Iterable[str], columns: Sequence[Column]) -> list[Column]:
    """Return the columns of which one of the methods has the number."""
    known = list(methods)
    return [c for c in columns if any(results.number(c.task, method, c.number) is not None for method in known)]


def _beside(beside: Beside, methods: Sequence[str]) -> dict[str, list[str]]:
    return {heading: [cells.get(m, words.ABSENT) for m in methods] for heading, cells in beside.items()}


def _best(results: Results, methods: Sequence[str], column: Column) -> list[str]:
    """Return a column's cells, the best in bold, the prior aside; equal texts are equally good."""
    cells = [_cell(results, method, column) for method in methods]
    ranked = [
        (value, cell)
        for method, cell in zip(methods, cells, strict=True)
        if method != PRIOR and (value := results.number(column.task, method, column.number)) is not None
    ]
    if len(ranked) < 2:
        return cells
    best = (min if column.lowest else max)(ranked)[1]
    return [
        f"**{cell}**" if cell == best and method != PRIOR else cell for method, cell in zip(methods, cells, strict=True)
    ]


def _cell(results: Results, method: str, column: Column) -> str:
    found = results.get(column.task, method)
    value = found.numbers.get(column.number) if found else None
    if found is None or value is None:
        return words.ABSENT
    if column.number == "alignment":
        bounds = binomtest(round(value * found.count), found.count).proportion_ci(0.95, method="wilson")
        return f"{value:.2f} ({bounds.low:.2f} .. {bounds.high:.2f})"
    return f"{value:.3f}" if column.task == "canny" else words.number(value)


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
