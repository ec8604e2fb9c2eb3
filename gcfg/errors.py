"""The one error type whose message is written for the person at the graph editor."""

from __future__ import annotations

import unicodedata

_ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of a surrogate pair, line and paragraph separators
_OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # these turn around what stands after them


class GuidanceError(ValueError):
    """A user's mistake, told in one sentence: what, expected, got, and the fix; safe to print and to send."""

    def __init__(self, message: str = "", *args: object) -> None:
        super().__init__(printable(message), *args)


def printable(text: str) -> str:
    r"""Text of others on one line: what a terminal, a log or JSON would trip over becomes an escape such as `\n`.

    Half a surrogate pair cannot be sent or written; a control character can move the cursor or begin another line.
    """

    def shown(character: str) -> str:
        escaped = unicodedata.category(character) in _ESCAPED or character in _OVERRIDES
        return character.encode("unicode_escape").decode("ascii") if escaped else character

    return "".join(map(shown, text))


def short(text: str, most: int = 40) -> str:
    """The beginning of a text of others, at most so many characters, on one line as `printable` shows it."""
    shown = printable(text.strip()[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"
