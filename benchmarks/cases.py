"""The cases of the matrix: what a guided step is made of, and the guider that makes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers

from ..gcfg.terms import GuidanceTerm
from ..nodes.runtime.guider import GCFGGuider
from .bench import SCALE, Bench

OTHER = 1.5  # weight of every further term


@dataclass(frozen=True)
class Part:
    """One guided prediction.

    Attributes:
        model: "prior", "concept" or "tuned", as `Bench` names them.
        prompt: the seed of its text; 0 is the unconditional one.
        weight: of its term.
    """

    model: str
    prompt: int
    weight: float = OTHER


@dataclass(frozen=True)
class Case:
    """One way to make a guided step.

    Attributes:
        name: its key in the JSON.
        text: its row's title.
        parts: its predictions beside the unconditional one of the prior.
        make: the guider.
        peer_of: the name of the case of ours that makes the same predictions; "" for our own.
    """

    name: str
    text: str
    parts: tuple[Part, ...]
    make: Callable[[Bench, tuple[Part, ...]], Any]
    peer_of: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is a run of this pack."""
        return self.make is gcfg

    @property
    def evaluations(self) -> int:
        """Predictions of a step, the unconditional one among them."""
        return 1 + len(self.parts)

    @property
    def models(self) -> tuple[str, ...]:
        """The models it needs, the prior first."""
        return tuple(dict.fromkeys(["prior", *(part.model for part in self.parts)]))

    def guider(self, bench: Bench) -> Any:
        """Its guider, ready to sample."""
        return self.make(bench, self.parts)


def gcfg(bench: Bench, parts: tuple[Part, ...]) -> GCFGGuider:
    """The guider of this pack."""
    terms = [
        GuidanceTerm(part.weight, model=getattr(bench, part.model), conditioning=bench.prompt(part.prompt))
        for part in parts
    ]
    return GCFGGuider(bench.prior, bench.prompt(0), terms, "Benchmark")


def stock(bench: Bench, parts: tuple[Part, ...]) -> Any:
    """The stock KSampler's."""
    guider = comfy.samplers.CFGGuider(bench.prior)
    guider.set_conds(bench.prompt(parts[0].prompt), bench.prompt(0))
    guider.set_cfg(parts[0].weight)
    return guider


def dual(bench: Bench, parts: tuple[Part, ...]) -> Any:
    """ComfyUI's Dual CFG Guider, of two prompts.

    D_0 + cfg_1 (D_1 - D_2) + cfg_2 (D_2 - D_0), the sum of two terms with the weights cfg_1 and cfg_2 - cfg_1
    """
    first, second = parts
    guider = _dual_class()(bench.prior)
    guider.set_conds(bench.prompt(first.prompt), bench.prompt(second.prompt), bench.prompt(0))
    guider.set_cfg(first.weight, first.weight + second.weight)
    return guider


def _dual_class() -> Any:
    for module in ("comfy_extras.nodes_custom_sampler", "comfy_extras.nodes.nodes_custom_sampler"):
        try:
            return importlib.import_module(module).Guider_DualCFG
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
    raise ModuleNotFoundError("this ComfyUI has no comfy_extras.nodes_custom_sampler")


_TEXT = Part("prior", 1, SCALE)
_TWO = (_TEXT, Part("prior", 2))

CASES = (
    Case("stock", "stock CFG", (_TEXT,), stock),
    Case("k1", "GCFG K=1", (_TEXT,), gcfg),
    Case("k2", "GCFG K=2, one model", _TWO, gcfg),
    Case("k4", "GCFG K=4, one model", (*_TWO, Part("prior", 3), Part("prior", 4)), gcfg),
    Case("k2_concept", "GCFG K=2, prior and concept UNet", (_TEXT, Part("concept", 2)), gcfg),
    Case("k2_lora", "GCFG K=2, prior and LoRA clone", (_TEXT, Part("tuned", 2)), gcfg),
    Case("k4_mixed", "GCFG K=4, two on the prior, concept, clone", (*_TWO, Part("concept", 3), Part("tuned", 4)), gcfg),
    Case("dual", "ComfyUI's Dual CFG Guider", _TWO, dual, peer_of="k2"),
)
BY_NAME = {case.name: case for case in CASES}
