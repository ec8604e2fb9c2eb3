"""At full quality a run does what its model calls need and nothing besides, counted in torch's operations.

On the CPU a host read costs nothing; on a GPU each makes the host wait. So reads are counted, not timed: `.item()`,
`float()`, `bool()` and `==` as torch's profiler sees them, and the calls that only a GPU makes wait (`tolist`, `numpy`,
`cpu`) as they are called.
"""

import sys
from collections import Counter

import pytest
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

STEPS = 2
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "tolist", "numpy", "cpu")
COPIES = ("aten::copy_", "aten::clone", "aten::_to_copy")


class Waits(TorchFunctionMode):
    """Counts the calls that wait for a GPU and that the CPU's profile does not show."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS:
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def counted(comfy, monkeypatch):
    """Count the operations of a run from where the solver begins to where it ends."""
    solvers = sys.modules["comfy.k_diffusion.sampling"]
    euler, counts = solvers.sample_euler, []

    def sample_euler(*args, **kwargs):
        with Waits() as waits, profile(activities=[ProfilerActivity.CPU]) as seen:
            out = euler(*args, **kwargs)
        operations = {event.key: event.count for event in seen.key_averages() if event.key.startswith("aten::")}
        counts.append(Counter(operations) + waits.calls)
        return out

    monkeypatch.setattr(solvers, "sample_euler", sample_euler)

    def count(run, *args, **kwargs):
        counts.clear()
        run(*args, steps=STEPS, **kwargs)
        (found,) = counts
        return found

    return count


@pytest.fixture(scope="module")
def kept():
    """Counts of runs that several tests compare with."""
    return {}


@pytest.fixture
def guided(kept, counted, stock, prior, prompt, latent):
    """The counts of stock sampling with a negative prompt."""
    if "guided" not in kept:
        kept["guided"] = counted(stock, prior, prompt(1), prompt(2), latent)
    return kept["guided"]


def of(counts, names):
    return {name: counts[name] for name in names}


def test_one_term_is_stock_sampling_operation_by_operation(guided, counted, gcfg, prior, prompt, latent):
    expected = guided
    got = counted(gcfg, prior, prompt(2), [GuidanceTerm(7.5, conditioning=prompt(1))], latent)
    assert got == expected, "stock's own function"
    eq7 = [GuidanceTerm(7.5, conditioning=prompt(1)), GuidanceTerm(-6.5, conditioning=prompt(2))]
    assert counted(gcfg, prior, prompt(3), eq7, latent) == expected


def test_another_models_term_adds_its_own_run_at_most(guided, counted, gcfg, stock, prior, concept, prompt, latent):
    """Against the two stock runs that make the same predictions; one solver less makes it cheaper."""
    alone = counted(stock, concept, prompt(3), prompt(3), latent, cfg=1.0)
    terms = [GuidanceTerm(7.5, conditioning=prompt(1)), GuidanceTerm(2.0, model=concept, conditioning=prompt(3))]
    got = counted(gcfg, prior, prompt(2), terms, latent)
    for name in (*READS, *COPIES, "aten::cat", "aten::conv2d"):
        assert got[name] <= guided[name] + alone[name], name
    assert got["aten::conv2d"] == guided["aten::conv2d"] + alone["aten::conv2d"]
    solver = ("aten::sub", 2 * STEPS), ("aten::div", STEPS)  # two derivatives less, of which one prediction is less
    assert all(got[name] <= guided[name] + alone[name] - less for name, less in solver)


def test_terms_on_one_model_wait_no_more_than_stock_sampling(guided, counted, gcfg, prior, prompt, latent):
    expected = guided
    terms = [GuidanceTerm(weight, conditioning=prompt(seed)) for seed, weight in enumerate((3.0, -1.0, 2.0, 1.5), 3)]
    got = counted(gcfg, prior, prompt(2), terms, latent)
    assert of(got, READS) == of(expected, READS)
    assert got["aten::conv2d"] == expected["aten::conv2d"]
    # Stock code collects each prediction in tensors of its own: three casts of a scalar and a latent each.
    assert got["aten::copy_"] <= expected["aten::copy_"] + 3 * STEPS * (len(terms) - 1)
    assert got["aten::clone"] == expected["aten::clone"]


@pytest.mark.parametrize("choice", ["interval", "range"])
def test_only_what_depends_on_the_noise_level_reads_it(guided, counted, gcfg, prior, prompt, latent, choice):
    """A term's interval, or its conditioning's, costs one look at sigma per evaluation: the counter sees each."""
    if choice == "interval":
        term = GuidanceTerm(7.5, end_percent=0.99, conditioning=prompt(1))
    else:
        ranged = sys.modules["nodes"].ConditioningSetTimestepRange().set_range(prompt(1), 0.0, 0.99)[0]
        term = GuidanceTerm(7.5, conditioning=ranged)
    got = counted(gcfg, prior, prompt(2), [term], latent)
    assert got["aten::_local_scalar_dense"] >= guided["aten::_local_scalar_dense"] + STEPS


def test_one_call_for_each_set_of_weights(lora, gcfg, load_unet, weights, concept, prompt, latent, count_forwards):
    """Four terms on one model and the unconditional: a batch of five. A LoRA clone, another model: their own calls."""
    base = load_unet(weights("sd15", 0))
    calls = count_forwards(base, concept)  # before the clone's module is copied, hook and all
    terms = [GuidanceTerm(1.0 + seed, conditioning=prompt(seed)) for seed in (3, 4, 5, 6)]
    gcfg(base, prompt(0), terms, latent, steps=2)
    assert [batch for _, batch in calls] == [5, 5]
    calls.clear()
    others = [GuidanceTerm(2.0, model=model, conditioning=prompt(8)) for model in (lora(base), concept)]
    gcfg(base, prompt(0), [*terms, *others], latent, steps=2)
    assert [batch for _, batch in calls] == [1, 1, 5] * 2
    own, other, prior = (module for module, _ in calls[:3])
    assert prior == id(base.model.diffusion_model)
    assert len({own, other, prior}) == 3
    assert id(concept.model.diffusion_model) in {own, other}


def test_conditionings_are_prepared_once_for_each_model(gcfg, prior, concept, prompt, latent, comfy, monkeypatch):
    calls, made = [], []
    process, encode = comfy.samplers.process_conds, comfy.samplers.encode_model_conds

    def process_conds(model, *args, **kwargs):
        calls.append(model)
        return process(model, *args, **kwargs)

    def encode_model_conds(model_function, conds, *args, **kwargs):
        made.append(len(conds))
        return encode(model_function, conds, *args, **kwargs)

    monkeypatch.setattr(comfy.samplers, "process_conds", process_conds)
    monkeypatch.setattr(comfy.samplers, "encode_model_conds", encode_model_conds)
    terms = [
        GuidanceTerm(3.0, conditioning=prompt(1)),
        GuidanceTerm(1.0, conditioning=prompt(4)),
        GuidanceTerm(2.0, model=concept, conditioning=prompt(3)),
    ]
    gcfg(prior, prompt(2), terms, latent, steps=4)
    assert sorted(map(id, calls)) == sorted(map(id, (prior.model, concept.model)))
    assert made == [1] * 4, "each of the four conditionings once"


@pytest.fixture
def layers_run(gcfg, prompt, latent):
    """How often each layer of a term's UNet runs in a run of STEPS steps, by its name in the whole UNet."""

    def count(base, model, unet):
        ran, handles = Counter(), []
        for name, module in unet.named_modules():
            hook = lambda module, args, output, name=name: ran.update([name])  # noqa: E731
            handles.append(module.register_forward_hook(hook))
        try:
            term = GuidanceTerm(2.0, model=model, conditioning=prompt(1))
            gcfg(base, prompt(2), [term], latent, steps=STEPS)
        finally:
            for handle in handles:
                handle.remove()
        return ran

    return count


def _removed(name):
    """A layer of the cross-attention or its norm."""
    return any(part in ("attn2", "norm2") for part in name.split("."))


def test_the_patch_runs_every_layer_but_the_removed_ones(layers_run, load_unet, weights, prior, prompt):
    """v and out run once in a run, for the constants; where ComfyUI does not tell when a run begins, in each step."""
    from comfyui_gcfg.nodes.runtime.null_text import patch_null_text

    model = load_unet(weights("sd15", 1))
    unet = model.model.diffusion_model
    plain = layers_run(prior, model, unet)
    assert {count for name, count in plain.items() if "transformer_blocks" in name} == {STEPS}
    ran = layers_run(prior, patch_null_text(model, prompt(9), "uniform_mean"), unet)
    once = 1 if hasattr(model, "add_callback_with_key") else STEPS
    expected = {name: count for name, count in plain.items() if not _removed(name)}
    read = [name for name in plain if name.endswith(("attn2.to_v", "attn2.to_out.0", "attn2.to_out.1"))]
    assert ran == expected | dict.fromkeys(read, once)
    assert len(read) == 3 * sum(name.endswith("attn2") for name in plain) > 0


def test_a_concept_unet_runs_every_layer_but_the_removed_ones(
    layers_run, load_unet, weights, prior, prompt, tmp_path, comfy
):
    """From a compact file: nothing of q, k, v, out and norm2 is there that could run."""
    from comfyui_gcfg.nodes.runtime.concept import load_concept_unet
    from comfyui_gcfg.testkit.models import null_text_features
    from safetensors.torch import save_file

    state_dict = weights("sd15", 1)
    plain = load_unet(state_dict)
    before = layers_run(prior, plain, plain.model.diffusion_model)
    path = tmp_path / "concept.safetensors"
    blocks = null_text_features(state_dict, prompt(9)[0][0])
    compact = {name: weight for name, weight in state_dict.items() if not _removed(name)}
    features = {f"{name}.attn2.null_text_feature": value.reshape(1, 1, -1) for name, value in blocks.items()}
    save_file({name: weight.contiguous() for name, weight in (compact | features).items()}, path)
    concept = load_concept_unet(str(path))
    ran = layers_run(prior, concept, concept.model.diffusion_model)
    stands_in = ("attn2", "norm2")
    assert {name: n for name, n in ran.items() if not _removed(name)} == {
        name: n for name, n in before.items() if not _removed(name)
    }
    assert {name.rsplit(".", 1)[-1] for name in ran if _removed(name)} == set(stands_in)
    assert sum(name.endswith("norm2") for name in ran) == len(blocks)


def test_the_patch_waits_no_more_than_a_plain_model(counted, gcfg, prior, concept, prompt, latent, monkeypatch):
    """Where ComfyUI tells when a run begins, the constants are read once in it; attention_mean's are also compared."""
    from comfyui_gcfg.nodes.runtime import null_text

    monkeypatch.setattr(null_text, "_LATENT_SIZE", 8)
    monkeypatch.setattr(null_text, "_PERCENTS", (0.5,))
    made = []
    features = null_text.NullText.features
    monkeypatch.setattr(null_text.NullText, "features", lambda *args: (made.append(args), features(*args))[1])
    patched = null_text.patch_null_text(concept, prompt(9), "attention_mean")
    term = GuidanceTerm(2.0, model=patched, conditioning=prompt(1))
    gcfg(prior, prompt(2), [term], latent, steps=STEPS)  # measures
    once = 1 if hasattr(concept, "add_callback_with_key") else STEPS
    assert len(made) == once
    got = counted(gcfg, prior, prompt(2), [term], latent)
    assert len(made) == 2 * once, "and again in the next run"
    plain = counted(gcfg, prior, prompt(2), [GuidanceTerm(2.0, model=concept, conditioning=prompt(1))], latent)
    assert of(got, READS) == of(plain, READS) | {"aten::equal": once}
    assert plain["aten::equal"] == 0
