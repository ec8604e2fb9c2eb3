"""The guider and the two samplers that sum guidance terms.

GCFG: Cao et al. 2023, "Concept-centric Personalization with Large-scale Diffusion Priors", arXiv 2312.08195, Eq. 3.
"""

from __future__ import annotations

from typing import Any

from .inputs import checked
from .runtime.guider import GCFGGuider as Guider
from .runtime.ksampler import SAMPLERS, SCHEDULERS, sample_latent
from .runtime.live import Watch, reads_output
from .sockets import REPORT, gather_terms, optional_terms

_MODEL = (
    "MODEL",
    {"tooltip": "The unconditional model: its prediction is the base that every term is measured from."},
)
_UNCONDITIONAL = (
    "CONDITIONING",
    {"tooltip": "The unconditional prompt, usually an empty text. A negative prompt works as in a KSampler."},
)
_SEED: dict[str, Any] = {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True}
_SEED["tooltip"] = "Seed of the noise."
_STEPS = ("INT", {"default": 20, "min": 1, "max": 10000, "tooltip": "Number of sampling steps."})
_SAMPLER = (SAMPLERS, {"tooltip": "The solver, as in the KSampler."})
_SCHEDULER = (SCHEDULERS, {"tooltip": "How the noise is removed over the steps, as in the KSampler."})
_LATENT = ("LATENT", {"tooltip": "The latent image to denoise."})
HIDDEN = {"unique_id": "UNIQUE_ID", "prompt": "PROMPT"}
REPORT_TIP = "What each term did at every step, for a Guidance Report."


class GCFGGuider:
    """Node that makes a GUIDER for SamplerCustomAdvanced."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "Guider for SamplerCustomAdvanced: the unconditional prediction of this model plus the weighted deltas of all "
        "connected terms."
    )
    RETURN_TYPES = ("GUIDER", REPORT)
    RETURN_NAMES = ("GUIDER", "report")
    OUTPUT_TOOLTIPS = ("Connect it to SamplerCustomAdvanced.", REPORT_TIP)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        required = {"model": _MODEL, "unconditional": _UNCONDITIONAL}
        return {"required": required, "optional": optional_terms(), "hidden": HIDDEN}

    @checked("GCFG Guider")
    def make(
        self, model: Any, unconditional: Any, unique_id: str | None = None, prompt: Any = None, **sockets: Any
    ) -> tuple[Any, Any]:
        """Build the guider."""
        watch = watch_of(unique_id, prompt)
        return (Guider(model, unconditional, gather_terms(sockets), "GCFG Guider", watch), watch.report)


class GCFGKSampler:
    """Node that samples like the KSampler, with terms for positive, negative and cfg."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "KSampler for any number of guidances: unconditional prediction + sum of weight * (term - unconditional). One "
        "term of the same model is a KSampler at cfg = weight; each further model costs one more evaluation per step."
    )
    RETURN_TYPES = ("LATENT", REPORT)
    RETURN_NAMES = ("LATENT", "report")
    OUTPUT_TOOLTIPS = ("The denoised latent.", REPORT_TIP)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        denoise: dict[str, Any] = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
        denoise["tooltip"] = "How much of the latent image is replaced; below 1 it keeps its structure (img2img)."
        return {
            "required": {
                "model": _MODEL,
                "seed": ("INT", _SEED),
                "steps": _STEPS,
                "sampler_name": _SAMPLER,
                "scheduler": _SCHEDULER,
                "unconditional": _UNCONDITIONAL,
                "latent_image": _LATENT,
                "denoise": ("FLOAT", denoise),
            },
            "optional": optional_terms(),
            "hidden": HIDDEN,
        }

    @checked("GCFG KSampler")
    def sample(
        self,
        model: Any,
        seed: int,
        steps: int,
        sampler_name: str,
        scheduler: str,
        unconditional: Any,
        latent_image: dict[str, Any],
        denoise: float,
        unique_id: str | None = None,
        prompt: Any = None,
        **sockets: Any,
    ) -> Any:
        """Sample the latent."""
        watch = watch_of(unique_id, prompt)
        guider = Guider(model, unconditional, gather_terms(sockets), "GCFG KSampler", watch)
        latent = sample_latent(
            guider,
            latent_image,
            seed=seed,
            steps=steps,
            sampler_name=sampler_name,
            scheduler=scheduler,
            denoise=denoise,
        )
        return _with_chart(latent, watch)


class GCFGKSamplerAdvanced:
    """Node that samples like the KSampler (Advanced), with terms for positive, negative and cfg."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "GCFG KSampler that starts and stops at any step, with or without adding noise, so that passes can be chained."
    )
    RETURN_TYPES = ("LATENT", REPORT)
    RETURN_NAMES = ("LATENT", "report")
    OUTPUT_TOOLTIPS = (
        "The denoised latent, or a partly denoised one when it returns with leftover noise.",
        REPORT_TIP,
    )
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        step = {"min": 0, "max": 10000}
        return {
            "required": {
                "model": _MODEL,
                "add_noise": (["enable", "disable"], {"tooltip": "Disable it to go on from a partly denoised latent."}),
                "noise_seed": ("INT", _SEED),
                "steps": _STEPS,
                "sampler_name": _SAMPLER,
                "scheduler": _SCHEDULER,
                "unconditional": _UNCONDITIONAL,
                "latent_image": _LATENT,
                "start_at_step": ("INT", {"default": 0, **step, "tooltip": "First step to run."}),
                "end_at_step": ("INT", {"default": 10000, **step, "tooltip": "Step to stop at."}),
                "return_with_leftover_noise": (
                    ["disable", "enable"],
                    {"tooltip": "Enable it when another sampler goes on from here."},
                ),
            },
            "optional": optional_terms(),
            "hidden": HIDDEN,
        }

    @checked("GCFG KSampler (Advanced)")
    def sample(
        self,
        model: Any,
        add_noise: str,
        noise_seed: int,
        steps: int,
        sampler_name: str,
        scheduler: str,
        unconditional: Any,
        latent_image: dict[str, Any],
        start_at_step: int,
        end_at_step: int,
        return_with_leftover_noise: str,
        unique_id: str | None = None,
        prompt: Any = None,
        **sockets: Any,
    ) -> Any:
        """Sample the latent."""
        watch = watch_of(unique_id, prompt)
        guider = Guider(model, unconditional, gather_terms(sockets), "GCFG KSampler (Advanced)", watch)
        latent = sample_latent(
            guider,
            latent_image,
            seed=noise_seed,
            steps=steps,
            sampler_name=sampler_name,
            scheduler=scheduler,
            add_noise=add_noise == "enable",
            start_step=start_at_step,
            last_step=end_at_step,
            force_full_denoise=return_with_leftover_noise == "disable",
        )
        return _with_chart(latent, watch)


def watch_of(unique_id: str | None, prompt: Any) -> Watch:
    """Readings are taken for the editor, and for what is connected to the second output."""
    return Watch(unique_id, reads_output(prompt, unique_id, 1))


def _with_chart(latent: dict[str, Any], watch: Watch) -> Any:
    """The node's results; the editor keeps the chart with a cached run's results too."""
    result = (latent, watch.report)
    return {"ui": {"gcfg": [watch.report.as_dict()]}, "result": result} if watch.report.readings else result


NODES = [
    ("GCFGGuider", "GCFG Guider", GCFGGuider),
    ("GCFGKSampler", "GCFG KSampler", GCFGKSampler),
    ("GCFGKSamplerAdvanced", "GCFG KSampler (Advanced)", GCFGKSamplerAdvanced),
]
