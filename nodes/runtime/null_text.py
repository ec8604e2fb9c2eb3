"""The null-text mode as a patch around each evaluation of a model.

The patch never touches the model's weights and keeps no module: it finds the UNet in the call, reads the constants off
the weights as they are then (LoRAs included), lends the blocks its constants, and puts everything back after the call.
So clones that share a module do not see each other's patch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ...gcfg.errors import GuidanceError
from ...gcfg.null_text import (
    ConstantCrossAttention,
    attention_means,
    constants,
    cross_attention_blocks,
    is_null_text,
    null_text_blocks,
    uniform_means,
)
from . import compiled
from .weight_state import WeightState, hooks_at_work

MODES = ("uniform_mean", "attention_mean")
KEY = "gcfg_null_text"
NODE = "Null-Text Patch"

# attention_mean: two fixed latents at each of four noise levels, spread evenly over the schedule.
_PERCENTS = (0.125, 0.375, 0.625, 0.875)
_LATENTS_EACH = 2
_LATENT_SIZE = 32
_SEED = 0


def patch_null_text(patcher: Any, null_text: Any, mode: str) -> Any:
    """Return a clone whose evaluations run in null-text mode; a patch it already has is replaced.

    Args:
        patcher: a model with an SD1.x, SD2.x or SDXL UNet.
        null_text: CONDITIONING of the empty prompt, [[(1, tokens, width), {"pooled_output": ...}]].
        mode: one of MODES.

    Raises:
        GuidanceError: if the model has no cross-attention, or the conditioning is not of its width.
    """
    embedding, options = _single_prompt(null_text)
    unet = patcher.get_model_object("diffusion_model")
    names = _text_blocks(compiled.original(unet) or unet)
    expected = unet.get_submodule(f"{names[0]}.attn2.to_k").weight.shape[1]
    if embedding.shape[-1] != expected:
        raise GuidanceError(
            f"{NODE}: null_text is {embedding.shape[-1]} wide, expected {expected} for this model; "
            "encode the empty prompt with this model's own CLIP."
        )
    pooled = options.get("pooled_output")
    if mode == "attention_mean":
        _pooled_vector(patcher.model, pooled, embedding)
    patch = NullText(embedding, pooled, names, mode)
    clone = remove_null_text(patcher)
    if hasattr(clone, "add_wrapper_with_key"):
        from comfy.patcher_extension import CallbacksMP, WrappersMP

        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, patch)
        clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, patch.run_begins)
        clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, patch.run_ends)
    else:
        previous = clone.model_options.get("model_function_wrapper")
        clone.model_options["model_function_wrapper"] = FunctionWrapper(patch, previous)
    return clone


def remove_null_text(patcher: Any) -> Any:
    """Return a clone without the null-text patch."""
    clone = patcher.clone()
    if hasattr(clone, "remove_wrappers_with_key"):
        from comfy.patcher_extension import CallbacksMP, WrappersMP

        clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
        for moment in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP):
            clone.remove_callbacks_with_key(moment, KEY)
        return clone
    wrapper = clone.model_options.get("model_function_wrapper")
    if isinstance(wrapper, FunctionWrapper):
        clone.model_options["model_function_wrapper"] = wrapper.previous
        if wrapper.previous is None:
            del clone.model_options["model_function_wrapper"]
    return clone


Constants = dict[str, ConstantCrossAttention]


@dataclass(eq=False)
class NullText:
    """One patch. It is itself the wrapper of ComfyUI's `apply_model`.

    Attributes:
        embedding: of the empty prompt, (1, tokens, width).
        pooled: its pooled vector, which SDXL needs for the mode attention_mean.
        names: the UNet's cross-attention blocks.
        mode: one of MODES.
    """

    embedding: torch.Tensor
    pooled: torch.Tensor | None
    names: tuple[str, ...]
    mode: str
    # Per UNet, because clones that differ may have been given modules of their own.
    _measured: weakref.WeakKeyDictionary[Any, Measured] = field(default_factory=weakref.WeakKeyDictionary)
    # Of the run that is on; None between runs, and where ComfyUI does not tell when a run begins.
    _constants: weakref.WeakKeyDictionary[Any, Constants] | None = None

    def __call__(self, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Wrap one `BaseModel.apply_model`, in the form of ComfyUI's wrapper API."""
        return self.around(executor.class_obj, x.device, lambda: executor(x, *args, **kwargs))

    def around(self, model: Any, device: torch.device, evaluate: Callable[[], Any]) -> Any:
        """Evaluate the model in null-text mode."""
        unet = model.diffusion_model
        if isinstance(unet.get_submodule(f"{self.names[0]}.attn2"), ConstantCrossAttention):
            return evaluate()  # a later patch, further out, is already at work
        with null_text_blocks(unet, self.constants(model, device)):
            return evaluate()

    def run_begins(self, patcher: Any) -> None:
        """Keep constants from now on: only weight hooks change weights while a run is on."""
        self._constants = weakref.WeakKeyDictionary()

    def run_ends(self, patcher: Any) -> None:
        """Forget the constants, because anything may change until the next run."""
        self._constants = None

    def constants(self, model: Any, device: torch.device) -> Constants:
        """The blocks' stand-ins for attn2, made once in a run."""
        unet = model.diffusion_model
        if self._constants is None or hooks_at_work(model) is not None:
            return constants(self.features(model, device))
        kept = self._constants.get(unet)
        if kept is None or next(iter(kept.values())).null_text_feature.device != device:
            kept = self._constants[unet] = constants(self.features(model, device))
        return kept

    def features(self, model: Any, device: torch.device) -> dict[str, torch.Tensor]:
        """F_null of each block for the weights as they are now."""
        unet = model.diffusion_model
        embedding = self.embedding.to(device=device, dtype=_compute_dtype(model))
        uniform = uniform_means(embedding, unet, self.names)
        if self.mode == "uniform_mean":
            return uniform
        measured = self._measured.get(unet)
        if measured is None or not measured.weights.are_those_of(model, uniform):
            weights = WeightState.of(model, uniform)
            means = attention_means(unet, self.names, _calibration_runs(model, embedding, self.pooled))
            measured = self._measured[unet] = Measured(weights, means)
        return measured.features

    def __deepcopy__(self, memo: dict[int, Any]) -> NullText:
        return self  # old versions deep-copy model_options in each clone; the patch is the same one


@dataclass(eq=False)
class FunctionWrapper:
    """The patch as `model_function_wrapper`, for a ComfyUI without the wrapper API; an earlier wrapper runs inside."""

    patch: NullText
    previous: Callable[[Any, dict[str, Any]], Any] | None

    def __call__(self, apply_model: Any, args: dict[str, Any]) -> Any:
        """Wrap one evaluation, in the form of ComfyUI's `model_function_wrapper`."""
        model = getattr(apply_model, "__self__", None)
        if not hasattr(model, "diffusion_model"):
            raise GuidanceError(
                f"{NODE}: model is wrapped by another patch that hides its UNet, expected to wrap it directly; "
                "put the Null-Text Patch after that patch."
            )

        def evaluate() -> Any:
            if self.previous is not None:
                return self.previous(apply_model, args)
            return apply_model(args["input"], args["timestep"], **args["c"])

        return self.patch.around(model, args["input"].device, evaluate)


@dataclass(frozen=True, eq=False)
class Measured:
    """Features of the mode attention_mean, and the weights they were measured with."""

    weights: WeightState
    features: dict[str, torch.Tensor]


def _compute_dtype(model: Any) -> torch.dtype:
    """The dtype a model's context has, as `apply_model` casts it."""
    if hasattr(model, "get_dtype_inference"):
        return model.get_dtype_inference()
    return model.get_dtype() if model.manual_cast_dtype is None else model.manual_cast_dtype


def _calibration_runs(
    model: Any, embedding: torch.Tensor, pooled: torch.Tensor | None
) -> Iterator[Callable[[], object]]:
    """Evaluations of the UNet with the null text at fixed latents and noise levels.

    The UNet's input has unit variance at every noise level, so a standard normal latent stands for any of them.
    """
    unet, sampling = model.diffusion_model, model.model_sampling
    vector = _pooled_vector(model, pooled, embedding)
    extra = {} if vector is None else {"y": vector}
    generator = torch.Generator().manual_seed(_SEED)
    for percent in _PERCENTS:
        sigma = torch.tensor([sampling.percent_to_sigma(percent)], device=embedding.device)
        timestep = sampling.timestep(sigma).float()
        for _ in range(_LATENTS_EACH):
            # What an inpainting UNet takes besides the noisy latent (mask, masked image) is empty here.
            x = torch.zeros(1, unet.in_channels, _LATENT_SIZE, _LATENT_SIZE)
            x[:, : unet.out_channels] = torch.randn(x[:, : unet.out_channels].shape, generator=generator)
            x = x.to(embedding)

            def run(x: torch.Tensor = x, timestep: torch.Tensor = timestep) -> object:
                return unet(x, timestep, context=embedding, control=None, transformer_options={}, **extra)

            yield run


def _pooled_vector(model: Any, pooled: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """SDXL's vector of pooled text and sizes for the empty prompt at 1024 x 1024; None where a model takes none."""
    options = {} if pooled is None else {"pooled_output": pooled.cpu()}
    try:
        vector = model.encode_adm(device=torch.device("cpu"), width=1024, height=1024, **options)
    except KeyError as error:
        raise GuidanceError(
            f"{NODE}: null_text has no pooled_output, expected one for the mode attention_mean with this model; "
            "encode the empty prompt with this model's own CLIP."
        ) from error
    return None if vector is None else vector.to(like)


def _single_prompt(null_text: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    if len(null_text) != 1:
        raise GuidanceError(
            f"{NODE}: null_text holds {len(null_text)} prompts, expected the one empty prompt; "
            "connect a CLIP Text Encode node with no text."
        )
    embedding, options = null_text[0]
    if embedding is None or embedding.ndim != 3:
        found = "holds no text" if embedding is None else f"has the shape {tuple(embedding.shape)}"
        raise GuidanceError(
            f"{NODE}: null_text {found}, expected (1, tokens, width); connect a CLIP Text Encode node with no text."
        )
    return embedding, options


def _text_blocks(unet: torch.nn.Module) -> tuple[str, ...]:
    blocks = cross_attention_blocks(unet)
    if is_null_text(unet):
        raise GuidanceError(
            f"{NODE}: model is a null-text UNet already, expected one that reads text; use it without this patch."
        )
    # A block whose self-attention is a second cross-attention (upscalers) would still read the text.
    if not blocks or any(getattr(block, "disable_self_attn", False) for block in blocks.values()):
        raise GuidanceError(
            f"{NODE}: model ({type(unet).__name__}) has no UNet with one cross-attention in each transformer block, "
            "expected an SD1.x, SD2.x or SDXL model."
        )
    return tuple(blocks)
