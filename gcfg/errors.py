"""The one error type whose message is written for the person at the graph editor."""

from __future__ import annotations


class GuidanceError(ValueError):
    """A user's mistake, told in one sentence: what, expected, got, and the fix."""
