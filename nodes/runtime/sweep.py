"""A weight sweep: the same sampling with other weights in every cell, all cells in step.

Every cell runs the stock solver for itself and gets what the GCFG KSampler with its weights would give. Cells of one
round are evaluated in one call per model, and cells whose weights did not differ yet (all of them at the first step)
share one prediction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...gcfg.lockstep import RandomState, run_in_step
from ...gcfg.plan import ActiveTerm, GuidancePlan
from ...gcfg.terms import GuidanceTerm
from .guider import GCFGGuider
from .lanes import predict_all


class SweepGuider(GCFGGuider):
    """Guider that samples every cell of a sweep.

    Args:
        model_patcher: the unconditional model.
        unconditional: its conditioning.
        cells: the terms of each cell; they differ only in their weights.
        node: the node's name, for errors.
        at_once: how many cells are evaluated in one call.

    Raises:
        GuidanceError: see `GCFGGuider`.
    """

    def __init__(
        self, model_patcher: Any, unconditional: Any, cells: Sequence[Sequence[GuidanceTerm]], node: str, at_once: int
    ) -> None:
        # A term that pulls in any cell is prepared; which cells evaluate it is decided step by step.
        terms = [next((term for term in column if term.pulls), column[0]) for column in zip(*cells, strict=True)]
        super().__init__(model_patcher, unconditional, terms, node)
        self.cells = [[term.weight for term in cell] for cell in cells]
        self.at_once = at_once

    def sample(self, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample all cells.

        Returns:
            (cells * B, C, *spatial), cell by cell.
        """
        if sigmas.shape[-1] == 0:
            return torch.cat([latent_image] * len(self.cells))
        return super().sample(noise, latent_image, _EachCell(self, sampler), sigmas, *args, **kwargs)

    def _call_shape(self, noise: Tensor) -> Sequence[int]:
        return (min(self.at_once, len(self.cells)) * noise.shape[0], *noise.shape[1:])


class _EachCell(comfy.samplers.Sampler):
    """Runs a sampler once per cell, with the cells of one chunk in step."""

    def __init__(self, guider: SweepGuider, sampler: Any) -> None:
        self.guider, self.sampler = guider, sampler

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Sample every cell from the same noise."""
        plans = [self.guider.step_plan.with_weights(weights) for weights in self.guider.cells]
        total, done = len(plans) * (len(sigmas) - 1), 0
        random = RandomState.take(noise.device)
        results: list[Tensor] = []
        with tqdm(total=total, disable=disable_pbar) as bar:

            def step(i: int, denoised: Tensor, x: Tensor, steps: int) -> None:
                nonlocal done
                done += 1
                bar.update()
                # One preview a round: decoding every cell's would cost more than it shows.
                if callback is not None and (done % len(chunk.plans) == 0 or done == total):
                    callback(done - 1, denoised, x, total)

            def sample_cell(ask: Callable[[_Question], Tensor]) -> Tensor:
                args = {**extra_args, "model_options": dict(extra_args.get("model_options", {}))}
                model = _asking(model_wrap, ask)
                return self.sampler.sample(model, sigmas, args, step, noise.clone(), latent_image, denoise_mask, True)

            for first in range(0, len(plans), self.guider.at_once):
                chunk = _Chunk(model_wrap, plans[first : first + self.guider.at_once])
                random.restore()  # every cell draws the numbers of a run alone, whichever chunk it is in
                results += run_in_step([sample_cell] * len(chunk.plans), chunk.answer, noise.device)
        return torch.cat(results)


@dataclass(eq=False)
class _Question:
    """What a cell's solver asks its model."""

    x: Tensor
    sigma: Tensor
    options: dict[str, Any]


class _Chunk:
    """The cells that are evaluated together."""

    def __init__(self, guider: GCFGGuider, plans: Sequence[GuidancePlan]) -> None:
        self.guider, self.plans = guider, plans
        self._caches = [guider.new_cache() for _ in plans]
        # Cells of one group have had the same weights so far, so their latents are the same.
        self._group = [0] * len(plans)
        self._groups: dict[Any, int] = {}

    def answer(self, questions: list[tuple[int, _Question]]) -> list[Tensor]:
        """The guided prediction for each cell's question."""
        answers: dict[int, Tensor] = {}
        by_sigma: dict[float, list[tuple[int, _Question]]] = {}
        for cell, question in questions:  # a solver that chooses its own steps chooses them for each cell
            by_sigma.setdefault(float(question.sigma[0]), []).append((cell, question))
        for together in by_sigma.values():
            answers.update(self._answer(together))
        return [answers[cell] for cell, _ in questions]

    def _answer(self, questions: list[tuple[int, _Question]]) -> dict[int, Tensor]:
        guider, asked = self.guider, dict(questions)
        first: dict[int, int] = {}
        evaluated = {cell: first.setdefault(self._group[cell], cell) for cell in asked}  # the group's first cell
        terms: dict[int, tuple[ActiveTerm, ...]] = {}
        keys: dict[int, list[str]] = {}
        rows: dict[str, dict[int, None]] = {}  # for each key the cells that it is evaluated for, in order
        for cell, question in questions:
            terms[cell], keys[cell] = guider.wanted(
                self.plans[cell], self._caches[cell], question.sigma, question.options
            )
            for key in keys[cell]:
                rows.setdefault(key, {})[evaluated[cell]] = None
        batches = {tuple(cells): torch.cat([asked[cell].x for cell in cells]) for cells in rows.values()}
        question = questions[0][1]
        wanted = {key: batches[tuple(cells)] for key, cells in rows.items()}
        predictions = predict_all(guider.lanes, wanted, question.sigma, question.options)
        parts = {
            key: dict(zip(rows[key], prediction.split(len(question.x)), strict=True))
            for key, prediction in predictions.items()
        }
        answers = {}
        for cell, question in questions:
            own = {key: parts[key][evaluated[cell]] for key in keys[cell]}
            answers[cell] = guider.guided(
                own, self._caches[cell], terms[cell], question.x, question.sigma, question.options
            )
            weights = tuple((term.index, term.weight) for term in terms[cell])
            self._group[cell] = self._groups.setdefault((self._group[cell], weights), len(self._groups) + 1)
        return answers


def _asking(guider: GCFGGuider, ask: Callable[[_Question], Tensor]) -> GCFGGuider:
    """The guider as one cell's solver sees it: its predictions come from `ask`, through the same wrappers."""
    cell = copy.copy(guider)

    def predict_noise(x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: Any = None) -> Tensor:
        return ask(_Question(x, timestep, model_options or {}))

    cell.predict_noise = predict_noise  # type: ignore[method-assign]
    return cell
