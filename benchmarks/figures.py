"""What a benchmark reports: figures beside their goals, as tables and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_FORMATS = {
    "x": "{:.3f}",
    "ms": "{:.1f} ms",
    "s": "{:.2f} s",
    "MB": "{:,.0f} MB",
    "%": "{:.2f} %",
    "dB": "{:.1f} dB",
    "images/s": "{:.3g} images/s",
    "count": "{:.0f}",
    "error": "{:.2g}",
}


@dataclass(frozen=True)
class Figure:
    """One cell of a section's table.

    Attributes:
        row: what was run.
        column: what was measured of it.
        value: the measured value, the median where there are repeats.
        unit: "x" for a ratio, "ms", "s", "MB" (10^6 bytes), "%", "dB", "images/s", "count", or "error".
        low: the smallest of the repeats.
        high: the largest.
        goal: the value should be at most this; None where the figure only informs.
        at_least: the value should be at least the goal.
        note: what stands behind the value in the table.
    """

    row: str
    column: str
    value: float
    unit: str
    low: float
    high: float
    goal: float | None = None
    at_least: bool = False
    note: str = ""

    @classmethod
    def of(cls, row: str, column: str, values: Sequence[float], unit: str, **more: Any) -> Figure:
        """A figure of repeated values."""
        return cls(row, column, statistics.median(values), unit, min(values), max(values), **more)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def cell(self) -> str:
        """The median, the lowest and highest of the repeats, the note, and the goal with its verdict."""
        write = _FORMATS[self.unit].format
        spread = f" ({write(self.low)} .. {write(self.high)})".replace(f" {self.unit}", "")
        text = write(self.value) + (spread if self.low != self.high else "") + self.note
        if self.goal is None:
            return text
        verdict = "met" if self.met else "MISSED"
        return f"{text}, goal {'>=' if self.at_least else '<='} {self.goal:g} {verdict}"


def table(title: str, figures: Sequence[Figure]) -> str:
    """Return one section's figures as a Markdown table, a row for everything that was run."""
    columns = dict.fromkeys(figure.column for figure in figures)
    cells = {(figure.row, figure.column): figure.cell() for figure in figures}
    rows = [[title, *columns]]
    for row in dict.fromkeys(figure.row for figure in figures):
        rows.append([row, *(cells.get((row, column), "") for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write_json(path: Path, setting: Mapping[str, Any], sections: Mapping[str, Sequence[Figure]]) -> None:
    """Store what was measured on, and every section's figures."""
    rows = {name: [{**asdict(each), "met": each.met} for each in figures] for name, figures in sections.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setting": setting, "sections": rows}, indent=2) + "\n", encoding="utf-8")
