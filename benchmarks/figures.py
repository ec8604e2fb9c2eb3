"""What a benchmark reports: figures beside their goals, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .timing import Spread

_FORMATS = {
    "x": "{:.3f}",
    "ms": "{:.1f} ms",
    "s": "{:.2f} s",
    "MB": "{:,.0f} MB",
    "%": "{:.2f} %",
    "dB": "{:.1f} dB",
    "images/s": "{:.3g} images/s",
    "GFLOP/s": "{:,.0f} GFLOP/s",
    "count": "{:.0f}",
    "": "{:.2g}",
}


@dataclass(frozen=True)
class Figure:
    """One row.

    Attributes:
        name: its key in the JSON.
        text: what was measured against what.
        value: the measured value, the median where there are repeats.
        unit: "x" for a ratio, "ms", "s", "MB" (10^6 bytes), "%", "dB", "images/s", "GFLOP/s", "count", or "" for none.
        low: the smallest of the repeats, or None.
        high: the largest.
        goal: the value should be at most this; None where the figure only informs.
        note: what else the reader should know.
        at_least: the value should be at least the goal.
    """

    name: str
    text: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    goal: float | None = None
    note: str = ""
    at_least: bool = False

    @classmethod
    def spread(
        cls,
        name: str,
        text: str,
        spread: Spread,
        unit: str,
        goal: float | None = None,
        note: str = "",
        at_least: bool = False,
    ) -> Figure:
        """A figure of repeated values."""
        return cls(name, text, spread.median, unit, spread.low, spread.high, goal, note, at_least)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def cells(self) -> tuple[str, str, str, str, str]:
        """The row: text, value, spread, goal, verdict."""
        write = _FORMATS[self.unit].format
        between = "" if self.low is None or self.high is None else f"{write(self.low)} .. {write(self.high)}"
        goal = "" if self.goal is None else f"{'>=' if self.at_least else '<='} {write(self.goal)}"
        verdict = {None: "", True: "met", False: "MISSED"}[self.met]
        return self.text, write(self.value), between, goal, verdict


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table, their notes below it."""
    rows = [("figure", "median", "lowest .. highest", "goal", ""), *(figure.cells() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    notes = [f"- {figure.text}: {figure.note}" for figure in figures if figure.note]
    return "\n".join([*lines, "", *notes])


def write_json(path: Path, setting: dict[str, Any], figures: Sequence[Figure]) -> None:
    """Store the setting and the figures."""
    rows = [{**asdict(figure), "met": figure.met} for figure in figures]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setting": setting, "figures": rows}, indent=2) + "\n", encoding="utf-8")
