"""Region Terms: each region is what a run of its own is there, and only there."""

import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.nodes.regions import OVERLAPS, GCFGRegionTerms

LEFT, RIGHT = (slice(0, 4), slice(4, 8))


def half(side, size=64):
    mask = torch.zeros(1, size, size)
    mask[..., side.start * size // 8 : side.stop * size // 8] = 1.0
    return mask


def regions(*terms, overlap="share", background=()):
    return GCFGRegionTerms().make(tuple(terms), overlap, tuple(background))[0]


def test_two_regions_with_two_loras_are_the_composite_of_two_runs(gcfg, exact, prior, base, prompt, latent):
    """Where nothing mixes positions, each half is the half of a run with its own LoRA, prompt and negative alone."""
    loras = [exact(prior, name, offset) for name, offset in (("a", 0.5), ("b", -0.8))]
    terms = [
        GuidanceTerm(5.0, model=lora, conditioning=prompt(1 + n), relative_conditioning=prompt(5 + n))
        for n, lora in enumerate(loras)
    ]
    masked = [
        GuidanceTerm(**{**vars(term), "mask": half(side)}) for term, side in zip(terms, (LEFT, RIGHT), strict=True)
    ]
    got = gcfg(base, prompt(0), regions(*masked), latent)
    for term, side in zip(terms, (LEFT, RIGHT), strict=True):
        assert torch.equal(got[..., side], gcfg(base, prompt(0), [term], latent)[..., side])


def test_the_lora_of_one_region_leaves_the_others_pixels(gcfg, prior, concept, prompt, latent):
    """On a real UNet positions mix, so the other half moves, by far less than the region itself."""
    text = GuidanceTerm(4.0, conditioning=prompt(1), mask=half(RIGHT))
    with_lora = gcfg(prior, prompt(0), regions(GuidanceTerm(1.5, model=concept, mask=half(LEFT)), text), latent)
    without = gcfg(prior, prompt(0), regions(text), latent)
    moved = [float((with_lora - without)[..., side].abs().mean()) for side in (LEFT, RIGHT)]
    assert moved[1] < 0.35 * moved[0]


@pytest.mark.parametrize(
    ("overlap", "expected"), [("share", (0.5, 0.5, 0.0)), ("first on top", (1.0, 0.0, 0.0)), ("add", (1.0, 1.0, 0.0))]
)
def test_where_masks_overlap(prompt, overlap, expected):
    terms = [GuidanceTerm(1.0, conditioning=prompt(1), mask=half(slice(0, 5))) for _ in range(2)]
    made = regions(*terms, overlap=overlap, background=[GuidanceTerm(2.0, conditioning=prompt(2))])
    assert [float(term.masks[0][0, 0, 0]) for term in made] == list(expected)
    assert [float(term.masks[0][0, 0, -1]) for term in made] == [0.0, 0.0, 1.0]
    assert [term.weight for term in made] == [1.0, 1.0, 2.0]


def test_the_background_keeps_its_own_mask(prompt):
    region = GuidanceTerm(1.0, conditioning=prompt(1), mask=half(LEFT))
    background = GuidanceTerm(1.0, conditioning=prompt(2), mask=half(slice(2, 6), size=128))
    _, made = regions(region, background=[background])
    expected = half(slice(4, 6), size=128)[0, 0]
    assert torch.equal(made.masks[0][0, 0, 8::16], expected[8::16])  # the region's enlarged edge is smooth


def test_a_region_without_a_mask(prompt):
    term = GuidanceTerm(1.0, conditioning=prompt(1), label="sky")
    with pytest.raises(
        GuidanceError, match=r"^Region Terms: regions has the term 'sky' with no mask, expected one for each; "
    ):
        regions(term)


def test_no_region():
    with pytest.raises(GuidanceError, match=r"^Region Terms: regions holds no term, expected at least one with a mask"):
        regions()


def test_the_choices():
    assert GCFGRegionTerms.INPUT_TYPES()["required"]["overlap"][0] == list(OVERLAPS)
