"""Null-text models: the patch that makes one of a prior, and the loader of trained ones.

Null-text unconditional generator: Cao et al. 2023, arXiv 2312.08195, Eq. 4-6.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import folder_paths

from ..gcfg.errors import GuidanceError
from .inputs import checked
from .runtime.concept import WEIGHT_DTYPES, load_concept_unet
from .runtime.null_text import MODES, patch_null_text

# Old versions call the first folder "unet". A name in both a UNet folder and the checkpoints means the UNet.
_FOLDERS = ("diffusion_models", "unet", "checkpoints")


class GCFGNullTextPatch:
    """Node that puts a model into null-text mode."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "Makes a model ignore text: each cross-attention gives a constant that the empty prompt would give on average. "
        "This is how a concept model starts its training. Follows LoRAs placed before or after it."
    )
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The same model in null-text mode; the input model stays as it is.",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "An SD1.x, SD2.x or SDXL model."}),
                "null_text": (
                    "CONDITIONING",
                    {"tooltip": "The empty prompt, encoded with this model's own CLIP (CLIP Text Encode, no text)."},
                ),
                "mode": (
                    list(MODES),
                    {
                        "default": MODES[0],
                        "tooltip": "uniform_mean: every token counts the same (the paper's Eq. 5). attention_mean: the "
                        "mean of what the attention really gives, measured in 8 evaluations before the first step.",
                    },
                ),
            }
        }

    @checked("Null-Text Patch")
    def patch(self, model: Any, null_text: Any, mode: str) -> tuple[Any]:
        """Return a patched clone of the model."""
        return (patch_null_text(model, null_text, mode),)


class GCFGLoadConceptUNet:
    """Node that loads a concept model."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "Loads a concept model: a null-text UNet in any of its forms (folded, compact, the authors' keys), with LDM or "
        "diffusers keys, alone or in a checkpoint. The attention it does not use takes no memory. An ordinary UNet "
        "loads too."
    )
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model; a null-text one ignores the text of its conditioning.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        return {
            "required": {
                "unet_name": (
                    _file_names(),
                    {"tooltip": "A .safetensors file in models/diffusion_models (or unet) or models/checkpoints."},
                ),
                "weight_dtype": (
                    list(WEIGHT_DTYPES),
                    {"tooltip": "As in Load Diffusion Model: default keeps what suits the file and the device."},
                ),
            }
        }

    @checked("Load Concept UNet", free=["unet_name"])
    def load(self, unet_name: str, weight_dtype: str) -> tuple[Any]:
        """Load the file."""
        return (load_concept_unet(find_model(unet_name), weight_dtype, unet_name),)


def find_model(name: str) -> str:
    """Return the path of a listed model file.

    Raises: GuidanceError: if the name leaves the model folders or no such file is there.
    """
    # What ComfyUI lists is inside, whatever its name looks like; another name must look so.
    if name not in _file_names() and _leads_out(name):
        raise GuidanceError(
            f"Load Concept UNet: unet_name {name!r} leads out of the model folders, expected a name from the list."
        )
    for folder in _folders():
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return str(path)
    raise GuidanceError(
        f"Load Concept UNet: unet_name {name!r} was not found in the model folders ({', '.join(_folders())}), expected "
        "a .safetensors file there; check the name and refresh the page."
    )


def _leads_out(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or ".." in parts.parts or ":" in name or "\0" in name


def _folders() -> list[str]:
    return [folder for folder in _FOLDERS if folder in folder_paths.folder_names_and_paths]


def _file_names() -> list[str]:
    # Pickles are listed too, so that choosing one tells how to convert it.
    return list(dict.fromkeys(name for folder in _folders() for name in folder_paths.get_filename_list(folder)))


NODES = [
    ("GCFGLoadConceptUNet", "Load Concept UNet", GCFGLoadConceptUNet),
    ("GCFGNullTextPatch", "Null-Text Patch", GCFGNullTextPatch),
]
