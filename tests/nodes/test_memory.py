"""Memory: equal weights are kept once, and what is shared stays two models."""

import functools
import gc
import logging

import pytest
import torch
from comfyui_gcfg.benchmarks.memory import used
from comfyui_gcfg.gcfg.concept_file import compact, features, fold
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.models import lora_state_dict, null_text_features
from safetensors.torch import load_file, save_file

QUERY = "middle_block.1.transformer_blocks.0.attn1.to_q.weight"  # among what a LoRA changes
TRAINED = ("attn2.to_k.weight", "attn2.to_v.weight")  # by Custom Diffusion


@pytest.fixture(scope="module")
def tuned(weights):
    """The weights of a model that Custom Diffusion made of the prior: all but a few are the prior's."""
    other = weights("sd15", 1)
    return {key: other[key] if key.endswith(TRAINED) else value for key, value in weights("sd15", 0).items()}


@pytest.fixture
def pair(load_unet, weights, tuned):
    """Prior and tuned model, freshly loaded and in memory of their own."""
    return load_unet(weights("sd15", 0)), load_unet(tuned)


@pytest.fixture
def run(gcfg, prompt):
    """Prior and tuned model in one run of two steps."""

    def go(prior, model, conditioning=None):
        terms = [
            GuidanceTerm(3.0, conditioning=conditioning or prompt(1)),
            GuidanceTerm(2.0, model=model, conditioning=prompt(2)),
        ]
        return gcfg(prior, prompt(0), terms, {"samples": torch.zeros(1, 4, 8, 8)}, steps=2)

    return go


@pytest.fixture
def unshared(monkeypatch):
    """Call something as if there were no sharing."""
    from comfyui_gcfg.nodes.runtime import guider

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(guider, "share_equal", lambda patchers: 0)
            return function(*args)

    return call


def held(*models):
    """Bytes of the models' parameters, each address once."""
    from comfyui_gcfg.nodes.runtime.sharing import addresses

    found = {}
    for model in models:
        found |= addresses(model.model.diffusion_model)
    return sum(found.values())


def values(model):
    """A model's weights, copied without touching them."""
    return {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def with_lora(comfy, weights, model, seed):
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora_state_dict(weights("sd15", 0), seed), 1.0, 0.0)
    assert patched.patches
    return patched


def test_equal_weights_are_kept_once_and_the_result_is_the_same(
    pair, run, unshared, weights, tuned, load_unet, comfy, caplog
):
    prior, model = pair
    each, changed = held(prior), sum(v.nbytes for k, v in tuned.items() if k.endswith(TRAINED))
    assert held(model) == each
    expected = unshared(run, prior, model)
    assert held(prior, model) == 2 * each, "without sharing each has its own"
    before = used(torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        got = run(prior, model)
    assert held(prior, model) == each + changed
    freed = before - used(torch.device("cpu"))
    assert freed > 0.9 * (each - changed), "and the system has it back"
    said = f"GCFG: models of this run have equal weights, which now share {(each - changed) / 1e6:.1f} MB."
    assert caplog.messages.count(said) == 1
    assert torch.equal(got, expected)
    assert same(values(prior), weights("sd15", 0))
    assert same(values(model), tuned)
    assert torch.equal(run(prior, model), expected)
    assert held(prior, model) == each + changed, "evaluating does not end it"


def test_three_loads_of_one_file_are_one(load_unet, weights, run):
    models = [load_unet(weights("sd15", 0)) for _ in range(3)]
    from comfyui_gcfg.nodes.runtime.sharing import share_equal

    each = held(models[0])
    assert share_equal(models) == 2 * each
    assert held(*models) == each
    assert share_equal(models) == 0


def test_a_second_run_compares_nothing(pair, run, monkeypatch):
    from comfyui_gcfg.nodes.runtime import sharing

    run(*pair)
    monkeypatch.setattr(sharing, "_equal", lambda a, b: pytest.fail("compared again"))
    run(*pair)


def test_only_the_same_bits_are_shared(load_unet, weights):
    """A tensor that differs in one value, in the sign of a zero, in dtype or layout keeps its memory."""
    from comfyui_gcfg.nodes.runtime.sharing import share_equal

    first, second = load_unet(weights("sd15", 0)), load_unet(weights("sd15", 0))
    a, b = (dict(model.model.diffusion_model.named_parameters()) for model in (first, second))
    with torch.no_grad():
        b["out.2.weight"].view(-1)[-1] += 1
        b["out.2.bias"].neg_()
        assert torch.equal(a["out.2.bias"], b["out.2.bias"]), "0 == -0"
        b["time_embed.0.bias"].data = b["time_embed.0.bias"].data.double()
        b["input_blocks.0.0.weight"].data = b["input_blocks.0.0.weight"].data.to(memory_format=torch.channels_last)
    share_equal([first, second])
    from comfyui_gcfg.nodes.runtime.sharing import addresses

    own = set(addresses(second.model.diffusion_model)) - set(addresses(first.model.diffusion_model))
    apart = {name for name, parameter in b.items() if torch._C._data_address(parameter) in own}
    assert apart == {"out.2.weight", "out.2.bias", "time_embed.0.bias", "input_blocks.0.0.weight"}


@pytest.mark.parametrize("which", ["prior", "model"])
def test_a_lora_changes_its_own_model_only(pair, run, unshared, comfy, weights, tuned, load_unet, which):
    """On either of two models that share, patched out of place and in place."""
    fresh = load_unet(weights("sd15", 0)), load_unet(tuned)
    run(*pair)

    def patched(prior, model):
        change = prior if which == "prior" else model
        lora = with_lora(comfy, weights, change, 1)
        return run(lora, model) if which == "prior" else run(prior, lora)

    expected = unshared(patched, *fresh)
    for in_place in (False, True):
        for model in pair:
            model.weight_inplace_update = in_place
        assert torch.equal(patched(*pair), expected), f"in place: {in_place}"
    comfy.model_management.unload_all_models()
    assert same(values(pair[0]), weights("sd15", 0))
    assert same(values(pair[1]), tuned)


def test_weight_hooks_write_into_their_own_model_only(pair, run, unshared, comfy, weights, tuned, load_unet, prompt):
    """They write in place while both models are at work."""
    try:
        import comfy.hooks
    except ModuleNotFoundError:
        pytest.skip("this ComfyUI has no hooks")
    group = comfy.hooks.create_hook_lora(lora_state_dict(weights("sd15", 0), 1), 1.0, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(prompt(1), group)
    expected = unshared(run, load_unet(weights("sd15", 0)), load_unet(tuned), hooked)
    plain = run(*pair)
    seen = []

    def look(*_):
        clean = weights("sd15", 0)[QUERY], tuned[QUERY]
        seen.append(tuple(torch.equal(values(model)[QUERY], value) for model, value in zip(pair, clean, strict=True)))

    handle = pair[0].model.diffusion_model.out.register_forward_pre_hook(look)
    assert torch.equal(run(*pair, hooked), expected)
    handle.remove()
    assert not torch.equal(expected, plain), "the hook does something"
    assert (False, True) in seen, "the prior's weight was hooked"
    assert (False, False) not in seen, "and the other model's with it"
    comfy.model_management.unload_all_models()
    assert same(values(pair[0]), weights("sd15", 0))
    assert same(values(pair[1]), tuned)
    assert torch.equal(run(*pair), plain)


def test_any_write_ends_the_sharing_of_that_weight(pair, run, weights, tuned):
    run(*pair)
    before = held(*pair)
    with torch.no_grad():
        weight = pair[0].model.diffusion_model.out[2].weight
        weight.add_(1)
    assert held(*pair) == before + weight.nbytes
    assert same(values(pair[1]), tuned)


def test_unloading_deleting_and_running_alone(pair, run, stock, prompt, latent, comfy, load_unet, weights, tuned):
    prior, model = pair
    alone = [stock(load_unet(sd), prompt(1), prompt(0), latent, steps=2) for sd in (weights("sd15", 0), tuned)]
    together = run(prior, model)
    comfy.model_management.unload_all_models()
    assert torch.equal(stock(prior, prompt(1), prompt(0), latent, steps=2), alone[0])
    assert torch.equal(stock(model, prompt(1), prompt(0), latent, steps=2), alone[1])
    assert torch.equal(run(prior, model), together)
    del prior, pair
    comfy.model_management.unload_all_models()
    gc.collect()
    assert torch.equal(stock(model, prompt(1), prompt(0), latent, steps=2), alone[1])


def test_models_that_comfyui_moves_or_streams_are_left_alone(pair, monkeypatch):
    from comfyui_gcfg.nodes.runtime import sharing

    apart = 2 * held(pair[0])
    with monkeypatch.context() as patch:
        patch.setattr(pair[1], "load_device", torch.device("cuda"))
        assert sharing.share_equal(pair) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sharing, "is_dynamic", lambda patcher: patcher is pair[1])
        assert sharing.share_equal(pair) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sharing, "_lazy_clone", None)
        assert sharing.share_equal(pair) == 0
    assert held(*pair) == apart


SCALE = 4  # the small models count as so many times larger, because versions always load 64 or 128 MB
OTHER = torch.device("cpu:0")  # not equal to the "cpu" where models are kept, and moving there makes a copy


@pytest.fixture
def pressure(comfy, monkeypatch):
    """Let ComfyUI believe that models run on a device of its own with little memory; give it the bytes.

    Everything else is its own code: what it loads, in part, evicts, casts in every call, and patches while casting.
    """
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.ops
    from comfyui_gcfg.nodes.runtime.versions import left_in_ram

    loaded, budget, size_of = {}, [1e12], management.module_size
    patcher_class = comfy.model_patcher.ModelPatcher

    def free_memory(device=None, torch_free_too=False):
        free = 1e12
        if device is None or device == OTHER:
            models = {id(entry.model.model): entry.model for entry in management.current_loaded_models}
            free = budget[0] - sum(model.model_size() - left_in_ram(model) for model in (loaded | models).values())
        return (free, free) if torch_free_too else free

    def cast(layer, input):  # the oldest patches what `.to` gives, on a GPU always a copy
        cast_all = [
            None if weight is None else weight.to(device=input.device, dtype=input.dtype, copy=True)
            for weight in (layer.weight, layer.bias)
        ]
        functions = layer.weight_function, layer.bias_function
        return tuple(w if w is None or f is None else f(w) for w, f in zip(cast_all, functions, strict=True))

    def set_budget(count, state="NORMAL_VRAM"):
        management.unload_all_models()
        loaded.clear()
        budget[0] = count
        monkeypatch.setattr(management, "vram_state", management.VRAMState[state])

    if hasattr(patcher_class, "load"):
        load = patcher_class.load

        def watched(patcher, *args, **kwargs):
            loaded[id(patcher.model)] = patcher  # while it is being loaded it stands in no list
            return load(patcher, *args, **kwargs)

        monkeypatch.setattr(patcher_class, "load", watched)
        monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    else:
        monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    monkeypatch.setattr(management, "module_size", lambda module: SCALE * size_of(module))
    monkeypatch.setattr(management, "get_torch_device", lambda: OTHER)
    monkeypatch.setattr(management, "get_free_memory", free_memory)
    monkeypatch.setattr(management, "is_device_cpu", lambda device: device == torch.device("cpu"))
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: SCALE * 2**20)
    set_budget(1e12)
    yield set_budget
    management.unload_all_models()


PRESSURES = [(2.2, "NORMAL_VRAM"), (1.2, "LOW_VRAM"), (1.2, "NO_VRAM")]  # so many of the run's three models would fit


def test_little_memory_changes_nothing_but_is_told(pressure, load_unet, weights, gcfg, prompt, latent, comfy, caplog):
    """Prior, its clone with a LoRA, and a concept, with all memory and with less; the second time from half loaded."""
    from comfyui_gcfg.benchmarks.loads import counting
    from comfyui_gcfg.nodes.runtime.clones import separate
    from comfyui_gcfg.nodes.runtime.versions import left_in_ram

    prior, concept = load_unet(weights("sd15", 0)), load_unet(weights("sd15", 1))
    assert prior.load_device != prior.offload_device
    lora = with_lora(comfy, weights, prior, 1)
    terms = [
        GuidanceTerm(3.0, conditioning=prompt(1)),
        GuidanceTerm(2.0, model=lora, conditioning=prompt(2)),
        GuidanceTerm(1.5, model=concept, conditioning=prompt(3)),
    ]

    def go():
        caplog.clear()
        with caplog.at_level(logging.WARNING), counting([prior, concept]) as counts:
            out = gcfg(prior, prompt(0), terms, latent, steps=2)
        assert counts.evaluations >= 4
        assert counts.between_steps == 0
        return out, [line for line in caplog.messages if "this run's models" in line]

    expected, said = go()
    assert said == [], "nothing is said where all fits"
    size = prior.model_size()
    run = separate([prior, lora, concept])
    assert len({id(patcher.model) for patcher in run}) == 3
    for models, state in PRESSURES:
        pressure(models * size, state)
        got, said = go()
        assert torch.equal(got, expected), state
        left = sum(map(left_in_ram, run))
        assert (3 - models) * size / 2 < left <= 3 * size, state  # the least that versions load differs
        assert said == [
            f"GCFG: this run's models (3) take {written(3 * size)}, of which {written(3 * size - left)} fit in free "
            f"memory: ComfyUI keeps {written(left)} in RAM and copies it to the device at every step, which gives the "
            "same image slowly; for speed load terms with an fp8 weight_dtype (where Load Concept UNet offers it), use "
            "fewer models, or make a smaller image."
        ]
    got, said = go()
    assert torch.equal(got, expected), "and again from what was half loaded"
    assert len(said) == 1
    pressure(1e12)
    assert go()[1] == []


def written(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


@pytest.fixture(scope="module")
def concept_path(comfy, weights, prompt, tmp_path_factory):
    """A compact concept UNet in fp16, as they are exported."""
    constants = null_text_features(weights("sd15", 1), prompt(0)[0][0])
    sd = compact(fold(weights("sd15", 1), constants))
    path = tmp_path_factory.mktemp("concept") / "concept.safetensors"
    save_file({key: value.half() for key, value in sd.items()}, path)
    return str(path)


@pytest.mark.parametrize("form", ["compact", "folded"])
def test_unused_attention_is_never_loaded(comfy, concept_path, weights, tmp_path, monkeypatch, caplog, form):
    """Its layers exist for a moment, but nothing is written into them, so the system gives them no memory."""
    from comfyui_gcfg.nodes.runtime import concept

    if form == "folded":
        small = load_file(concept_path)
        save_file(fold(small, features(small)), path := tmp_path / "folded.safetensors")
        concept_path = str(path)
    given, load = {}, concept._load_state_dict

    @functools.wraps(load)
    def noted(sd, **options):
        given.update(sd)
        return load(sd, **options)

    monkeypatch.setattr(concept, "_load_state_dict", noted)
    with caplog.at_level(logging.INFO):
        model = concept.load_concept_unet(concept_path)
    dead = {key for key in weights("sd15", 1) if ".attn2." in key or ".norm2." in key}
    assert given.keys() & dead == {key for key in dead if key.endswith("0.attn2.to_k.weight")}
    assert not [line for line in caplog.messages if line.startswith("unet missing")]
    logging.getLogger().warning("unet missing: heard again")
    assert "unet missing: heard again" in caplog.messages
    assert not [name for name, _ in model.model.named_parameters() if ".attn2.to_" in name]


# Relative L2 of the result of two steps, 1.5 times what 0.3.29 to 0.29.0 all gave: 0.058 and 0.069.
FP8 = {"fp8_e4m3fn": 0.087, "fp8_e5m2": 0.103}


def test_a_term_in_fp8(comfy, load_unet, weights, gcfg, prompt, latent, concept_path):
    """A quarter of the CPU's fp32; the constants keep the file's values; the result is near, and not the same."""
    from comfyui_gcfg.nodes.runtime.concept import WEIGHT_DTYPES, load_concept_unet

    assert set(FP8) <= set(WEIGHT_DTYPES) or WEIGHT_DTYPES == ("default",)
    prior, plain = load_unet(weights("sd15", 0)), load_concept_unet(concept_path)

    def go(base, model):
        terms = [GuidanceTerm(3.0, conditioning=prompt(1)), GuidanceTerm(1.5, model=model, conditioning=prompt(2))]
        return gcfg(base, prompt(0), terms, latent, steps=2)

    def constants(model):
        return {k: v for k, v in model.model.state_dict().items() if k.endswith("null_text_feature")}

    expected = go(prior, plain)
    for name in FP8.keys() & set(WEIGHT_DTYPES):
        model = load_concept_unet(concept_path, name)
        unet = model.model.diffusion_model
        kept_as = {p.dtype for key, p in unet.named_parameters() if "null_text" not in key}
        assert kept_as == {getattr(torch, name.replace("fp8", "float8"))}
        assert same(constants(model), constants(plain))
        assert constants(plain)
        small = sum(v.nbytes for v in constants(plain).values())
        assert held(model) - small == (held(plain) - small) // 4
        norms = [(key, p) for key, p in unet.named_parameters() if "norm" in key or "in_layers.0" in key]
        given = plain.model.diffusion_model.state_dict()
        assert norms
        assert all(torch.allclose(p.float(), given[key], rtol=0.13, atol=1e-3) for key, p in norms)
        error = float((go(prior, model) - expected).norm() / expected.norm())
        assert 0 < error < FP8[name], name
