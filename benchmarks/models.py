"""The models of a benchmark: untrained ones in real layouts, and the small world's trained ones.

What a call costs does not depend on the values of the weights; what Guidance Cache does to an image does.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..gcfg.concept_file import compact, fold
from ..nodes.runtime.concept import load_concept_unet
from ..nodes.runtime.versions import encode_prompt
from ..testkit import layouts, models, small_world
from ..testkit.layouts import FAMILIES

RANK = 16  # of the LoRA
_STRENGTH = 0.3  # how far it moves the weights, of their spread


class Untrained:
    """A prior, a concept UNet from its compact file, and a clone of the prior with a LoRA.

    Args:
        folder: where the files are written, unless they are there; in fp16, as models are shared.
        layout: one of `FAMILIES`.
    """

    def __init__(self, folder: Path, layout: str) -> None:
        self.layout = layout
        self._family = FAMILIES[layout]
        self._prior, self._concept = folder / f"{layout}-prior.safetensors", folder / f"{layout}-concept.safetensors"
        write_once(self._prior, lambda: models.unet_state_dict(self.layout, 0, torch.float16))
        write_once(self._concept, self._concept_state_dict)

    @cached_property
    def prior(self) -> Any:
        """The prior; loaded once."""
        return self.load_prior()

    @cached_property
    def concept(self) -> Any:
        """The concept UNet; loaded once."""
        return load_concept_unet(str(self._concept))

    @cached_property
    def tuned(self) -> Any:
        """A clone of the prior with the LoRA."""
        return self.with_lora(self.prior)

    def forget_tuned(self) -> None:
        """Make a new clone when one is next asked for, so that a run separates it from the prior anew."""
        self.__dict__.pop("tuned", None)

    def load_prior(self) -> Any:
        """Load the prior's file through ComfyUI."""
        load = getattr(comfy.sd, "load_diffusion_model", None) or comfy.sd.load_unet
        return load(str(self._prior))

    def with_lora(self, model: Any) -> Any:
        """A clone with the LoRA, as the stock loader node makes it. Raises: RuntimeError: if it fits no weight."""
        clone, _ = comfy.sd.load_lora_for_models(model, None, self._lora, 1.0, 0.0)
        if len(clone.patches) != len(self._lora) // 3:
            raise RuntimeError(f"the LoRA has {len(self._lora) // 3} layers, of which {len(clone.patches)} fit")
        return clone

    def prompt(self, number: int) -> list[list[object]]:
        """A CONDITIONING with the pooled vector that SDXL takes; 0 is the unconditional one."""
        pooled = torch.randn(1, 1280, generator=torch.Generator().manual_seed(number))
        return [[self._embedding(number), {"pooled_output": pooled}]]

    def _embedding(self, seed: int) -> Tensor:
        return torch.randn(1, 77, self._family.context_dim, generator=torch.Generator().manual_seed(seed))

    def _concept_state_dict(self) -> dict[str, Tensor]:
        unet = models.unet_state_dict(self.layout, 1, torch.float16)
        return compact(fold(unet, models.null_text_features(unet, self._embedding(0))))

    @cached_property
    def _lora(self) -> dict[str, Tensor]:
        """On every layer that kohya's trainer takes by default: all matrices of the transformers."""
        generator = torch.Generator().manual_seed(0)
        out: dict[str, Tensor] = {}
        for name, shape in layouts.unet(self._family).items():
            in_transformer = any(part in name for part in (".transformer_blocks.", ".proj_in.", ".proj_out."))
            if not in_transformer or len(shape) < 2:
                continue
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            up, down = (shape[0], RANK, *shape[2:]), (RANK, *shape[1:])
            scale = _STRENGTH / math.sqrt(RANK * shape[1])
            out[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator) * scale
            out[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator)
            out[f"{key}.alpha"] = torch.tensor(float(RANK))
        return out


class World:
    """The small world's prior, concept, text encoder and autoencoder.

    Attributes:
        word: what prompt 1 says; the others are empty.

    Args:
        folder: where the files are written, unless they are there.
    """

    def __init__(self, folder: Path) -> None:
        self.word = small_world.WORDS[0]
        checkpoint, concept = folder / "small-world-prior.safetensors", folder / "small-world-concept.safetensors"
        write_once(checkpoint, self._checkpoint)
        write_once(concept, small_world.concept)
        loaded = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=True, output_clip=True)
        self.prior, clip, self.vae = loaded[:3]
        self.concept = load_concept_unet(str(concept))
        self._texts = {words: encode_prompt(clip, words) for words in ("", *small_world.WORDS)}

    def prompt(self, number: int) -> Any:
        """A CONDITIONING; 0 is the empty text."""
        return self._texts[self.word if number else ""]

    def _checkpoint(self) -> dict[str, Tensor]:
        vae = models.to_dtype(small_world.vae(), torch.float16)
        parts = {
            "model.diffusion_model.": small_world.prior(),
            "first_stage_model.": vae,
            "cond_stage_model.transformer.": small_world.clip(),
        }
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


Models = Untrained | World  # what a case is made of


def write_once(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> None:
    """Write a safetensors file unless it is there; an interrupted run leaves no file that looks whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(dict(make()), part)
        part.replace(path)


def unload_all() -> None:
    """Unload every model and let go of what nobody holds."""
    management.unload_all_models()
    gc.collect()
