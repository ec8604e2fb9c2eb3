"""The matrix as figures, and as tables of one line per case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from .cases import Case
from .figures import Figure
from .ksampler import agreement
from .matrix import Measured
from .timing import Spread, ratio

STEP = {
    "calls": "model calls",
    "step": "step",
    "vs_stock": "/ stock CFG",
    "arithmetic": "by evaluations",
    "overhead": "/ its model calls",
    "overhead_ms": "- its model calls",
    "vs_separate": "/ separate calls",
    "vs_peer": "ours / peer",
}
RUN = {
    "cold": "cold run",
    "warm": "warm run",
    "cold_vs_warm": "cold / warm",
    "peak": "peak memory, cold",
    "loads": "loads per model",
    "moves": "loads and moves between its model calls",
}


def figures(setting: str, measured: Sequence[Measured]) -> list[Figure]:
    """Every figure of one setting.

    Args:
        setting: "family, size, batch" in words, the beginning of every row's name.
        measured: its cases, stock among them.
    """
    by_name = {each.case.name: each for each in measured}
    found: list[Figure] = []
    for each in measured:
        columns = {**_step(each, by_name), **(_run(each) if each.cold else {})}
        titles = STEP | RUN
        for column, made in columns.items():
            name, text = f"{setting}: {each.case.name}.{column}", f"{setting}: {each.case.text}, {titles[column]}"
            found.append(Figure(name, text, made.value, made.unit, made.low, made.high, made.goal, made.note))
    return found


def _step(each: Measured, by_name: Mapping[str, Measured]) -> dict[str, Figure]:
    case, stock = each.case, by_name["stock"]
    batches = "batch " + ", ".join(map(str, each.batches))
    columns = {
        "calls": Figure("", "", len(each.batches), "count", note=batches),
        "step": _spread(each.steps, "s"),
        "overhead": _overhead(each),
        "overhead_ms": _spread([1000 * split.around for split in each.splits], "ms"),
    }
    if each is not stock:
        goal = 1.5 if case.ours and case.evaluations == 3 else None
        columns["vs_stock"] = Figure.spread("", "", ratio(each.steps, stock.steps), "x", goal)
        columns["arithmetic"] = Figure("", "", sum(each.batches) / sum(stock.batches), "x")
    if case.ours:
        columns["vs_separate"] = Figure.spread("", "", ratio(each.steps, each.apart), "x")
    if case.peer_of in by_name:
        mine = by_name[case.peer_of]
        columns["vs_peer"] = Figure.spread("", "", ratio(mine.steps, each.steps), "x", note=_agreement(mine, each))
    return columns


def _overhead(each: Measured) -> Figure:
    values = [1 + split.around / split.within for split in each.splits]
    return Figure.spread("", "", Spread.of(values), "x", 1.01 if each.case.ours else None)


def _agreement(mine: Measured, peer: Measured) -> str:
    assert isinstance(mine.result, torch.Tensor)
    assert isinstance(peer.result, torch.Tensor)
    return f"{mine.case.text} beside {peer.case.text}: {agreement(mine.result, peer.result)}"


def _run(each: Measured) -> dict[str, Figure]:
    return {
        "cold": _spread(each.cold, "s"),
        "warm": _spread(each.warm, "s"),
        "cold_vs_warm": Figure.spread("", "", ratio(each.cold, each.warm), "x"),
        "peak": _spread([number / 1e6 for number in each.peaks], "MB"),
        "loads": Figure("", "", max(each.loads), "count", goal=1 if each.case.ours else None),
        "moves": Figure("", "", each.between, "count", goal=0 if each.case.ours else None),
    }


def _spread(values: Sequence[float], unit: str) -> Figure:
    return Figure.spread("", "", Spread.of(values), unit)


def tables(setting: str, cases: Sequence[Case], figures: Sequence[Figure]) -> str:
    """Return the figures of one setting as two Markdown tables, steps and runs."""
    by_name = {figure.name: figure for figure in figures}
    parts = [f"### {setting}"]
    for columns in (STEP, RUN):
        rows = list(_rows(setting, cases, by_name, columns))
        filled = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
        parts.append("\n".join("| " + " | ".join(row[column] for column in filled) + " |" for row in rows))
        parts[-1] = parts[-1].replace("\n", "\n|" + "---|" * len(filled) + "\n", 1)
    notes = [figure.note for name, figure in by_name.items() if name.endswith(".vs_peer")]
    return "\n\n".join(parts + ["\n".join(f"- {note}" for note in notes)] * bool(notes))


def _rows(
    setting: str, cases: Sequence[Case], by_name: Mapping[str, Figure], columns: Mapping[str, str]
) -> Iterator[list[str]]:
    yield ["case", *columns.values()]
    for case in cases:
        figures = [by_name.get(f"{setting}: {case.name}.{column}") for column in columns]
        if any(figures):
            yield [case.text, *map(_cell, figures)]


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    _, value, between, _, _ = figure.cells()
    if figure.unit == "count":
        return f"{value} of {figure.note}" if figure.note else value
    plain = between.replace(f" {figure.unit}", "")
    return f"{value} ({plain})" if figure.low != figure.high else value
