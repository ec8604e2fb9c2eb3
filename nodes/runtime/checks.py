"""What can be combined: checks made before anything is loaded, each with one sentence for the user."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_sampling
import comfy.samplers

from ...gcfg.diagnostics import Recorder
from ...gcfg.errors import GuidanceError
from ...gcfg.plan import GuidancePlan, ScheduledTerm
from ...gcfg.terms import GuidanceTerm
from . import placing, wrapping
from .clones import called, identical
from .failures import width_error
from .keys import measured_from, predicted_from
from .lanes import BASE, covers, takes
from .latents import latent_shapes, streams
from .words import Words

MANY = 16  # predictions a step
_PAIR = 2  # a ComfyUI conditioning is a list of [tensor, options] pairs


def check_terms(node: str, terms: Sequence[GuidanceTerm]) -> None:
    """Refuse to sum nothing.

    Raises:
        GuidanceError: if there is no term.
    """
    if not terms:
        raise GuidanceError(
            f"{node}: no guidance term is connected, expected at least one; connect the terms output of a Guidance "
            f"Term node to term_1."
        )


def check_run(words: Words, base: Any, unconditional: Any, plan: GuidancePlan, positive: Any = None) -> None:
    """Refuse models and conditionings that cannot be summed around `base`.

    Args:
        words: what the messages call them.
        base: the sampler's model.
        unconditional: the sampler's conditioning.
        plan: all terms.
        positive: a sampler's own positive conditioning, where it has one.

    Raises:
        GuidanceError: if a conditioning is empty or of the wrong width, or a model of another latent family or another
            kind of noise schedule.
    """
    _check_conditioning(f"{words.node}: {words.base}", unconditional, base)
    if positive:
        _check_conditioning(f"{words.node}: {words.positive}", positive, base)
    _check_no_terms(f"{words.node}: model", base)
    for scheduled in plan.terms:
        term, name = scheduled.term, f"Guidance Term '{scheduled.label}'"
        if term.model is None and term.conditioning is None and not term.relative:
            raise GuidanceError(
                f"{name}: neither model nor conditioning is connected, expected at least one, because without them the "
                f"term predicts {words.prediction} itself and changes nothing; connect one."
            )
        model, conditioning = predicted_from(base, unconditional, term)
        _check_no_terms(f"{name}: model", model)
        _check_no_terms(f"{name}: relative_model", term.relative_model)
        _check_latent_format(name, model, base, words)
        _check_schedule(name, model, base, words)
        _check_conditioning(f"{name}: conditioning", conditioning, model)
        if term.relative:
            _check_reference(name, (model, conditioning), measured_from(base, unconditional, term), base, words)


def check_latent(words: Words, base: Any, latent_image: Any) -> None:
    """Refuse a latent image that is empty, or whose channels are not the model's.

    Raises:
        GuidanceError: if so.
    """
    expected = base.get_model_object("latent_format").latent_channels
    shapes = latent_shapes(latent_image)
    for shape in shapes:
        if 0 in shape:
            raise GuidanceError(
                f"{words.node}: latent_image has shape {shape} and so holds nothing, expected at least one latent; "
                f"give it a batch of 1 or more and a size above 0."
            )
        if shape[1] != expected and len(shapes) == 1:
            raise GuidanceError(
                f"{words.node}: latent_image has {shape[1]} channels, expected {expected} as {words.model} works "
                f"with; encode the image with the VAE of this model."
            )


def holds_lost(latent: Any) -> bool:
    """Whether a latent holds NaN or infinity."""
    return not all(bool(part.isfinite().all()) for part in streams(latent))


def warn_not_finite(node: str, latent: Any, after: bool = False, recorder: Recorder | None = None) -> bool:
    """Say that a latent holds NaN or infinity, which would only show as a black image.

    Args:
        node: the node's name.
        latent: the latent image that comes in, or the samples after a run.
        after: whether it is the samples.
        recorder: of the run, which may know the step; None: not known.

    Returns:
        Whether it was said.
    """
    if not holds_lost(latent):
        return False
    if after:
        step = None if recorder is None else recorder.lost_at()
        logging.warning(
            "%s: the samples hold NaN or infinity%s, expected finite numbers, so the image is lost; lower the weights, "
            "or load the models in a wider precision.",
            node,
            "" if step is None else f" (the guidance from step {step} on)",
        )
    else:
        logging.warning(
            "%s: latent_image holds NaN or infinity, expected finite numbers, so the image will be lost; look at the "
            "node that made the latent.",
            node,
        )
    return True


def check_base_covers(words: Words, conds: Sequence[dict], sigma: float) -> None:
    """Refuse an unconditional conditioning that has no part in a step that needs it.

    Raises:
        GuidanceError: if so.
    """
    if not covers(conds, sigma):
        raise GuidanceError(
            f"{words.node}: {words.base} is limited to a part of the sampling and has no prompt at sigma {sigma:g}, "
            f"expected one at every step; combine it with a conditioning for the rest."
        )


def warn_idle(idle: Sequence[ScheduledTerm]) -> None:
    """Say which terms act at no step."""
    for scheduled in idle:
        logging.warning(
            "Guidance Term '%s': no step of this run lies between %g and %g of the noise schedule, so the term "
            "never becomes active; widen start_percent and end_percent, or take more steps.",
            scheduled.label,
            scheduled.term.start_percent,
            scheduled.term.end_percent,
        )


def warn_nowhere(plan: GuidancePlan) -> None:
    """Say which terms have a mask (or stream weights) that leaves nothing of them."""
    for scheduled in plan.terms:
        if scheduled.off:
            masked = bool(scheduled.term.masks) and not any(bool(mask.any()) for mask in scheduled.term.masks)
            logging.warning(
                "Guidance Term '%s': its %s zero everywhere, so the term does nothing; %s.",
                scheduled.label,
                "mask is" if masked else "stream_weights are",
                "paint the region where it should act, or disconnect it" if masked else "give a stream another weight",
            )


def warn_many_evaluations(node: str, count: int) -> None:
    """Say what a step costs where it is more than anyone would expect."""
    if count > MANY:
        logging.warning(
            "%s: the terms need up to %d predictions at each step, one for every different pair of model and prompt "
            "and what relative terms are measured from, so a step takes as long as %d of a model without guidance; "
            "use fewer terms, let them share prompts and models, or place a Guidance Cache.",
            node,
            count,
            count,
        )


def warn_override(terms: int) -> None:
    """Say that a cfg which a wrapper of the sampler's model sets cannot stand for several weights."""
    logging.warning(
        "GCFG: CFG Override (or another node that sets the cfg of a run) on the sampler's model is ignored, because %d "
        "terms act and it gives one weight; put the node on the model of the one term that it is for, or set the "
        "weights' intervals and curves in the Guidance Term nodes.",
        terms,
    )


def warn_settings(lanes: Sequence[Any]) -> None:
    """Say where a pack stands in the sampler's place and reads settings that a term's model has alone."""
    sample = comfy.samplers.KSAMPLER.sample
    if not placing.is_replaced(sample):
        return
    for lane in lanes[1:]:
        names = placing.own_settings(lane.patcher.model_options, lanes[0].patcher.model_options)
        if names:
            logging.warning(
                "GCFG: %s looks at the sampler's model only, and the model of %s has settings for it (%s), which may "
                "have no effect or fail there; put their node on the sampler's model too.",
                called(sample),
                lane.name,
                ", ".join(names),
            )


def warn_caches(lanes: Sequence[Any]) -> None:
    """Say where a cache that other packs put around a model keeps one state for several predictions."""
    found: dict[str, list[Any]] = {}
    for lane in lanes:
        name = _cache_around(lane.patcher)
        if name:
            found.setdefault(name, []).append(lane)
    for name, holders in found.items():
        terms = max(len([key for key in lane.keys if key != BASE]) for lane in holders)
        if len(holders) > 1 or (terms > 1 and holders[0].reads_index):
            what = f"{len(holders)} models" if len(holders) > 1 else f"{terms} terms of one model"
            logging.warning(
                "GCFG: %s of this run carry the cache %s, which keeps what it stores once for all of them, so the "
                "image may change or nothing may be skipped; use it on one of them, or ComfyUI's own EasyCache.",
                what,
                name,
            )


def _check_no_terms(name: str, model: Any) -> None:
    if wrapping.carries_terms(model):
        raise GuidanceError(
            f"{name} comes from a GCFG Model node, whose terms would count twice or not at all, expected a model "
            f"without; connect the model in front of that node, and its terms to the GCFG sampler."
        )


def _check_reference(name: str, own: tuple[Any, Any], reference: tuple[Any, Any], base: Any, words: Words) -> None:
    """Refuse what a relative term is measured from where it is not of the family, or is the term's own prediction."""
    (model, conditioning), (other, prompt) = own, reference
    _check_latent_format(f"{name}: relative_model", other, base, words)
    _check_schedule(f"{name}: relative_model", other, base, words)
    _check_conditioning(f"{name}: relative_conditioning", prompt, other)
    if takes(other, model) and identical(prompt, conditioning):
        raise GuidanceError(
            f"{name}: relative_model and relative_conditioning predict what the term itself predicts, so it changes "
            f"nothing, expected another model or prompt; connect another one, or the prompt to conditioning."
        )


def _check_latent_format(name: str, model: Any, base: Any, words: Words) -> None:
    found, expected = model.get_model_object("latent_format"), base.get_model_object("latent_format")
    if found.latent_channels != expected.latent_channels:
        raise GuidanceError(
            f"{name}: latent has {found.latent_channels} channels, expected {expected.latent_channels} as "
            f"{words.model} works with; use models of one latent family."
        )
    if type(found).__name__ != type(expected).__name__:
        raise GuidanceError(
            f"{name}: latent format is {type(found).__name__}, expected {type(expected).__name__} like "
            f"{words.model}'s; use models of one latent family."
        )


def _check_schedule(name: str, model: Any, base: Any, words: Words) -> None:
    found, expected = (_kind(patcher.get_model_object("model_sampling")) for patcher in (model, base))
    if found != expected:
        raise GuidanceError(
            f"{name}: model is a {found} model, expected a {expected} model like {words.model}, because "
            f"their noise levels mean different things; use two models of one kind."
        )


def _kind(model_sampling: Any) -> str:
    return "flow" if isinstance(model_sampling, comfy.model_sampling.CONST) else "diffusion (eps or v)"


def _check_conditioning(name: str, conditioning: Any, model: Any) -> None:
    if not conditioning or any(len(entry) != _PAIR for entry in conditioning):
        raise GuidanceError(f"{name} is empty, expected at least one prompt; connect a CLIP Text Encode node.")
    config = getattr(getattr(model.model, "model_config", None), "unet_config", {})
    expected = config.get("context_dim")
    if not isinstance(expected, int):
        return
    for tensor, _ in conditioning:
        if tensor is None:
            raise GuidanceError(f"{name} holds no text, which this model reads; connect a CLIP Text Encode node.")
        if tensor.shape[-1] != expected:
            raise width_error(name, tensor.shape[-1], expected)


def _cache_around(patcher: Any) -> str:
    """The name of the cache that another pack has put around a model's calls, as it calls itself; else empty."""
    wrapper = patcher.model_options.get("model_function_wrapper")
    name = "" if wrapper is None else called(wrapper)
    return name if "cache" in name.lower() else ""
