"""Small model files under the names that the shared workflows use."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import layouts, models, small_world, sparse, widen

PRIOR = "v1-5-pruned-emaonly-fp16.safetensors"
CUSTOM = "Counterfeit-V3.0_fp16.safetensors"
CONCEPT = "ffhq-concept.safetensors"
CANNY = "control_v11p_sd15_canny_fp16.safetensors"
DREAMBOOTH = "ffhq-dreambooth.safetensors"
LORA = "ffhq-lora.safetensors"
LORA_2 = "watercolour-lora.safetensors"
WORD = "ffhq-face.safetensors"  # a textual inversion; prompts call it embedding:ffhq-face
XL = "sd_xl_base_1.0.safetensors"
XL_LORA = "pixel-art-xl.safetensors"
HALF = torch.float16
NAMES = (PRIOR, CUSTOM, CONCEPT, DREAMBOOTH, LORA, LORA_2, WORD, CANNY, XL, XL_LORA)


def recipe() -> str:
    """Return a fingerprint of what makes the small models: it changes, they are made anew."""
    sources = [Path(module.__file__ or "") for module in (layouts, models, small_world, sparse, widen)]
    trained = sorted(small_world.TRAINED.glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in (*sources, Path(__file__), *trained))).hexdigest()


def make_small_models(folder: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Write the small models (1.0 GB on disk, about 15 s) into a ComfyUI `models/` folder, unless they are there.

    Each file is written under another name first, and the list of finished ones last, so an interrupted run is not
    taken for a good one.
    """
    stamp = folder / "small-models.json"
    finished = stamp.exists() and json.loads(stamp.read_text()) == {"recipe": recipe()}
    if finished and all((folder / kind / name).exists() for kind, name in _places()):
        return
    say("Making small models in real layouts (once) ...")
    for kind in {kind for kind, _ in _places()}:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    parts = _Parts()
    writers: dict[str, Callable[[Path], None]] = {
        PRIOR: lambda path: models.save_checkpoint(path, small_world.prior(), parts.vae, parts.clip),
        CUSTOM: lambda path: models.save_checkpoint(path, small_world.custom(), parts.vae),
        CONCEPT: lambda path: save_file(small_world.concept(), path),
        DREAMBOOTH: lambda path: save_file(small_world.custom(), path),
        LORA: lambda path: save_file(small_world.lora(), path),
        LORA_2: lambda path: save_file(small_world.extracted_lora(), path),
        WORD: lambda path: save_file(small_world.embedding(), path),
        CANNY: lambda path: save_file(small_world.controlnet(), path),
        XL: lambda path: models.save_checkpoint(path, parts.xl, parts.vae, parts.clip, clip_g=True),
        XL_LORA: lambda path: save_file(models.to_dtype(models.lora_state_dict(parts.xl, seed=5), HALF), path),
    }
    for kind, name in _places():
        part = folder / kind / f"{name}.{os.getpid()}.part"
        writers[name](part)
        part.replace(folder / kind / name)
    stamp.write_text(json.dumps({"recipe": recipe()}))


class _Parts:
    """The parts that several files share, each made when first needed."""

    @cached_property
    def xl(self) -> models.StateDict:
        """An untrained SDXL: no world is trained for it."""
        return models.unet_state_dict("sdxl", seed=10, dtype=HALF)

    @cached_property
    def vae(self) -> models.StateDict:
        return models.to_dtype(small_world.vae(), HALF)

    @cached_property
    def clip(self) -> models.StateDict:
        return small_world.clip()


def _places() -> list[tuple[str, str]]:
    return [
        ("checkpoints", PRIOR),
        ("checkpoints", CUSTOM),
        ("checkpoints", XL),
        ("unet", CONCEPT),
        ("unet", DREAMBOOTH),
        ("loras", LORA),
        ("loras", LORA_2),
        ("embeddings", WORD),
        ("controlnet", CANNY),
        ("loras", XL_LORA),
    ]
