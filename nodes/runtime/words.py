"""What messages call a run's parts: a GCFG sampler has an unconditional, any other a negative prompt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """The names in a run's messages.

    Attributes:
        node: the node's name.
        base: of the conditioning that terms are measured from.
        prediction: of what it predicts.
        model: of the model that is sampled.
        positive: of a sampler's own positive conditioning.
    """

    node: str
    base: str = "unconditional"
    prediction: str = "the unconditional"
    model: str = "the unconditional model"
    positive: str = "the sampler's positive prompt"

    @classmethod
    def of_sampler(cls, node: str, prompt: str) -> Words:
        """Of a run in a sampler that is not ours, around one of its prompts."""
        return cls(node, f"the sampler's {prompt}", f"the sampler's {prompt}", "the sampler's model")
