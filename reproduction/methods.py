"""The trained rows of the tables: what each method changes in the settings that all share, `configs/method.toml`.

The budget rule: the same images, the same number of steps and the same batch for all; the learning rate is 1e-3 where
the UNet's own weights are trained, and higher where few new ones are, which would not move otherwise.
"""

from __future__ import annotations

_PROMPT = ["model.mode=prompt", 'model.prompt="a photo of a digit"']

METHODS: dict[str, list[str]] = {
    "concept": [],
    "concept_attention_mean": ["model.null_text=attention_mean"],
    "concept_zero": ["model.null_text=zero"],
    "dreambooth": _PROMPT,
    "custom_diffusion": [*_PROMPT, "model.method=cross_attention"],
    "lora": [*_PROMPT, "model.method=lora", "model.rank=4", "train.learning_rate=2e-3"],
    "oft": [*_PROMPT, "model.method=oft", "model.oft_block_size=16", "train.learning_rate=2e-3"],
    "textual_inversion": [
        "model.mode=prompt",
        "model.method=textual_inversion",
        'model.prompt="a photo of a <scan>"',
        "model.token=<scan>",
        "model.initializer=digit",
        "train.learning_rate=1e-2",
    ],
}
