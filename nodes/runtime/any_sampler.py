"""Terms on a model: whatever samples it with stock guidance samples the sum.

ComfyUI lets a model stand around its whole run. There a run with stock guidance is handed to a guider of ours that has
the sampler's own prompts and cfg as its first term, so that it is the very run of a GCFG KSampler. A guider of another
pack's runs as it is, and the terms are added where it combines its predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.samplers
import comfy.utils
from torch import Tensor

from ...gcfg.errors import GuidanceError
from ...gcfg.terms import GuidanceTerm
from . import checks, hooks, latents, versions
from .guider import GCFGGuider
from .lanes import BASE, FIRST, PREDICT
from .live import Watch
from .words import Words
from .wrapping import OUTER, TERMS

NODE = "GCFG Model"
_WORDS = Words.of_sampler(NODE, "negative prompt")
_OF_ONE_PROMPT = Words.of_sampler(NODE, "prompt")
_BEGINS = "on_pre_run"  # a kind of callbacks: from here on a run evaluates the model
_IMAGE = 4  # axes of a batch of images


def with_terms(model: Any, terms: Sequence[GuidanceTerm], watch: Watch) -> Any:
    """A clone of the model whose runs have these terms added around the sampler's negative prediction.

        denoised = D_neg + cfg (D_pos - D_neg) + sum_i w_i m_i (D_i - R_i),   R_i = D_neg unless given

    Args:
        model: a model, perhaps one that has terms already; then these come after them.
        terms: what to add.
        watch: who looks at its runs.

    Raises:
        GuidanceError: if there is no term, or this ComfyUI knows no wrappers around a run.
    """
    checks.check_terms(NODE, terms)
    if not versions.HAS_HOOKS:
        raise GuidanceError(
            f"{NODE}: this ComfyUI is too old, expected one from 0.3.8 on, where a model can stand around its run; "
            f"update ComfyUI, or use the GCFG KSampler."
        )
    clone = model.clone()
    others = clone.wrappers.pop(OUTER, {})
    before: tuple[GuidanceTerm, ...] = ()
    for wrapper in others.pop(TERMS, []):
        before, watch.others = wrapper.terms, (wrapper.watch, *wrapper.watch.others)
    # First, so that all others stand inside, around the run that it is handed to.
    clone.wrappers[OUTER] = {TERMS: [_Terms((*before, *terms), watch)], **others}
    clone.callbacks.setdefault(_BEGINS, {})[TERMS] = [_not_around_its_run]
    return clone


class _Terms:
    """The wrapper: ComfyUI calls it in place of a run, with what it wraps."""

    def __init__(self, terms: tuple[GuidanceTerm, ...], watch: Watch) -> None:
        # Numbered here, since in a run the sampler's positive may stand before them.
        self.terms = tuple(replace(term, label=term.label or str(place)) for place, term in enumerate(terms, start=1))
        self.watch = watch

    def __call__(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., Any] | None = None,
        disable_pbar: bool = False,
        seed: Any = None,
        latent_shapes: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """The run of the sampler's guider, with the terms.

        Raises:
            GuidanceError: if that guider does not tell its negative prediction, or as `GCFGGuider` does.
        """
        stock = executor.class_obj
        within = None
        if _is_stock(stock):
            guider = self._guider(stock)
        else:
            model, negative = _without_terms(stock.model_patcher), _negative(stock)
            positive = _conditioning(stock.original_conds.get(FIRST, []))  # under another name it spreads to nothing
            guider = GCFGGuider(model, negative, self.terms, _WORDS, self.watch, positive=positive)
            guider.around = versions.drop_run_wrappers(guider.model_patcher)
            given = {} if latent_shapes is None else {"latent_shapes": latent_shapes}
            arguments = (noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
            within = sampler = _Within(stock, guider, lambda: executor(*arguments, **given), seed)
        # Here ComfyUI has packed the streams of a latent, and told the callback of packed ones.
        packed = latent_shapes is not None and len(latent_shapes) > 1
        if packed:
            noise, latent_image = _unpacked(noise, latent_shapes), _unpacked(latent_image, latent_shapes)
            callback = None if callback is None else _told_of_packed(callback)
        mask = None if denoise_mask is None else _mask_again(denoise_mask, latent_shapes if packed else None)
        samples: Tensor = guider.sample(noise, latent_image, sampler, sigmas, mask, callback, disable_pbar, seed)
        if within is not None:
            return within.result
        return _packed(samples) if packed else samples

    def _guider(self, stock: Any) -> GCFGGuider:
        """Our guider with the prompts and the cfg of stock guidance."""
        model = _without_terms(stock.model_patcher)
        conds = {name: _conditioning(entries) for name, entries in stock.original_conds.items()}
        if BASE not in conds:  # the Basic Guider's one prompt is what the terms are added to
            return GCFGGuider(model, conds[FIRST], self.terms, _OF_ONE_PROMPT, self.watch, positive=conds[FIRST])
        own = _Positive(stock.cfg, conditioning=conds[FIRST], label="positive")
        terms = (own, *self.terms)
        return GCFGGuider(model, conds[BASE], terms, _WORDS, self.watch, cfg_of=0, positive=conds[FIRST])


class _Positive(GuidanceTerm):
    """The sampler's own guidance as a term, whose weight is the cfg, of any size that the sampler takes."""

    def __post_init__(self) -> None:
        """Check nothing: it is of no Guidance Term node."""


class _Within(comfy.samplers.Sampler):
    """The whole run of another pack's guider, as the sampler of ours: the terms are added where it combines its own.

    Args:
        stock: that guider.
        ours: the guider whose terms are added; their models are prepared around the run.
        run: runs it.
        seed: of the run.
    """

    result: Tensor

    def __init__(self, stock: Any, ours: GCFGGuider, run: Callable[[], Tensor], seed: Any) -> None:
        self._stock, self._ours, self._run, self._seed = stock, ours, run, seed
        self._told = False  # of its negative prediction, so that the terms could be added

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *_: Any) -> Tensor:
        """Run it, and return anything of a latent's shape: the result is kept beside."""
        stock, patcher = self._stock, self._stock.model_patcher
        options = stock.model_options
        options["sampler_post_cfg_function"] = [self._added, *options.get("sampler_post_cfg_function", [])]
        options["disable_cfg1_optimization"] = True  # the terms are measured from its negative prediction
        versions.add_wrapper(PREDICT, TERMS, self._telling, options)
        around = patcher.get_additional_models_with_key(TERMS)  # of a run that this one is a part of
        patcher.set_additional_models(TERMS, [lane.patcher for lane in self._ours.run.lanes])  # so that none goes
        try:
            self.result = self._run()
        finally:
            patcher.remove_additional_models(TERMS)
            if around:
                patcher.set_additional_models(TERMS, around)
        if not self._told and len(sigmas) > 1:  # an older ComfyUI has no such wrappers
            raise _has_no_negative(stock)
        return noise

    def _telling(self, executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One of its predictions; where terms act it has to tell of its negative one, so that no step goes without."""
        self._told = False
        denoised: Tensor = executor(x, timestep, *args, **kwargs)
        if not self._told and self._ours.run.acting(float(timestep.flatten()[0])):
            raise _has_no_negative(self._stock)
        self._told = True
        return denoised

    def _added(self, args: dict[str, Any]) -> Tensor:
        """Its guided prediction, with the terms around its negative one."""
        names = [name for name, entries in self._stock.conds.items() if entries is args["uncond"]]
        if not any(name.endswith(BASE) for name in names):
            raise _has_no_negative(self._stock)
        self._told = True
        base, options = args["uncond_denoised"], hooks.without_hooks(args["model_options"])
        total = self._ours.run.around(base, args["input"], args["sigma"], options, self._seed)
        denoised: Tensor = args["denoised"] + (total - base)
        return denoised


def _not_around_its_run(patcher: Any) -> None:
    """What a model with terms does where a run begins with it that they do not stand around."""
    if patcher.get_additional_models_with_key(TERMS):  # they do, around that of another pack's guider
        return
    patcher.cleanup()
    raise GuidanceError(
        f"{NODE}: its model is evaluated beside the one that is sampled, as model_negative of a Dual Model CFG Guider "
        f"is, where its terms would be left out, expected the model of a sampler; connect the model in front of this "
        f"node there, and say that sum with Guidance Terms and a GCFG Guider."
    )


def _is_stock(guider: Any) -> bool:
    """Whether a guider guides as stock does: of two prompts and one weight, or of one prompt."""
    stock = type(guider).predict_noise is comfy.samplers.CFGGuider.predict_noise
    return stock and set(guider.original_conds) <= {FIRST, BASE}


def _negative(guider: Any) -> Any:
    """The negative conditioning of another pack's guider."""
    names = sorted((name for name in guider.original_conds if name.endswith(BASE)), key=len)
    if not names:
        raise _has_no_negative(guider)
    return _conditioning(guider.original_conds[names[0]])


def _has_no_negative(guider: Any) -> GuidanceError:
    return GuidanceError(
        f"{NODE}: the sampler's guider is {type(guider).__name__}, whose sum does not start from a negative prediction "
        f"that it tells, expected stock guidance or one like it; say that sum with Guidance Terms and a GCFG Guider."
    )


def _without_terms(patcher: Any) -> Any:
    """A clone of a model as it was in front of this node."""
    clone = patcher.clone()
    for held, kind in ((clone.wrappers, OUTER), (clone.callbacks, _BEGINS)):
        named = held.get(kind, {})
        named.pop(TERMS, None)  # a later node may have taken it away
        if not named:
            held.pop(kind, None)
    return clone


def _conditioning(entries: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """A CONDITIONING again, of what a guider keeps of it."""

    def options(entry: dict[str, Any]) -> dict[str, Any]:
        added = {"cross_attn", "uuid"} if entry.get("model_conds") else {"cross_attn", "uuid", "model_conds"}
        return {name: value for name, value in entry.items() if name not in added}

    return [[entry.get("cross_attn"), options(entry)] for entry in entries]


def _unpacked(packed: Tensor, shapes: Any) -> Any:
    return _nested(comfy.utils.unpack_latents(packed, shapes))


def _nested(parts: Sequence[Tensor]) -> Any:
    import comfy.nested_tensor

    return comfy.nested_tensor.NestedTensor(parts)


def _mask_again(prepared: Tensor, shapes: Any) -> Any:
    """A mask that ComfyUI makes the prepared one of: it takes the channels of an image's for further samples.

    Args:
        prepared: (B, C, *spatial), alike in all channels, or several of them packed.
        shapes: of the streams where it is packed, else None.
    """
    parts = [prepared] if shapes is None else comfy.utils.unpack_latents(prepared, shapes)
    parts = [part[:, :1] if part.ndim == _IMAGE else part for part in parts]
    return parts[0] if shapes is None else _nested(parts)


def _packed(nested: Any) -> Tensor:
    packed: Tensor = comfy.utils.pack_latents(latents.streams(nested))[0]
    return packed


def _told_of_packed(callback: Callable[..., Any]) -> Callable[..., Any]:
    return lambda step, denoised, x, total: callback(step, _packed(denoised), _packed(x), total)
