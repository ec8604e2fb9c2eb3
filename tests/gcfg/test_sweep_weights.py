"""Which cells a weight sweep has, and how its lists are typed."""

import math
from fractions import Fraction

import pytest
from comfyui_gcfg.gcfg.curves import WeightCurve
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.sweep_weights import MAX_CELLS, SweptTerm, cell_terms, find_swept, parse_weights
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

NAME = "Weight Sweep: weights_1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.5", [1.5]),
        ("0, 1.5, 3", [0.0, 1.5, 3.0]),
        ("3,\n-1\n, 2e-1,", [3.0, -1.0, 0.2]),
        ("0:2:0.25", [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]),
        ("2:0:-1", [2.0, 1.0, 0.0]),
        ("0:1:0.4", [0.0, 0.4, 0.8]),
        ("1:1:5", [1.0]),
        ("7, 0:1:0.5, -2", [7.0, 0.0, 0.5, 1.0, -2.0]),
        ("-0.3:0.3:0.1", [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]),
    ],
)
def test_weights_are_read_exactly(text, expected):
    assert parse_weights(text, NAME) == tuple(expected)


@pytest.mark.parametrize("step", ["0.1", "0.05", "0.3", "0.7", "0.01"])
def test_a_range_holds_the_decimals_that_are_written(step):
    """Against exact fractions: 0.1 added up is 0.30000000000000004, but a user who writes 0.1 means 0.3."""
    count = int(Fraction(3) / Fraction(step))
    expected = tuple(float(number * Fraction(step)) for number in range(count + 1))
    assert parse_weights(f"0:3:{step}", NAME) == expected


@pytest.mark.parametrize("text", ["", "  ", ",", "\n,\n"])
def test_an_empty_list(text):
    assert refusal(parse_weights, text, NAME) == (
        "Weight Sweep: weights_1 is empty, expected weights such as 0, 1.5, 3 or a range such as 0:2:0.25; add some."
    )


@pytest.mark.parametrize("part", ["x", "1.5.2", "1 2", "0:2", "0:1:2:3", "nan", "-inf", "0:inf:1", "1:", ":::", "1;2"])
def test_what_is_neither_number_nor_range(part):
    assert refusal(parse_weights, f"1, {part}", NAME) == (
        f"Weight Sweep: weights_1: '{part}', expected a number such as 1.5, or a range such as 0:2:0.25; correct it."
    )


@pytest.mark.parametrize("part", ["0:2:-1", "2:0:0.5", "0:2:0"])
def test_a_step_that_does_not_lead_to_the_end(part):
    assert refusal(parse_weights, part, NAME) == (
        f"Weight Sweep: weights_1: '{part}', expected start:stop:step with a step that leads from start to stop; "
        f"correct it."
    )


@pytest.mark.parametrize("part", ["0:1:1e-12", "-100:100:1e-320", "0:40.1:0.1"])
def test_a_range_of_too_many_weights(part):
    assert refusal(parse_weights, part, NAME) == (
        f"Weight Sweep: weights_1: '{part}' is more than 400 weights, expected fewer; take a larger step."
    )


def test_a_list_of_too_many_weights():
    assert refusal(parse_weights, "1," * 401, NAME) == (
        "Weight Sweep: weights_1 has more than 400 weights, expected fewer; take some out."
    )


@pytest.mark.parametrize(("part", "found"), [("100.5", 100.5), ("-1e308", -1e308), ("0:1e39:1e38", 1e39)])
def test_weights_out_of_range(part, found):
    assert refusal(parse_weights, f"1, {part}", NAME) == (
        f"Weight Sweep: weights_1: a weight of '{part}' is {found}, expected a number from -100 to 100; type "
        "one, such as 1.5."
    )


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from([*"0123456789.:,-+e_ ", "nan", "inf", "1e400", "0.1"])).map("".join))
def test_any_list_is_read_or_refusal(text):
    try:
        weights = parse_weights(text, NAME)
    except GuidanceError:
        return
    assert weights
    assert all(map(math.isfinite, weights))


def terms(*labels):
    return tuple(GuidanceTerm(float(place), label=label) for place, label in enumerate(labels, start=1))


def test_a_term_is_found_by_label_or_place():
    named = terms("prior", "", "concept")
    assert find_swept(named, "concept", "x") == 2
    assert find_swept(named, " prior ", "x") == 0
    assert find_swept(named, "2", "x") == 1


def test_a_label_that_no_term_has():
    for wrong in ("style", "", "1", "Concept"):
        assert refusal(find_swept, terms("prior", "", "concept"), wrong, "Weight Sweep: label_2") == (
            f"Weight Sweep: label_2 is '{wrong}', and no connected term has that label, expected exactly one of "
            f"'prior', '2', 'concept'; correct it."
        )


def test_a_label_of_two_terms():
    assert refusal(find_swept, terms("a", "a", "b"), "a", "Weight Sweep: label_1") == (
        "Weight Sweep: label_1 is 'a', and 2 connected terms have that label, expected exactly one of 'a', 'a', 'b'; "
        "give each Guidance Term its own label."
    )


def test_a_term_on_points_has_no_weight_to_replace():
    points = GuidanceTerm(1.0, label="a", curve=WeightCurve("points", points=((0.0, 1.0),)))
    assert refusal(find_swept, [points], "a", "Weight Sweep: label_1") == (
        "Weight Sweep: label_1 is 'a', whose weight follows a list of points, expected a constant, linear or cosine "
        "curve whose weight can be replaced; choose another curve there."
    )
    linear = GuidanceTerm(1.0, label="a", curve=WeightCurve("linear", 2.0))
    assert find_swept([linear], "a", "Weight Sweep: label_1") == 0


def test_cells_go_along_the_rows_of_the_first_term():
    swept = [SweptTerm(2, "c", (1.0, 2.0, 3.0)), SweptTerm(0, "a", (10.0, 20.0))]
    cells = cell_terms(terms("a", "b", "c"), swept)
    assert [[term.weight for term in cell] for cell in cells] == [
        [row, 2.0, column] for row in (10.0, 20.0) for column in (1.0, 2.0, 3.0)
    ]


def test_only_the_swept_weights_change():
    curve = WeightCurve("linear", 5.0)
    own = (GuidanceTerm(1.0, 0.1, 0.9, "model", "cond", label="a", curve=curve), *terms("b"))
    (cell,) = cell_terms(own, [SweptTerm(0, "a", (7.0,))])
    assert cell[1] is own[1]
    assert vars(cell[0]) == {**vars(own[0]), "weight": 7.0}
    assert own[0].weight == 1.0


def test_the_limit_of_cells():
    swept = [SweptTerm(0, "a", (1.0,) * 20), SweptTerm(1, "b", (1.0,) * 20)]
    assert len(cell_terms(terms("a", "b"), swept)) == MAX_CELLS == 400
    swept[1] = SweptTerm(1, "b", (1.0,) * 21)
    assert refusal(cell_terms, terms("a", "b"), swept) == (
        "Weight Sweep: 420 cells, expected at most 400; shorten the lists of weights."
    )
