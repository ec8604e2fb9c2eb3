"""The models of one run: which predictions are evaluated together, and how.

A lane is a set of predictions that use the same weights and options, so that one call can batch them. The first lane is
that of the unconditional model, which stock sampling prepares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import comfy.samplers
from torch import Tensor, nn

from ...gcfg.plan import as_stored
from . import hooks, placing, versions
from .calls import Around, calls, with_stock_indices
from .clones import same_calls, same_weights
from .index import reads_index, wants_uncond
from .term_guider import TermGuider

BASE = "negative"  # the names that previews and other packs read from a guider
FIRST = "positive"
PREDICT = "predict_noise"  # a kind of wrapper: around a guider's whole prediction

Predictions = dict[str, Tensor]


def takes(a: Any, b: Any) -> bool:
    """Whether predictions of two patchers may share a call."""
    return a is b or (same_weights(a, b) and same_calls(a, b))


class Lane:
    """Predictions of one model with one set of options.

    Args:
        guider: what the model's wrappers know as their guider: the sampler's own, or a `TermGuider`.
        keys: the names of its predictions, in the order of the terms; `BASE` is the unconditional one.
        name: of its first term, for messages.
        stock_names: under which names the guider has the conditionings of a further model, by key.
    """

    def __init__(
        self,
        guider: comfy.samplers.CFGGuider,
        keys: Sequence[str],
        name: str = "",
        stock_names: dict[str, str] | None = None,
    ) -> None:
        self.guider = guider
        self.keys = list(keys)
        self.name = name
        self._stock_names = stock_names
        self.options = guider.model_options  # of this run, once it is prepared
        self.functions = placing.functions_in_place()
        self._beside: dict[str, Any] = {}
        self.is_wrapped = self.is_replaced = self.own_sampling_function = False
        self._moves = True
        self.reads_index = reads_index(guider.model_patcher)
        self._wants_uncond = wants_uncond(guider.model_patcher)

    @property
    def patcher(self) -> Any:
        """The model."""
        return self.guider.model_patcher

    @property
    def conds(self) -> dict[str, list[dict]]:
        """Its conditionings by key, processed for the model while a run is on."""
        conds: dict[str, list[dict]] = self.guider.conds
        if self._stock_names is None:
            return conds
        return {key: conds[name] for key, name in self._stock_names.items()}

    def placed_beside(self, owner: Any) -> None:
        """Note what has to be put in place around this lane's calls on the module that `owner` has loaded."""
        self._beside = {} if owner is self.patcher else placing.object_patches_beside(owner, self.patcher)
        for value in self._beside.values():
            if isinstance(value, nn.Module):
                value.to(self.patcher.load_device)

    def leave(self) -> None:
        """Put back what was moved for the run."""
        for value in self._beside.values():
            if isinstance(value, nn.Module):
                value.to(self.patcher.offload_device)
        self._beside = {}

    def settle(self, lanes: Sequence[Lane], outside: placing.Functions) -> None:
        """Note what holds while the run samples.

        Args:
            lanes: all of the run, the sampler's first.
            outside: ComfyUI's sampling functions as they stand outside of all models' wrappers.
        """
        beside = [lane for lane in lanes if lane.patcher.model is self.patcher.model]
        self._moves = len(beside) > 1 or self.functions != lanes[0].functions
        further = isinstance(self.guider, TermGuider)
        # Wrappers around a further model's prediction, which may change its weight.
        self.is_wrapped = further and bool(versions.wrappers(PREDICT, self.guider.model_options))
        function = self.functions["sampling_function"]
        self.is_replaced = placing.is_replaced(function)
        self.own_sampling_function = further and function is not outside["sampling_function"]

    def at_work(self) -> AbstractContextManager[None]:
        """Have the module and ComfyUI's functions be this lane's within the block."""
        return self._moved_in() if self._moves or not versions.is_active(self.patcher) else nullcontext()

    @contextmanager
    def _moved_in(self) -> Iterator[None]:
        with placing.placed(self.functions, self.patcher.model, self._beside):
            previous = versions.activate(self.patcher)
            try:
                yield
            finally:
                if previous is not None and previous is not self.patcher:
                    versions.activate(previous)

    def predictions(
        self, keys: Sequence[str], around: Around, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any
    ) -> Predictions:
        """Denoised predictions of some of its conditionings, in as few calls as its options allow.

        Args:
            keys: which.
            around: what each is measured from, which counts as the unconditional prediction of its call.
            x: noisy latents, (B, C, *spatial).
            sigma: (B,), all equal.
            options: the model's options at this step.
            seed: of the run.
        """
        if self.is_wrapped:
            return self._wrapped(keys[0], around, x, sigma, options, seed)
        return self._plain(keys, around, x, sigma, options, seed)

    def _plain(
        self, keys: Sequence[str], around: Around, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any
    ) -> Predictions:
        found: Predictions = {}
        beside = BASE if self._wants_uncond else None
        for together, other in calls(keys, around, beside, self._batches(keys, around, options), self.reads_index):
            places = [*together, other] if other is not None else together
            predictions = self._evaluate(together, other, x, sigma, options, seed)
            # What is a term's and a reference as well counts as the term's.
            for key, prediction in zip(places, predictions, strict=True):
                if key != other or key not in found:
                    found[key] = prediction
        return {key: found[key] for key in keys}

    def _wrapped(
        self, key: str, around: Around, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any
    ) -> Predictions:
        """The same inside the wrappers of a further model's own, which know one term's prediction."""
        guider = self.guider
        assert isinstance(guider, TermGuider)
        guider.predict = lambda x, sigma, options, seed: self._plain([key], around, x, sigma, options, seed)[key]
        return {key: guider(x, sigma, options, seed)}

    def _batches(self, keys: Sequence[str], around: Around, options: dict[str, Any]) -> bool:
        """ControlNets, patches that read the index and replaced functions know only cond and uncond."""
        return not (
            self.reads_index
            or "sampler_calc_cond_batch_function" in options
            or self.is_replaced
            or placing.is_replaced(self.functions["calc_cond_batch"])
            or any("control" in entry for key in keys if key != around.base for entry in self.conds[key])
        )

    def _evaluate(
        self, terms: Sequence[str], uncond: str | None, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any
    ) -> list[Tensor]:
        """The predictions of one call: of the terms, and of the unconditional last, which comes first in the batch."""
        model = self.patcher.model
        if self.is_replaced:
            return self._through_sampling_function(terms, uncond, x, sigma, options, seed)
        if len(terms) > 1:
            places = [*terms, *([] if uncond is None else [uncond])]
            marked = with_stock_indices(options, None if uncond is None else len(terms))
            return list(comfy.samplers.calc_cond_batch(model, [self.conds[key] for key in places], x, sigma, marked))
        # In stock form: the place of what is not evaluated stays.
        pair = [self.conds[terms[0]] if terms else None, None if uncond is None else self.conds[uncond]]
        if "sampler_calc_cond_batch_function" in options:
            args = {"conds": pair, "input": x, "sigma": sigma, "model": model, "model_options": options}
            out = options["sampler_calc_cond_batch_function"](args)
        else:
            out = comfy.samplers.calc_cond_batch(model, pair, x, sigma, options)
        return [prediction for prediction, cond in zip(out, pair, strict=False) if cond is not None]

    def _through_sampling_function(
        self, terms: Sequence[str], uncond: str | None, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any
    ) -> list[Tensor]:
        """The same through what a pack put in the place of ComfyUI's `sampling_function`, which sees stock guidance."""
        taken: list[Tensor] = []
        options = hooks.taking(options, lambda *predictions: taken.extend(predictions))
        if not terms:
            options = with_stock_indices(options, 0)
        cond, other = (self.conds[terms[0]], uncond) if terms else (self.conds[uncond or BASE], None)
        comfy.samplers.sampling_function(
            self.patcher.model,
            x,
            sigma,
            None if other is None else self.conds[other],
            cond,
            1.0 if other is None else 2.0,  # at 1 stock guidance leaves the unconditional out
            model_options=options,
            seed=seed,
        )
        return taken[: 1 if other is None else 2]


def predict(
    lanes: Sequence[Lane],
    wanted: Sequence[str],
    around: Around,
    x: Tensor,
    sigma: Tensor,
    options: dict[str, Any],
    seed: Any,
) -> Predictions:
    """Denoised predictions at one noise level.

    Args:
        lanes: all lanes, the unconditional model's first.
        wanted: the keys of the predictions.
        around: what each is measured from.
        x: noisy latents, (B, C, *spatial).
        sigma: (B,), all equal.
        options: the sampled model's options at this step.
        seed: of the run.

    Returns:
        A prediction per key, of the latents' shape.
    """
    found: Predictions = {}
    for lane in reversed(lanes):  # the base last: hooks that evaluate the model again find it active
        together = [key for key in lane.keys if key in wanted]
        if together:
            own = options if lane is lanes[0] else lane.options
            with lane.at_work():
                found.update(lane.predictions(together, around, x, sigma, own, seed))
    return found


def covers(conds: Sequence[dict], sigma: float) -> bool:
    """Whether any of these processed conditionings acts at `sigma`; outside its range a prediction is all zeros."""
    return any(
        not (
            ("timestep_start" in cond and sigma > as_stored(float(cond["timestep_start"])))
            or ("timestep_end" in cond and sigma < as_stored(float(cond["timestep_end"])))
        )
        for cond in conds
    )
