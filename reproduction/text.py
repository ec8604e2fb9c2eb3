"""The small world's text encoder: CLIP-L's layout with two layers of random weights, which stay as they are.

Each word's embedding comes out of it turned and mixed with those before it, which is all that a UNet trained from
scratch needs of a text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ..gcfg.errors import GuidanceError
from ..testkit.models import clip_l_state_dict
from ..testkit.small_world import CLIP_LAYERS, CLIP_SEED
from ..training.prior.text_encoder import END, LENGTH, START, clip_config, token_ids


def text_encoder() -> dict[str, Tensor]:
    """Return its weights, in Hugging Face keys."""
    return clip_l_state_dict(CLIP_SEED, layers=CLIP_LAYERS)


def tokenizer() -> Path:
    """Return the folder of CLIP's tokenizer, which ComfyUI ships.

    Raises: GuidanceError: if no ComfyUI is installed.
    """
    spec = find_spec("comfy")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "sd1_tokenizer" / "vocab.json").is_file():
            return Path(folder) / "sd1_tokenizer"
    raise GuidanceError("CLIP's tokenizer was not found; install ComfyUI, which ships it: make venv.")


@torch.no_grad()
def encode(clip: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
    """Return the embeddings of many prompts, (N, 77, 768)."""
    bare = {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in clip.items()}
    model = CLIPTextModel(CLIPTextConfig(**clip_config(bare, "quick_gelu"))).eval()
    flat = not any(name.startswith("text_model.") for name in model.state_dict())  # since transformers 5.6
    model.load_state_dict({name.removeprefix("text_model.") if flat else name: w for name, w in clip.items()})
    folder = tokenizer()
    ids = torch.tensor([_padded(token_ids(prompt, folder)) for prompt in prompts])
    return torch.cat([model(some).last_hidden_state for some in torch.split(ids, 64)])


def _padded(ids: list[int]) -> list[int]:
    return [START, *ids] + [END] * (LENGTH - 1 - len(ids))
