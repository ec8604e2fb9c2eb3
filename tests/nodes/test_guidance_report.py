"""What a run tells about its terms: against a float64 loop, and that looking changes nothing."""

import json
import types

import pytest
import torch
from comfyui_gcfg.gcfg.curves import WeightCurve
from comfyui_gcfg.gcfg.diagnostics import GuidanceReport, Reading
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import bent_prior, refusal

STEPS = 5
FLOAT32 = 1e-5  # float32 sampling against float64, over 5 steps of elementwise models
NODE = "7"
CONNECTED = {"7": {"inputs": {"steps": 5}}, "9": {"inputs": {"report": ["7", 1]}}}
NOT_CONNECTED = {"7": {"inputs": {"steps": 5}}, "8": {"inputs": {"samples": ["7", 0]}, "report": 1}}


def offset_of(cond):
    """What the model sees of a prompt."""
    return float(cond[0][0][0, 0, 0])


@pytest.fixture
def models(base, exact, concept):
    """The sampler's model and another one, both with predictions that a float64 loop can repeat."""
    return base, exact(concept, "concept", 1.0)


@pytest.fixture
def sample(comfy):
    """The GCFG KSampler's latent, its report and its chart."""
    from comfyui_gcfg.nodes.sampling import GCFGKSampler

    def run(model, unconditional, terms, latent, prompt=CONNECTED, sampler="euler", scheduler="normal", steps=STEPS):
        args = (model, 1, steps, sampler, scheduler, unconditional, latent, 1.0)
        out = GCFGKSampler().sample(*args, unique_id=NODE, prompt=prompt, term_1=tuple(terms))
        result = out["result"] if isinstance(out, dict) else out
        return (*result, out["ui"] if isinstance(out, dict) else None)

    return run


@pytest.fixture
def measured(monkeypatch):
    """How often a reading was measured."""
    from comfyui_gcfg.gcfg import diagnostics

    count, measure = [], diagnostics.measure
    monkeypatch.setattr(diagnostics, "measure", lambda *args: count.append(1) or measure(*args))
    return count


def two_terms(other, prompt):
    return [
        GuidanceTerm(3.0, conditioning=prompt(1), label="text"),
        GuidanceTerm(-1.5, 0.2, 0.7, model=other, conditioning=prompt(2), label="concept"),
    ]


def by_hand(comfy, base, unconditional, terms, weights):
    """Euler in float64: the latent, and every evaluation's (x, base, deltas).

    Args:
        terms: (prompt, further offset) of each.
        weights: of each term at a step.
    """
    sampling = base.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS).double()
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1)).double()
    x = noise * float(torch.sqrt(1.0 + sigmas[0] ** 2))  # ComfyUI scales so at the largest sigma
    evaluations = []
    for step, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        d_0 = bent_prior(x, sigma, offset_of(unconditional))
        deltas = [
            weight * (bent_prior(x, sigma, offset_of(cond) + further) - d_0)
            for weight, (cond, further) in zip(weights(step), terms, strict=True)
        ]
        evaluations.append((sigma, x, d_0, deltas))
        x = x + (x - d_0 - sum(deltas)) / sigma * (following - sigma)
    return x / 0.18215, evaluations


def close(got, expected):
    return float((got.double() - expected).abs().max() / expected.abs().max()) < FLOAT32


def test_readings_against_a_loop_in_float64(sample, models, prompt, latent, comfy):
    base, other = models
    latent_out, report, _ = sample(base, prompt(0), two_terms(other, prompt), latent)

    # The normal schedule is even in time: step i is at percent i / 4, so the second term acts at steps 2 and 3.
    def weights(step):
        return 3.0, -1.5 if step in (1, 2) else 0.0

    expected, evaluations = by_hand(comfy, base, prompt(0), [(prompt(1), 0.0), (prompt(2), 1.0)], weights)
    assert close(latent_out["samples"], expected)
    assert report.labels == ("text", "concept")
    assert report.steps == len(report.readings) == STEPS
    for step, (reading, (sigma, x, d_0, deltas)) in enumerate(zip(report.readings, evaluations, strict=True)):
        centre = float(torch.linalg.norm(x - d_0))
        pulls = [float(torch.linalg.norm(delta)) / centre for delta in deltas]
        assert reading.step == step + 1
        assert reading.sigma == pytest.approx(sigma, rel=1e-6)
        assert reading.weights == weights(step)
        assert reading.pulls == pytest.approx(pulls, rel=1e-4)
        assert reading.total == pytest.approx(float(torch.linalg.norm(sum(deltas))) / centre, rel=1e-4)
        assert reading.centre == ""
        if weights(step)[1]:
            cosine = torch.nn.functional.cosine_similarity(*(delta.flatten() for delta in deltas), dim=0)
            assert reading.cosines == (pytest.approx(float(cosine), abs=1e-4),)
        else:
            assert reading.cosines == (None,)


@pytest.mark.parametrize("kind", ["linear", "points"])
def test_a_curve_against_a_loop_in_float64(sample, models, prompt, latent, comfy, kind):
    """One term whose weight falls from 8 to -2: 8, 5.5, 3, 0.5, -2 at the five even steps."""
    base, _ = models
    curve = WeightCurve(kind, -2.0, ((0.0, 8.0), (0.5, 3.0), (1.0, -2.0)))
    term = GuidanceTerm(8.0 if kind == "linear" else 1.0, conditioning=prompt(1), curve=curve)
    got, report, _ = sample(base, prompt(0), [term], latent)
    expected, _ = by_hand(comfy, base, prompt(0), [(prompt(1), 0.0)], lambda step: [8 - 2.5 * step])
    assert close(got["samples"], expected)
    # A percent is found to 6e-8, in a schedule of float32 noise levels.
    assert [r.weights[0] for r in report.readings] == pytest.approx([8.0, 5.5, 3.0, 0.5, -2.0], abs=1e-4)
    constant = GuidanceTerm(8.0, conditioning=prompt(1))
    assert not close(sample(base, prompt(0), [constant], latent)[0]["samples"], expected)


def test_a_level_curve_is_a_constant_to_the_last_bit(sample, models, prompt, latent):
    base, _ = models
    constant = sample(base, prompt(0), [GuidanceTerm(3.0, conditioning=prompt(1))], latent)[0]["samples"]
    for curve in (WeightCurve("linear", 3.0), WeightCurve("cosine", 3.0), WeightCurve("points", points=((0.5, 3.0),))):
        got = sample(base, prompt(0), [GuidanceTerm(3.0, conditioning=prompt(1), curve=curve)], latent)[0]["samples"]
        assert torch.equal(got, constant)


def test_curve_of_the_node_reaches_the_term(comfy, prompt):
    from comfyui_gcfg.nodes.guidance import GCFGGuidanceTerm

    make = GCFGGuidanceTerm().make
    ((term,),) = make(4.0, 0.2, 0.6, conditioning=prompt(1), curve="cosine", end_weight=1.0)
    assert term.curve == WeightCurve("cosine", 1.0)
    ((term,),) = make(4.0, 0.2, 0.6, conditioning=prompt(1), curve="points", points="0: 1, 100%: 2")
    assert term.curve == WeightCurve("points", points=((0.0, 1.0), (1.0, 2.0)))
    assert refusal(make, 4.0, 0.2, 0.6, conditioning=prompt(1), label="style", curve="points", points="0: 1, 2") == (
        "Guidance Term 'style': points: pair 2 is '2', expected percent: weight, such as 0.5: 3; correct it."
    )


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde"])
def test_looking_changes_no_bit(sample, prior, concept, prompt, sampler):
    mask = torch.zeros(2, 64, 64)
    mask[..., 32:] = 1.0
    terms = [
        GuidanceTerm(3.0, conditioning=prompt(1)),
        GuidanceTerm(2.0, model=concept, conditioning=prompt(2), mask=mask),
    ]
    batch = {"samples": torch.zeros(2, 4, 8, 8)}
    run = {"sampler": sampler, "steps": 2}
    seen, report, _ = sample(prior, prompt(0), terms, batch, CONNECTED, **run)
    unseen, empty, _ = sample(prior, prompt(0), terms, batch, NOT_CONNECTED, **run)
    assert report.readings
    assert not empty.readings
    assert torch.equal(seen["samples"], unseen["samples"])


@pytest.mark.parametrize("prompt_graph", [NOT_CONNECTED, {}, None])
def test_nothing_is_measured_when_nobody_looks(sample, models, prompt, latent, measured, prompt_graph):
    base, other = models
    _, report, ui = sample(base, prompt(0), two_terms(other, prompt), latent, prompt_graph)
    assert measured == []
    assert report == GuidanceReport()
    assert ui is None
    sample(base, prompt(0), two_terms(other, prompt), latent, CONNECTED)
    assert len(measured) == STEPS


def test_the_chart_of_a_cached_run(sample, models, prompt, latent):
    base, other = models
    _, report, ui = sample(base, prompt(0), two_terms(other, prompt), latent)
    assert ui == {"gcfg": [report.as_dict()]}
    json.dumps(ui, allow_nan=False)


def test_the_centre_is_named_where_the_unconditional_is_not_evaluated(sample, models, prompt, latent):
    base, _ = models
    terms = [
        GuidanceTerm(3.0, conditioning=prompt(1), label="positive"),
        GuidanceTerm(-2.0, conditioning=prompt(2), label="negative"),
    ]
    _, report, _ = sample(base, prompt(0), terms, latent)
    assert {reading.centre for reading in report.readings} == {"negative"}
    assert {reading.pulls[1] for reading in report.readings} == {0.0}
    assert all(reading.total == pytest.approx(reading.pulls[0], rel=1e-6) for reading in report.readings)


def test_steps_of_a_solver_that_evaluates_twice(sample, models, prompt, latent):
    """dpm_2 looks at the beginning and in the middle of each step; its last goes straight to 0."""
    base, _ = models
    term = GuidanceTerm(3.0, conditioning=prompt(1))
    _, report, _ = sample(base, prompt(0), [term], latent, sampler="dpm_2")
    assert [reading.step for reading in report.readings] == [1, 1, 2, 2, 3, 3, 4, 4, 5]


# --- the live chart ---


@pytest.fixture
def editor(monkeypatch, comfy):
    """A server with an editor, and a clock that stands still."""
    from comfyui_gcfg.nodes.runtime import live

    sent = []
    server = types.SimpleNamespace(client_id="me", send_sync=lambda *message: sent.append(message), sent=sent)
    monkeypatch.setattr(live, "prompt_server", lambda: server)
    server.now = 1000.0
    monkeypatch.setattr(live, "time", types.SimpleNamespace(monotonic=lambda: server.now))
    return server


def test_an_editor_sees_every_reading_once(sample, models, prompt, latent, editor, monkeypatch):
    from comfyui_gcfg.nodes.runtime import live

    base, other = models
    monkeypatch.setattr(live, "_INTERVAL", 0.0)
    _, report, ui = sample(base, prompt(0), two_terms(other, prompt), latent, NOT_CONNECTED)
    assert [(event, to) for event, _, to in editor.sent] == [("gcfg.step", "me")] * STEPS
    messages = [message for _, message, _ in editor.sent]
    assert [message["first"] for message in messages] == list(range(STEPS))
    assert {message["node"] for message in messages} == {NODE}
    assert all((m["labels"], m["steps"]) == (["text", "concept"], STEPS) for m in messages)
    readings = [reading for message in messages for reading in message["readings"]]
    assert readings == report.as_dict()["readings"] == ui["gcfg"][0]["readings"]


def test_messages_are_not_more_frequent_than_a_chart_needs(sample, models, prompt, latent, editor):
    base, other = models
    sample(base, prompt(0), two_terms(other, prompt), latent, NOT_CONNECTED)
    assert [len(message["readings"]) for _, message, _ in editor.sent] == [1, STEPS - 1], "at once, and at the end"


def test_a_prompt_that_no_editor_queued_is_not_measured(sample, models, prompt, latent, editor, measured):
    base, other = models
    editor.client_id = None
    _, report, ui = sample(base, prompt(0), two_terms(other, prompt), latent, NOT_CONNECTED)
    assert editor.sent == measured == report.readings == []
    assert ui is None


def test_a_run_that_fails_sends_what_it_read(sample, models, prompt, latent, editor):
    base, _ = models
    own, count = base.model_options["model_function_wrapper"], []

    def fail(apply_model, args):
        count.append(1)
        if len(count) == 4:
            raise RuntimeError("out of memory")
        return own(apply_model, args)

    base.set_model_unet_function_wrapper(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(base, prompt(0), [GuidanceTerm(3.0, conditioning=prompt(1))], latent, NOT_CONNECTED)
    assert sum(len(message["readings"]) for _, message, _ in editor.sent) == 3


# --- the guider ---


def test_report_of_a_guider_in_stock_sampler_custom_advanced(sample, models, prompt, latent, custom_advanced):
    from comfyui_gcfg.nodes.report import GCFGGuidanceReport
    from comfyui_gcfg.nodes.sampling import GCFGGuider

    base, other = models
    terms = two_terms(other, prompt)
    expected_latent, expected, _ = sample(base, prompt(0), terms, latent)
    guider, report = GCFGGuider().make(base, prompt(0), unique_id=NODE, prompt=CONNECTED, term_1=tuple(terms))
    assert not report.readings
    for _ in range(2):  # a second run begins its report anew
        out = custom_advanced(guider, latent, STEPS)
        assert torch.equal(out["samples"], expected_latent["samples"])
        assert report == expected
    _, text, _ = GCFGGuidanceReport().make(report, latent=out)
    assert json.loads(text) == json.loads(expected.as_json())


# --- the node ---


@pytest.fixture
def make(comfy):
    from comfyui_gcfg.nodes.report import GCFGGuidanceReport

    return GCFGGuidanceReport().make


def test_report_without_readings(make):
    assert refusal(make, GuidanceReport(("a",), 4)) == (
        "Guidance Report: report is empty, expected the readings of a run; after a GCFG Guider connect latent to the "
        "output of SamplerCustomAdvanced, and after a run that ComfyUI has kept change the seed."
    )


def test_texts_are_those_of_the_report(make, sample, models, prompt, latent):
    base, other = models
    _, report, _ = sample(base, prompt(0), two_terms(other, prompt), latent)
    _, as_json, as_csv = make(report)
    assert as_json == report.as_json()
    assert as_csv == report.as_csv()


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours


def rows_of(plot, colour, left=0.0, right=1.0):
    """The rows of a colour's pixels in a part of the picture, from the top."""
    width = plot.shape[1]
    part = (plot[:, int(left * width) : int(right * width)] * 255).round()
    return (part == torch.tensor(colour)).all(-1).nonzero()[:, 0].double()


def made_up(*pulls, total=2.0, cosines=(0.5,)):
    """A report whose terms pull as given at every evaluation; None where they are off."""
    weights = [tuple(0.0 if p is None else 1.0 for p in row) for row in zip(*pulls, strict=True)]
    rows = [tuple(p or 0.0 for p in row) for row in zip(*pulls, strict=True)]
    readings = [Reading(i + 1, 1.0, w, r, total, cosines) for i, (w, r) in enumerate(zip(weights, rows, strict=True))]
    return GuidanceReport(tuple("ab"[: len(pulls)]), len(readings), readings)


def test_plot_shows_the_pulls(make):
    """Blue rises, orange falls and is off in the second half."""
    rising = [0.2 * n for n in range(1, 9)]
    falling = [2.0 - 0.4 * n for n in range(4)] + [None] * 4
    plot, _, _ = make(made_up(rising, falling))
    assert plot.ndim == 4
    assert (plot.shape[0], plot.shape[3]) == (1, 3)
    assert plot.dtype == torch.float32
    assert 0.0 <= float(plot.min()) < 0.2 < 0.9 < float(plot.max()) <= 1.0
    upper = plot[0, : plot.shape[1] // 2]
    first, last = (0.1, 0.25), (0.6, 0.8)
    assert rows_of(upper, BLUE, *first).median() > rows_of(upper, BLUE, *last).median() + 20
    assert rows_of(upper, ORANGE, *first).median() < rows_of(upper, ORANGE, 0.3, 0.45).median() - 20
    assert len(rows_of(upper, ORANGE, *last)) == 0


def test_plot_of_one_term_has_no_cosines(make):
    one, two = make(made_up([1.0] * 4, cosines=()))[0], make(made_up([1.0] * 4, [1.0] * 4))[0]
    assert one.shape[1] < two.shape[1]


def test_cosines_are_drawn_where_they_are(make):
    agree = make(made_up([1.0] * 4, [1.0] * 4, cosines=(0.9,)))[0][0]
    fight = make(made_up([1.0] * 4, [1.0] * 4, cosines=(-0.9,)))[0][0]
    half = agree.shape[0] // 2
    assert torch.equal(agree[:half], fight[:half])
    middle = 0.3, 0.6  # away from the legend
    assert rows_of(agree[half:], BLUE, *middle).median() < rows_of(fight[half:], BLUE, *middle).median() - 50


def test_plot_of_what_is_no_number(make):
    """A model that overflowed: the evaluations that are left are drawn."""
    report = made_up([1.0] * 6, [0.5] * 6)
    nothing = Reading(7, 1.0, (1.0, 1.0), (None, None), None, (None,))
    report.readings += [nothing]
    assert len(rows_of(make(report)[0][0], BLUE)) > 50
    report.readings[:] = [nothing]
    assert make(report)[0].shape[0] == 1


@pytest.mark.parametrize("label", ["a_b", "$x^2$", r"$\frac{$", "$x", "_hidden", "x" * 300, "two\nlines"])
def test_plot_names_any_label(make, label):
    """Labels are free text, which matplotlib would take for a formula or for the name of a hidden line."""
    report = made_up([1.0] * 4, [0.5] * 4)
    plots = []
    for report.labels in (("", "b"), (label, "b")):
        plots.append(make(report)[0])
        assert len(rows_of(plots[-1][0], BLUE, 0.2, 0.6)) > 50
    assert not torch.equal(*plots)


def test_the_plots_legend_tells_what_a_term_is_measured_from(make, monkeypatch):
    from matplotlib.axes import Axes

    drawn, legend = [], Axes.legend
    monkeypatch.setattr(
        Axes, "legend", lambda self, **how: drawn.append(self.get_legend_handles_labels()[1]) or legend(self, **how)
    )
    report = made_up([1.0] * 4, [0.5] * 4)
    make(report)  # as a report is that knows of none
    report.relative = ("", "relative_model")
    make(report)
    assert drawn == [["a", "b", "sum"], ["a · b"], ["a", "b, measured from relative_model", "sum"], ["a · b"]]


def test_without_matplotlib(make, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert refusal(make, made_up([1.0] * 3)) == (
        "Guidance Report: matplotlib is not installed, expected it for the plot; run pip install matplotlib in "
        "ComfyUI's Python environment."
    )


def test_a_term_with_the_unconditionals_prompt_that_acts_at_some_steps_only(sample, models, prompt, latent):
    """Its prediction is the base's; where nothing acts the base is read as it is."""
    base, _ = models
    unconditional = prompt(0)
    term = GuidanceTerm(3.0, 0.4, 0.6, conditioning=unconditional, label="none")
    _, report, _ = sample(base, unconditional, [term], latent)
    assert [reading.total for reading in report.readings] == [0.0] * STEPS
    assert [reading.centre for reading in report.readings if not reading.weights[0]] == [""] * (STEPS - 1)
