"""Terms on a model: whatever samples it with stock guidance samples the sum.

ComfyUI lets a model stand around its whole run. There the run is handed to a guider of ours that has the sampler's own
prompts and cfg as its first term, so that it is the very run of a GCFG KSampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import comfy.utils
from torch import Tensor

from ...gcfg.errors import GuidanceError
from ...gcfg.terms import GuidanceTerm
from . import latents, versions
from .guider import GCFGGuider
from .lanes import BASE, FIRST
from .live import Watch
from .wrapping import OUTER, TERMS

NODE = "GCFG Model"


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
    if not terms:
        raise GuidanceError(
            f"{NODE}: no guidance term is connected, expected at least one; connect the terms output of a Guidance "
            f"Term node to term_1."
        )
    if not versions.HAS_HOOKS:
        raise GuidanceError(
            f"{NODE}: this ComfyUI is too old, expected one from 0.3.8 on, where a model can stand around its run; "
            f"update ComfyUI, or use the GCFG KSampler."
        )
    clone = model.clone()
    others = clone.wrappers.pop(OUTER, {})
    before = [term for wrapper in others.pop(TERMS, []) for term in wrapper.terms]
    # First, so that all others stand inside, around the run that it is handed to.
    clone.wrappers[OUTER] = {TERMS: [_Terms((*before, *terms), watch)], **others}
    return clone


class _Terms:
    """The wrapper: ComfyUI calls it in place of a run, with what it wraps."""

    def __init__(self, terms: tuple[GuidanceTerm, ...], watch: Watch) -> None:
        self.terms, self._watch = terms, watch

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
            GuidanceError: if that guider is not stock guidance, or as `GCFGGuider` does.
        """
        guider = self._guider(executor.class_obj)
        # Here ComfyUI has packed the streams of a latent, and told the callback of packed ones.
        packed = latent_shapes is not None and len(latent_shapes) > 1
        if packed:
            noise, latent_image = _unpacked(noise, latent_shapes), _unpacked(latent_image, latent_shapes)
            denoise_mask = None if denoise_mask is None else _unpacked(denoise_mask, latent_shapes)
            callback = None if callback is None else _told_of_packed(callback)
        samples: Tensor = guider.sample(
            noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed
        )
        return _packed(samples) if packed else samples

    def _guider(self, stock: Any) -> GCFGGuider:
        """Our guider with the prompts and the cfg of the sampler's."""
        plain = comfy.samplers.CFGGuider
        conds = {name: _conditioning(entries) for name, entries in stock.original_conds.items()}
        if type(stock).predict_noise is not plain.predict_noise or not {*conds} <= {FIRST, BASE}:
            raise GuidanceError(
                f"{NODE}: the sampler's guider is {type(stock).__name__}, which makes a sum of its own, expected "
                f"stock guidance (a KSampler, CFGGuider or BasicGuider); say that sum with Guidance Terms and use a "
                f"GCFG Guider."
            )
        model = stock.model_patcher.clone()
        del model.wrappers[OUTER][TERMS]
        if not model.wrappers[OUTER]:
            del model.wrappers[OUTER]
        if BASE not in conds:  # the Basic Guider's one prompt is what the terms are added to
            return GCFGGuider(model, conds[FIRST], self.terms, NODE, self._watch)
        own = GuidanceTerm(stock.cfg, conditioning=conds[FIRST], label="positive")
        return GCFGGuider(model, conds[BASE], (own, *self.terms), NODE, self._watch)


def _conditioning(entries: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """A CONDITIONING again, of what a guider keeps of it."""

    def options(entry: dict[str, Any]) -> dict[str, Any]:
        added = {"cross_attn", "uuid"} if entry.get("model_conds") else {"cross_attn", "uuid", "model_conds"}
        return {name: value for name, value in entry.items() if name not in added}

    return [[entry.get("cross_attn"), options(entry)] for entry in entries]


def _unpacked(packed: Tensor, shapes: Any) -> Any:
    import comfy.nested_tensor

    return comfy.nested_tensor.NestedTensor(comfy.utils.unpack_latents(packed, shapes))


def _packed(nested: Any) -> Tensor:
    packed: Tensor = comfy.utils.pack_latents(latents.streams(nested))[0]
    return packed


def _told_of_packed(callback: Callable[..., Any]) -> Callable[..., Any]:
    return lambda step, denoised, x, total: callback(step, _packed(denoised), _packed(x), total)
