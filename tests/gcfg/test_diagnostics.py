"""Readings of the guidance sum, against plain numpy in float64."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from comfyui_gcfg.gcfg.combine import Delta, combine
from comfyui_gcfg.gcfg.diagnostics import GuidanceReport, Reading, Recorder, measure, pairs
from comfyui_gcfg.gcfg.plan import ActiveTerm

SIGMAS = [10.0, 5.0, 2.0, 0.0]
FLOAT32 = 2e-6  # sums of a few hundred products in float32


def tensors(count, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 4, 6, 5, generator=generator) for _ in range(count)]


def active(*weights, masks=None):
    masks = masks or [None] * len(weights)
    return [ActiveTerm(i, w, m, f"t{i}") for i, (w, m) in enumerate(zip(weights, masks, strict=True))]


def guided(predictions, terms):
    return [Delta(prediction, term) for prediction, term in zip(predictions, terms, strict=True)]


def expected(x, base, predictions, terms, denoised):
    """Pulls, total and cosines sample by sample, by the definitions of the paper's noise predictions."""
    sigma = 3.0  # any: the ratios do not depend on it
    x, base, denoised = (tensor.double().numpy() for tensor in (x, base, denoised))
    per_sample = []
    for b in range(len(x)):
        eps_0 = (x[b] - base[b]) / sigma
        deltas = []
        for prediction, term in zip(predictions, terms, strict=True):
            eps = (x[b] - prediction[b].double().numpy()) / sigma
            mask = 1.0 if term.mask is None else term.mask[b % len(term.mask)].double().numpy()
            deltas.append((term.weight * mask * (eps - eps_0)).ravel())
        length = np.sqrt((eps_0**2).sum())
        whole = np.sqrt((((x[b] - denoised[b]) / sigma - eps_0) ** 2).sum()) / length
        pulls = [np.sqrt((delta**2).sum()) / length for delta in deltas]
        cosines = [
            float(deltas[i] @ deltas[j] / np.sqrt((deltas[i] @ deltas[i]) * (deltas[j] @ deltas[j])))
            for i in range(len(deltas))
            for j in range(i + 1, len(deltas))
        ]
        per_sample.append([whole, *pulls, *cosines])
    return np.mean(per_sample, axis=0)


def half_masks():
    mask = torch.zeros(2, 1, 6, 5)
    mask[0, :, :, 2:] = 1.0
    mask[1, :, :3] = 0.5
    return mask


@pytest.mark.parametrize(
    ("weights", "masks"),
    [
        ([2.0], None),
        ([7.5, -2.0], None),
        ([1.5, -0.5, 4.0], None),
        ([1.5, 3.0, -4.0], [None, half_masks(), half_masks()[:1]]),
    ],
)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_measure_against_float64(weights, masks, batch):
    x, base, *predictions = tensors(2 + len(weights), batch)
    terms = active(*weights, masks=masks)
    denoised = combine(base, guided(predictions, terms))
    got = measure(x, base, guided(predictions, terms), denoised)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected(x, base, predictions, terms, denoised), rtol=FLOAT32, atol=FLOAT32)


def test_terms_that_fight_and_agree():
    """Hand-made deltas: the same, opposite, and orthogonal ones."""
    x = torch.zeros(1, 1, 1, 2)
    base = torch.tensor([[[[3.0, 4.0]]]])  # |eps_0| = 5
    east, north = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    terms = active(2.0, 3.0, -1.0, 5.0)
    denoised = base + 2 * east + 3 * east - east + 5 * north
    got = measure(x, base, guided([base + east, base + east, base + east, base + north], terms), denoised).tolist()
    assert got == pytest.approx([math.hypot(4, 5) / 5, 0.4, 0.6, 0.2, 1.0, 1, -1, 0, -1, 0, 0], abs=1e-6)


def test_what_hooks_do_counts_in_the_total():
    x, base, prediction = tensors(3)
    terms = active(2.0)
    total, pull = measure(x, base, guided([prediction], terms), base).tolist()
    assert total == 0.0
    assert pull > 0.1


def test_a_sample_outside_a_mask_does_not_hide_the_angle_of_the_other():
    """A batch of masks: in the second sample the masked term pulls nowhere."""
    x, base, a, b = tensors(4)
    mask = torch.ones(2, 1, 6, 5)
    mask[1] = 0.0
    terms = active(2.0, 3.0, masks=[None, mask])
    got = measure(x, base, guided([a, b], terms), combine(base, guided([a, b], terms)))
    alone = expected(x[:1], base[:1], [a[:1], b[:1]], terms, base[:1])
    assert float(got[3]) == pytest.approx(alone[3], abs=FLOAT32)


# --- the recorder ---


def recorded(*evaluations, sigmas=SIGMAS, labels=("t0", "t1", "t2")):
    """Evaluations are (sigma, terms, base or None)."""
    report = GuidanceReport()
    recorder = Recorder(report, sigmas, labels)
    for number, (sigma, terms, with_base) in enumerate(evaluations):
        x, base, *outputs = tensors(5, seed=number)
        outputs = [outputs[term.index] for term in terms]
        base = base if with_base else None
        denoised = combine(base, guided(outputs, terms)) if terms else base
        recorder.record(x, torch.full((2,), sigma), base, guided(outputs, terms), denoised)
    recorder.finish()
    return report


def test_readings_of_active_and_inactive_terms():
    t0, t1, t2 = active(1.5, -0.5, 4.0)
    report = recorded((10.0, [t0, t2], True), (5.0, [t1], True), (2.0, [], True))
    x, base, a, _, c = tensors(5, seed=0)
    total, pull_0, pull_2, cosine = expected(x, base, [a, c], [t0, t2], combine(base, guided([a, c], [t0, t2])))
    first, second, third = report.readings
    assert first.weights == (1.5, 0.0, 4.0)
    assert first.pulls == pytest.approx((pull_0, 0.0, pull_2), rel=1e-5)
    assert first.total == pytest.approx(total, rel=1e-5)
    assert first.cosines[0] is None
    assert first.cosines[1] == pytest.approx(cosine, abs=1e-5)
    assert first.cosines[2] is None
    assert first.centre == ""
    assert second.weights == (0.0, -0.5, 0.0)
    assert second.pulls[0] == second.pulls[2] == 0.0 < second.pulls[1]
    assert second.cosines == (None, None, None)
    assert third == Reading(3, 2.0, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0, (None, None, None))


def test_without_a_base_the_centre_is_named():
    """Weights 3, -1, -1 sum to 1: the base is the later of the two smallest, where the sum measures from too."""
    terms = active(3.0, -1.0, -1.0)
    report = recorded((10.0, terms, False))
    x, _, a, b, c = tensors(5, seed=0)
    wanted = expected(x, c, [a, b], terms[:2], combine(None, guided([a, b, c], terms)))
    (reading,) = report.readings
    assert reading.centre == "t2"
    assert reading.total == pytest.approx(wanted[0], rel=1e-5)
    assert reading.pulls == pytest.approx((wanted[1], wanted[2], 0.0), rel=1e-5)
    assert reading.cosines[0] == pytest.approx(wanted[3], abs=1e-5)
    assert reading.cosines[1:] == (None, None), "the base pulls nowhere"


@pytest.mark.parametrize(
    ("sigmas", "evaluations", "steps"),
    [
        (SIGMAS, [10.0, 5.0, 2.0], [1, 2, 3]),
        (SIGMAS, [10.0, 7.0, 5.0, 3.0, 2.0, 1.0], [1, 1, 2, 2, 3, 3]),  # midpoints, as dpm_2 takes them
        (SIGMAS, [10.0, 5.0, 5.0, 2.0, 2.0], [1, 2, 2, 3, 3]),  # heun looks at the end of each step
        (SIGMAS, [10.00001, 4.99999, 2.00001], [1, 2, 3]),  # float32 on the way through the model
        (SIGMAS, [11.0], [1]),
        ([0.1, 2.0, 5.0, 10.0], [0.1, 2.0, 5.0], [1, 2, 3]),  # unsampling
    ],
)
def test_step_numbers(sigmas, evaluations, steps):
    report = recorded(*((sigma, active(2.0), True) for sigma in evaluations), sigmas=sigmas)
    assert [reading.step for reading in report.readings] == steps
    assert [reading.sigma for reading in report.readings] == pytest.approx(evaluations)
    assert report.steps == 3


def test_a_new_run_forgets_the_last_one():
    report = GuidanceReport(("old",), 9, [Reading(1, 1.0, (1.0,), (1.0,), 1.0, ())])
    Recorder(report, SIGMAS, ["new"])
    assert report == GuidanceReport(("new",), 3, [], ("",))


def test_listeners_are_told_after_each_reading():
    told = []
    report = GuidanceReport()
    recorder = Recorder(report, SIGMAS, ["t0"], lambda: told.append(len(report.readings)))
    x, base, a = tensors(3)
    for _ in range(2):
        recorder.record(x, torch.ones(2), base, guided([a], active(2.0)), base)
    assert told == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    x, base, a = (tensor.to(dtype) * 100 for tensor in tensors(3))  # squares overflow in float16
    terms = active(2.0)
    got = measure(x, base, guided([a], terms), combine(base, guided([a], terms)))
    # The deltas themselves are rounded to 8 bits in bfloat16; their norm averages over 120 of them.
    np.testing.assert_allclose(got.numpy(), expected(x, base, [a], terms, combine(base, guided([a], terms))), rtol=5e-3)


# --- out of the program ---


def broken_report():
    """Two good evaluations, and the ones of a model that overflows and of a latent that has no noise left."""
    report = recorded((10.0, active(1.5, -0.5, 4.0), True), (5.0, active(2.0), True))
    recorder = Recorder(other := GuidanceReport(), SIGMAS, ["t0", "t1", "t2"])
    x, base, a, b = tensors(4)
    recorder.record(x, torch.ones(2), base, guided([a * math.nan, b], active(2.0, 1.0)), base * math.nan)
    recorder.record(x, torch.ones(2), base, guided([a * math.inf, b], active(2.0, 1.0)), base * math.inf)
    recorder.record(x, torch.ones(2), x, guided([a, b], active(2.0, 1.0)), a)
    recorder.record(x, torch.ones(2), x, guided([x, x], active(2.0, 1.0)), x)
    report.readings += other.readings
    return report


def test_what_is_no_number_is_none():
    nan, inf, noiseless, nothing = broken_report().readings[2:]
    for reading in (nan, inf):
        assert reading.total is None
        assert reading.pulls[0] is None
        assert reading.pulls[1] > 0
        assert reading.cosines == (None, None, None)
    assert noiseless.total is None
    assert noiseless.pulls == (None, None, 0.0)
    assert nothing.pulls == (None, None, 0.0)
    assert nothing.cosines == (None, None, None)


def test_json_read_back():
    report = broken_report()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(report.as_json(), parse_constant=refuse)
    assert read == json.loads(json.dumps(report.as_dict()), parse_constant=refuse)
    assert read["labels"] == ["t0", "t1", "t2"]
    assert read["steps"] == 3
    again = [
        Reading(**{k: tuple(v) if isinstance(v, list) else v for k, v in reading.items()})
        for reading in read["readings"]
    ]
    assert again == report.readings


def test_csv_read_back():
    report = broken_report()
    report.labels = ("plain", 'with "quotes", and comma', "two\nlines")
    header, *rows = csv.reader(io.StringIO(report.as_csv()))
    labels = report.labels
    assert header == [
        *("step", "sigma", "total"),
        *(f"{what} {label}" for label in labels for what in ("weight", "pull")),
        *(f"cosine {labels[i]} / {labels[j]}" for i, j in ((0, 1), (0, 2), (1, 2))),
        "centre",
    ]
    assert len(rows) == len(report.readings) == 6
    for row, reading in zip(rows, report.readings, strict=True):
        assert len(row) == len(header)
        values = [float(cell) if cell else None for cell in row[:-1]]
        assert all(value is None or math.isfinite(value) for value in values)
        assert values[:3] == [reading.step, reading.sigma, reading.total]
        assert tuple(values[3:9:2]) == reading.weights
        assert tuple(values[4:9:2]) == reading.pulls
        assert tuple(values[9:]) == reading.cosines
        assert row[-1] == reading.centre


def test_pairs_are_rows_of_the_upper_triangle():
    assert pairs(1) == []
    assert pairs(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
