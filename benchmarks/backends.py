"""GCFG against stock guidance under each attention back end, and compiled against not compiled."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..gcfg.terms import GuidanceTerm
from ..nodes.runtime.guider import GCFGGuider
from .bench import SCALE, Bench, Step, unload_all
from .figures import Figure
from .steps import stock
from .timing import Spread, Times, interleave, ratio

# What ComfyUI's flags choose when it is imported; the UNet's layers look the function up in each call.
ATTENTION = {
    "--use-pytorch-cross-attention": "attention_pytorch",
    "--use-split-cross-attention": "attention_split",
    "--use-quad-cross-attention": "attention_sub_quad",
}
_LOOKED_UP = ("optimized_attention", "optimized_attention_masked")


def figures(bench: Bench, compiler: str = "inductor") -> list[Figure]:
    """Unconditional, text control and concept model against stock guidance of the same prior, in the same setting.

    Args:
        bench: the models and their sizes.
        compiler: the back end of `torch.compile`.
    """
    return _attention(bench) + _compiled(bench, compiler)


def _attention(bench: Bench) -> list[Figure]:
    times: Times = {}
    module = importlib.import_module("comfy.ldm.modules.attention")
    usual = next((flag for flag, name in ATTENTION.items() if getattr(module, name) is module.optimized_attention), "")

    def body(guider: GCFGGuider, step: Step, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
        def under(name: str, call: Callable[[], object]) -> None:
            with attention(name):
                call()

        calls: dict[str, Callable[[], object]] = {}
        for flag, name in ATTENTION.items():
            calls[f"gcfg {flag}"] = partial(under, name, step)
            calls[f"stock {flag}"] = partial(under, name, lambda: stock(guider.run.lanes[0], x, sigma, options))
        times.update(interleave(calls, bench.repeats, bench.clock, "attention"))

    bench.inside_run(_terms(bench, bench.concept), body)
    found: list[Figure] = []
    for flag in ATTENTION:
        key = flag.removeprefix("--use-").removesuffix("-cross-attention")
        note = "what this ComfyUI takes here without a flag" if flag == usual else ""
        gcfg, plain = times[f"gcfg {flag}"], times[f"stock {flag}"]
        found.append(Figure.spread(f"step_{key}", f"{flag}: GCFG, one step", Spread.of(gcfg), "s", note=note))
        text = f"{flag}: uncond, control, concept / stock CFG step"
        found.append(Figure.spread(f"three_vs_stock_{key}", text, ratio(gcfg, plain), "x", 1.5))
    return found


def _compiled(bench: Bench, compiler: str) -> list[Figure]:
    """A run of the plain models and one of the compiled ones, because older versions compile in the shared module."""
    eager = _run(bench, bench.prior, bench.concept)
    try:
        fast = _run(bench, compiled(bench.prior, compiler), compiled(bench.concept, compiler))
    except RuntimeError as error:
        if "compiler" not in str(error).lower() and "triton" not in str(error).lower():
            raise
        reason = f"torch.compile with {compiler} has no compiler here, so its rows are left out"
        return [Figure.spread("step_eager", "GCFG, one step, not compiled", Spread.of(eager["gcfg"]), "s", note=reason)]
    finally:
        torch._dynamo.reset()
        unload_all()
    spent = fast["first"][0] - Spread.of(fast["gcfg"]).median
    apart = f"{compiler}; without the time to compile"
    return [
        Figure("compile", f"compiling prior and concept model ({compiler})", spent, "s"),
        Figure.spread("step_eager", "GCFG, one step, not compiled", Spread.of(eager["gcfg"]), "s"),
        Figure.spread("step_compiled", "GCFG, one step, compiled", Spread.of(fast["gcfg"]), "s", note=apart),
        Figure.spread(
            "three_vs_stock_eager",
            "not compiled: uncond, control, concept / stock CFG step",
            ratio(eager["gcfg"], eager["stock"]),
            "x",
            1.5,
        ),
        Figure.spread(
            "three_vs_stock_compiled",
            "compiled: uncond, control, concept / stock CFG step",
            ratio(fast["gcfg"], fast["stock"]),
            "x",
            1.5,
            apart,
        ),
        Figure.spread(
            "compiled_vs_eager",
            "GCFG step, compiled / not compiled",
            ratio(fast["gcfg"], eager["gcfg"]),
            "x",
            note="of two runs, one after the other",
        ),
    ]


def _run(bench: Bench, prior: Any, concept: Any) -> Times:
    """Times of GCFG's and stock guidance's steps within one run, and of the very first step."""
    times: Times = {}
    guider = GCFGGuider(prior, bench.prompt(0), _terms(bench, concept), "Benchmark")

    def body(step: Step, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
        times["first"] = [bench.clock.time(step)]
        calls = {"gcfg": step, "stock": lambda: stock(guider.run.lanes[0], x, sigma, options)}
        times.update(interleave(calls, bench.repeats, bench.clock, "compile"))

    bench.inside(guider, body)
    return times


def _terms(bench: Bench, concept: Any) -> list[GuidanceTerm]:
    return [
        GuidanceTerm(SCALE, conditioning=bench.prompt(1)),
        GuidanceTerm(1.5, model=concept, conditioning=bench.prompt(2)),
    ]


@contextmanager
def attention(name: str) -> Iterator[None]:
    """Compute attention by one of ComfyUI's functions within the `with` block."""
    module = importlib.import_module("comfy.ldm.modules.attention")
    usual = {place: getattr(module, place) for place in _LOOKED_UP}
    try:
        for place in usual:
            setattr(module, place, getattr(module, name))
        yield
    finally:
        for place, function in usual.items():
            setattr(module, place, function)


def compiled(model: Any, compiler: str) -> Any:
    """A clone as the node TorchCompileModel makes it; without the node, by the object patch of its first form."""
    try:
        node = importlib.import_module("comfy_extras.nodes_torch_compile").TorchCompileModel
    except ModuleNotFoundError:
        clone = model.clone()
        unet = torch.compile(model=clone.get_model_object("diffusion_model"), backend=compiler)
        clone.add_object_patch("diffusion_model", unet)
        return clone
    if hasattr(node, "execute"):
        return node.execute(model, compiler).result[0]
    return node().patch(model, compiler)[0]
