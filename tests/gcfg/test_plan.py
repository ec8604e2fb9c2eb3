"""Which terms act, and whether the unconditional prediction is needed."""

import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.plan import GuidancePlan, needs_base
from comfyui_gcfg.gcfg.terms import GuidanceTerm


def percent_to_sigma(percent):
    """ComfyUI's convention on a made-up schedule."""
    return {0.0: 999999999.9, 1.0: 0.0}.get(percent, 10.0 * (1 - percent))


def plan(*terms):
    return GuidancePlan.schedule(terms, percent_to_sigma)


def acting(scheduled, sigma):
    return [(term.label, term.weight) for term in scheduled.active(sigma)]


def test_interval_includes_both_ends():
    scheduled = plan(GuidanceTerm(2.0, 0.2, 0.6, label="a"))
    assert scheduled.needs_sigma
    assert [bool(acting(scheduled, sigma)) for sigma in (8.01, 8.0, 5.0, 4.0, 3.99)] == [False, True, True, True, False]


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
    assert needs_base(plan(*terms).active(5.0)) is needed


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
