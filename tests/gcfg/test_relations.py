"""Relations between terms, against loops in float64."""

import math

import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.relations import RELATIONS, Limit, Perpendicular, Saliency, related
from hypothesis import given, settings
from hypothesis import strategies as st

SIGMA = 2.0


def drawn(seed, batch=2, shape=(4, 5, 6)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator) for _ in range(2)]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.floats(0, 2))
def test_perpendicular_is_perp_neg_sample_by_sample(seed, amount):
    own, other = drawn(seed)
    got = Perpendicular("", amount).applied(own, other, SIGMA)
    for g, a, b in zip(got.double(), own.double(), other.double(), strict=True):
        expected = a - amount * dot(a, b) / dot(b, b) * b
        torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-4)
        if amount == 1.0:
            assert abs(dot(g, b)) < 1e-3 * math.sqrt(dot(a, a) * dot(b, b))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.floats(0, 4), st.floats(0.01, 20))
def test_limit_holds_the_norm_to_a_multiple(seed, amount, size):
    own, other = drawn(seed)
    own = own * size
    got = Limit("", amount).applied(own, other, SIGMA)
    for g, a, b in zip(got.double(), own.double(), other.double(), strict=True):
        expected = a * min(1.0, amount * math.sqrt(dot(b, b) / dot(a, a)))
        torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-5)
        assert dot(g, g) <= amount**2 * dot(b, b) * (1 + 1e-5)


def salience(delta):
    """softmax of the 3 x 3 mean of the channels' mean magnitude, one position at a time."""
    channels, height, width = delta.shape
    strength = [
        [sum(abs(float(delta[c, i, j])) / SIGMA for c in range(channels)) / channels for j in range(width)]
        for i in range(height)
    ]
    blurred = {}
    for i in range(height):
        for j in range(width):
            near = [
                strength[a][b]
                for a in range(max(0, i - 1), min(height, i + 2))
                for b in range(max(0, j - 1), min(width, j + 2))
            ]
            blurred[i, j] = sum(near) / len(near)
    total = math.fsum(map(math.exp, blurred.values()))
    return {place: math.exp(value) / total for place, value in blurred.items()}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.5, 1.0, 1.5]))
def test_saliency_keeps_what_stands_out(seed, amount):
    own, other = (tensor.double() for tensor in drawn(seed))
    got = Saliency("", amount).applied(own, other, SIGMA)
    for g, a, b in zip(got, own, other, strict=True):
        ours, theirs = salience(a), salience(b)
        for (i, j), value in ours.items():
            assert torch.equal(
                g[:, i, j], a[:, i, j] if value >= amount * theirs[i, j] else torch.zeros(4, dtype=g.dtype)
            )


def test_two_that_look_at_each_other_divide_the_picture():
    own, other = drawn(0)
    masks = [Saliency().applied(*both, SIGMA) != 0 for both in ((own, other), (other, own))]
    assert torch.equal(masks[0], ~masks[1])


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zeros_and_half_precision_give_numbers(name, dtype):
    """A term whose delta is 0, or that looks at one, and squares that overflow in half precision."""
    own, other = (300 * tensor.to(dtype) for tensor in drawn(1))
    for a, b in ((own, other), (own, 0 * other), (0 * own, other), (0 * own, 0 * other)):
        kept = a.clone()
        got = RELATIONS[name]().applied(a, b, SIGMA)
        assert got.isfinite().all()
        assert got.dtype == dtype
        assert torch.equal(a, kept)


def test_perpendicular_to_next_to_nothing_in_half_precision():
    own, other = (tensor.half() for tensor in drawn(1))
    got = Perpendicular("", 100.0).applied(300 * own, 0.001 * other, SIGMA)
    assert got.isfinite().all()


@pytest.mark.parametrize("name", RELATIONS)
def test_video_and_packed_streams(name):
    for shape in ((4, 3, 5, 6), (1, 40)):
        own, other = drawn(2, shape=shape)
        assert RELATIONS[name]().applied(own, other, SIGMA).shape == own.shape


def test_relations_act_in_their_order_and_rest_where_the_other_does_not_act():
    own, other = drawn(3)
    both = [Perpendicular(), Limit("", 0.1)]
    expected = both[1].applied(both[0].applied(own, other, SIGMA), other, SIGMA)
    assert torch.equal(related(both, own, [other, other], SIGMA), expected)
    assert torch.equal(related(both, own, [None, None], SIGMA), own)
    assert torch.equal(related(both, own, [other, other], 0.0), own)


@pytest.mark.parametrize("amount", [-0.1, 100.5, math.nan, math.inf])
def test_an_amount_out_of_range_is_refused(amount):
    with pytest.raises(
        GuidanceError, match=rf"^Guidance Relation: amount is {amount:g}, expected 0 to 100; correct it\.$"
    ):
        Limit("x", amount)
