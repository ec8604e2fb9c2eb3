"""Masks of regions that overlap."""

import torch
from comfyui_gcfg.gcfg.masks import outside, shared, stacked
from hypothesis import given, settings
from hypothesis import strategies as st

masks = st.lists(st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6), min_size=1, max_size=4)


def as_masks(values):
    return [torch.tensor(value).reshape(1, 2, 3) for value in values]


@settings(max_examples=50, deadline=None)
@given(masks)
def test_every_position_is_what_its_formula_says(values):
    share, stack, rest = shared(as_masks(values)), stacked(as_masks(values)), outside(as_masks(values))
    for place in range(6):
        i, j = divmod(place, 3)
        here = [value[place] for value in values]
        free = 1.0
        for k, m in enumerate(here):
            torch.testing.assert_close(float(share[k][0, i, j]), m / max(1.0, sum(here)), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(float(stack[k][0, i, j]), m * free, rtol=1e-5, atol=1e-6)
            free *= 1.0 - m
        torch.testing.assert_close(float(rest[0, i, j]), 1.0 - min(1.0, sum(here)), rtol=1e-5, atol=1e-6)


def test_masks_of_other_sizes_meet_at_the_largest():
    small, tall, many = torch.ones(1, 2, 8), torch.zeros(1, 16, 4), torch.zeros(3, 4, 4)
    for made in (shared([small, tall, many]), stacked([small, tall, many])):
        assert {tuple(mask.shape) for mask in made} == {(3, 16, 8)}
        assert all(torch.equal(mask, torch.full_like(mask, value)) for mask, value in zip(made, (1, 0, 0), strict=True))
    assert torch.equal(outside([small, tall]), torch.zeros(1, 16, 8))


def test_masks_themselves_are_only_read():
    given = [torch.ones(1, 2, 2), torch.full((1, 2, 2), 0.5)]
    for made in (shared(given), stacked(given), [outside(given)]):
        made[0].zero_()
    assert torch.equal(given[0], torch.ones(1, 2, 2))
    assert torch.equal(given[1], torch.full((1, 2, 2), 0.5))
