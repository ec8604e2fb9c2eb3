"""The combination against loops in float64, and against the density it promises."""

import math

import pytest
import torch
from comfyui_gcfg.gcfg.combine import Delta, ShapeError, combine, effective_cond, pair
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.plan import ActiveTerm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode


def active(weight, index=0, mask=None, label="1"):
    return ActiveTerm(index, weight, mask, label)


def guided(predictions, terms):
    return [Delta(prediction, term) for prediction, term in zip(predictions, terms, strict=True)]


def draw(count, seed=0, shape=(2, 4, 6, 5)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def by_hand(base, predictions, weights, masks):
    """Eq. 3, one number at a time."""
    out = torch.empty_like(base, dtype=torch.float64)
    for b, c, i, j in torch.cartesian_prod(*map(torch.arange, base.shape)).tolist():
        centre = float(base[b, c, i, j])
        value = centre
        for prediction, weight, mask in zip(predictions, weights, masks, strict=True):
            m = 1.0 if mask is None else float(mask[b % mask.shape[0], 0, i, j])
            value += weight * m * (float(prediction[b, c, i, j]) - centre)
        out[b, c, i, j] = value
    return out


weight = st.floats(-20, 20, allow_nan=False)


@settings(max_examples=25, deadline=None)
@given(st.lists(weight, min_size=1, max_size=4), st.integers(0, 2**16), st.booleans())
def test_is_eq_3(weights, seed, with_mask):
    base, *predictions = draw(len(weights) + 1, seed)
    masks = [torch.rand(1, 1, 6, 5) if with_mask and i == 0 else None for i in range(len(weights))]
    terms = [active(w, i, m) for i, (w, m) in enumerate(zip(weights, masks, strict=True))]
    expected = by_hand(base, predictions, weights, masks)
    scale = 1.0 + sum(map(abs, weights))
    assert torch.allclose(combine(base, guided(predictions, terms)).double(), expected, rtol=0, atol=2e-6 * scale)


@settings(max_examples=25, deadline=None)
@given(weight, st.integers(0, 2**16))
@example(0.5, 0)
def test_without_base_is_stock_guidance(w, seed):
    """Eq. 7 in the very operations of stock guidance, hence to the last bit."""
    positive, negative = draw(2, seed)
    if w < 0.5:
        w = 1 - w
    got = combine(None, guided([positive, negative], [active(w, 0), active(1 - w, 1)]))
    assert torch.equal(got, negative + (positive - negative) * w)


@settings(max_examples=25, deadline=None)
@given(st.lists(weight, min_size=1, max_size=4), st.integers(0, 2**16))
def test_effective_cond_is_the_same_sum(weights, seed):
    base, *predictions = draw(len(weights) + 1, seed)
    terms = [active(w, i) for i, w in enumerate(weights)]
    cond, scale = effective_cond(base, guided(predictions, terms))
    expected = combine(base, guided(predictions, terms))
    size = 1.0 + sum(map(abs, weights))
    assert torch.allclose(base + scale * (cond - base), expected, rtol=0, atol=5e-6 * size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("w", [7.5, 0.3, -1.7])
def test_rounds_as_stock_guidance_in_every_dtype(dtype, w):
    """Three operations, each rounded: no fused multiply-add, no wider intermediate."""
    positive, negative = (10 * tensor.to(dtype) for tensor in draw(2, shape=(1, 4, 33, 31)))
    expected = negative + (positive - negative) * w
    got = combine(negative, guided([positive], [active(w)]))
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    if w > 0.5:
        assert torch.equal(combine(None, guided([positive, negative], [active(w, 0), active(1 - w, 1)])), expected)


class Written(TorchDispatchMode):
    """The names of all operations, and how many tensors they made."""

    def __init__(self):
        super().__init__()
        self.names, self.made = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function._schema.name.removeprefix("aten::"))
        self.made += all(out is not arg for arg in args)
        return out


@pytest.mark.parametrize("inference", [False, True])
def test_one_new_tensor_per_term_and_predictions_are_only_read(inference):
    """Predictions are kept by others (readings, Guidance Cache), and the base is read by every term."""
    with torch.inference_mode(inference):
        base, *predictions = draw(4)
        kept = [tensor.clone() for tensor in (base, *predictions)]
        terms = [active(w, i) for i, w in enumerate((3.0, -1.5, 2.0))]
        masked = [active(2.0, 0, torch.rand(1, 1, 6, 5)), *terms[1:]]
        with Written() as written:
            got = combine(base, guided(predictions, terms))
        assert written.names == ["sub", "mul_", "add_"] * 3
        assert written.made == 3
        combine(base, guided(predictions, masked))
        effective_cond(base, guided(predictions, terms))
        effective_cond(base, guided(predictions, masked))
        without, _ = effective_cond(base, guided(predictions[:1], terms[:1]))
        assert without is predictions[0]
    assert all(torch.equal(now, then) for now, then in zip((base, *predictions), kept, strict=True))
    assert all(got.data_ptr() != tensor.data_ptr() for tensor in (base, *predictions))


def test_missing_base_is_refused_where_it_counts():
    with pytest.raises(GuidanceError, match="weights sum to 3"):
        combine(None, guided(draw(1), [active(3.0)]))
    with pytest.raises(GuidanceError, match="base is None"):
        combine(None, guided(draw(1), [active(1.0, mask=torch.ones(1, 1, 6, 5))]))
    with pytest.raises(GuidanceError, match="nothing to combine"):
        combine(None, guided([], []))


def test_shapes_are_named():
    base, prediction = draw(1)[0], torch.zeros(2, 16, 6, 5)
    with pytest.raises(ShapeError) as error:
        combine(base, guided([prediction], [active(2.0, label="style")]))
    assert str(error.value) == (
        "Guidance Term 'style': prediction has shape (2, 16, 6, 5), expected (2, 4, 6, 5) like the unconditional "
        "model's; use models of one latent family."
    )


def test_video_latents_take_one_mask_for_all_frames():
    base, prediction = draw(2, shape=(2, 4, 3, 6, 5))
    mask = torch.zeros(1, 1, 1, 6, 5)
    mask[..., :3, :] = 1
    got = combine(base, guided([prediction], [active(2.0, mask=mask)]))
    assert torch.equal(got[..., 3:, :], base[..., 3:, :])
    assert torch.equal(got[..., :3, :], (base + (prediction - base) * 2.0)[..., :3, :])


def test_langevin_samples_the_guided_density():
    """Scores of N(0, 1) and N(1, 0.5^2) with w = 2.5: p^(1-w) q^w is a Gaussian of precision (1-w)/1 + w/0.25."""
    w, sigma = 2.5, 0.05
    variances = (1.0 + sigma**2, 0.25 + sigma**2)
    precision = (1 - w) / variances[0] + w / variances[1]
    mean = w * 1.0 / variances[1] / precision
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 100, 200, generator=generator, dtype=torch.float64)
    step = 0.01
    for _ in range(1200):
        base = x + sigma**2 * (0.0 - x) / variances[0]  # D = x + sigma^2 score (Tweedie)
        cond = x + sigma**2 * (1.0 - x) / variances[1]
        score = (combine(base, guided([cond], [active(w)])) - x) / sigma**2
        x = x + step * score + math.sqrt(2 * step) * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    # 20,000 chains: four standard errors, plus the step size's known inflation of the variance (1 / (1 - step/2 * p))
    inflated = 1 / precision / (1 - step / 2 * precision)
    assert float(x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(inflated / 20000))
    assert float(x.var()) == pytest.approx(inflated, rel=4 * math.sqrt(2 / 20000))


def term_of(index, weight, mask=None):
    return ActiveTerm(index, weight, mask, str(index))


@pytest.mark.parametrize("weights", [(5.0, -4.0), (-4.0, 5.0), (7.3, 1 - 7.3), (0.25, 0.75)])
def test_two_weights_that_sum_to_one_are_a_pair(weights):
    """Eq. 7; the smaller weight is the negative prompt's, wherever it stands."""
    positive, negative = pair([term_of(place, weight) for place, weight in enumerate(weights)])
    assert (positive.weight, negative.weight) == (max(weights), min(weights))


def test_others_are_no_pair():
    mask = torch.ones(1, 1, 8, 8)
    assert pair([term_of(0, 1.0)]) is None
    assert pair([term_of(0, 5.0), term_of(1, -3.0)]) is None
    assert pair([term_of(0, 5.0, mask), term_of(1, -4.0)]) is None
    assert pair([term_of(0, 5.0), term_of(1, -5.0), term_of(2, 1.0)]) is None


def test_a_scale_other_than_the_weights_sum():
    """A rule's prediction H counts with weight 1, and stands for the weight w_i that is in it."""
    base, rule, other = (torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(s)) for s in range(3))
    cond, scale = effective_cond(base, guided([rule, other], [term_of(0, 1.0), term_of(1, 3.0)]), weight=5.0)
    assert scale == 5.0
    assert torch.allclose(base + scale * (cond - base), base + (rule - base) + 3.0 * (other - base), atol=1e-5)
