"""Verdicts on results of which one knows what is true, both ways."""

import pytest
from comfyui_gcfg.evaluation.results import Results
from comfyui_gcfg.reproduction.paper.claims import claims, rank_correlation


@pytest.fixture
def verdicts(stored):
    """Verdict and numbers of the claims whose statement begins so."""

    def say(start, index=0):
        found = [claim for claim in claims(Results(stored)) if claim.statement.startswith(start)]
        return found[index].holds, found[index].here

    return say


CONTROLLABLE = "Ours has the lowest FID of unconditional images among the methods that keep control"
GUIDED = "Ours has the lowest FID of text-guided images among the methods that keep control"


def test_ours_is_compared_with_those_that_keep_control(verdicts, find):
    assert verdicts(CONTROLLABLE) == (True, "12.35; next: OFT 40.00")
    find("fid", "dreambooth")["numbers"]["fid"] = 1.0  # better, but it has lost control
    assert verdicts(CONTROLLABLE) == (True, "12.35; next: OFT 40.00")
    find("alignment", "dreambooth")["numbers"]["alignment"] = 0.85  # now it has not
    assert verdicts(CONTROLLABLE) == (False, "12.35; next: DreamBooth 1.00")
    assert verdicts(GUIDED) == (True, "14.00; next: DreamBooth 21.00")


def test_ours_must_keep_control_itself(verdicts, find):
    find("alignment", "ours")["numbers"]["alignment"] = 0.84
    assert verdicts(CONTROLLABLE) == (False, "ours keeps 0.84, the prior 0.95")
    assert verdicts(GUIDED)[0] is False


def test_an_ablation_is_no_rival(verdicts, find):
    find("fid", "rectified")["numbers"]["fid"] = 1.0
    assert verdicts(CONTROLLABLE)[0] is True


@pytest.mark.parametrize(("task", "method"), [("fid", "ours"), ("alignment", "prior"), ("alignment", "ours")])
def test_what_was_not_measured_has_no_verdict(stored, find, verdicts, task, method):
    stored.remove(find(task, method))
    assert verdicts(CONTROLLABLE) == (None, "-")


def test_drift_compares_equal_terms_around_two_models(stored, find, verdicts):
    start = "The prior as unconditional model gives a lower FID"
    pairs = [claim for claim in claims(Results(stored)) if claim.statement.startswith(start)]
    assert [(claim.holds, claim.here) for claim in pairs] == [
        (False, "DreamBooth around the prior 25.00; DreamBooth 20.00"),
        (True, "Ours 14.00; Ours around the concept model 30.00"),
    ]
    # A result of the ablation itself, at equal weights, stands in for the tables' one.
    stored.append({**find("alignment", "ours"), "method": "fixed", "title": "Equal", "group": "drift"})
    stored[-1]["config"] = {"methods": {**stored[-1]["config"]["methods"], "fixed": {}}}
    again = [claim.here for claim in claims(Results(stored)) if claim.statement.startswith(start)]
    assert again == [pairs[0].here, "Equal 14.00; Ours around the concept model 30.00"]
    stored.pop()
    find("alignment", "drifted")["numbers"]["fid"] = 13.0
    assert verdicts(start, 1)[0] is False
    for each in (find("alignment", "drifted"), find("fid", "rectified")):
        stored.remove(each)
    assert verdicts("The fixed unconditional model") == (None, "-")


def test_decoupling_compares_several_prompts_with_one(stored, find, verdicts):
    assert verdicts("Decoupled prompts raise diversity") == (True, "two prompts 5.50; joint prompt 4.00")
    find("diversity", "apart")["numbers"]["diversity"] = 4.0
    assert verdicts("Decoupled prompts raise diversity")[0] is False
    stored.remove(find("diversity", "joint"))
    assert verdicts("Decoupled prompts raise diversity")[0] is None


def test_the_papers_tables_are_tested(stored, find, verdicts):
    assert verdicts("Ours has the lowest FID of all") == (True, "12.35; next: DreamBooth 20.00")
    assert verdicts("Textual Inversion follows the text better") == (
        True,
        "alignment 0.93 against 0.90, FID 72.00 against 14.00",
    )
    assert verdicts("DreamBooth loses control") == (True, "0.30; next: OFT 0.88")
    assert verdicts("All methods follow edges") == (True, "0.055 to 0.060")
    find("fid", "dreambooth")["numbers"]["fid"] = 12.0
    find("alignment", "textual_inversion")["numbers"]["alignment"] = 0.89
    find("alignment", "oft")["numbers"]["alignment"] = 0.29
    find("canny", "dreambooth")["numbers"]["mae"] = 0.08
    for start in ("Ours has the lowest FID of all", "Textual", "DreamBooth loses", "All methods follow edges"):
        assert verdicts(start)[0] is False


def test_parameters_are_ranked_against_fid_among_the_others(find, verdicts, stored):
    start = "Of the other methods, those that train more parameters"
    assert verdicts(start) == (True, "-1.00 over 3 methods")
    (claim,) = [claim for claim in claims(Results(stored)) if claim.statement.startswith(start)]
    # <1K: 70.62, 23M: 27.50, 44M: 40.98, 859M: 12.37; one pair of four is out of order: 1 - 6 * 2 / 60 = 0.8
    assert claim.paper == "-0.80 over 4 methods (Face)"
    find("fid", "textual_inversion")["numbers"]["fid"] = 10.0
    assert verdicts(start)[0] is False


def test_each_weight_of_the_plane_does_its_own_work(stored, verdicts):
    assert verdicts("More control weight raises alignment")[0] is True
    assert verdicts("More concept weight lowers FID")[0] is True
    for cell in stored[-1]["search"]:
        cell["fid"], cell["alignment"] = -cell["fid"], -cell["alignment"]
    assert verdicts("More control weight raises alignment")[0] is False
    assert verdicts("More concept weight lowers FID")[0] is False


def test_the_control_weight_is_that_of_the_term_that_reads_text(stored, verdicts):
    """The same plane with the two terms the other way round."""
    sweep = stored[-1]
    sweep["recipe"]["terms"].reverse()
    for cell in sweep["search"]:
        cell["weights"].reverse()
    assert verdicts("More control weight raises alignment")[0] is True
    assert verdicts("More concept weight lowers FID")[0] is True


def test_a_constant_has_no_rank_correlation():
    assert rank_correlation([1, 2, 3], [5, 5, 5]) == 0
    assert rank_correlation([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)


def test_the_three_expectations_come_first(stored):
    statements = [claim.statement for claim in claims(Results(stored))]
    assert statements[:2] == [f"{CONTROLLABLE}.", f"{GUIDED}."]
    assert statements[4].startswith("Decoupled prompts")
    assert len(statements) == 12
