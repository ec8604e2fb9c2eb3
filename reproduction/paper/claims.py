"""What the paper says, held against the stored numbers by stated rules; nothing here is judged by eye."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr

from ...evaluation.config import METHODS
from ...evaluation.recipe import PRIOR
from ...evaluation.report import words
from ...evaluation.results import Result, Results, Sweep
from .numbers import DREAMBOOTH, OURS, PAPER, TEXTUAL_INVERSION

KEPT_ALIGNMENT = 0.1  # below the prior's, that a method may lose and still count as controllable
SIMILAR_DISCREPANCY = 0.02  # the spread in the paper's Table 2


@dataclass(frozen=True)
class Claim:
    """A statement and its test.

    Attributes:
        statement: that is tested.
        rule: when it holds.
        here: the numbers compared.
        paper: the paper's own numbers, if it gives any.
        holds: None if a number that it needs was not measured.
    """

    statement: str
    rule: str
    here: str
    paper: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        """In words."""
        return {True: "holds", False: "**does not hold**", None: "not measured"}[self.holds]


def claims(results: Results) -> list[Claim]:
    """Return all that can be tested; the three expectations come first, measured or not."""
    expectations = [
        _lowest_controllable(results, "fid", "unconditional images"),
        _lowest_controllable(results, "alignment", "text-guided images"),
        *(
            [_compared_bases(*pair) for pair in drift_pairs(results)]
            or [_not_measured("The fixed unconditional model gives a lower FID.")]
        ),
        *(list(_decoupling(results)) or [_not_measured("Decoupled prompts raise diversity.")]),
    ]
    further = [_lowest_of_all, _inversion_aligns, _dreambooth_loses, _edges_similar, _parameters_help]
    found = [claim for make in further if (claim := make(results))]
    return [*expectations, *found, *_plane(results)]


def claims_table(claims: Sequence[Claim]) -> str:
    """Return statements, their rules, the numbers and the verdict as a table."""
    rows = [[claim.statement, claim.rule, claim.here, claim.paper, claim.verdict] for claim in claims]
    return words.table(["statement", "rule", "here", "*paper*", "verdict"], rows, numbers=False)


def _not_measured(statement: str) -> Claim:
    return Claim(statement, "", words.ABSENT, words.ABSENT, None)


def _lowest_controllable(results: Results, task: str, images: str) -> Claim:
    statement = f"Ours has the lowest FID of {images} among the methods that keep control."
    rule = f"lowest FID where alignment ≥ the prior's - {KEPT_ALIGNMENT:g}"
    prior, ours = results.number("alignment", PRIOR, "alignment"), results.number(task, OURS, "fid")
    aligned = _numbers(results, "alignment", "alignment")
    if prior is None or ours is None or OURS not in aligned:
        return Claim(statement, rule, words.ABSENT, words.ABSENT, None)
    least = prior - KEPT_ALIGNMENT - 1e-9  # both are shares of a count
    if aligned[OURS] < least:
        here = f"ours keeps {aligned[OURS]:.2f}, the prior {prior:.2f}"
        return Claim(statement, rule, here, words.ABSENT, False)
    fids = _numbers(results, task, "fid")
    kept = {name: fids[name] for name in fids if name == OURS or aligned.get(name, -1.0) >= least}
    if len(kept) < 2:
        return Claim(statement, rule, "no other method keeps control", words.ABSENT, True)
    here, lower = _against_rest(results, kept, OURS)
    return Claim(statement, rule, here, words.ABSENT, lower)


def _against_rest(
    results: Results, values: Mapping[str, float], method: str, write: Callable[[float], str] = words.number
) -> tuple[str, bool]:
    """Return a method's number beside the lowest of all others, in words, and whether it is lower."""
    rival = min((name for name in values if name != method), key=lambda name: values[name])
    here = f"{write(values[method])}; next: {results.title(rival)} {write(values[rival])}"
    return here, values[method] < values[rival]


def drift_pairs(results: Results) -> list[tuple[Result, Result]]:
    """Return results with the same terms, one around the prior, the other around a model of its own.

    The ablation's own results come first: their weights are equal, those of the tables were searched for each method.
    """
    pairs = []
    for task in ("fid", "alignment"):
        known = sorted(
            (each for each in results.of_task(task) if each.group in ("drift", METHODS)),
            key=lambda each: each.group == METHODS,
        )
        fixed = [each for each in known if _base(each) == PRIOR]
        for terms in dict.fromkeys(_terms(each) for each in known if _base(each) != PRIOR):
            drifted = next(each for each in known if _base(each) != PRIOR and _terms(each) == terms)
            frozen = next((each for each in fixed if _terms(each) == terms), None)
            if frozen and "drift" in (drifted.group, frozen.group):
                pairs.append((frozen, drifted))
    return pairs


def _compared_bases(fixed: Result, drifted: Result) -> Claim:
    low, high = fixed.numbers["fid"], drifted.numbers["fid"]
    kind = "text-guided" if fixed.task == "alignment" else "unconditional"
    return Claim(
        f"The prior as unconditional model gives a lower FID than the fine-tuned one ({kind}).",
        "lower FID of two recipes that differ in the unconditional model",
        f"{fixed.title} {words.number(low)}; {drifted.title} {words.number(high)}",
        "Fig. 8(b), 10: shown, no number",
        low < high,
    )


def _decoupling(results: Results) -> Iterator[Claim]:
    """In the group 'decoupling': several prompts of their own against one joint prompt."""
    group = [each for each in results.of_task("diversity") if each.group == "decoupling"]
    joint = [each for each in group if _text_terms(each) == 1]
    for single in joint[:1]:
        for several in (each for each in group if _text_terms(each) > 1):
            more, less = several.numbers["diversity"], single.numbers["diversity"]
            yield Claim(
                "Decoupled prompts raise diversity.",
                "greater mean feature distance between two images of one prompt",
                f"{several.title} {words.number(more)}; {single.title} {words.number(less)}",
                "Fig. 5: shown, no number",
                more > less,
            )


def _lowest_of_all(results: Results) -> Claim | None:
    fids = {name: value for name, value in _numbers(results, "fid", "fid").items() if name != PRIOR}
    if OURS not in fids or len(fids) < 2:
        return None
    here, lower = _against_rest(results, fids, OURS)
    return Claim(
        "Ours has the lowest FID of all personalization methods (Table 1).",
        "lowest FID of unconditional images",
        here,
        "6.57; next: DreamBooth 12.37",
        lower,
    )


def _inversion_aligns(results: Results) -> Claim | None:
    aligned, fids = (_numbers(results, "alignment", name) for name in ("alignment", "fid"))
    if not {OURS, TEXTUAL_INVERSION} <= set(aligned):
        return None
    theirs, ours = TEXTUAL_INVERSION, OURS
    return Claim(
        "Textual Inversion follows the text better than ours, at the cost of FID (Table 2).",
        "higher alignment and higher FID of text-guided images",
        f"alignment {aligned[theirs]:.2f} against {aligned[ours]:.2f}, "
        f"FID {words.number(fids[theirs])} against {words.number(fids[ours])}",
        "alignment 0.97 against 0.89",
        aligned[theirs] > aligned[ours] and fids[theirs] > fids[ours],
    )


def _dreambooth_loses(results: Results) -> Claim | None:
    aligned = {name: value for name, value in _numbers(results, "alignment", "alignment").items() if name in PAPER}
    if DREAMBOOTH not in aligned or len(aligned) < 2:
        return None
    here, lower = _against_rest(results, aligned, DREAMBOOTH, "{:.2f}".format)
    return Claim(
        "DreamBooth loses control: it follows the text worst of the paper's methods (Table 2).",
        "lowest alignment",
        here,
        "0.24; next: Custom Diffusion 0.74",
        lower,
    )


def _edges_similar(results: Results) -> Claim | None:
    found = {name: value for name, value in _numbers(results, "canny", "mae").items() if name in PAPER}
    if len(found) < 2:
        return None
    low, high = min(found.values()), max(found.values())
    return Claim(
        "All methods follow edges about equally well (Table 2).",
        f"spread of the edge difference at most {SIMILAR_DISCREPANCY:g}",
        f"{low:.3f} to {high:.3f}",
        "0.20 to 0.22",
        high - low <= SIMILAR_DISCREPANCY,
    )


def _parameters_help(results: Results) -> Claim | None:
    """Among the baselines, as in Appendix A."""
    fids = _numbers(results, "fid", "fid")
    known = [name for name in fids if name not in (PRIOR, OURS) and results.parameters(name) is not None]
    if len(known) < 3:
        return None
    here = rank_correlation([results.parameters(name) or 0 for name in known], [fids[name] for name in known])
    paper = [row for name, row in PAPER.items() if name != OURS]
    theirs = rank_correlation([row.parameter_count for row in paper], [row.fid_face for row in paper])
    return Claim(
        "Of the other methods, those that train more parameters have a lower FID (Appendix A).",
        "negative rank correlation (Spearman) of parameters and FID",
        f"{here:+.2f} over {len(known)} methods",
        f"{theirs:+.2f} over {len(paper)} methods (Face)",
        here < 0,
    )


def _plane(results: Results) -> Iterator[Claim]:
    """Fig. 8(a): each weight does its own work."""
    for sweep in results.sweeps:
        places = plane_axes(sweep)
        for axis, name, number, better, sign in (
            (places[0], "control", "alignment", "raises alignment", 1),
            (places[1], "concept", "fid", "lowers FID", -1),
        ):
            cells = [cell for cell in sweep.search if cell.get(number) is not None]
            if len({cell["weights"][axis] for cell in cells}) < 2:
                continue
            found = rank_correlation([cell["weights"][axis] for cell in cells], [cell[number] for cell in cells])
            yield Claim(
                f"More {name} weight {better} (Fig. 8(a)).",
                f"{'positive' if sign > 0 else 'negative'} rank correlation (Spearman) over the plane",
                f"{found:+.2f} over {len(cells)} pairs of weights",
                "shown, no number",
                found * sign > 0,
            )


def plane_axes(sweep: Sweep) -> tuple[int, int]:
    """Return the places of the control weight and the concept weight in a sweep's pairs: control is what reads text."""
    lists = [place for place, term in enumerate(sweep.recipe["terms"]) if isinstance(term["weight"], list)]
    prompted = [bool(sweep.recipe["terms"][place]["prompt"]) for place in lists]
    return (1, 0) if prompted == [False, True] else (0, 1)


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Return Spearman's rank correlation; 0 where one of the two is constant."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return float(spearmanr(one, other).statistic)


def _numbers(results: Results, task: str, name: str) -> dict[str, float]:
    """A number of every method in the paper's tables that has it."""
    every = {method: results.number(task, method, name) for method in results.of_group(METHODS)}
    return {method: value for method, value in every.items() if value is not None}


def _base(result: Result) -> str:
    return str(result.recipe["base"])


def _terms(result: Result) -> tuple[tuple[str, str, bool], ...]:
    return tuple(sorted((term["model"], term["prompt"], term["control"]) for term in result.recipe["terms"]))


def _text_terms(result: Result) -> int:
    return sum(bool(term["prompt"]) for term in result.recipe["terms"])
