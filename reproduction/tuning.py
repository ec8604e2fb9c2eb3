"""The learning rate of each method: that of a grid, the same for all, whose images have the lowest FID.

Each method is trained at each rate with the first seed, its weights are searched as in the tables, and the FID is that
of the unconditional images. The other seeds then train at the rate that was found.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..evaluation.results import RESULTS, read_result
from ..gcfg.errors import GuidanceError
from ..training.files import whole_file, whole_folder
from .evaluation import write_evaluation
from .methods import ABLATIONS, methods
from .settings import Settings

RATES = "rates.json"
_ROWS = {"concept": "ours"}  # what the tables call a training that they do not call by its own name


def tuned(concept: str) -> dict[str, str]:
    """Return what is tuned, {training: its row in the tables}."""
    return {name: _ROWS.get(name, name) for name in methods(concept) if name not in ABLATIONS}


def run_name(number: int) -> str:
    """Return what the folders of a rate's trainings end in."""
    return f"rate-{number}"


def write_tuning(folder: Path, settings: Settings, concept: str, number: int) -> Path:
    """Write the config that measures the trainings at one rate, with few images, and return its path."""
    few = settings.evaluation.model_copy(update={"fid_count": settings.evaluation.fid_search_count})
    smaller = settings.model_copy(update={"evaluation": few})
    return write_evaluation(folder, smaller, concept, settings.methods.seeds[0], run_name(number))


def choose(folder: Path, settings: Settings, concept: str) -> None:
    """Write the best rate of each method as `methods/CONCEPT/rates.json`; its training becomes that of the first seed.

    Raises: GuidanceError: if a method has no FID at any rate.
    """
    rates, trained = settings.methods.learning_rates, folder / "methods" / concept
    chosen = {}
    for name, row in tuned(concept).items():
        fids = [_fid(folder / "evaluation" / f"{concept}-{run_name(number)}", row) for number in range(len(rates))]
        known = [number for number, fid in enumerate(fids) if fid is not None]
        if not known:
            raise GuidanceError(f"No learning rate of {name!r} was measured: run `gcfg evaluate fid` for one of them.")
        best = min(known, key=lambda number: fids[number] or 0.0)
        chosen[name] = {"rate": rates[best], "fid": dict(zip(map(str, rates), fids, strict=True))}
        place = trained / f"{name}-{settings.methods.seeds[0]}"
        if not place.exists():
            with whole_folder(place) as beside:
                shutil.copytree(trained / f"{name}-{run_name(best)}", beside, dirs_exist_ok=True)
    with whole_file(trained / RATES) as beside:
        beside.write_text(json.dumps(chosen, indent=1), encoding="utf-8")


def learning_rate(folder: Path, concept: str, name: str) -> float:
    """Return the chosen rate of a method; an ablation has that of the concept."""
    chosen = json.loads((folder / "methods" / concept / RATES).read_text(encoding="utf-8"))
    rate: float = chosen["concept" if name in ABLATIONS else name]["rate"]
    return rate


def _fid(evaluation: Path, row: str) -> float | None:
    result = read_result(evaluation / RESULTS / f"fid-{row}.json")
    return result["numbers"]["fid"] if result else None
