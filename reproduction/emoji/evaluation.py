"""What is measured of a concept and one seed of its methods: a config of `gcfg evaluate`, and the held-out distance."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template

from ...training.files import whole_file
from .captions import plain
from .held_out import measure_held_out, truth_distance
from .judge import features, second_reads
from .settings import Settings
from .things import describe, things
from .world import JUDGE, SECOND_JUDGE

HELD_OUT = "held_out.json"
_TEMPLATE = Path(__file__).parent / "configs" / "evaluation.toml"
# Beside the held-out things: attributes, the paper's own where they occur, each with its label.
_ATTRIBUTES = {"face": ("smiling", "sunglasses", "hat", "tears", "angry", "tongue"), "animal": ("smiling",)}
_DECOUPLED = {"face": ("angry-face", "crying-face", "nerd-face"), "animal": ("tiger", "horse", "turtle")}
_SWEEP = {"face": "smiling-face-with-sunglasses", "animal": "tiger-face"}


def write_evaluation(folder: Path, settings: Settings, concept: str, seed: int) -> Path:
    """Write the config of one concept and seed, and return its path."""
    world = {thing.name: thing for thing in things()}
    asked = [(thing.words, name) for name, thing in world.items() if thing.group == concept and thing.held_out]
    asked += [(describe(concept, attribute), attribute) for attribute in _ATTRIBUTES[concept]]
    values = settings.evaluation.model_dump()
    values["sampler_steps"] = values.pop("steps")
    values |= {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
    values |= {
        "concept": concept,
        "seed": seed,
        "first": settings.methods.seeds[0],
        "plain": plain(concept),
        "prompts": "\n".join(f'    {{ prompt = "{prompt}", label = "{label}" }},' for prompt, label in asked),
        "decoupled": ", ".join(f'"{world[name].words}"' for name in _DECOUPLED[concept]),
        "sweep_prompt": world[_SWEEP[concept]].words,
        "sweep_label": _SWEEP[concept],
    }
    path = folder / f"evaluation-{concept}-{seed}.toml"
    path.write_text(Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(values), encoding="utf-8")
    return path


def write_held_out(folder: Path, concept: str, seed: int) -> None:
    """Measure the text-guided images against the held-out truth and by the second judge; write `held_out.json`."""
    evaluation, truth = folder / "evaluation" / f"{concept}-{seed}", folder / "concepts" / concept / "held-out"
    extractor = features(folder / JUDGE)
    found = {
        "truth": truth_distance(truth, extractor),
        "methods": measure_held_out(evaluation, truth, extractor, second_reads(folder / SECOND_JUDGE)),
    }
    with whole_file(evaluation / HELD_OUT) as beside:
        beside.write_text(json.dumps(found, indent=1), encoding="utf-8")
