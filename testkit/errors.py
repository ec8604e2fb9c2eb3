"""Errors of commands: one sentence for the person at the terminal."""

from __future__ import annotations


class CommandError(Exception):
    """What went wrong, and what to do about it, in one sentence."""


class ServerDied(CommandError):
    """The ComfyUI process ended by itself."""


class PromptFailed(CommandError):
    """ComfyUI refused a prompt or a node raised.

    Attributes:
        details: the server's own answer, as it sent it.
    """

    def __init__(self, message: str, details: dict | None = None) -> None:
        super().__init__(message)
        self.details = details or {}


class PromptInterrupted(CommandError):
    """The prompt was cancelled while it ran."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; a BaseException, so that no library takes it for an error of its own."""
