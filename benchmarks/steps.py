"""One guided step against the model calls it is made of, three separate calls, and stock guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
from torch import Tensor

from ..gcfg.terms import GuidanceTerm
from ..nodes.runtime.guider import GCFGGuider
from ..nodes.runtime.lanes import BASE, FIRST
from .bench import SCALE, Bench, Body, Step
from .figures import Figure
from .files import prompt
from .timing import Clock, Spread, Times, interleave, ratio


@dataclass
class Watch:
    """What the models were asked: the calls as functions, to be made again, and the seconds they took."""

    clock: Clock
    calls: list[Callable[[], Tensor]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    seconds: float = 0.0
    recording: bool = False

    def around(self, apply_model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `apply_model`, watched."""

        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.recording:
                self.calls.append(lambda: watched(x, *args, **kwargs))
                self.batches.append(x.shape[0])
            start = self.clock.now()
            out = apply_model(x, *args, **kwargs)
            self.seconds += self.clock.now() - start
            return out

        return watched


@contextmanager
def watching(models: Sequence[Any], clock: Clock) -> Iterator[Watch]:
    """Watch the models within the `with` block."""
    watch = Watch(clock)
    for model in models:
        model.apply_model = watch.around(model.apply_model)
    try:
        yield watch
    finally:
        for model in models:
            del model.apply_model  # the class's own again


def figures(bench: Bench) -> list[Figure]:
    """Unconditional and text control on the prior, and a concept model: three evaluations."""
    terms = [
        GuidanceTerm(SCALE, conditioning=prompt(1)),
        GuidanceTerm(1.5, model=bench.concept, conditioning=prompt(2)),
    ]
    times: Times = {}
    outside: list[tuple[float, float]] = []
    batches: list[int] = []

    def inside(guider: GCFGGuider) -> Body:
        def body(step: Step, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
            base, concept = guider.lanes
            model, other = base.patcher.model, concept.patcher.model
            with watching([model, other], bench.clock) as watch:
                watch.recording = True
                step()
                watch.recording = False
                batches.extend(watch.batches)

                def gcfg() -> None:
                    before = watch.seconds
                    total = bench.clock.time(step)
                    outside.append((total, watch.seconds - before))

                def raw() -> None:
                    for call in watch.calls:
                        call()

                def separate() -> None:
                    for conds in (base.conds[BASE], base.conds[FIRST]):
                        comfy.samplers.calc_cond_batch(model, [conds], x, sigma, options)
                    comfy.samplers.calc_cond_batch(other, [concept.conds[concept.keys[0]]], x, sigma, concept.options)

                def stock() -> None:
                    comfy.samplers.sampling_function(
                        model, x, sigma, base.conds[BASE], base.conds[FIRST], SCALE, options
                    )

                calls = {"gcfg": gcfg, "raw": raw, "separate": separate, "stock": stock}
                times.update(interleave(calls, bench.repeats, bench.clock, "steps"))

        return body

    bench.inside_run(terms, inside)
    counted = outside[-bench.repeats :]
    between = Spread.of([total / within for total, within in counted])
    own = Spread.of([(total - within) * 1000 for total, within in counted])
    each = f"calls of batch {' and '.join(map(str, batches))}"
    return [
        Figure.spread("step", "GCFG, one step of three evaluations", Spread.of(times["gcfg"]), "s", note=each),
        Figure.spread(
            "overhead", "GCFG step / its model calls, made alone", ratio(times["gcfg"], times["raw"]), "x", 1.02
        ),
        Figure.spread(
            "overhead_within",
            "GCFG step / its model calls, timed within the step",
            between,
            "x",
            1.02,
            "the same calls in both, so the machine's noise cancels",
        ),
        Figure.spread("overhead_ms", "GCFG step - its model calls, timed within the step", own, "ms"),
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
