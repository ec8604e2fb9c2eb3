"""The trained rows of the tables: what each method changes in the settings that all share, `configs/method.toml`.

The budget rule: the same images, the same number of steps and the same batch for all; the learning rate is 5e-4 where
the UNet's own weights are trained, and higher where few new ones are, which would not move otherwise.
"""

from __future__ import annotations

from .captions import plain


def methods(concept: str) -> dict[str, list[str]]:
    """Return the settings of every method for a concept, face or animal."""
    prompt = ["model.mode=prompt", f'model.prompt="{plain(concept)}"']
    return {
        "concept": [],
        "concept_attention_mean": ["model.null_text=attention_mean"],
        "concept_zero": ["model.null_text=zero"],
        "dreambooth": prompt,
        "custom_diffusion": [*prompt, "model.method=cross_attention"],
        "lora": [*prompt, "model.method=lora", "model.rank=4", "train.learning_rate=2e-3"],
        "oft": [*prompt, "model.method=oft", "model.oft_block_size=16", "train.learning_rate=2e-3"],
        "textual_inversion": [
            "model.mode=prompt",
            "model.method=textual_inversion",
            'model.prompt="a picture of a <solid>"',
            "model.token=<solid>",
            f"model.initializer={concept}",
            "train.learning_rate=1e-2",
        ],
    }


# Trained with one seed only: the other forms of the null-text constants, on one concept.
ABLATIONS = ("concept_attention_mean", "concept_zero")
