"""Deltas that are carried on: when terms are evaluated, and what stands in for them where they are not."""

import math

import pytest
import torch
from comfyui_gcfg.gcfg.guidance_cache import CacheRule, DeltaCache, Member
from comfyui_gcfg.gcfg.steps import Steps
from comfyui_gcfg.testkit.checks import refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SIGMAS = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0]
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 2, 2)
A = Member("a", 5.0, CacheRule())
B = Member("b", 1.5, CacheRule(), apart=True)


def centre_at(sigma):
    """Any prediction of the base, far from a straight line."""
    return torch.sin(7 * X / sigma) + math.cos(sigma)


def straight(start, slope):
    """A delta that is a straight line in log sigma."""
    return lambda sigma: (start * X + slope * X.square() * math.log(sigma)) * sigma


DELTAS = {"a": straight(1.0, 0.3), "b": straight(-0.5, 0.2)}


def run(members, sigmas=SIGMAS[:-1], deltas=DELTAS, steps=SIGMAS, members_at=None, cache=None):
    """What was evaluated at each noise level, and the completed predictions there."""
    cache = cache or DeltaCache(Steps(steps))
    asked, found = [], []
    for sigma in sigmas:
        acting = members_at(sigma) if members_at else members
        truth = {"0": centre_at(sigma), **{m.key: centre_at(sigma) + deltas[m.key](sigma) for m in acting}}
        keys = cache.wanted("0", acting, sigma)
        got = {key: found for (key, _), (found, _) in cache.complete({key: truth[key] for key in keys}).items()}
        assert set(got) == set(truth)
        for key in keys:
            assert got[key] is truth[key], "an evaluated prediction is passed on untouched"
        asked.append("".join(sorted(keys)))
        found.append((got, truth))
    return asked, found


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, ["0ab"] * 7),
        (2, ["0ab", "0ab", "b", "0ab", "b", "0ab", "b"]),
        (3, ["0ab", "0ab", "b", "b", "0ab", "b", "b"]),
        (4, ["0ab", "0ab", "b", "b", "b", "0ab", "b"]),
        (100, ["0ab", "0ab", "b", "b", "b", "b", "b"]),
    ],
)
def test_every_so_many_steps(every, expected):
    """A line takes two points, so the first two steps are evaluated; then the heaviest term elsewhere stands alone."""
    rule = CacheRule(every=every)
    assert run([Member("a", 5.0, rule), Member("b", 1.5, rule, apart=True)])[0] == expected


def test_a_held_delta_takes_one_point():
    rule = CacheRule(every=3, linear=False)
    asked, found = run([Member("a", 5.0, rule)])
    assert asked == ["0a", "a", "a", "0a", "a", "a", "0a"]
    got, truth = found[2]
    torch.testing.assert_close(got["0"], truth["a"] - 2.0 * DELTAS["a"](8.0) / 8.0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("members", [[A], [A, B], [Member("a", -1.0, CacheRule()), Member("b", 0.3, CacheRule())]])
def test_what_is_a_line_in_log_sigma_is_carried_on_exactly(members):
    """From a term as the anchor and from the base: every prediction at every level is the true one."""
    asked, found = run(members)
    assert min(map(len, asked)) == 1
    for got, truth in found:
        for key in truth:
            torch.testing.assert_close(got[key], truth[key], rtol=1e-10, atol=1e-10)


def test_a_line_goes_no_further_than_its_points_lie_apart():
    """Two points at 8 and 4 reach down to 2; below that the delta is held."""
    curved = {"a": lambda sigma: X * math.log(sigma) ** 2 * sigma}
    _, found = run([Member("a", 5.0, CacheRule(every=100))], deltas=curved)
    (got_2, truth_2), (got_1, truth_1) = found[2], found[3]
    at = {sigma: X * math.log(sigma) ** 2 for sigma in (8.0, 4.0)}
    reached = 2 * at[4.0] - at[8.0]
    torch.testing.assert_close((truth_2["a"] - got_2["0"]) / 2.0, reached, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((truth_1["a"] - got_1["0"]) / 1.0, reached, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("members", "anchor"),
    [
        ([("a", 5.0, False), ("b", 1.5, False)], "a"),
        ([("a", 5.0, False), ("b", 1.5, True)], "b"),
        ([("a", 5.0, True), ("b", 1.5, True)], "a"),
        ([("a", 5.0, False), ("b", 0.5, True)], "a"),
        ([("a", -5.0, False), ("b", 0.4, True)], "0"),
    ],
)
def test_the_anchor_is_the_term_whose_own_error_counts_least(members, anchor):
    """|w - 1| < |w| only above 0.5; of those a term on another model, then the heaviest."""
    asked, _ = run([Member(key, weight, CacheRule(), apart=apart) for key, weight, apart in members])
    assert asked[2] == anchor


def test_a_term_without_a_rule_is_always_evaluated():
    asked, _ = run([A, Member("b", 1.5, None)])
    assert asked == ["0ab", "0ab", "0b", "0ab", "0b", "0ab", "0b"]


def test_outside_its_interval_a_term_is_always_evaluated():
    def members_at(sigma):
        return [Member("a", 5.0, CacheRule(every=100), inside=0.2 < sigma < 3.0)]

    assert run(None, members_at=members_at)[0] == ["0a", "0a", "a", "a", "a", "a", "0a"]


HEUN = [8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
MIDPOINTS = [8.0, 5.6, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.17, 0.125]


@pytest.mark.parametrize(
    ("sigmas", "expected"),
    [
        # Steps 1 2 2 3 3 4 4 5 5 6 6 7 7: of 2, 4 and 6 both evaluations.
        (HEUN, "0a 0a 0a a a 0a 0a a a 0a 0a a a"),
        # Steps 1 1 2 2 3 3 4 4 5 5 6 6 7.
        (MIDPOINTS, "0a 0a 0a 0a a a 0a 0a a a 0a 0a a"),
    ],
)
def test_a_step_counts_once_however_often_a_solver_evaluates_it(sigmas, expected):
    asked, found = run([A], sigmas=sigmas)
    assert asked == expected.split()
    for got, truth in found:
        torch.testing.assert_close(got["0"], truth["0"], rtol=1e-10, atol=1e-10)


def test_the_last_evaluation_of_a_step_counts():
    """Heun evaluates a level twice, at two latents: the line goes through the second's delta."""
    calls = iter([1.0, 2.0, 30.0, 0.0, 0.0])
    asked, found = run([A], sigmas=HEUN[:4], deltas={"a": lambda sigma: X * next(calls) * sigma})
    assert asked[3] == "a"
    got, truth = found[3]
    torch.testing.assert_close((truth["a"] - got["0"]) / 2.0, X * (30.0 + (30.0 - 1.0)), rtol=1e-10, atol=1e-10)


def test_noise_that_is_added_back_begins_anew():
    asked, _ = run([A], sigmas=[8.0, 4.0, 2.0, 8.0, 4.0, 2.0])
    assert asked == ["0a", "0a", "a", "0a", "0a", "a"]


def test_a_run_of_rising_noise():
    rising = [0.0625, *reversed(SIGMAS[:-1])]
    asked, _ = run([A], sigmas=rising[:-1], steps=rising)
    assert asked == ["0a", "0a", "a", "0a", "a", "0a", "a"]


def test_another_centre_begins_anew():
    """At the third step A would rest, were its delta measured from the same centre."""
    cache = DeltaCache(Steps(SIGMAS))
    run([A], sigmas=SIGMAS[:2], cache=cache)
    assert cache.wanted("b", [A], 2.0) == ["a", "b"]


def test_at_noise_level_zero_all_is_evaluated_and_nothing_kept():
    cache, rare = DeltaCache(Steps(SIGMAS)), Member("a", 5.0, CacheRule(every=100))
    run([rare], sigmas=SIGMAS[:2], cache=cache)
    assert sorted(cache.wanted("0", [rare], 0.0)) == ["0", "a"]
    got = cache.complete({"0": X, "a": 2 * X})
    assert got["a", None][0].equal(2 * X)


def test_two_runs_share_nothing():
    first, second = DeltaCache(Steps(SIGMAS)), DeltaCache(Steps(SIGMAS))
    run([A], cache=first)
    assert run([A], cache=second)[0][0] == "0a"


# Deltas by step, as multiples of X; |change| / |last| is then by hand.
SIZES = {8.0: 1.0, 4.0: 2.0, 2.0: 2.1, 1.0: 2.1, 0.5: 2.1, 0.25: 4.0, 0.125: 4.0}


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.0, ["0a"] * 7),
        # After 8 and 4 the change is 1/2 a level: 0.5 predicted at 2. Then 0.1/2.1 = 0.048 at 1, 0.095 at 0.5, 0.14 ...
        (0.1, ["0a", "0a", "0a", "a", "a", "0a", "0a"]),
        # Half a level's change is below 0.6, twice that is not.
        (0.6, ["0a", "0a", "a", "0a", "a", "a", "a"]),
        (10.0, ["0a", "0a", "a", "a", "a", "a", "a"]),
    ],
)
def test_by_predicted_change(threshold, expected):
    deltas = {"a": lambda sigma: X * SIZES[sigma] * sigma}
    asked, _ = run([Member("a", 5.0, CacheRule(every=None, threshold=threshold))], deltas=deltas)
    assert asked == expected


def test_the_sample_that_changes_most_decides():
    """The first sample of the batch stands still."""

    def delta(sigma):
        return torch.cat([X[:1], X[1:] * SIZES[sigma]]) * sigma

    rule = CacheRule(every=None, threshold=0.1)
    assert run([Member("a", 5.0, rule)], deltas={"a": delta})[0] == ["0a", "0a", "0a", "a", "a", "0a", "0a"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_delta_that_is_no_number_is_not_carried_on(bad):
    rule = CacheRule(every=None, threshold=0.5)
    asked, _ = run([Member("a", 5.0, rule)], deltas={"a": lambda sigma: X * 0 + bad})
    assert asked == ["0a"] * 7


def turning(angle):
    """A delta that turns by `angle` from level to level."""

    across = torch.ones_like(X)
    across[..., 1] = -1.0  # at a right angle to ones, in every sample

    def delta(sigma):
        turned = math.log2(8.0 / sigma) * angle
        return (math.cos(turned) + math.sin(turned) * across) * sigma

    return delta


@pytest.mark.parametrize(
    ("align", "expected"),
    [
        # The cosine of 0.1 rad is 0.995; the next is measured over two levels, 0.98.
        (0.97, ["0ab", "0ab", "ab", "0ab", "ab", "0ab", "ab"]),
        (0.99, ["0ab", "0ab", "ab", "0ab", "0ab", "ab", "0ab"]),
        (0.999, ["0ab"] * 7),
        (1.0, ["0ab"] * 7),
    ],
)
def test_the_centre_rests_where_deltas_keep_their_direction(align, expected):
    rule = CacheRule(every=1, align=align)
    members = [Member("a", 5.0, rule), Member("b", 1.5, rule, apart=True)]
    assert run(members, deltas={"a": turning(0.1), "b": turning(0.01)})[0] == expected


def test_one_term_that_turns_keeps_the_centre():
    rule = CacheRule(every=1, align=0.97)
    members = [Member("a", 5.0, rule), Member("b", 1.5, rule)]
    assert run(members, deltas={"a": turning(0.1), "b": turning(0.5)})[0] == ["0ab"] * 7


def test_one_sample_that_turns_keeps_the_centre():
    def delta(sigma):
        return torch.cat([turning(0.01)(sigma)[:1], turning(0.5)(sigma)[1:]])

    assert run([Member("a", 5.0, CacheRule(every=1, align=0.9))], deltas={"a": delta})[0] == ["0a"] * 7


def test_the_centre_rests_inside_the_interval_only():
    def members_at(sigma):
        return [Member("a", 5.0, CacheRule(every=1, align=-1.0), inside=sigma > 0.7)]

    assert run(None, members_at=members_at)[0] == ["0a", "0a", "a", "0a", "0a", "0a", "0a"]


def test_a_term_that_begins_keeps_the_centre():
    rule = CacheRule(every=1, align=-1.0)

    def members_at(sigma):
        return [Member("a", 5.0, rule), *([Member("b", 1.5, rule)] if sigma < 3.0 else [])]

    assert run(None, members_at=members_at)[0] == ["0a", "0a", "0ab", "0ab", "ab", "0ab", "ab"]


def test_where_the_centre_rests_the_others_follow_from_a_term_that_is_due():
    """The better anchor, on another model, is not evaluated for that alone."""
    members = [
        Member("a", 5.0, CacheRule(every=1, align=-1.0)),
        Member("b", 1.5, CacheRule(every=100, align=-1.0), apart=True),
    ]
    assert run(members)[0] == ["0ab", "0ab", "a", "0a", "a", "0a", "a"]


def test_nothing_is_measured_against_a_centre_that_is_not_evaluated():
    """What follows from an estimate must not feed the next one: only the anchor's line decides, and it is exact."""
    rule = CacheRule(every=1, align=-1.0)
    _, found = run([Member("a", 5.0, rule), Member("b", 1.5, rule)])
    for got, truth in found:
        torch.testing.assert_close(got["0"], truth["0"], rtol=1e-10, atol=1e-10)


def test_without_terms_the_centre_is_evaluated():
    assert run([])[0] == ["0"] * 7


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.lists(st.floats(0.01, 20.0), min_size=1, max_size=12), st.booleans())
def test_every_step_means_every_step(levels, linear):
    """Whatever a solver asks for, in whatever order: k = 1 and threshold 0 leave nothing out."""
    for rule in (CacheRule(every=1, linear=linear), CacheRule(every=None, threshold=0.0, linear=linear)):
        asked, _ = run([Member("a", 5.0, rule), Member("b", 0.1, rule)], sigmas=levels)
        assert asked == ["0ab"] * len(levels)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"every": 0}, "Guidance Cache: every is 0, expected at least 1 (each step); correct it."),
        ({"every": None}, "Guidance Cache: neither every nor threshold is given, expected one of them; give one."),
        ({"threshold": -0.1}, "Guidance Cache: threshold is -0.1, expected 0 or more; correct it."),
        ({"threshold": math.nan}, "Guidance Cache: threshold is nan, expected 0 or more; correct it."),
        ({"align": 1.5}, "Guidance Cache: align is 1.5, expected -1 to 1 (never); correct it."),
        (
            {"start_percent": 0.6, "end_percent": 0.4},
            "Guidance Cache: start_percent is 0.6 and end_percent is 0.4, expected 0 <= start_percent <= end_percent "
            "<= 1; correct them.",
        ),
    ],
)
def test_bad_values(values, error):
    assert refusal(CacheRule, **values) == error
