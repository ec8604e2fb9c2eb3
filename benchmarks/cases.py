"""What is run: each case is a sum of guided predictions, made by GCFG or by a guider of ComfyUI's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import comfy.sample
import comfy.samplers
from torch import Tensor

from ..gcfg.guidance_cache import CacheRule
from ..gcfg.terms import GuidanceTerm
from ..nodes.runtime.any_sampler import with_terms
from ..nodes.runtime.guider import GCFGGuider
from ..nodes.runtime.live import Watch
from ..nodes.sampling import GCFGKSampler
from .models import Models

# A solver is given the guided step, noisy latent (B, C, H, W), sigma (B,), and the prior's model options.
Solver = Callable[[Callable[[], Tensor], Tensor, Tensor, dict[str, Any]], None]


@dataclass(frozen=True)
class Part:
    """One guided prediction.

    Attributes:
        model: "prior", "concept" or "tuned", as `Untrained` names them.
        prompt: the number of its text.
        weight: of its term.
        cache_rule: how Guidance Cache carries it on.
    """

    model: str
    prompt: int
    weight: float = 1.5
    cache_rule: CacheRule | None = None


@dataclass(frozen=True)
class Sampling:
    """How a whole run is sampled."""

    steps: int
    sampler: str = "euler"
    scheduler: str = "normal"
    seed: int = 1


@dataclass(frozen=True)
class Case:
    """One way to guide.

    Attributes:
        text: its row's title.
        parts: its predictions beside the unconditional one of the prior.
        by: whose guider makes it.
        base: the number of the unconditional prompt.
    """

    text: str
    parts: tuple[Part, ...]
    by: Literal["GCFG", "stock", "dual", "model"] = "GCFG"
    base: int = 0

    @property
    def ours(self) -> bool:
        """Whether it is a run of this pack."""
        return self.by == "GCFG"

    def terms(self, models: Models) -> list[GuidanceTerm]:
        """Its parts as terms of GCFG."""
        return [
            GuidanceTerm(
                part.weight,
                model=getattr(models, part.model),
                conditioning=models.prompt(part.prompt),
                cache_rule=part.cache_rule,
            )
            for part in self.parts
        ]

    def guider(self, models: Models) -> Any:
        """Its guider, ready to sample."""
        base, first = models.prompt(self.base), self.parts[0]
        if self.ours:
            return GCFGGuider(models.prior, base, self.terms(models), "Benchmark")
        if self.by == "dual":  # D_0 + cfg_1 (D_1 - D_2) + cfg_2 (D_2 - D_0): the weights are cfg_1 and cfg_2 - cfg_1
            guider, second = _dual_class()(models.prior), self.parts[1]
            guider.set_conds(models.prompt(first.prompt), models.prompt(second.prompt), base)
            guider.set_cfg(first.weight, first.weight + second.weight)
            return guider
        guider = comfy.samplers.CFGGuider(models.prior)
        guider.set_conds(models.prompt(first.prompt), base)
        guider.set_cfg(first.weight)
        return guider

    def run(self, models: Models, latent: dict[str, Tensor], how: Sampling) -> Tensor:
        """The latent that the whole node makes: GCFG KSampler, or the stock one."""
        base, first = models.prompt(self.base), self.parts[0]
        ways = how.sampler, how.scheduler
        if self.by == "model":  # the stock node, on a model that carries all terms but the first
            prior = with_terms(models.prior, self.terms(models)[1:], Watch())
            texts = models.prompt(first.prompt), base
            node = sys.modules["nodes"].KSampler()
            out = node.sample(prior, how.seed, how.steps, first.weight, *ways, *texts, latent, 1.0)[0]
        elif self.ours:
            node, terms = GCFGKSampler(), tuple(self.terms(models))
            out = node.sample(models.prior, how.seed, how.steps, *ways, base, latent, 1.0, term_1=terms)[0]
        else:
            texts = models.prompt(first.prompt), base
            node = sys.modules["nodes"].KSampler()
            out = node.sample(models.prior, how.seed, how.steps, first.weight, *ways, *texts, latent, 1.0)[0]
        samples: Tensor = out["samples"]
        return samples


def inside(guider: Any, latent: dict[str, Tensor], solver: Solver) -> None:
    """Start a run of a guider and hand over where the solver would begin."""

    def solve(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, *_: Any, **__: Any) -> Tensor:
        sigma = sigmas[0].expand(len(x))
        solver(lambda: model(x, sigma, **extra_args), x, sigma, extra_args["model_options"])
        return x

    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 4)[1:]
    noise = comfy.sample.prepare_noise(latent["samples"], 1)
    guider.sample(noise, latent["samples"], comfy.samplers.KSAMPLER(solve), sigmas, disable_pbar=True, seed=1)


def _dual_class() -> Any:
    for module in ("comfy_extras.nodes_custom_sampler", "comfy_extras.nodes.nodes_custom_sampler"):
        try:
            return importlib.import_module(module).Guider_DualCFG
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
    raise ModuleNotFoundError("this ComfyUI has no comfy_extras.nodes_custom_sampler")


_TEXT = Part("prior", 1, 7.5)
_TWO = (_TEXT, Part("prior", 2))

STOCK = Case("stock CFG", (_TEXT,), "stock")
ONE = Case("GCFG, one term", (_TEXT,))
CONCEPT = Case("GCFG, text and concept UNet", (_TEXT, Part("concept", 2)))
ON_MODEL = Case("KSampler on a GCFG Model, the same", CONCEPT.parts, "model")
CLONE = Case("GCFG, text and LoRA clone", (_TEXT, Part("tuned", 2)))
CASES = (
    STOCK,
    ONE,
    Case("GCFG, two terms on one model", _TWO),
    Case("ComfyUI's Dual CFG Guider, the same", _TWO, "dual"),
    Case("GCFG, four terms on one model", (*_TWO, Part("prior", 3), Part("prior", 4))),
    CONCEPT,
    CLONE,
)
# Two terms w and 1 - w are stock guidance with a negative prompt, whatever the unconditional one is (paper Eq. 7).
PAIR = Case("GCFG, terms w and 1 - w", (_TEXT, Part("prior", 0, 1 - 7.5)), base=2)

# Guidance Cache: text at 5 and concept at 1.5 as in the workflow text-guided-concept, each with a rule of its own.
WORLD_STOCK = Case("stock CFG", (Part("prior", 1, 5.0),), "stock")


def _cached(text: str, of_text: CacheRule | None, of_concept: CacheRule | None) -> Case:
    return Case(text, (Part("prior", 1, 5.0, of_text), Part("concept", 0, 1.5, of_concept)))


def _both(text: str, rule: CacheRule) -> Case:
    return _cached(text, rule, rule)


FULL = _cached("full run", None, None)
PRESET = _cached(
    "text every 2, concept every 3 (the preset)", CacheRule(), CacheRule(every=3)
)  # workflow three-for-two
CACHED = (
    FULL,
    PRESET,
    _both("every 2 (the node's defaults)", CacheRule()),
    _both("every 2, hold", CacheRule(linear=False)),
    _both("every 3", CacheRule(every=3)),
    _both("every 4", CacheRule(every=4)),
    _both("threshold 0.2", CacheRule(every=None, threshold=0.2)),
    _both("threshold 0.4", CacheRule(every=None, threshold=0.4)),
    _both("threshold 0.8", CacheRule(every=None, threshold=0.8)),
    _cached("text every 2, concept always", CacheRule(), None),
    _cached("concept every 2, text always", None, CacheRule()),
    _both("every 2 from 40 % on", CacheRule(start_percent=0.4)),
    _both("every 2 up to 60 %", CacheRule(end_percent=0.6)),
    _both("always, align 0.99", CacheRule(every=1, align=0.99)),
    _both("always, align 0.97", CacheRule(every=1, align=0.97)),
    _both("threshold 0.3, align 0.95", CacheRule(every=None, threshold=0.3, align=0.95)),
)
