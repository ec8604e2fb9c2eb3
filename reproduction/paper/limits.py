"""What an evaluation of this size cannot tell: sentences that its own config calls for."""

from __future__ import annotations

from ...evaluation.config import METHODS
from ...evaluation.results import Results
from .numbers import PAPER

_PAPER_SIZE, _PAPER_COUNT = 512, 50_000
_PAPER_PARAMETERS = max(row.parameter_count for row in PAPER.values())


def limits(results: Results) -> list[str]:
    """Return the sentences, most important first."""
    config = results.everything[0].config
    size, extractor, classifier = (
        config["sampling"]["size"],
        config["fid"]["extractor"],
        config["alignment"]["classifier"],
    )
    count = min((each.count for each in results.of_task("fid", METHODS)), default=_PAPER_COUNT)
    trained = [results.parameters(method) or 0 for method in results.of_group(METHODS)]
    sentences = []
    if size < _PAPER_SIZE:
        sentences += [
            f"Images are {size} pixels wide, the paper's {_PAPER_SIZE}: hair, fur, skin, and what the VAE loses of "
            "them, cannot be seen at this size.",
            "The prior knows a small world. Open vocabulary, stylised checkpoints (Fig. 7(b)) and a concept in a "
            "larger scene (Appendix F) need a prior such as Stable Diffusion.",
        ]
    if extractor != "inception":
        sentences.append(
            f"FID's features are those of `{extractor}`, not Inception's: values can be compared on this page, "
            "not with the paper's. What can be compared is the order of the methods."
        )
    if count < _PAPER_COUNT:
        sentences.append(
            f"FID is over {count:,} images, the paper's over {_PAPER_COUNT:,}. With fewer images it comes out "
            "higher, for all methods alike."
        )
    if results.of_task("alignment"):
        told = "CLIP, zero-shot" if classifier == "clip" else f"`{classifier}`"
        sentences.append(
            f"Whether an attribute is in an image is decided by {told}; the paper does not name its predictors."
        )
    if trained and max(trained) < 0.5 * _PAPER_PARAMETERS:
        sentences.append(
            f"The largest method trains {max(trained) / 1e6:.1f}M parameters, the paper's 859M: which methods have too "
            "few parameters may be another question in a large model."
        )
    return [
        *sentences,
        "Each method was trained once. Differences as small as those between two trainings of one method mean nothing, "
        "and how large these are was not measured.",
        "No people were asked: the paper's preference columns have no counterpart. `gcfg evaluate abtest` makes a page "
        "on which your friends can choose.",
    ]
