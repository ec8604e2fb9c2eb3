"""GCFG KSampler in the cases that the stock KSampler can do too: whole nodes, models loaded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from ..nodes.runtime import versions
from .bench import Bench
from .cases import CONCEPT, ON_MODEL, ONE, PAIR, STOCK, Case, Sampling
from .figures import Figure
from .harness import Split, Watch, interleaved, ratio, watching

STEPS = 2
Run = tuple[Split, Tensor]


def figures(bench: Bench) -> Iterator[Figure]:
    """One term, and a positive and a negative prompt as two terms, over the stock node; GCFG Model over our own."""
    yield from _compared(bench, STOCK, (ONE, PAIR), "stock KSampler", 1.02)
    if versions.HAS_HOOKS:
        yield from _compared(bench, CONCEPT, (ON_MODEL,), "GCFG KSampler", 1.01)


def _compared(bench: Bench, peer: Case, cases: tuple[Case, ...], name: str, goal: float) -> Iterator[Figure]:
    modules = [bench.models.prior.model, bench.models.concept.model] if peer is CONCEPT else [bench.models.prior.model]
    with watching(modules, bench.clock) as watch:
        runs = {case.text: partial(_run, bench, watch, case) for case in (peer, *cases)}
        found = interleaved(runs, bench.repeats, "KSampler")
    theirs = found[peer.text]
    for case in cases:
        own = found[case.text]
        whole = ratio([split.whole for split, _ in own], [split.whole for split, _ in theirs])
        # The calls are the same in both, so only what happens around them is compared.
        around = [1 + (a.around - b.around) / b.whole for (a, _), (b, _) in zip(own, theirs, strict=True)]
        yield Figure.of(case.text, f"/ {name}", whole, "x", goal=goal)
        yield Figure.of(case.text, "the calls' noise cancelled", around, "x", goal=goal)
        yield Figure.of(case.text, "error of the result", [relative_error(own[0][1], theirs[0][1])], "error", goal=0.0)


def _run(bench: Bench, watch: Watch, case: Case, _: int) -> Run:
    results: list[Tensor] = []
    split = watch.split(lambda: results.append(case.run(bench.models, bench.latent, Sampling(STEPS))))
    return split, results[0]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
