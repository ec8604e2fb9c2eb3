"""What the sections of the benchmark share: the models in a running ComfyUI, and a place inside a sampling run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
from torch import Tensor

from ..gcfg.terms import GuidanceTerm
from ..nodes.runtime.concept import load_concept_unet
from ..nodes.runtime.guider import GCFGGuider
from ..nodes.sampling import GCFGKSampler
from ..testkit.layouts import FAMILIES
from .files import Files, latent, lora, prompt
from .timing import Clock

SCALE = 7.5  # of the text guidance
SEED = 1
Step = Callable[[], Tensor]
Solver = Callable[[Step, Tensor, Tensor, dict[str, Any]], None]
Body = Callable[[GCFGGuider, Step, Tensor, Tensor, dict[str, Any]], None]


@dataclass
class Bench:
    """One benchmark.

    Attributes:
        files: the model files.
        family: whose layout they have.
        size: of the image, in pixels.
        steps: of a sampler's run.
        repeats: of everything that is timed.
        cpu_time: see `Clock`.
        batch: images in a latent batch.
    """

    files: Files
    family: str
    size: int
    steps: int
    repeats: int
    cpu_time: bool = False
    batch: int = 1

    @cached_property
    def clock(self) -> Clock:
        """Of the device that ComfyUI runs its models on."""
        return Clock(management.get_torch_device(), self.cpu_time)

    @property
    def latent(self) -> dict[str, Tensor]:
        """The empty latent that everything samples."""
        return latent(self.size, self.batch)

    def prompt(self, seed: int) -> list[list[object]]:
        """A CONDITIONING for the family's models; the unconditional one is 0."""
        return prompt(seed, FAMILIES[self.family].context_dim)

    @cached_property
    def prior(self) -> Any:
        """The prior; loaded once."""
        return self.load_prior()

    @cached_property
    def concept(self) -> Any:
        """The concept model; loaded once."""
        return load_concept_unet(str(self.files.concept))

    @cached_property
    def lora(self) -> dict[str, Tensor]:
        """The LoRA."""
        return lora(self.family)

    @cached_property
    def tuned(self) -> Any:
        """A clone of the prior with the LoRA."""
        return self.with_lora(self.prior)

    def forget_tuned(self) -> None:
        """Make a new clone when one is next asked for, so that it is separated from the prior anew."""
        self.__dict__.pop("tuned", None)

    def load_prior(self) -> Any:
        """Load the prior's file through ComfyUI."""
        load = getattr(comfy.sd, "load_diffusion_model", None) or comfy.sd.load_unet
        return load(str(self.files.prior))

    def with_lora(self, model: Any) -> Any:
        """A clone with the LoRA, as the stock loader node makes it. Raises: RuntimeError: if it fits no weight."""
        clone, _ = comfy.sd.load_lora_for_models(model, None, self.lora, 1.0, 0.0)
        if len(clone.patches) != len(self.lora) // 3:
            raise RuntimeError(f"the LoRA has {len(self.lora) // 3} layers, of which {len(clone.patches)} fit")
        return clone

    def gcfg(self, model: Any, unconditional: Any, terms: Sequence[GuidanceTerm], steps: int) -> Tensor:
        """The result of the GCFG KSampler."""
        node = GCFGKSampler()
        out, _ = node.sample(
            model, SEED, steps, "euler", "normal", unconditional, self.latent, 1.0, term_1=tuple(terms)
        )
        samples: Tensor = out["samples"]
        return samples

    def inside_run(self, terms: Sequence[GuidanceTerm], body: Body) -> None:
        """Start a run of the prior with these terms and hand over where the solver would begin.

        Args:
            terms: the guidance terms.
            body: is given the guider, the guided step, noisy latent (B, C, H, W), sigma (B,), and the prior's model
                options.
        """
        guider = GCFGGuider(self.prior, self.prompt(0), terms, "Benchmark")

        def solver(step: Step, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
            body(guider, step, x, sigma, options)

        self.inside(guider, solver)

    def inside(self, guider: Any, body: Solver) -> None:
        """Start a guider's run and hand over where the solver would begin.

        Args:
            guider: any GUIDER of the prior.
            body: is given the guided step, noisy latent (B, C, H, W), sigma (B,), and the guider's model options.
        """

        def solver(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, *_: Any, **__: Any) -> Tensor:
            sigma = sigmas[0].expand(x.shape[0])
            body(lambda: model(x, sigma, **extra_args), x, sigma, extra_args["model_options"])
            return x

        self.sample(guider, comfy.samplers.KSAMPLER(solver), 4, skip=1)

    def sample(self, guider: Any, sampler: Any, steps: int, skip: int = 0) -> Tensor:
        """Run a guider on the empty latent.

        Args:
            guider: any GUIDER of the prior.
            sampler: a ComfyUI sampler.
            steps: of the schedule.
            skip: how many of its first steps to leave out.
        """
        sampling = self.prior.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)[skip:]
        samples = self.latent["samples"]
        noise = comfy.sample.prepare_noise(samples, SEED)
        out: Tensor = guider.sample(noise, samples, sampler, sigmas, disable_pbar=True, seed=SEED)
        return out


def unload_all() -> None:
    """Unload every model and let go of what nobody holds."""
    management.unload_all_models()
    gc.collect()
