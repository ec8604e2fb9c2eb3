"""Guidance Cache on the small world's trained models: its time beside stock guidance, its error beside the full run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..gcfg.terms import GuidanceTerm
from ..nodes.runtime.concept import load_concept_unet
from ..nodes.runtime.text import encode_prompt
from ..nodes.sampling import GCFGKSampler
from ..testkit import models, small_world
from ..testkit.small_world import WORDS
from .figures import Figure
from .quality import front, psnr, rmse
from .rules import FULL, PRESET, RULES, Rule
from .timing import Clock, Spread, ratio

TEXT, CONCEPT = 5.0, 1.5  # the weights of the workflow text-guided-concept


@dataclass(frozen=True)
class Sampling:
    """How everything is sampled."""

    steps: int
    sampler: str
    scheduler: str
    batch: int = 1


class World:
    """The small world's prior, concept, text encoder and autoencoder in a running ComfyUI.

    Args:
        folder: where their files are written, unless they are there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, concept = folder / "small-world-prior.safetensors", folder / "small-world-concept.safetensors"
        if not checkpoint.exists():
            part = checkpoint.with_suffix(".part")
            vae = models.to_dtype(small_world.vae(), torch.float16)
            models.save_checkpoint(part, small_world.prior(), vae, small_world.clip())
            part.replace(checkpoint)
        if not concept.exists():
            save_file(small_world.concept(), concept)
        loaded = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=True, output_clip=True)
        self.prior, self._clip, self.vae = loaded[:3]
        self.concept = load_concept_unet(str(concept))
        self._texts: dict[str, Any] = {}

    def text(self, words: str) -> Any:
        """The CONDITIONING of a prompt."""
        if words not in self._texts:
            self._texts[words] = encode_prompt(self._clip, words)
        return self._texts[words]

    def latent(self, batch: int) -> dict[str, Tensor]:
        """An empty latent of the world's size."""
        side = small_world.SIZE // 8
        return {"samples": torch.zeros(batch, 4, side, side)}

    def terms(self, words: str, text: Rule, concept: Rule) -> tuple[GuidanceTerm, ...]:
        """Text guidance by the prior, and the concept's."""
        return (
            replace(GuidanceTerm(TEXT, conditioning=self.text(words), label="text"), cache_rule=text),
            replace(GuidanceTerm(CONCEPT, model=self.concept, label="concept"), cache_rule=concept),
        )

    def stock(self, how: Sampling, seed: int) -> Tensor:
        """The stock KSampler's latent, by text guidance alone."""
        node = sys.modules["nodes"].KSampler()
        words, latent = _words(seed), self.latent(how.batch)
        args = (seed, how.steps, TEXT, how.sampler, how.scheduler, self.text(words), self.text(""), latent, 1.0)
        samples: Tensor = node.sample(self.prior, *args)[0]["samples"]
        return samples

    def guided(self, how: Sampling, seed: int, text: Rule, concept: Rule) -> Tensor:
        """The GCFG KSampler's latent."""
        terms = self.terms(_words(seed), text, concept)
        args = (seed, how.steps, how.sampler, how.scheduler, self.text(""), self.latent(how.batch), 1.0)
        samples: Tensor = GCFGKSampler().sample(self.prior, *args, term_1=terms)[0]["samples"]
        return samples


def _words(seed: int) -> str:
    return WORDS[seed % len(WORDS)]


@dataclass(frozen=True)
class Measured:
    """One rule beside the others, seed by seed.

    Attributes:
        time: over the stock run's.
        saved: over the full run's.
        psnr: of the image against the full run's, dB.
        rmse: of the latent against the full run's, over the spread of that one's values.
    """

    time: Spread
    saved: Spread
    psnr: Spread
    rmse: Spread


def measure(world: World, how: Sampling, seeds: int, clock: Clock, rules: Mapping[str, Any]) -> dict[str, Measured]:
    """Sample every seed with every rule and with stock guidance, in turn; the first seed is also a warm-up."""
    runs: dict[str, Callable[[int], Tensor]] = {"stock": partial(world.stock, how)}
    for name, (_, (text, concept)) in rules.items():
        runs[name] = partial(world.guided, how, text=text, concept=concept)
    times: dict[str, list[float]] = {name: [] for name in runs}
    latents: dict[str, list[Tensor]] = {name: [] for name in runs}
    for words in ("", *WORDS):
        world.text(words)  # else a word's first run would pay for encoding it
    with tqdm(total=(seeds + 1) * len(runs), desc="reuse", unit="run", leave=False) as bar:
        for number in range(seeds + 1):
            seed = max(number - 1, 0)
            for name in runs if number % 2 else reversed(runs):
                kept: list[Tensor] = []
                seconds = clock.time(lambda run=runs[name], kept=kept, seed=seed: kept.append(run(seed)))  # type: ignore[misc]
                if number:
                    times[name].append(seconds)
                    latents[name] += kept[0].split(1)
                bar.update()
    images = {name: [world.vae.decode(latent) for latent in found] for name, found in latents.items()}
    return {
        name: Measured(
            ratio(times[name], times["stock"]),
            ratio(times[name], times[FULL]),
            Spread.of(list(map(psnr, images[name], images[FULL]))),
            Spread.of(list(map(rmse, latents[name], latents[FULL]))),
        )
        for name in rules
    }


def figures(measured: Mapping[str, Measured], seeds: int) -> list[Figure]:
    """Three rows for each rule; goals for the preset."""
    found = []
    for name, row in measured.items():
        title = RULES[name][0]
        goal = {"time": 1.0, "psnr": 35.0} if name == PRESET else {}
        full = f"medians of {seeds} seeds" if name == FULL else ""
        found.append(Figure.spread(f"{name}_time", f"{title}: time / stock CFG", row.time, "x", goal.get("time"), full))
        if name == FULL:
            continue
        found.append(Figure.spread(f"{name}_saved", f"{title}: time / full run", row.saved, "x"))
        quality = Figure.spread(f"{name}_psnr", f"{title}: PSNR to the full run", row.psnr, "dB", goal.get("psnr"))
        found.append(replace(quality, at_least=True))
        found.append(Figure.spread(f"{name}_rmse", f"{title}: latent RMSE", row.rmse, "x"))
    return found


def draw(measured: Mapping[str, Measured], path: Path) -> None:
    """Draw the front: time against PSNR, with the rules that nothing beats joined by a line."""
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(8.6, 4.2), layout="constrained")
    axes = plot.subplots()
    rows = {name: row for name, row in measured.items() if name != FULL}
    best = front([(row.time.median, row.psnr.median) for row in rows.values()])
    axes.plot(*zip(*best, strict=True), color="#0072b2", zorder=1, linewidth=1)
    for number, (name, row) in enumerate(rows.items(), start=1):
        place, colour = (row.time.median, row.psnr.median), "#d55e00" if name == PRESET else "#0072b2"
        axes.scatter(*place, color=colour, zorder=2, s=28, label=f"{number}  {RULES[name][0]}")
        axes.annotate(str(number), place, (5, 5), textcoords="offset points", fontsize=8)
    for level, style in ((measured[FULL].time.median, ":"), (1.0, "--")):
        axes.axvline(level, color="#666666", linestyle=style, linewidth=1)
    axes.axhline(35.0, color="#666666", linestyle="--", linewidth=1)
    axes.set_xlabel("time over stock CFG (dotted: the full run)")
    axes.set_ylabel("PSNR to the full run, dB (median)")
    plot.legend(loc="outside right upper", fontsize=7, frameon=False, handlelength=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=110)


def device_clock(cpu_time: bool) -> Clock:
    """Of the device that ComfyUI runs its models on."""
    return Clock(management.get_torch_device(), cpu_time)
