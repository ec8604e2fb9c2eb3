"""GCFG KSampler in the cases that the stock KSampler can do too: whole nodes, models loaded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from .bench import Bench
from .cases import ONE, PAIR, STOCK, Case, Sampling
from .figures import Figure
from .harness import Split, Watch, interleaved, ratio, watching

STEPS = 2
Run = tuple[Split, Tensor]


def figures(bench: Bench) -> Iterator[Figure]:
    """One term, and a positive and a negative prompt as two terms, over the stock node."""
    cases = (STOCK, ONE, PAIR)
    with watching([bench.models.prior.model], bench.clock) as watch:
        found = interleaved({case.text: partial(_run, bench, watch, case) for case in cases}, bench.repeats, "KSampler")
    stock = found[STOCK.text]
    for case in (ONE, PAIR):
        runs = found[case.text]
        whole = ratio([own.whole for own, _ in runs], [split.whole for split, _ in stock])
        # The calls are the same in both, so only what happens around them is compared.
        around = [
            1 + (own.around - split.around) / split.whole for (own, _), (split, _) in zip(runs, stock, strict=True)
        ]
        yield Figure.of(case.text, "/ stock KSampler", whole, "x", goal=1.02)
        yield Figure.of(case.text, "the calls' noise cancelled", around, "x", goal=1.02)
        yield Figure.of(case.text, "error of the result", [relative_error(runs[0][1], stock[0][1])], "error", goal=0.0)


def _run(bench: Bench, watch: Watch, case: Case, _: int) -> Run:
    results: list[Tensor] = []
    split = watch.split(lambda: results.append(case.run(bench.models, bench.latent, Sampling(STEPS))))
    return split, results[0]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
