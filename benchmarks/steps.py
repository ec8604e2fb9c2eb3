"""One guided step of every case against the model calls in it, against separate calls, and against stock guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import comfy.samplers
from torch import Tensor

from ..nodes.runtime.lanes import BASE, Lane
from .bench import Bench
from .cases import CASES, STOCK, Case, inside
from .figures import Figure
from .harness import Split, interleaved, ratio, watching


class Step(NamedTuple):
    """One step.

    Attributes:
        batches: of its model calls.
        seconds: of the step.
        split: what of it the models took.
        apart: seconds of the same predictions, each in a call of its own; None where they are not ours.
    """

    batches: list[int]
    seconds: float
    split: Split
    apart: float | None


def figures(bench: Bench) -> Iterator[Figure]:
    """One step of every case, in turn."""
    calls = {case.text: partial(_step, bench, case) for case in CASES}
    found = interleaved(calls, bench.repeats, f"steps, {bench.size} px")
    stock = found[STOCK.text]
    for case in CASES:
        yield from _row(case, found[case.text], stock)


def _row(case: Case, steps: Sequence[Step], stock: Sequence[Step]) -> Iterator[Figure]:
    figure = partial(Figure.of, case.text)
    batches = steps[0].batches
    evaluations, of_stock = sum(batches), sum(stock[0].batches)
    seconds = [step.seconds for step in steps]
    yield figure("model calls", [len(batches)], "count", note=f" of batch {', '.join(map(str, batches))}")
    yield figure("step", seconds, "s")
    goal = 1.5 if case.ours and 2 * evaluations == 3 * of_stock else None
    yield figure("/ stock CFG", ratio(seconds, [step.seconds for step in stock]), "x", goal=goal)
    yield figure("by evaluations", [evaluations / of_stock], "x")
    within = [step.split.whole / step.split.within for step in steps]
    yield figure("/ its model calls", within, "x", goal=1.01 if case.ours else None)
    yield figure("- its model calls", [1000 * step.split.around for step in steps], "ms")
    if case.ours:
        yield figure("/ separate calls", ratio(seconds, [step.apart or 0 for step in steps]), "x")


def _step(bench: Bench, case: Case, _: int) -> Step:
    guider = case.guider(bench.models)
    found: list[Step] = []

    def solver(step: Callable[[], Tensor], x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
        # Waiting for a GPU after every model call is no part of a step, so there the step is timed by itself too.
        alone = None if bench.cpu else bench.clock.time(step)
        patchers = [lane.patcher for lane in guider.run.lanes] if case.ours else [bench.models.prior]
        with watching([patcher.model for patcher in patchers], bench.clock) as watch:
            split = watch.split(step)
        apart = bench.clock.time(lambda: separate(guider.run.lanes, x, sigma, options)) if case.ours else None
        found.append(Step(watch.batches, alone or split.whole, split, apart))

    inside(guider, bench.latent, solver)
    return found[0]


def separate(lanes: Sequence[Lane], x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
    """Evaluate every prediction of a run in a call of its own."""
    for lane in lanes:
        for key in lane.keys:
            own = options if BASE in lane.keys else lane.options
            comfy.samplers.calc_cond_batch(lane.patcher.model, [lane.conds[key]], x, sigma, own)
