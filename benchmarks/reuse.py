"""Guidance Cache on the small world's trained models: its time beside stock guidance, its error beside the full run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ..testkit import small_world
from .bench import Bench, empty_latent
from .cases import CACHED, FULL, PRESET, WORLD_STOCK, Case, Sampling
from .figures import Figure
from .harness import interleaved, ratio
from .models import World

STEPS = 25
TIME, PSNR = "time / stock CFG", "PSNR to the full run"
Run = tuple[float, Tensor]


def figures(bench: Bench, cases: Sequence[Case] = CACHED, steps: int = STEPS) -> Iterator[Figure]:
    """Sample by every rule and by stock guidance, in turn; each round has a seed and a prompt of its own.

    Draws time against PSNR into `reuse-front.png`.
    """
    world = World(Path(bench.folder))
    calls = {case.text: partial(_run, bench, world, case, steps) for case in (WORLD_STOCK, *cases)}
    found = interleaved(calls, bench.repeats, "reuse")
    seconds = {name: [seconds for seconds, _ in runs] for name, runs in found.items()}
    latents = {name: [latent for _, batch in runs for latent in batch.split(1)] for name, runs in found.items()}
    images = {name: [world.vae.decode(latent) for latent in latents[name]] for name in latents}
    made: list[Figure] = []
    for case in cases:
        figure, name = partial(Figure.of, case.text), case.text
        made.append(figure(TIME, ratio(seconds[name], seconds[WORLD_STOCK.text]), "x", goal=_goal(case, 1.0)))
        if case is FULL:
            continue
        made.append(figure("time / full run", ratio(seconds[name], seconds[FULL.text]), "x"))
        quality = list(map(psnr, images[name], images[FULL.text]))
        made.append(figure(PSNR, quality, "dB", goal=_goal(case, 35.0), at_least=True))
        made.append(figure("latent RMSE", list(map(rmse, latents[name], latents[FULL.text])), "x"))
    draw(made, Path(bench.output) / "reuse-front.png")
    yield from made


def _goal(case: Case, goal: float) -> float | None:
    return goal if case is PRESET else None


def _run(bench: Bench, world: World, case: Case, steps: int, number: int) -> Run:
    world.word = small_world.WORDS[number % len(small_world.WORDS)]
    how = Sampling(steps, "dpmpp_2m", "karras", number)
    kept: list[Tensor] = []
    latent = empty_latent(small_world.SIZE, bench.batch or 1)
    return bench.clock.time(lambda: kept.append(case.run(world, latent, how))), kept[0]


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio of an image with values in 0 .. 1, dB: 10 log10(1 / mean squared error).

    Of the image as it is saved, in 8 bits; 99 for equal ones.
    """
    a, b = ((picture.double().clamp(0, 1) * 255).round() / 255 for picture in (image, reference))
    error = float((a - b).square().mean())
    return 99.0 if error == 0.0 else -10 * math.log10(error)


def rmse(latent: Tensor, reference: Tensor) -> float:
    """Root mean square difference of a latent, over the standard deviation of the reference."""
    a, b = latent.double(), reference.double()
    return float((a - b).square().mean().sqrt() / b.std())


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both time and quality, by time."""
    return sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points))


def draw(figures: Sequence[Figure], path: Path) -> None:
    """Draw the front: time against PSNR, with the rules that nothing beats joined by a line."""
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(8.6, 4.2), layout="constrained")
    axes = plot.subplots()
    values = {(figure.row, figure.column): figure.value for figure in figures}
    places = {row: (values[row, TIME], value) for (row, column), value in values.items() if column == PSNR}
    axes.plot(*zip(*front(list(places.values())), strict=True), color="#0072b2", zorder=1, linewidth=1)
    for number, (row, place) in enumerate(places.items(), start=1):
        colour = "#d55e00" if row == PRESET.text else "#0072b2"
        axes.scatter(*place, color=colour, zorder=2, s=28, label=f"{number}  {row}")
        axes.annotate(str(number), place, (5, 5), textcoords="offset points", fontsize=8)
    for level, style in ((values[FULL.text, TIME], ":"), (1.0, "--")):
        axes.axvline(level, color="#666666", linestyle=style, linewidth=1)
    axes.axhline(35.0, color="#666666", linestyle="--", linewidth=1)
    axes.set_xlabel("time over stock CFG (dotted: the full run)")
    axes.set_ylabel("PSNR to the full run, dB (median)")
    plot.legend(loc="outside right upper", fontsize=7, frameon=False, handlelength=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=110)
