"""What a run costs from unloaded models: time, memory, loads and moves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from ..testkit.loads import counting
from .bench import Bench
from .cases import CLONE, CONCEPT, STOCK, Case, Sampling
from .figures import Figure
from .harness import interleaved, ratio
from .memory import Memory
from .models import unload_all

STEPS = 2


class Cold(NamedTuple):
    """A run from unloaded models, and the same run again.

    Attributes:
        cold: its seconds; reading files is not among them, separating a clone is.
        warm: the second run's.
        peak: bytes that it needed beyond what was held before.
        loads: how often the model that was loaded most was loaded.
        moves: loads and moves of modules between its first and last model call.
    """

    cold: float
    warm: float
    peak: int
    loads: int
    moves: int


def figures(bench: Bench) -> Iterator[Figure]:
    """Stock guidance of one model, and GCFG with two."""
    cases = (STOCK, CONCEPT, CLONE)
    found = interleaved({case.text: partial(_run, bench, case) for case in cases}, bench.repeats, "loads", False)
    for case in cases:
        figure, goals = partial(Figure.of, case.text), (1, 0) if case.ours else (None, None)
        cold, warm, peaks, loads, moves = map(list, zip(*found[case.text], strict=True))
        yield figure("cold run", cold, "s")
        yield figure("warm run", warm, "s")
        yield figure("cold / warm", ratio(cold, warm), "x")
        yield figure("peak memory, cold", [peak / 1e6 for peak in peaks], "MB")
        yield figure("loads per model", [max(loads)], "count", goal=goals[0])
        yield figure("moves between steps", [max(moves)], "count", goal=goals[1])


def _run(bench: Bench, case: Case, _: int) -> Cold:
    models, clock = bench.models, bench.clock
    unload_all()
    models.forget_tuned()
    used = {part.model for part in case.parts}
    for name in used:
        getattr(models, name)  # read from its file, not yet loaded
    run = partial(case.run, models, bench.latent, Sampling(STEPS))
    watched = [models.prior, *([models.concept] if "concept" in used else [])]
    with counting(watched) as counts, Memory(clock.device).peak() as peak:
        cold = clock.time(run)
    warm = clock.time(run)
    if not all(counts.loads[id(patcher.model)] for patcher in watched) or counts.evaluations < STEPS:
        raise RuntimeError(f"counted {counts}: the counters do not see the run")
    return Cold(cold, warm, peak.grown, max(counts.loads.values()), counts.between_steps)
