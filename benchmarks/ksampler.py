"""The GCFG KSampler in the cases the stock KSampler can do too: whole nodes, models loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..gcfg.terms import GuidanceTerm
from .bench import SCALE, SEED, Bench
from .figures import Figure
from .timing import Spread, interleave, ratio
from .watch import Split, Watch, watching

TEXTS = {
    "k1": "K=1: GCFG KSampler / stock",
    "eq7": "Eq. 7, terms (w, 1-w): GCFG KSampler / stock",
}
CANCELLED = "1 + (own time around the model calls - the stock node's) / the stock node's whole time"


def figures(bench: Bench) -> list[Figure]:
    """K=1, and a positive and a negative prompt as two terms (paper Eq. 7)."""
    uncond, positive, negative = bench.prompt(0), bench.prompt(1), bench.prompt(2)
    eq7_terms = [GuidanceTerm(SCALE, conditioning=positive), GuidanceTerm(1 - SCALE, conditioning=negative)]
    results: dict[str, Tensor] = {}

    def stock() -> None:
        node = sys.modules["nodes"].KSampler()
        arguments = (SEED, bench.steps, SCALE, "euler", "normal", positive, negative, bench.latent, 1.0)
        results["stock"] = node.sample(bench.prior, *arguments)[0]["samples"]

    def k1() -> None:
        terms = [GuidanceTerm(SCALE, conditioning=positive)]
        results["k1"] = bench.gcfg(bench.prior, negative, terms, bench.steps)

    def eq7() -> None:
        results["eq7"] = bench.gcfg(bench.prior, uncond, eq7_terms, bench.steps)

    runs = {"stock": stock, "k1": k1, "eq7": eq7}
    splits: dict[str, list[Split]] = {name: [] for name in runs}
    with watching([bench.prior.model], bench.clock) as watch:
        calls = {name: partial(_split, watch, run, splits[name]) for name, run in runs.items()}
        times = interleave(calls, bench.repeats, bench.clock, "KSampler")
    found: list[Figure] = []
    for name, text in TEXTS.items():
        note = f"nodes of {bench.steps} steps; {agreement(results[name], results['stock'])}"
        whole = ratio(times[name], times["stock"])
        found.append(Figure.spread(f"{name}_vs_stock", text, whole, "x", 1.02, note))
        around = Spread.of(
            [
                1 + (own.around - stock.around) / (stock.within + stock.around)
                for own, stock in zip(splits[name][1:], splits["stock"][1:], strict=True)
            ]
        )
        found.append(Figure.spread(f"{name}_around", f"{text}, noise cancelled", around, "x", 1.02, CANCELLED))
    return found


def _split(watch: Watch, run: Callable[[], object], into: list[Split]) -> None:
    into.append(watch.split(run))


def agreement(got: Tensor, expected: Tensor) -> str:
    """How far a result is from the stock one, in words."""
    if torch.equal(got, expected):
        return "the same result to the last bit"
    return f"relative difference of the results {relative_error(got, expected):.1e}"


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
