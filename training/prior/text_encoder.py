"""A prior's own text encoder.

SD1.x   CLIP-L, last layer, final norm
SD2.x   OpenCLIP-H, last but one layer, final norm
SDXL    CLIP-L and OpenCLIP-bigG, last but one layer, no norm, side by side; pooled: bigG's projected end token
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import LazyStateDict, read_header
from .architecture import FAMILY_NAMES, Config, Family, Shapes
from .components import TEXT_WEIGHTS, read_json, weight_files
from .learned_token import LEARNED_ID, LearnedToken, add_word

START, END = 49406, 49407
LENGTH = 77
CLIP_PADDING, OPEN_CLIP_PADDING = END, 0

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
class TextEmbedding:
    """An encoded prompt.

    Attributes:
        tokens: (1, 77, D), float32.
        pooled: (1, P), float32, or None where the family has none.
    """

    tokens: Tensor
    pooled: Tensor | None = None


def encode_prompt(
    path: Path,
    family: Family,
    prompt: str,
    source: str,
    tokenizer: Path | None = None,
    learned: LearnedToken | None = None,
) -> TextEmbedding:
    """Encode one prompt; the empty one needs no tokenizer.

    Args:
        path: a checkpoint, a text encoder's file (SD1.x) or a diffusers folder.
        family: the prior's.
        prompt: what to encode.
        source: start of every error: "model.text_encoder 'path'".
        tokenizer: folder with vocab.json and merges.txt; a diffusers folder brings its own.
        learned: a word that the prompt may hold beside those of the tokenizer; SD1.x and SD2.x.

    Raises: GuidanceError: if there is no text encoder of the family, or no tokenizer for a prompt that needs one.
    """
    ids = token_ids(prompt, tokenizer or path / "tokenizer", learned.text if learned else "")
    models = load_text_models(path, family, source)
    if learned:
        add_word(_only(models, source), learned, source)
    return encode_ids(models, family, ids)


@torch.no_grad()
def encode_ids(models: Sequence[nn.Module], family: Family, ids: Sequence[int]) -> TextEmbedding:
    """Encode one prompt's token numbers, which come without start and end."""
    if family == "sdxl":
        clip, open_clip = models
        first = clip(_padded(ids, CLIP_PADDING), output_hidden_states=True)
        second = open_clip(_padded(ids, OPEN_CLIP_PADDING), output_hidden_states=True)
        tokens = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1)
        return TextEmbedding(tokens.float(), second.text_embeds.float())
    return TextEmbedding(models[0](padded_ids(ids, family)).last_hidden_state.float())


def load_text_models(path: Path, family: Family, source: str) -> list[nn.Module]:
    """Read a family's text encoders, in evaluation mode: one, or SDXL's two.

    Raises: GuidanceError: if there is no text encoder of the family.
    """
    return _from_folder(path, family, source) if os.path.isdir(path) else _from_file(path, family, source)


def load_text_model(path: Path, family: Family, source: str) -> nn.Module:
    """Read the one text encoder of SD1.x or SD2.x as transformers' CLIPTextModel, whose last hidden state counts.

    Raises: GuidanceError: if there is none, or the family has two.
    """
    return _only(load_text_models(path, family, source), source)


def padded_ids(ids: Sequence[int], family: Family) -> Tensor:
    """Return a prompt's token numbers with start, end and padding, (1, 77), for SD1.x or SD2.x."""
    return _padded(ids, CLIP_PADDING if family == "sd1" else OPEN_CLIP_PADDING)


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
    from transformers import CLIPTokenizer

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


def _only(models: list[nn.Module], source: str) -> nn.Module:
    if len(models) > 1:
        raise GuidanceError(
            f"{source} has two text encoders, expected the one of SD1.x or SD2.x to give a new word; "
            "use another method, or a prior of those families."
        )
    return models[0]


def clip_config(shapes: Shapes, act: str) -> Config:
    """Return the CLIPTextConfig of a text model in Hugging Face's keys, below `text_model.`."""
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    layers = {key.split(".")[2] for key in shapes if key.startswith("encoder.layers.")}
    return _config(
        vocabulary,
        width,
        shapes["embeddings.position_embedding.weight"][0],
        len(layers),
        shapes["encoder.layers.0.mlp.fc1.weight"][0],
        act,
    )


def open_clip_config(shapes: Shapes, last_layer: bool) -> Config:
    """Return the CLIPTextConfig of a text model in OpenCLIP's keys.

    Args:
        shapes: bare OpenCLIP keys.
        last_layer: whether the last layer counts; SD2.x never reads it.
    """
    vocabulary, width = shapes["token_embedding.weight"]
    layers = {key.split(".")[2] for key in shapes if key.startswith("transformer.resblocks.")}
    intermediate = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
    config = _config(
        vocabulary, width, shapes["positional_embedding"][0], len(layers) - (not last_layer), intermediate, "gelu"
    )
    return config | {"projection_dim": shapes.get("text_projection", (width, width))[1]}


def _config(vocabulary: int, width: int, length: int, layers: int, intermediate: int, act: str) -> Config:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": length,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "intermediate_size": intermediate,
        "hidden_act": act,
        "projection_dim": width,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
    }


def _padded(ids: Sequence[int], padding: int) -> Tensor:
    full = [START, *ids, END]
    return torch.tensor([full + [padding] * (LENGTH - len(full))])


def _from_file(path: Path, family: Family, source: str) -> list[nn.Module]:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    shapes = read_header(path, source).shapes
    lazy = LazyStateDict(path)
    models = []
    try:
        if family in _CLIP_PREFIXES:
            first = "embeddings.token_embedding.weight"
            prefix = next(prefix for prefix in _CLIP_PREFIXES[family] if prefix + first in shapes)
            below = _below(shapes, prefix)
            model = _empty(CLIPTextModel, clip_config(below, "quick_gelu"))
            models.append(_fill(model, {f"text_model.{key}": lazy[prefix + key].float() for key in below}, source))
        if family in _OPEN_CLIP_PREFIXES:
            prefix = next(prefix for prefix in _OPEN_CLIP_PREFIXES[family] if f"{prefix}ln_final.weight" in shapes)
            below = _below(shapes, prefix)
            cls = CLIPTextModelWithProjection if family == "sdxl" else CLIPTextModel
            model = _empty(cls, open_clip_config(below, last_layer=family == "sdxl"))
            weights = {prefix + key: lazy[prefix + key].float() for key in below}
            models.append(_fill(model, convert_open_clip_checkpoint(model, weights, prefix=prefix), source))
    except GuidanceError:
        raise
    except (StopIteration, KeyError) as error:
        raise _missing(family, source) from error
    except (IndexError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise GuidanceError(
            f"{source} has a text encoder whose tensors do not fit each other ({_line(error)}); download it again."
        ) from error
    return models


def _from_folder(path: Path, family: Family, source: str) -> list[nn.Module]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes: dict[str, Any] = {"text_encoder": CLIPTextModel}
    if family == "sdxl":
        classes["text_encoder_2"] = CLIPTextModelWithProjection
    models = []
    for name, cls in classes.items():
        folder = path / name
        if not (folder / "config.json").is_file():
            raise _missing(family, source)
        read_json(folder / "config.json", source)
        variant, _ = weight_files(folder, TEXT_WEIGHTS, source)
        try:
            model, info = cls.from_pretrained(
                str(folder), variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise _missing(family, source) from error
        _refuse_missing(info["missing_keys"], source)
        models.append(model.float().eval())
    return models


def _empty(cls: Any, config: Config) -> Any:
    with torch.device("meta"):
        return cls(cls.config_class(**config))


def _fill(model: Any, weights: dict[str, Tensor], source: str) -> nn.Module:
    if not any(key.startswith("text_model.") for key in model.state_dict()):  # transformers 5.6 took the level out
        weights = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    missing, _ = model.load_state_dict(weights, strict=False, assign=True)
    _refuse_missing(missing, source)
    for module in model.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:  # a constant that no file holds
            module.position_ids = torch.arange(ids.shape[-1])[None]
    return model.eval()  # type: ignore[no-any-return]


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        key.removeprefix(prefix): shape
        for key, shape in shapes.items()
        if key.startswith(prefix) and not key.endswith("position_ids")
    }


def _refuse_missing(missing: Sequence[str], source: str) -> None:
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing:
        raise GuidanceError(f"{source} lacks weights of its text encoder, first {missing[0]!r}; download it again.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _missing(family: Family, source: str) -> GuidanceError:
    return GuidanceError(
        f"{source} holds no text encoder of the {FAMILY_NAMES[family]} kind, expected the prior's own; set "
        "model.text_encoder to a whole checkpoint or a diffusers folder of the same family."
    )
