"""A weight sweep: the same sampling with other weights in every cell, all cells in step.

Every cell runs the stock solver for itself and gets what the GCFG KSampler with its weights would give. Cells of one
round are evaluated in one call per model, and cells whose weights did not differ yet (all of them at the first step)
share one prediction.

Guidance nodes and caches may keep what they saw at the last step, so with one on any model each cell is a run of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...gcfg.errors import GuidanceError
from ...gcfg.lockstep import RandomState, run_in_step
from ...gcfg.plan import GuidancePlan
from ...gcfg.terms import GuidanceTerm
from . import checks, hooks, latents, versions
from .guider import GCFGGuider
from .lanes import BASE, Predictions, predict
from .run import Run
from .step import Step

_MODEL_FAILED = (AssertionError, IndexError, NotImplementedError, RuntimeError, ValueError)


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
            return latents.joined([latent_image] * len(self.cells))
        if any(_keeps_state(group.patcher) for group in self.groups):
            return self._one_by_one(noise, latent_image, sampler, sigmas, *args, **kwargs)
        return super().sample(noise, latent_image, _EachCell(self, sampler), sigmas, *args, **kwargs)

    def _lasting_pair(self, terms: Sequence[GuidanceTerm]) -> None:
        """None: what is a pair in one cell is none in another."""

    def _one_by_one(self, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any) -> Any:
        """Every cell as a run of its own."""
        callback, results = kwargs.pop("callback", None), []
        device = noise.device
        random = RandomState.take(self.model_patcher.load_device)
        each = len(sigmas) - 1
        lost = checks.warn_not_finite(self.node, latent_image)
        for number, weights in enumerate(self.cells):

            def told(i: int, denoised: Any, x: Any, steps: int, number: int = number) -> None:
                if callback is not None:
                    callback(number * each + i, denoised, x, len(self.cells) * each)

            terms = [replace(scheduled.term, weight=w) for scheduled, w in zip(self.plan.terms, weights, strict=True)]
            cell = GCFGGuider(self.model_patcher, self.unconditional, terms, self.node)
            cell.quiet = True
            random.restore()
            results.append(cell.sample(noise, latent_image, sampler, sigmas, *args, callback=told, **kwargs).to(device))
        samples = latents.joined(results)
        if not lost:
            checks.warn_not_finite(self.node, samples, True)
        return samples

    def _call_shape(self, noise: Tensor) -> Sequence[int]:
        return (min(self.at_once, len(self.cells)) * noise.shape[0], *noise.shape[1:])


def _keeps_state(patcher: Any) -> bool:
    """Whether nodes on a model may carry something from step to step, which cells in step would mix."""
    wrappers = getattr(patcher, "wrappers", {})
    return (
        hooks.has_hooks(patcher.model_options)
        or versions.has_run_wrappers(patcher)
        or any(wrappers.get("calc_cond_batch", {}).values())
        or bool(checks.cache_around(patcher))
    )


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
        run = self.guider.run
        plans = [run.plan.with_weights(weights) for weights in self.guider.cells]
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
                model = _CellGuider(self.guider, ask)
                return self.sampler.sample(model, sigmas, args, step, noise.clone(), latent_image, denoise_mask, True)

            for first in range(0, len(plans), self.guider.at_once):
                chunk = _Chunk(run, plans[first : first + self.guider.at_once], extra_args.get("seed"))
                random.restore()  # every cell draws the numbers of a run alone, whichever chunk it is in
                results += run_in_step([sample_cell] * len(chunk.plans), chunk.answer, noise.device)
        return torch.cat(results)


@dataclass(eq=False)
class _Question:
    """What a cell's solver asks its model."""

    x: Tensor
    sigma: Tensor
    options: dict[str, Any]


class _CellGuider(comfy.samplers.CFGGuider):
    """The guider as one cell's solver sees it: its predictions come from `ask`."""

    def __init__(self, guider: SweepGuider, ask: Callable[[_Question], Tensor]) -> None:
        super().__init__(guider.model_patcher)
        self.inner_model, self.conds, self.cfg, self.ask = guider.inner_model, guider.conds, guider.cfg, ask

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: Any = None) -> Tensor:
        """The cell's guided prediction."""
        return self.ask(_Question(x, timestep, model_options or {}))


class _Chunk:
    """The cells that are evaluated together."""

    def __init__(self, run: Run, plans: Sequence[GuidancePlan], seed: Any) -> None:
        self.run, self.plans, self.seed = run, plans, seed
        self._caches = [run.new_cache() for _ in plans]
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
        run, asked = self.run, dict(questions)
        first: dict[int, int] = {}
        evaluated = {cell: first.setdefault(self._group[cell], cell) for cell in asked}  # the group's first cell
        steps: dict[int, Step] = {}
        rows: dict[str, dict[int, None]] = {}  # for each key the cells that it is evaluated for, in order
        for cell, q in questions:
            steps[cell] = run.step(self.plans[cell], self._caches[cell], q.sigma, q.options)
            for key in steps[cell].wanted:
                rows.setdefault(key, {})[evaluated[cell]] = None
        batches = {tuple(cells): torch.cat([asked[cell].x for cell in cells]) for cells in rows.values()}
        question = questions[0][1]
        wanted = {key: batches[tuple(cells)] for key, cells in rows.items()}
        predictions = self._predictions(wanted, question)
        parts = {
            key: dict(zip(rows[key], prediction.split(len(question.x)), strict=True))
            for key, prediction in predictions.items()
        }
        answers = {}
        for cell, q in questions:
            own = {key: parts[key][evaluated[cell]] for key in steps[cell].wanted}
            answers[cell] = run.combined(steps[cell], own, self._caches[cell], q.x, q.sigma, q.options)
            weights = tuple((term.index, term.weight) for term in steps[cell].acting)
            self._group[cell] = self._groups.setdefault((self._group[cell], weights), len(self._groups) + 1)
        return answers

    def _predictions(self, wanted: Predictions, question: _Question) -> Predictions:
        """Predictions of all cells; with a word where the model evaluates one cell but not several in one call."""
        run, each = self.run, len(question.x)

        def of(latents: Predictions) -> Predictions:
            return predict(run.lanes, latents, BASE, question.sigma, question.options, self.seed)

        try:
            return of(wanted)
        except _MODEL_FAILED as error:
            cells = max(len(x) for x in wanted.values()) // each
            if cells == 1 or isinstance(error, GuidanceError | torch.cuda.OutOfMemoryError):
                raise
            try:
                of({key: x[:each] for key, x in wanted.items()})
            except _MODEL_FAILED:
                raise error from None
            raise GuidanceError(
                f"{run.node}: the model cannot evaluate {cells} cells in one call ({error}), but it can one; set "
                f"cells_at_once to 1."
            ) from error
