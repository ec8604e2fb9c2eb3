"""The sockets that several nodes share."""

from __future__ import annotations

from typing import Any

from ..gcfg.terms import GuidanceTerm

TERMS = "GCFG_TERMS"
REPORT = "GCFG_REPORT"
TERM_SOCKETS = tuple(f"term_{number}" for number in range(1, 9))


def optional_terms() -> dict[str, Any]:
    """The optional inputs term_1 ... term_8."""
    tip = "A Guidance Term (or a chain of them). All connected terms are summed; their order does not matter."
    return {name: (TERMS, {"tooltip": tip}) for name in TERM_SOCKETS}


def gather_terms(sockets: dict[str, tuple[GuidanceTerm, ...] | None]) -> tuple[GuidanceTerm, ...]:
    """All terms that the sockets bring, in the order of the sockets."""
    return tuple(term for name in TERM_SOCKETS for term in sockets.get(name) or ())
