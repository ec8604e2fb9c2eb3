"""One guided step against the model calls it is made of, three separate calls, and stock guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.samplers
from torch import Tensor

from ..gcfg.diagnostics import GuidanceReport, Recorder
from ..gcfg.terms import GuidanceTerm
from ..nodes.runtime.guider import GCFGGuider
from ..nodes.runtime.lanes import BASE, FIRST, Lane
from ..nodes.runtime.readings import Readings
from .bench import SCALE, Bench, Step
from .figures import Figure
from .timing import Clock, Spread, Times, interleave, ratio
from .watch import Split, watching


def figures(bench: Bench) -> list[Figure]:
    """Unconditional and text control on the prior, and a concept model: three evaluations."""
    terms = [
        GuidanceTerm(SCALE, conditioning=bench.prompt(1)),
        GuidanceTerm(1.5, model=bench.concept, conditioning=bench.prompt(2)),
    ]
    times: Times = {}
    splits: list[Split] = []
    batches: list[int] = []
    readings: list[float] = []

    def body(guider: GCFGGuider, step: Step, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
        with watching([lane.patcher.model for lane in guider.run.lanes], bench.clock) as watch:
            watch.record(step)
            batches.extend(watch.batches)
            calls = {
                "gcfg": lambda: splits.append(watch.split(step)),
                "raw": watch.repeat,
                "separate": lambda: separate(guider.run.lanes, x, sigma, options),
                "stock": lambda: stock(guider.run.lanes[0], x, sigma, options),
                "recorded": lambda: recorded(guider, step, bench.clock, readings),
            }
            times.update(interleave(calls, bench.repeats, bench.clock, "steps"))

    bench.inside_run(terms, body)
    counted = splits[-bench.repeats :]
    within = Spread.of([1 + split.around / split.within for split in counted])
    own = Spread.of([split.around * 1000 for split in counted])
    shown = Spread.of([1 + spent / step for spent, step in zip(readings[1:], times["gcfg"], strict=True)])
    each = f"calls of batch {' and '.join(map(str, batches))}"
    return [
        Figure.spread("step", "GCFG, one step of three evaluations", Spread.of(times["gcfg"]), "s", note=each),
        Figure.spread(
            "overhead", "GCFG step / its model calls, made alone", ratio(times["gcfg"], times["raw"]), "x", 1.01
        ),
        Figure.spread(
            "overhead_within",
            "GCFG step / its model calls, noise cancelled",
            within,
            "x",
            1.01,
            "the calls are timed within the step, so they are the same in both",
        ),
        Figure.spread("overhead_ms", "GCFG step - its model calls", own, "ms"),
        Figure.spread(
            "diagnostics",
            "GCFG step with readings for the chart / without, noise cancelled",
            shown,
            "x",
            1.01,
            "none are taken where no editor and no Guidance Report looks",
        ),
        Figure.spread(
            "three_vs_separate",
            "uncond, control, concept / three separate calls",
            ratio(times["gcfg"], times["separate"]),
            "x",
        ),
        Figure.spread(
            "three_vs_stock",
            "uncond, control, concept / stock CFG step",
            ratio(times["gcfg"], times["stock"]),
            "x",
            1.5,
            "three evaluations against two",
        ),
    ]


def recorded(guider: GCFGGuider, step: Step, clock: Clock, seconds: list[float]) -> None:
    """One step whose readings are taken; adds how long that took."""
    recorder = Recorder(GuidanceReport(), (1.0, 0.0), [term.label for term in guider.plan.terms])
    take = recorder.record

    def record(*args: Any) -> None:
        seconds.append(clock.time(lambda: take(*args)))

    recorder.record = record  # type: ignore[method-assign, assignment]
    guider.run.readings = Readings(recorder, guider.run.known)
    try:
        step()
    finally:
        guider.run.readings = None


def separate(lanes: Sequence[Lane], x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
    """Evaluate every prediction of a run in a call of its own."""
    for lane in lanes:
        for key in lane.keys:
            own = options if BASE in lane.keys else lane.options
            comfy.samplers.calc_cond_batch(lane.patcher.model, [lane.conds[key]], x, sigma, own)


def stock(lane: Lane, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
    """One step of stock classifier-free guidance with the prior."""
    conds = lane.conds
    comfy.samplers.sampling_function(lane.patcher.model, x, sigma, conds[BASE], conds[FIRST], SCALE, options)
