"""The page of an evaluation with the paper's numbers beside its own, the verdicts on its claims, and the limits."""

from __future__ import annotations

from pathlib import Path

from ...evaluation.config import METHODS
from ...evaluation.report import page
from ...evaluation.report.pictures import draw_panels, tradeoff_points
from ...evaluation.results import Results
from .claims import claims, claims_table, drift_pairs
from .limits import limits
from .numbers import OURS, PAPER, STYLEGAN, TABLE_1, TABLE_2

# Heading and explanation of the ablations that the paper has; any other group is told by its name.
_GROUPS = {
    "drift": (
        "Unconditional guidance drift (Fig. 8(b), Fig. 10)",
        "The same guidances around the frozen prior, and around the fine-tuned model's own unconditional prediction.",
    ),
    "null_text": (
        "The constants of a null-text model (Eq. 5)",
        "What stands in for cross-attention: the mean over the empty prompt's tokens, the mean of real attention, or "
        "nothing.",
    ),
    "decoupling": (
        "Condition decoupling (Fig. 5)",
        "One joint prompt, and one guidance for each of its parts. Diversity is the mean feature distance between two "
        "images of a prompt; the Vendi score counts how many really different ones there are.",
    ),
    "negative": (
        "Negative weights (Fig. 11)",
        "A second guidance whose weight runs from negative to positive.",
    ),
}


def page_text(results: Results, experiment: page.Experiment, folder: str) -> str:
    """Return the page in Markdown; see `evaluation.report.page.page_text` for the arguments."""
    return page.joined(
        page.introduction(experiment),
        _introduction(folder),
        page.unconditional(results, folder, "Unconditional generation (Table 1)", TABLE_1, [STYLEGAN]),
        page.guided(
            results,
            folder,
            "Text-guided and spatially guided generation (Table 2)",
            TABLE_2,
            ", the paper's discrepancy (its table marks the column ↑)",
        ),
        page.tradeoff(results, folder, "Fidelity against control (Fig. 9)", "each method here and in the paper"),
        ["## What agrees with the paper, and what does not", claims_table(claims(results))],
        *(_ablation(results, group, folder) for group in results.groups),
        *(page.plane(sweep, folder, "Two weights (Fig. 8(a))") for sweep in results.sweeps),
        page.weights(results),
        ["## What this cannot tell", "\n".join(f"- {sentence}" for sentence in limits(results))],
        page.provenance(results, experiment.stages, folder),
    )


def draw_tradeoff(results: Results, path: Path) -> None:
    """Fidelity against control (Fig. 9), beside the paper's own numbers for faces."""
    theirs = [
        (row.title, row.fid_face, row.alignment, row.parameter_count, name == OURS) for name, row in PAPER.items()
    ]
    draw_panels({"here": tradeoff_points(results, marked=OURS), "the paper, faces": theirs}, path)


def _introduction(folder: str) -> list[str]:
    return [
        "The tables and figures of [Cao et al. 2023](https://arxiv.org/abs/2312.08195), repeated with `gcfg train` and "
        "`gcfg evaluate`. The numbers under *paper* are the paper's own, from Stable Diffusion 1.5 on faces (FFHQ) and "
        f"animal faces (AFHQv2). {page.LEGEND}",
        f"`comfyui_gcfg.reproduction` wrote this page from the files in {page.results_link(folder)}, and every verdict "
        "on it follows from a stated rule. Nothing was edited by hand.",
    ]


def _ablation(results: Results, group: str, folder: str) -> list[str]:
    reference = [OURS] if OURS in results.of_group(METHODS) else []
    if group == "drift":
        reference += [each.method for pair in drift_pairs(results) for each in pair if each.group == METHODS]
    return page.ablation(results, group, folder, *_GROUPS.get(group, ("", "")), reference=reference)
