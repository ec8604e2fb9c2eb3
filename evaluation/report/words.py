"""Numbers and tables as the page writes them."""

from __future__ import annotations

from collections.abc import Sequence

ABSENT = "-"


def number(value: float | None) -> str:
    """Three or four digits that count: 123.4, 12.34, 0.123."""
    if value is None:
        return ABSENT
    if abs(value) >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def parameters(count: float | None) -> str:
    """A number of parameters: 768, 44K, 859M."""
    if count is None:
        return ABSENT
    for unit, size in (("M", 1e6), ("K", 1e3)):
        if count >= size:
            scaled = count / size
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{count:.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A Markdown table; the first column is text, the others are numbers or text too."""
    lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
