"""Which terms act, and whether the unconditional prediction is needed."""

import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.guidance_cache import CacheRule
from comfyui_gcfg.gcfg.plan import GuidancePlan, needs_base
from comfyui_gcfg.gcfg.terms import GuidanceTerm


def percent_to_sigma(percent):
    """ComfyUI's convention on a made-up schedule."""
    return {0.0: 999999999.9, 1.0: 0.0}.get(percent, 10.0 * (1 - percent))


def plan(*terms):
    return GuidancePlan.schedule(terms, percent_to_sigma)


def acting(scheduled, sigma):
    return [(term.label, term.weight) for term in scheduled.active(sigma)]


def test_interval_ends_before_its_end():
    scheduled = plan(GuidanceTerm(2.0, 0.2, 0.6, label="a"))
    assert scheduled.needs_sigma
    assert [bool(acting(scheduled, s)) for s in (8.01, 8.0, 5.0, 4.01, 4.0)] == [False, True, True, True, False]


def test_interval_to_the_end_includes_it():
    scheduled = plan(GuidanceTerm(2.0, 0.6, 1.0, label="a"))
    assert [bool(acting(scheduled, s)) for s in (4.01, 4.0, 1e-9, 0.0)] == [False, True, True, True]


def test_of_neighbours_exactly_one_acts_at_every_noise_level():
    scheduled = plan(*(GuidanceTerm(4.0, a, b, label=f"{a}") for a, b in ((0.0, 0.2), (0.2, 0.6), (0.6, 1.0))))
    at = {sigma: [label for label, _ in acting(scheduled, sigma)] for sigma in (10.0, 8.0, 6.0, 4.0, 2.0, 0.0)}
    assert at == {10.0: ["0.0"], 8.0: ["0.2"], 6.0: ["0.2"], 4.0: ["0.6"], 2.0: ["0.6"], 0.0: ["0.6"]}
    weights = [sum(term.term.weight_at(p / 10) for term in scheduled.terms) for p in range(11)]
    assert weights == [4.0] * 11


def test_an_interval_that_ends_where_it_begins_never_acts():
    scheduled = plan(GuidanceTerm(2.0, 0.6, 0.6, label="a"))
    assert not acting(scheduled, 4.0)
    assert [term.label for term in scheduled.idle([10.0, 4.0])] == ["a"]


def test_a_model_is_not_loaded_for_the_step_at_which_its_term_ends():
    scheduled = plan(GuidanceTerm(2.0, 0.0, 0.6), GuidanceTerm(2.0, 0.6, 1.0), GuidanceTerm(1.0, 0.6, 0.6))
    assert scheduled.used([4.0, 2.0, 0.0]) == (1,)
    assert scheduled.used([0.0]) == (1,)


def test_deltas_are_not_carried_on_at_the_end_of_the_cache():
    (term,) = plan(GuidanceTerm(2.0, cache_rule=CacheRule(2, start_percent=0.2, end_percent=0.6))).terms
    assert [term.caches_at(s) for s in (8.01, 8.0, 4.01, 4.0)] == [False, True, True, False]
    (whole,) = plan(GuidanceTerm(2.0, cache_rule=CacheRule(2))).terms
    assert whole.caches_at(0.0)


def test_whole_interval_needs_no_sigma():
    scheduled = plan(GuidanceTerm(2.0), GuidanceTerm(-1.0))
    assert not scheduled.needs_sigma
    assert acting(scheduled, float("nan")) == [("1", 2.0), ("2", -1.0)]


def test_zero_weight_never_acts():
    scheduled = plan(GuidanceTerm(0.0, label="off"), GuidanceTerm(1.0))
    assert acting(scheduled, 5.0) == [("2", 1.0)]
    assert scheduled.used([10.0, 5.0]) == (1,)
    assert scheduled.idle([10.0, 5.0]) == ()


@pytest.mark.parametrize(
    ("weights", "mask", "needed"),
    [
        ([7.5], None, True),
        ([1.0], None, False),
        ([7.5, -6.5], None, False),
        ([7.3, 1 - 7.3], None, False),
        ([0.1, 0.2, 0.7], None, False),
        ([3.0, -3.0], None, True),
        ([1.0], torch.ones(1, 2, 2), True),
        ([], None, True),
    ],
)
def test_base_is_skipped_where_its_coefficient_is_zero(weights, mask, needed):
    terms = [GuidanceTerm(w, mask=mask) for w in weights] or [GuidanceTerm(0.0)]
    assert needs_base(plan(*terms).fitted([(1, 4, 2, 2)]).active(5.0)) is needed


def test_used_counts_solvers_that_evaluate_between_steps():
    between = plan(GuidanceTerm(1.0, 0.41, 0.44))  # sigma 5.9 to 5.6, no step there
    assert between.used([10.0, 6.0, 5.0]) == (0,)
    assert [term.label for term in between.idle([10.0, 6.0, 5.0])] == ["1"]
    assert between.used([10.0, 6.0]) == ()
    assert between.used([5.0, 1.0]) == ()


def test_no_term_is_refused():
    with pytest.raises(GuidanceError, match="no term"):
        plan()


def test_terms_are_frozen():
    with pytest.raises(AttributeError):
        GuidanceTerm(1.0).weight = 2.0
