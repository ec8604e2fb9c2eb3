"""One guided step of every case on the same models, in turn; then what a run costs from unloaded models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.samplers
from torch import Tensor

from .bench import Bench, Step, unload_all
from .cases import Case
from .loads import counting
from .memory import peak
from .steps import separate
from .timing import rounds
from .watch import Split, watching


@dataclass
class Measured:
    """What one case cost, round by round.

    Attributes:
        case: the case.
        batches: the batch of each model call of a step.
        result: of the step, (B, C, H, W).
        steps: seconds of a guided step.
        splits: what of it the models took.
        apart: seconds of the same predictions, each in a call of its own; for our own runs.
        cold: seconds of a run from unloaded models.
        warm: seconds of the run after it.
        peaks: bytes that the cold run needed at its worst moment.
        loads: how often each model was loaded in the cold run.
        between: loads and moves between its first model call and its last.
    """

    case: Case
    batches: list[int] = field(default_factory=list)
    result: Tensor | None = None
    steps: list[float] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)
    between: int = 0


def measure(bench: Bench, cases: Sequence[Case]) -> list[Measured]:
    """Measure every case of one setting."""
    found = {case.name: Measured(case) for case in cases}
    for counts, name in rounds(list(found), bench.repeats, f"{bench.family} {bench.size} px, batch {bench.batch}"):
        _step(bench, found[name], counts)
    distinct = {case.models: case.name for case in reversed(cases) if not case.peer_of}
    for _, name in rounds(list(distinct.values()), bench.repeats - 1, "cold and warm"):  # all of its rounds count
        _run(bench, found[name])
    return list(found.values())


def _step(bench: Bench, into: Measured, counts: bool) -> None:
    """Time one step inside a run, and its predictions apart."""
    guider = into.case.guider(bench)

    def body(step: Step, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
        # Waiting for a GPU after every model call is no part of a step, so there the step is timed by itself first.
        alone = bench.clock.time(step) if bench.clock.device.type == "cuda" else None
        splits: list[Split] = []

        def watched() -> None:
            splits.append(watch.split(lambda: setattr(into, "result", step())))

        with watching(_modules(bench, into.case, guider), bench.clock) as watch:
            watch.record(watched)
        into.batches = watch.batches
        apart = bench.clock.time(lambda: separate(guider.run.lanes, x, sigma, options)) if into.case.ours else None
        if counts:
            into.splits += splits
            into.steps.append(splits[0].within + splits[0].around if alone is None else alone)
            into.apart += [] if apart is None else [apart]

    bench.inside(guider, body)


def _modules(bench: Bench, case: Case, guider: Any) -> list[Any]:
    """The modules that a run evaluates: a clone's is its own once the run has separated it."""
    patchers = (
        [lane.patcher for lane in guider.run.lanes] if case.ours else [getattr(bench, name) for name in case.models]
    )
    return [patcher.model for patcher in patchers]


def _run(bench: Bench, into: Measured) -> None:
    """Time a run from unloaded models, and the same run again."""
    euler = comfy.samplers.sampler_object("euler")
    unload_all()
    bench.forget_tuned()
    guider = into.case.guider(bench)  # with its models read from their files, not yet loaded
    run = partial(bench.sample, guider, euler, bench.steps)
    with counting([bench.prior, *([bench.concept] if "concept" in into.case.models else [])]) as counts:
        into.peaks.append(peak(bench.clock.device, lambda: into.cold.append(bench.clock.time(run))))
    into.warm.append(bench.clock.time(run))
    into.loads = list(counts.loads.values())
    into.between = max(into.between, counts.between_steps)
