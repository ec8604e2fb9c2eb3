"""Weight Sweep: two weights, every combination, one picture.

Grid search of the guidance weights: Cao et al. 2023, arXiv 2312.08195, Fig. 8(a) and D.2.
"""

from __future__ import annotations

from typing import Any

import torch

from ..gcfg.errors import GuidanceError, short
from ..gcfg.sweep_weights import SweptTerm, cell_terms, find_swept, parse_weights
from ..gcfg.terms import GuidanceTerm
from .figures import labelled_sheet
from .inputs import checked
from .runtime.guider import GCFGGuider
from .runtime.ksampler import sample_cells
from .runtime.latents import first_stream
from .sampling import GCFGKSampler
from .sockets import gather_terms, optional_terms

_NODE = "Weight Sweep"


class GCFGWeightSweep:
    """Node that samples every combination of two terms' weights."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "Samples every combination of the weights of two labelled terms from the same noise, and shows them on one "
        "sheet. Each cell is the GCFG KSampler's run with its weights."
    )
    RETURN_TYPES = ("IMAGE", "IMAGE", "LATENT")
    RETURN_NAMES = ("sheet", "images", "latent")
    OUTPUT_TOOLTIPS = (
        "All cells with their weights, one sheet for each latent of the batch.",
        "The cells' images, row by row.",
        "The cells' latents, row by row.",
    )
    FUNCTION = "sweep"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        label = "The label of a connected Guidance Term"
        weights = "Its weights: numbers and ranges start:stop:step, such as 0, 1.5, 3 or 0:2:0.25. They replace its own"
        return {
            "required": {
                **GCFGKSampler.INPUT_TYPES()["required"],
                "vae": ("VAE", {"tooltip": "Decodes the cells for the sheet."}),
                "label_1": ("STRING", {"default": "concept", "tooltip": f"{label}; it changes along a row."}),
                "weights_1": ("STRING", {"default": "0, 1.5, 3", "tooltip": f"{weights}."}),
                "label_2": (
                    "STRING",
                    {"default": "", "tooltip": f"{label}; it changes from row to row. Empty: one row only."},
                ),
                "weights_2": ("STRING", {"default": "0, 4, 8", "tooltip": f"{weights}."}),
            },
            "optional": optional_terms(),
        }

    @checked(_NODE)
    def sweep(
        self,
        model: Any,
        seed: int,
        steps: int,
        sampler_name: str,
        scheduler: str,
        unconditional: Any,
        latent_image: dict[str, Any],
        denoise: float,
        vae: Any,
        label_1: str,
        weights_1: str,
        label_2: str,
        weights_2: str,
        **sockets: Any,
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Sample all cells, decode them and lay them out."""
        terms = gather_terms(sockets)
        swept = _swept_terms(terms, (label_1, weights_1), (label_2, weights_2))
        guiders = [GCFGGuider(model, unconditional, cell, _NODE) for cell in cell_terms(terms, swept)]
        latent = sample_cells(
            guiders,
            latent_image,
            seed=seed,
            steps=steps,
            sampler_name=sampler_name,
            scheduler=scheduler,
            denoise=denoise,
        )
        latent.pop("batch_index", None)  # it counts the batch of one cell
        images = vae.decode(first_stream(latent["samples"]))
        images = images.reshape(-1, *images.shape[-3:])
        columns = [f"{swept[0].label} {weight:g}" for weight in swept[0].weights]
        rows = [f"{swept[1].label} {weight:g}" for weight in swept[1].weights] if len(swept) > 1 else [""]
        each = len(images) // (len(columns) * len(rows))
        sheets = [labelled_sheet(images[number::each], columns, rows) for number in range(each)]
        return torch.cat(sheets), images, latent


def _swept_terms(terms: tuple[GuidanceTerm, ...], *lists: tuple[str, str]) -> list[SweptTerm]:
    """The swept terms of the (label, weights) widgets; only the second label may be empty."""
    if not terms:
        return []  # the guider says so
    swept = []
    for number, (label, weights) in enumerate(lists, start=1):
        if number == 1 or label.strip():
            index = find_swept(terms, label, f"{_NODE}: label_{number}")
            swept.append(SweptTerm(index, short(label), parse_weights(weights, f"{_NODE}: weights_{number}")))
    if len(swept) > 1 and swept[0].index == swept[1].index:
        raise GuidanceError(
            f"{_NODE}: label_1 and label_2 are both '{swept[0].label}', expected two terms; change one."
        )
    return swept


NODES = [("GCFGWeightSweep", "Weight Sweep", GCFGWeightSweep)]
