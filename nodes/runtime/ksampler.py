"""What the stock KSampler nodes do around their guider, with ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.sample
import comfy.samplers
import latent_preview
from torch import Tensor

from ...gcfg.errors import GuidanceError
from . import checks, latents, versions
from .guider import GCFGGuider

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS


def sample_latent(
    guider: GCFGGuider,
    latent: dict[str, Any],
    *,
    seed: int,
    steps: int,
    sampler_name: str,
    scheduler: str,
    denoise: float = 1.0,
    add_noise: bool = True,
    start_step: int | None = None,
    last_step: int | None = None,
    force_full_denoise: bool = False,
    callback: Callable[[int, Any, Any, int], Any] | None = None,
) -> dict[str, Any]:
    """Sample a latent with GCFG as the stock KSampler (Advanced) does with CFG.

    Args:
        guider: the guidance.
        latent: ComfyUI's latent dictionary.
        seed: of the noise.
        steps: number of steps of the whole schedule.
        sampler_name: one of `SAMPLERS`.
        scheduler: one of `SCHEDULERS`.
        denoise: how much of the schedule is run, 0 to 1.
        add_noise: whether noise is added to the latent first.
        start_step: first step to run, or None.
        last_step: step to stop at, or None.
        force_full_denoise: whether to end at sigma 0 even when stopping early.
        callback: is told of each step (its number, denoised, x, how many there are); None: ComfyUI's preview.

    Returns:
        A copy of `latent` with new samples.

    Raises:
        GuidanceError: if `denoise` is out of its range; see `GCFGGuider.sample` too.
    """
    if not 0.0 <= denoise <= 1.0:
        raise GuidanceError(f"{guider.node}: denoise is {denoise}, expected a number from 0 to 1; correct it.")
    model = guider.model_patcher
    image = latents.fix_empty_latent(model, latent)
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index")) if add_noise else latents.no_noise(image)
    stock = comfy.samplers.KSampler(
        model,
        steps=steps,
        device=model.load_device,
        sampler=sampler_name,
        scheduler=scheduler,
        denoise=denoise,
        model_options=model.model_options,
    )
    sigmas = cut_sigmas(stock.sigmas, start_step, last_step, force_full_denoise)
    samples = guider.sample(
        noise,
        image,
        comfy.samplers.sampler_object(stock.sampler),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps) if callback is None else callback,
        disable_pbar=versions.progress_bar_disabled(),
        seed=seed,
    )
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio_")}
    out["samples"] = latents.to_intermediate(samples)
    return out


def sample_cells(
    guiders: Sequence[GCFGGuider], latent: dict[str, Any], *, steps: int, **settings: Any
) -> dict[str, Any]:
    """Sample a latent once with each guider, all from the same noise.

    Args:
        guiders: one for each cell, of one model; the first speaks for all in the log.
        latent: ComfyUI's latent dictionary.
        steps: of each run.
        settings: of `sample_latent`.

    Returns:
        A copy of `latent` with the samples of all cells in one batch, cell by cell.

    Raises:
        GuidanceError: see `sample_latent`.
    """
    count = len(guiders)
    preview = latent_preview.prepare_callback(guiders[0].model_patcher, steps * count)
    results = []
    for number, guider in enumerate(guiders):
        guider.quiet = number > 0

        def preview_cell(step: int, denoised: Any, x: Any, total: int, number: int = number) -> None:
            preview(number * total + step, denoised, x, count * total)

        results.append(sample_latent(guider, latent, steps=steps, callback=preview_cell, **settings))
    samples = latents.joined([result["samples"] for result in results])
    if not checks.holds_lost(results[0]["samples"]):  # else the first has said so
        checks.warn_not_finite(guiders[0].node, samples, True)
    return {**results[0], "samples": samples}


def cut_sigmas(sigmas: Tensor, start_step: int | None, last_step: int | None, force_full_denoise: bool) -> Tensor:
    """The part of a schedule that KSampler (Advanced) runs.

    Args:
        sigmas: (steps + 1,), falling.
        start_step: first step, or None.
        last_step: step to stop at, or None.
        force_full_denoise: whether the last sigma becomes 0.

    Returns:
        The sigmas to run; empty where nothing is left to do.
    """
    if last_step is not None and last_step < len(sigmas) - 1:
        sigmas = sigmas[: last_step + 1].clone()
        if force_full_denoise:
            sigmas[-1] = 0
    if start_step is not None:
        sigmas = sigmas[start_step:] if start_step < len(sigmas) - 1 else sigmas[:0]
    return sigmas
