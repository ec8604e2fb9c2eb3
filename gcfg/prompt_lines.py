"""Decoupled prompts as text: one weighted condition per line.

    7.5 | sunflower
    5 @0-60% | in Van Gogh style
    -2 | blurry

Each line is a guidance of its own (condition decoupling, section 4.4 of Cao et al. 2023); a negative weight is a
negative prompt (Appendix C). Empty lines and lines that begin with # are left out.

A text may come with a workflow from anywhere, so reading one takes time in proportion to its length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from .curves import MAX_WEIGHT
from .errors import short

EXPECTED = "expected weight | prompt, such as 7.5 | sunflower, or 5 @0-60% | in Van Gogh style"
MAX_HEAD = 100  # characters before |
MAX_LINES = 100  # each is one more evaluation per step

# No two parts beside each other take the same character, so that a line that does not fit is not tried in many ways.
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
_HEAD = re.compile(rf"\s*(?P<weight>{_NUMBER})\s*(?:@(?P<interval>.*))?", re.DOTALL)
_INTERVAL = re.compile(rf"\s*(?P<start>{_NUMBER})\s*(?:%\s*)?-\s*(?P<end>{_NUMBER})\s*%\s*")
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class PromptLine:
    """One condition.

    Attributes:
        number: its line in the text, from 1.
        weight: guidance weight, at most 100 either way; negative pushes away.
        text: the prompt.
        start_percent: where in the sampling it begins to act, 0 to 1.
        end_percent: where it stops.
    """

    number: int
    weight: float
    text: str
    start_percent: float = 0.0
    end_percent: float = 1.0

    def __str__(self) -> str:
        """The line as a user writes it; reading it gives the same condition again."""
        whole = (self.start_percent, self.end_percent) == (0.0, 1.0)
        interval = "" if whole else f" @{_percent_text(self.start_percent)}-{_percent_text(self.end_percent)}%"
        return f"{_plain(self.weight)}{interval} | {self.text}"


@dataclass(frozen=True)
class LineProblem:
    """What is wrong with a line.

    Attributes:
        number: the line, from 1.
        message: what was expected, and what is there.
    """

    number: int
    message: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.message}"


def read_prompt_lines(text: str) -> tuple[list[PromptLine], list[LineProblem]]:
    """Read a decoupled prompt; never raises.

    Args:
        text: one condition per line.

    Returns:
        The conditions of the good lines, and the problems of the bad ones; what comes after `MAX_LINES` is one problem.
    """
    lines: list[PromptLine] = []
    problems: list[LineProblem] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            if len(lines) + len(problems) == MAX_LINES:
                problems.append(LineProblem(number, f"expected at most {MAX_LINES} lines; take this and the rest out."))
                break
            read = _read_line(number, line)
            (lines if isinstance(read, PromptLine) else problems).append(read)  # type: ignore[arg-type]
    return lines, problems


def _read_line(number: int, line: str) -> PromptLine | LineProblem:
    head, bar, prompt = line.partition("|")
    if bar and len(head.strip()) > MAX_HEAD:
        return LineProblem(number, f"{EXPECTED}, at most {MAX_HEAD} characters before |; found '{short(line)}'.")
    found = _HEAD.fullmatch(head) if bar else None
    if found is None:
        return LineProblem(number, f"{EXPECTED}; found '{short(line)}'.")
    weight = float(found["weight"])
    if not abs(weight) <= MAX_WEIGHT:
        return LineProblem(
            number, f"expected a weight from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}; found {short(found['weight'])}."
        )
    if not prompt.strip():
        return LineProblem(number, f"expected a prompt after |; found nothing. {EXPECTED.capitalize()}.")
    half = _HALF.search(prompt)
    if half is not None:  # no text encoder takes it
        return LineProblem(number, f"expected whole characters; found {short(half[0])}, half of one; delete it.")
    if found["interval"] is None:
        return PromptLine(number, weight, prompt.strip())
    interval = _INTERVAL.fullmatch(found["interval"])
    if interval is None:
        return LineProblem(number, f"expected @start-end%, such as @0-60%; found '@{short(found['interval'])}'.")
    start, end = (_fraction(interval[name]) for name in ("start", "end"))
    if not 0.0 <= start <= end <= 1.0:
        return LineProblem(
            number, f"expected 0 <= start <= end <= 100 in @start-end%; found '@{short(found['interval'])}'."
        )
    return PromptLine(number, weight, prompt.strip(), start, end)


def _fraction(percent: str) -> float:
    """The fraction nearest to a percent as it is written: 7 % is 0.07 itself, which 7.0 / 100 need not be."""
    digits, _, exponent = percent.lower().partition("e")
    return float(f"{digits}e{int(exponent or 0) - 2}")


def _percent_text(fraction: float) -> str:
    """A percent that `_fraction` reads as this fraction, to the last bit."""
    if 0.0 < fraction < 1e-9:  # with all its zeros it would be a long head
        return str(Decimal(repr(fraction)).scaleb(2))
    return _without_zeros(f"{Decimal(repr(fraction)).scaleb(2):f}")


def _without_zeros(number: str) -> str:
    return number.rstrip("0").rstrip(".") if "." in number else number


def _plain(number: float) -> str:
    return repr(float(number)).removesuffix(".0")
