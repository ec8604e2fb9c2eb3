"""Small models with random weights, one or more of every architecture that ComfyUI runs.

Each is ComfyUI's own class, with a configuration that keeps its structure (a block of every kind, all inputs) in a few
hundred thousand parameters, and a conditioning and a latent of the form that its own nodes make. The configurations are
in zoo.json, by architecture; one that is like another says what it has instead.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """How to build one.

    Attributes:
        architecture: what it stands for.
        classname: in comfy.supported_models.
        config: of its diffusion model.
        text: (tokens, width) of its conditioning.
        shapes: (C, *spatial) of the streams of its latent.
        pooled: shape of the pooled conditioning, where it has one.
        options: further entries of its conditioning, made from a seed.
        batches: whether it evaluates several latents in one call.
        extra_weights: for its conditioners, which are not part of the diffusion model.
    """

    architecture: str
    classname: str
    config: dict[str, Any]
    text: tuple[int, int]
    shapes: Sequence[tuple[int, ...]]
    pooled: tuple[int, ...] | None = None
    options: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    batches: bool = True
    extra_weights: Callable[[], dict[str, torch.Tensor]] = dict

    def conditioning(self, seed: int, width: int | None = None) -> Any:
        """A CONDITIONING of random text, of its own width unless told."""
        tokens, own = self.text
        options = {name: make(seed) for name, make in self.options.items()}
        if self.pooled is not None:
            options["pooled_output"] = normal(self.pooled, seed + 100)
        return [[normal((1, tokens, width or own), seed), options]]

    def latent(self, batch: int = 1, seed: int | None = None) -> dict[str, Any]:
        """An empty latent, or one of a random image."""
        parts = [torch.zeros(batch, *shape) for shape in self.shapes]
        if seed is not None:
            parts = [normal(part.shape, seed + number) for number, part in enumerate(parts)]
        return {"samples": parts[0] if len(parts) == 1 else nested(parts)}

    def model(self, seed: int) -> Any:
        """A patcher of the model with weights of this seed; a LookupError says that this ComfyUI has none."""
        import comfy.model_patcher
        import comfy.supported_models

        kind = getattr(comfy.supported_models, self.classname, None)
        if kind is None:
            raise LookupError(f"this ComfyUI has no {self.classname}")
        config = kind(copy.deepcopy(self.config))
        config.unet_config.update(copy.deepcopy(self.config))  # over what the class would put in its place
        config.set_inference_dtype(torch.float32, None)
        try:
            model = config.get_model(self.extra_weights(), "", device=None)
        except (TypeError, KeyError, AttributeError) as error:  # options that came later than the class
            raise LookupError(f"this ComfyUI builds {self.classname} otherwise ({error})") from error
        fill(model.diffusion_model, seed)
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        return patcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def normal(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def nested(parts: Sequence[torch.Tensor]) -> Any:
    import comfy.nested_tensor

    return comfy.nested_tensor.NestedTensor(parts)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations of order one; frequencies of position embeddings rise evenly."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        last = name.split(".")[-1]
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "freq" in last:
            tensor.data.copy_(torch.linspace(0.1, 1.0, tensor.numel()).reshape(tensor.shape))
        elif not isinstance(tensor, torch.nn.Parameter) and last != "pos_embed":
            continue  # other buffers are what the class made them
        elif tensor.ndim >= 2:
            tensor.data.copy_(noise / math.sqrt(max(tensor[0].numel(), 1)))
        elif last in ("weight", "scale", "gamma"):
            tensor.data.copy_(1.0 + 0.1 * noise)
        else:
            tensor.data.copy_(0.05 * noise)


def number_conditioners(names: Sequence[str], largest: int, **options: Any) -> dict[str, torch.Tensor]:
    """Weights of Stable Audio's embedders of seconds."""
    import comfy.ldm.audio.embedders

    module = comfy.ldm.audio.embedders.NumberConditioner(768, min_val=0, max_val=largest, **options)
    fill(module, 3)
    return {
        f"conditioner.conditioners.{name}.{key}": value.clone()
        for name in names
        for key, value in module.state_dict().items()
    }


def _mask(tokens: int, dtype: torch.dtype = torch.float32) -> Callable[[int], torch.Tensor]:
    return lambda seed: torch.ones(1, tokens, dtype=dtype)


def _drawn(*shape: int) -> Callable[[int], torch.Tensor]:
    return lambda seed: normal(shape, seed + 200)


_OPTIONS: dict[str, dict[str, Callable[[int], Any]]] = {
    "hidream": {"conditioning_llama3": _drawn(1, 2, 5, 20)},
    "omnigen2": {"attention_mask": _mask(7, torch.long)},
    "pixart_alpha": {"width": lambda seed: 640, "height": lambda seed: 640},
    "hunyuan_dit": {
        **{"attention_mask": _mask(77), "attention_mask_mt5xl": _mask(256)},
        "conditioning_mt5xl": _drawn(1, 256, 2048),
    },
    "ltxv": {"attention_mask": _mask(7, torch.long)},
    "ace": {"conditioning_lyrics": lambda seed: torch.arange(5)[None] + seed % 10},
}
_EXTRA_WEIGHTS = {
    "stable_audio": lambda: number_conditioners(["seconds_start", "seconds_total"], 512),
    "stable_audio3": lambda: number_conditioners(["seconds_total"], 384, fourier_features_type="expo"),
}


# Of the texts in zoo.json: flux2 does not read its pooled one, but 0.8.0 asks for it; ltxav's is that of both streams,
# as 0.8.0 and later take it.
def _read() -> dict[str, Family]:
    stored = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    entries = {name: entry for group in stored.values() for name, entry in group.items()}

    def family(architecture: str, name: str) -> Family:
        own = entries[name]
        whole = {**entries.get(own.get("like"), {}), **own}
        return Family(
            architecture,
            whole["class"],
            {**entries.get(own.get("like"), {}).get("config", {}), **own["config"]},
            whole["text"],
            whole["shapes"],
            whole.get("pooled"),
            _OPTIONS.get(name, {}),
            whole.get("batches", True),
            _EXTRA_WEIGHTS.get(name, dict),
        )

    return {name: family(architecture, name) for architecture, group in stored.items() for name in group}


FAMILIES = _read()
