"""Weight curves: their values, how they are typed, and what a plan makes of them."""

import math

import pytest
import torch
from comfyui_gcfg.gcfg.curves import CONSTANT, CURVES, WeightCurve, make_curve, parse_points, percent_at
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.plan import GuidancePlan
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

NAN, INF = float("nan"), float("inf")


def eps_schedule():
    """SD1.5's 1000 noise levels in ComfyUI's convention, written again in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    products = torch.cumprod(1 - betas, dim=0)
    logs = ((1 - products) / products).sqrt().log()

    def percent_to_sigma(percent):
        if percent <= 0.0:
            return 999999999.9
        if percent >= 1.0:
            return 0.0
        at = (1.0 - percent) * 999
        low = min(int(at), 998)
        return math.exp(float(logs[low] + (logs[low + 1] - logs[low]) * (at - low)))

    return percent_to_sigma


def flow_schedule(shift=3.0):
    """A flow model's, shifted as SD3's."""

    def percent_to_sigma(percent):
        t = 1.0 - percent
        return shift * t / (1 + (shift - 1) * t)

    return percent_to_sigma


SCHEDULES = {"eps": eps_schedule(), "flow": flow_schedule()}


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (CONSTANT, [8.0, 8.0, 8.0, 8.0, 8.0]),
        (WeightCurve("linear", 2.0), [8.0, 6.5, 5.0, 3.5, 2.0]),
        # (1 - cos(pi t)) / 2 at t = 0, 1/4, 1/2, 3/4, 1
        (WeightCurve("cosine", 2.0), [8.0, 8 - 6 * 0.14644660940672624, 5.0, 8 - 6 * 0.8535533905932737, 2.0]),
        (WeightCurve("points", points=((0.3, 4.0), (0.5, 0.0), (0.9, -2.0))), [4.0, 2.0, 0.0, -0.5, -1.0]),
    ],
    ids=CURVES,
)
def test_values_between_start_and_end(curve, expected):
    """A term of weight 8 from 0.3 to 0.7, looked at in steps of a tenth."""
    term = GuidanceTerm(8.0, 0.3, 0.7, curve=curve)
    got = [term.weight_at(percent) for percent in (0.3, 0.4, 0.5, 0.6, 0.7 - 1e-15)]
    assert got == pytest.approx(expected, abs=1e-12)
    assert term.weight_at(0.29) == term.weight_at(0.7) == 0.0


def test_points_are_level_outside_their_own_range():
    curve = WeightCurve("points", points=((0.2, 3.0), (0.4, 5.0)))
    assert [curve.at(p, 99.0, 0.0, 1.0) for p in (0.0, 0.2, 0.25, 0.4, 1.0)] == pytest.approx([3.0, 3.0, 3.5, 5.0, 5.0])
    one = WeightCurve("points", points=((0.5, 2.5),))
    assert [one.at(p, 99.0, 0.0, 1.0) for p in (0.0, 0.5, 1.0)] == [2.5, 2.5, 2.5]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_an_interval_of_one_point_holds_nothing_but_at_the_end(kind):
    assert GuidanceTerm(3.0, 0.5, 0.5, curve=WeightCurve(kind, 9.0)).weight_at(0.5) == 0.0
    assert GuidanceTerm(3.0, 1.0, 1.0, curve=WeightCurve(kind, 9.0)).weight_at(1.0) == 3.0


@pytest.mark.parametrize(
    ("weight", "curve", "pulls"),
    [
        (0.0, CONSTANT, False),
        (-1.0, CONSTANT, True),
        (0.0, WeightCurve("linear", 0.0), False),
        (0.0, WeightCurve("linear", 2.0), True),
        (2.0, WeightCurve("cosine", 0.0), True),
        (5.0, WeightCurve("points", points=((0.0, 0.0), (1.0, 0.0))), False),
        (0.0, WeightCurve("points", points=((0.0, 0.0), (1.0, 1.0))), True),
    ],
)
def test_pulls(weight, curve, pulls):
    assert GuidanceTerm(weight, curve=curve).pulls is pulls


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_percent_at_is_the_inverse(schedule):
    percent_to_sigma = SCHEDULES[schedule]
    percents = [number / 997 for number in range(1, 997)]
    assert [percent_at(percent_to_sigma(p), percent_to_sigma) for p in percents] == pytest.approx(percents, abs=1.2e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_percent_at_the_ends(schedule):
    """A schedule's own largest sigma is the start (the convention for 0 % is larger still), and 0 is the end."""
    percent_to_sigma = SCHEDULES[schedule]
    assert percent_at(percent_to_sigma(1e-12), percent_to_sigma) == pytest.approx(0.0, abs=1e-7)
    assert percent_at(0.0, percent_to_sigma) == 1.0


def test_points_are_read():
    assert parse_points("0: 7.5, 0.5: 3, 100%: 0", "Guidance Term") == ((0.0, 7.5), (0.5, 3.0), (1.0, 0.0))
    assert parse_points(" 10 % :1e0\n\n20%:-2,", "Guidance Term") == ((0.1, 1.0), (0.2, -2.0))


PAIRS = "percent: weight, such as 0.5: 3; correct it."
EMPTY = "points is empty, expected percent: weight pairs, such as 0: 7.5, 1: 0; add some."
IN_RANGE = "expected a number from -100 to 100; type one, such as 1.5."
PERCENT = "a percent from 0 to 1 (or 0% to 100%); correct it."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", EMPTY),
        (" , \n", EMPTY),
        ("0.5", f"points: pair 1 is '0.5', expected {PAIRS}"),
        ("0: 1, : 3", f"points: pair 2 is ': 3', expected {PAIRS}"),
        ("0: 1, 0.5: x", f"points: pair 2 is '0.5: x', expected {PAIRS}"),
        ("0: nan", f"points: pair 1 is '0: nan', expected {PAIRS}"),
        ("0: 1, 1: 1e308", f"points: the weight of pair 2 is 1e+308, {IN_RANGE}"),
        ("0: -100.1", f"points: the weight of pair 1 is -100.1, {IN_RANGE}"),
        (
            ",".join(f"{n / 200}: 1" for n in range(101)),
            "points has more than 100 pairs, expected fewer; take some out.",
        ),
        ("0: 0." + "1" * 5000, f"points: pair 1 is '0: 0.{'1' * 34}…', expected {PAIRS}"),
        ("0: 1\ud83d\x1b", rf"points: pair 1 is '0: 1\ud83d\x1b', expected {PAIRS}"),
        ("0: 1: 2", f"points: pair 1 is '0: 1: 2', expected {PAIRS}"),
        ("inf: 2", f"points: pair 1 is 'inf: 2', expected {PAIRS}"),
        ("0: 1, 50: 3", f"points: pair 2 is '50: 3', expected {PERCENT}"),
        ("-1%: 3", f"points: pair 1 is '-1%: 3', expected {PERCENT}"),
        ("0.5: 1, 0.5: 2", "points: pair 2 is '0.5: 2', expected a percent above 0.5; sort the pairs."),
        ("60%: 1, 0.5: 2", "points: pair 2 is '0.5: 2', expected a percent above 0.6; sort the pairs."),
    ],
)
def test_points_that_cannot_be_read(text, message):
    assert refusal(make_curve, "points", 0.0, text, "Guidance Term 'style'") == f"Guidance Term 'style': {message}"


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from([*"0123456789.:,-+e_% \n", "nan", "inf", "1e400", "0: 1"])).map("".join))
def test_any_points_are_read_or_refused(text):
    try:
        points = parse_points(text, "Guidance Term")
    except GuidanceError:
        return
    percents = [percent for percent, _ in points]
    assert percents == sorted(set(percents))
    assert all(0.0 <= percent <= 1.0 and abs(weight) <= 100.0 for percent, weight in points)


def test_curve_of_the_widgets():
    assert make_curve("constant", NAN, "nonsense", "x") == CONSTANT, "what a kind does not use is not looked at"
    assert make_curve("linear", 2.0, "nonsense", "x") == WeightCurve("linear", 2.0)
    assert make_curve("points", NAN, "0: 1", "x") == WeightCurve("points", points=((0.0, 1.0),))


@pytest.mark.parametrize(
    ("kind", "end", "message"),
    [
        ("spline", 0.0, "curve is 'spline', expected one of constant, linear, cosine, points; choose one."),
        ("linear", NAN, f"end_weight is nan, {IN_RANGE}"),
        ("cosine", -INF, f"end_weight is -inf, {IN_RANGE}"),
        ("linear", 100.5, f"end_weight is 100.5, {IN_RANGE}"),
    ],
)
def test_curve_that_cannot_be_made(kind, end, message):
    assert refusal(make_curve, kind, end, "", "Guidance Term") == f"Guidance Term: {message}"


# --- in a plan ---

LINEAR = GuidanceTerm(8.0, label="linear", curve=WeightCurve("linear", 0.0))


def plan(*terms, schedule="flow"):
    return GuidancePlan.schedule(terms, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["linear", "cosine", "points"])
def test_active_weights_are_those_at_the_sigmas_percent(schedule, kind):
    term = GuidanceTerm(8.0, 0.2, 0.7, curve=WeightCurve(kind, -3.0, ((0.0, 1.0), (0.5, 6.0), (1.0, 2.0))))
    for percent in (0.1, 0.21, 0.35, 0.5, 0.69, 0.8):
        expected = term.weight_at(percent)
        active = plan(term, schedule=schedule).active(SCHEDULES[schedule](percent))
        assert [a.weight for a in active] == pytest.approx([expected] if expected else [], abs=1e-5)


def test_only_what_changes_needs_sigma():
    assert not plan(GuidanceTerm(2.0), GuidanceTerm(-1.0, curve=CONSTANT)).needs_sigma
    assert plan(GuidanceTerm(2.0), LINEAR).needs_sigma
    assert plan(GuidanceTerm(2.0, end_percent=0.9)).needs_sigma


def test_a_weight_that_falls_to_zero_is_not_active_there():
    scheduled = plan(LINEAR, GuidanceTerm(1.0, label="level"))
    assert [a.label for a in scheduled.active(0.0)] == ["level"]
    assert [a.label for a in scheduled.active(0.1)] == ["linear", "level"]
    assert [a.index for a in scheduled.active(0.0)] == [1]


def test_used_and_idle_follow_the_curve_and_the_interval():
    silent = GuidanceTerm(5.0, label="silent", curve=WeightCurve("points", points=((0.0, 0.0),)))
    rises = GuidanceTerm(0.0, 0.5, 1.0, label="rises", curve=WeightCurve("linear", 3.0))
    late = GuidanceTerm(1.0, label="late", curve=WeightCurve("points", points=((0.8, 0.0), (1.0, 4.0))))
    scheduled = plan(silent, rises, late, LINEAR)
    percents = lambda *ps: [SCHEDULES["flow"](p) for p in ps]  # noqa: E731
    assert scheduled.used(percents(0.0, 0.3, 0.6, 1.0)) == (1, 2, 3)
    assert scheduled.used(percents(0.0, 0.3)) == (2, 3), "rises begins after this run"
    assert [term.label for term in scheduled.idle(percents(0.0, 0.3, 0.6))] == ["late"], "it is 0 at each of these"
    assert [term.label for term in scheduled.idle(percents(0.9))] == []


def test_a_sigma_is_inverted_once_for_all_terms_and_evaluations():
    asked = []

    def counting(percent):
        asked.append(percent)
        return SCHEDULES["flow"](percent)

    scheduled = GuidancePlan.schedule([LINEAR, LINEAR, LINEAR], counting)
    asked.clear()
    scheduled.active(0.5)
    once = len(asked)
    scheduled.active(0.5)
    assert 0 < once == len(asked)
