"""A prior's own text encoder.

SD1.x   CLIP-L, last layer, final norm
SD2.x   OpenCLIP-H, last but one layer, final norm
SDXL    CLIP-L and OpenCLIP-bigG, last but one layer, no norm, side by side; pooled: bigG's projected end token
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import LazyStateDict, read_header
from .architecture import FAMILY_NAMES, Config, Family, Shapes
from .components import TEXT_WEIGHTS, first_line, load_component, read_json

START, END = 49406, 49407
LEARNED_ID = 49408  # of a new word (Textual Inversion): the first number after CLIP's vocabulary
LENGTH = 77

_CLIP_PREFIXES = {
    "sd1": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", "text_model."),
    "sdxl": ("conditioner.embedders.0.transformer.text_model.",),
}
_OPEN_CLIP_PREFIXES = {
    "sd2": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    "sdxl": ("conditioner.embedders.1.model.",),
}
_HEAD_WIDTH = 64


@dataclass(frozen=True)
class Conditions:
    """What a UNet reads beside x and t: an encoded prompt.

    Attributes:
        context: text embedding, (1, T, D).
        pooled: SDXL's pooled text, (1, P), or None for other families.
    """

    context: Tensor
    pooled: Tensor | None = None

    @classmethod
    def without_text(cls, context_dim: int, pooled: Tensor | None = None) -> Conditions:
        """Return the conditions of a null-text UNet, whose one token is asked for but never read."""
        return cls(torch.zeros(1, 1, context_dim), pooled)

    def to(self, device: torch.device) -> Conditions:
        """Return the conditions on a device."""
        return Conditions(self.context.to(device), None if self.pooled is None else self.pooled.to(device))


def encode_prompt(path: Path, family: Family, prompt: str, source: str, tokenizer: Path | None = None) -> Conditions:
    """Encode one prompt, in 77 tokens and float32; the empty one needs no tokenizer.

    Args:
        path: a checkpoint, a text encoder's file (SD1.x) or a diffusers folder.
        family: the prior's.
        prompt: what to encode.
        source: start of every error: "model.text_encoder 'path'".
        tokenizer: folder with vocab.json and merges.txt; a diffusers folder brings its own.

    Raises: GuidanceError: if there is no text encoder of the family, or no tokenizer for a prompt that needs one.
    """
    ids = token_ids(prompt, tokenizer or path / "tokenizer")
    return encode_ids(load_text_models(path, family, source), family, ids)


@torch.no_grad()
def encode_ids(models: Sequence[nn.Module], family: Family, ids: Sequence[int]) -> Conditions:
    """Encode one prompt's token numbers, which come without start and end."""
    if family == "sdxl":
        clip, open_clip = models
        first = clip(padded_ids(ids, "sd1"), output_hidden_states=True)
        second = open_clip(padded_ids(ids, "sd2"), output_hidden_states=True)
        tokens = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1)
        return Conditions(tokens.float(), second.text_embeds.float())
    return Conditions(models[0](padded_ids(ids, family)).last_hidden_state.float())


def load_text_models(path: Path, family: Family, source: str) -> list[nn.Module]:
    """Read a family's text encoders, in evaluation mode: one, whose last hidden state counts, or SDXL's two.

    Raises: GuidanceError: if there is no text encoder of the family.
    """
    return _from_folder(path, family, source) if os.path.isdir(path) else _from_file(path, family, source)


def padded_ids(ids: Sequence[int], family: Family) -> Tensor:
    """Return a prompt's token numbers with start, end and padding, (1, 77), for SD1.x (CLIP) or SD2.x (OpenCLIP)."""
    full = [START, *ids, END]
    return torch.tensor([full + [END if family == "sd1" else 0] * (LENGTH - len(full))])


def token_ids(prompt: str, tokenizer: Path, learned: str = "", section: str = "model") -> list[int]:
    """Return the prompt's token numbers, without start and end; LEARNED_ID for each `learned` in it.

    `section` of the config names the tokenizer.

    Raises: GuidanceError: if the prompt is too long, or it is not empty and the tokenizer is missing.
    """
    if not prompt:
        return []
    if not all((tokenizer / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise GuidanceError(
            f"{section}.tokenizer: {str(tokenizer)!r} has no 'vocab.json' and 'merges.txt', expected the folder of "
            "CLIP's tokenizer; ComfyUI ships one in comfy/sd1_tokenizer, a diffusers folder in tokenizer/."
        )
    reader = CLIPTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    first, *others = prompt.split(learned) if learned else [prompt]
    ids: list[int] = reader(first, add_special_tokens=False)["input_ids"]
    for part in others:
        ids += [LEARNED_ID, *reader(part, add_special_tokens=False)["input_ids"]]
    if len(ids) > LENGTH - 2:
        raise GuidanceError(
            f"The prompt {prompt[:40]!r} has {len(ids)} tokens, expected at most {LENGTH - 2}; shorten it."
        )
    return ids


def clip_config(shapes: Shapes, act: str) -> Config:
    """Return the CLIPTextConfig of a text model in Hugging Face's keys, below `text_model.`."""
    names = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers.")
    return _config(shapes, *names, "mlp.fc1.weight", act)


def open_clip_config(shapes: Shapes, last_layer: bool) -> Config:
    """Return the CLIPTextConfig of a text model in bare OpenCLIP keys; SD2.x never reads the last layer."""
    names = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.")
    config = _config(shapes, *names, "mlp.c_fc.weight", "gelu")
    config["num_hidden_layers"] -= not last_layer
    width = config["hidden_size"]
    return config | {"projection_dim": shapes.get("text_projection", (width, width))[1]}


def _config(shapes: Shapes, tokens: str, positions: str, layers: str, hidden: str, act: str) -> Config:
    vocabulary, width = shapes[tokens]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": shapes[positions][0],
        "num_hidden_layers": len({key.removeprefix(layers).split(".")[0] for key in shapes if key.startswith(layers)}),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "intermediate_size": shapes[f"{layers}0.{hidden}"][0],
        "hidden_act": act,
        "projection_dim": width,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
    }


def _from_file(path: Path, family: Family, source: str) -> list[nn.Module]:
    shapes = read_header(path, source).shapes
    lazy = LazyStateDict(path)
    models = []
    try:
        if family in _CLIP_PREFIXES:
            prefix, below = _below(shapes, _CLIP_PREFIXES[family], "embeddings.token_embedding.weight")
            config = CLIPTextConfig(**clip_config(below, "quick_gelu"))
            weights = {f"text_model.{key}": lazy[prefix + key].float() for key in below}
            models.append(_filled(CLIPTextModel, config, weights, source))
        if family in _OPEN_CLIP_PREFIXES:
            prefix, below = _below(shapes, _OPEN_CLIP_PREFIXES[family], "ln_final.weight")
            config = CLIPTextConfig(**open_clip_config(below, last_layer=family == "sdxl"))
            unread = f"transformer.resblocks.{config.num_hidden_layers}."
            weights = {prefix + key: lazy[prefix + key].float() for key in below if not key.startswith(unread)}
            weights = convert_open_clip_checkpoint(SimpleNamespace(config=config), weights, prefix=prefix)
            model = CLIPTextModelWithProjection if family == "sdxl" else CLIPTextModel
            models.append(_filled(model, config, weights, source))
    except (StopIteration, KeyError) as error:
        raise _missing(family, source) from error
    except (IndexError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        if isinstance(error, GuidanceError):
            raise
        raise GuidanceError(
            f"{source} has a text encoder whose tensors do not fit each other ({first_line(error)}); download it again."
        ) from error
    return models


def _below(shapes: Shapes, prefixes: Sequence[str], first: str) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Return the prefix below which the key `first` is, and the shapes below it."""
    prefix = next(prefix for prefix in prefixes if prefix + first in shapes)
    below = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    return prefix, {key: shape for key, shape in below.items() if not key.endswith("position_ids")}


def _filled(model_class: Any, config: CLIPTextConfig, weights: dict[str, Tensor], source: str) -> nn.Module:
    model, info = model_class.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    _refuse_missing(info["missing_keys"], source)
    ready: nn.Module = model.eval()
    return ready


def _from_folder(path: Path, family: Family, source: str) -> list[nn.Module]:
    classes: dict[str, Any] = {"text_encoder": CLIPTextModel}
    if family == "sdxl":
        classes["text_encoder_2"] = CLIPTextModelWithProjection
    models = []
    for name, model_class in classes.items():
        folder = path / name
        if not (folder / "config.json").is_file():
            raise _missing(family, source)
        read_json(folder / "config.json", source)
        model, missing = load_component(model_class, folder, TEXT_WEIGHTS, source, lambda _: _missing(family, source))
        _refuse_missing(missing, source)
        models.append(model)
    return models


def _refuse_missing(missing: Iterable[str], source: str) -> None:
    if missing := sorted(missing):
        raise GuidanceError(f"{source} lacks weights of its text encoder, first {missing[0]!r}; download it again.")


def _missing(family: Family, source: str) -> GuidanceError:
    return GuidanceError(
        f"{source} holds no text encoder of the {FAMILY_NAMES[family]} kind, expected the prior's own; set "
        "model.text_encoder to a whole checkpoint or a diffusers folder of the same family."
    )
