"""The trained rows of the tables: what each method changes in the settings that all share, `configs/method.toml`.

The budget rule: the same images, the same number of steps and the same batch for all, and the learning rate of one grid
that suits each best, see `tuning`.
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
        "lora": [*prompt, "model.method=lora", "model.rank=4"],
        "oft": [*prompt, "model.method=oft", "model.oft_block_size=16"],
        "textual_inversion": [
            "model.mode=prompt",
            "model.method=textual_inversion",
            'model.prompt="a picture of a <solid>"',
            "model.token=<solid>",
            f"model.initializer={concept}",
        ],
    }


# Trained with one seed only, at the concept's learning rate: the other forms of the null-text constants.
ABLATIONS = ("concept_attention_mean", "concept_zero")
