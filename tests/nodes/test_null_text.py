"""The Null-Text Patch on real (small) models of each family, in the ComfyUI under test."""

import importlib

import pytest
import torch
from comfyui_gcfg.testkit.checks import refusal, relative
from comfyui_gcfg.testkit.layouts import NARROW
from comfyui_gcfg.testkit.models import lora_state_dict

# W(mean V) and attention over equal values are the same sums in another order of float32 operations, seen through a
# whole UNet: a few ulp for each layer.
REORDERED = 2e-5
WIDTHS = {"sd15": 768, "sd21": 1024, "sdxl": 2048}
MODES = ["uniform_mean", "attention_mean"]


@pytest.fixture(autouse=True)
def small_calibration(comfy, monkeypatch):
    """Measure attention_mean at 8x8; one test looks at the real size."""
    from comfyui_gcfg.nodes.runtime import null_text

    monkeypatch.setattr(null_text, "_LATENT_SIZE", 8)


@pytest.fixture(scope="module")
def null_text_patch(comfy):
    from comfyui_gcfg.nodes.concept import GCFGNullTextPatch

    return lambda model, null_text, mode="uniform_mean": GCFGNullTextPatch().patch(model, null_text, mode)[0]


@pytest.fixture(scope="module")
def lora(comfy, weights):
    """A clone of an SD1.5 model with a LoRA on its attention projections, as the stock LoraLoader adds it."""
    loras = importlib.import_module("comfy.lora")

    def add(patcher, strength=1.0, seed=0, only=""):
        keys = loras.model_lora_keys_unet(patcher.model, {})
        file = lora_state_dict({k: v for k, v in weights("sd15", 7).items() if only in k}, seed)
        clone = patcher.clone()
        added = clone.add_patches(loras.load_lora(file, keys), strength)
        assert len(added) == sum(key.endswith("lora_up.weight") for key in file) > 0
        return clone

    return add


@pytest.fixture(scope="module")
def with_biases(weights):
    """State dicts with biases in to_out, which the small models' files leave at zero."""

    def get(family):
        sd = dict(weights(family, 7))
        for key in sd:
            if key.endswith("attn2.to_out.0.bias"):
                sd[key] = torch.randn(sd[key].shape, generator=torch.Generator().manual_seed(len(key)))
        return sd

    return get


@pytest.fixture(scope="module")
def models(load_unet, with_biases):
    """One model of each family for all tests here, which must leave it as they found it."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = load_unet(with_biases(family))
        return made[family]

    return get


@pytest.fixture(scope="module")
def sample(stock):
    """Two steps of the stock KSampler without guidance: the model alone."""

    def run(model, conditioning, batch=2):
        return stock(model, conditioning, conditioning, {"samples": torch.zeros(batch, 4, 8, 8)}, cfg=1.0, steps=2)

    return run


def same_tokens(conditioning):
    """The conditioning with its first token 77 times: attention over equal values is their W(V), exactly."""
    tokens, options = conditioning[0]
    return [[tokens[:, :1].repeat(1, 77, 1), options]]


def mean_token(conditioning):
    """A conditioning of one token, the mean: the softmax over one key is 1, so attn2 is exactly W(mean V)."""
    tokens, options = conditioning[0]
    return [[tokens.mean(dim=1, keepdim=True), options]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", WIDTHS)
def test_identical_tokens_give_the_same_output_patched_and_unpatched(
    models, prompt, null_text_patch, sample, family, mode
):
    model, text = models(family), same_tokens(prompt(1, WIDTHS[family]))
    expected = sample(model, text)
    # The patched model must not look at its conditioning, so it is given another one with the same pooled vector.
    other = [[prompt(2, WIDTHS[family])[0][0], text[0][1]]]
    got = sample(null_text_patch(model, text, mode), other)
    assert relative(got, expected) < REORDERED
    assert relative(sample(model, other), expected) > 1e-3, "the model must be able to tell the texts apart"


@pytest.mark.parametrize("family", WIDTHS)
def test_uniform_mean_is_a_one_token_conditioning_of_the_mean(models, prompt, null_text_patch, sample, family):
    model, null_text = models(family), prompt(3, WIDTHS[family])
    expected = sample(model, mean_token(null_text))
    assert relative(sample(null_text_patch(model, null_text), null_text), expected) < REORDERED
    assert relative(sample(model, null_text), expected) > 1e-3


def test_the_two_modes_differ(models, prompt, null_text_patch, sample):
    model, null_text = models("sd15"), prompt(3)
    uniform, measured = (sample(null_text_patch(model, null_text, mode), null_text) for mode in MODES)
    assert relative(uniform, measured) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_lora_before_and_after_the_patch(models, prompt, null_text_patch, lora, sample, mode):
    model, null_text = models("sd15"), prompt(3)
    before = sample(null_text_patch(lora(model), null_text, mode), null_text)
    after = sample(lora(null_text_patch(model, null_text, mode)), null_text)
    assert torch.equal(before, after)
    plain = sample(null_text_patch(model, null_text, mode), null_text)
    assert relative(before, plain) > 1e-3
    if mode == "uniform_mean":
        assert relative(before, sample(lora(model), mean_token(null_text))) < REORDERED


@pytest.mark.parametrize("only", ["attn2.to_v", "attn2.to_out", "attn1"])
def test_attention_mean_is_measured_again_when_weights_change(
    models, load_unet, with_biases, prompt, null_text_patch, lora, sample, only
):
    """One patch on one module, weights changing under it, against a fresh module that never saw other weights."""
    model, null_text = models("sd15"), prompt(3)
    patched = null_text_patch(model, null_text, "attention_mean")
    first = sample(patched, null_text)
    changed = sample(lora(patched, only=only), null_text)
    fresh = load_unet(with_biases("sd15"))
    assert torch.equal(changed, sample(null_text_patch(lora(fresh, only=only), null_text, "attention_mean"), null_text))
    assert relative(changed, first) > 1e-4
    assert torch.equal(sample(patched, null_text), first)


def test_attention_mean_sees_weights_written_in_place(models, prompt, null_text_patch, sample):
    """Weight hooks write into the parameters themselves: no parameter is replaced, no patch id changes."""
    model, null_text = models("sd15"), prompt(3)
    patched = null_text_patch(model, null_text, "attention_mean")
    first = sample(patched, null_text)
    block = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0]
    bias, kept = block.attn2.to_out[0].bias, block.attn2.to_out[0].bias.clone()
    try:
        bias.data.copy_(kept + 1)
        changed = sample(patched, null_text)
        assert torch.equal(changed, sample(null_text_patch(model, null_text, "attention_mean"), null_text))
    finally:
        bias.data.copy_(kept)
    assert relative(changed, first) > 1e-3
    assert torch.equal(sample(patched, null_text), first)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_attention_mean_is_the_mean_over_hand_made_evaluations(models, prompt, family):
    from comfyui_gcfg.nodes.runtime import null_text as runtime

    model, null_text = models(family), prompt(3, WIDTHS[family])
    base, unet = model.model, model.model.diffusion_model
    outputs, handles = {}, []
    names = [name for name, _ in unet.named_modules() if name.rsplit(".", 2)[-2:-1] == ["transformer_blocks"]]
    for name in names:
        attn2 = unet.get_submodule(name).attn2
        hook = lambda layer, args, output, name=name: outputs.setdefault(name, []).append(output.mean(dim=(0, 1)))  # noqa: E731
        handles.append(attn2.register_forward_hook(hook))
    generator = torch.Generator().manual_seed(0)
    tokens, options = null_text[0]
    kwargs = {}
    if family == "sdxl":
        kwargs["y"] = base.encode_adm(pooled_output=options["pooled_output"], width=1024, height=1024)
    for timestep in (874.125, 624.375, 374.625, 124.875):  # 7/8, 5/8, 3/8 and 1/8 of 999
        for _ in range(2):
            latent = torch.randn(1, 4, 8, 8, generator=generator)
            # Through apply_model, which scales its input by 1 / sqrt(1 + sigma^2): what arrives has unit variance.
            sigma = base.model_sampling.sigma(torch.tensor([timestep]))
            base.apply_model(latent * (sigma**2 + 1).sqrt(), sigma, c_crossattn=tokens, **kwargs)
    for handle in handles:
        handle.remove()
    expected = {name: torch.stack(found).mean(dim=0) for name, found in outputs.items()}
    assert all(len(found) == 8 for found in outputs.values())

    patch = runtime.NullText(tokens, options["pooled_output"], tuple(names), "attention_mean")
    got = patch.features(base, torch.device("cpu"))
    assert list(got) == names
    for name in names:
        assert relative(got[name], expected[name]) < 1e-4


def test_attention_mean_is_measured_on_latents_of_32_by_32(models, prompt, null_text_patch, sample, monkeypatch):
    """The first of the evaluations is looked at and ended: at this size the eight of them take seconds."""

    class Seen(Exception):
        pass

    def look(unet, args):
        raise Seen(tuple(args[0].shape))

    monkeypatch.undo()
    model, null_text = models("sd15"), prompt(3)
    handle = model.model.diffusion_model.register_forward_pre_hook(look)
    try:
        with pytest.raises(Seen) as seen:
            sample(null_text_patch(model, null_text, "attention_mean"), null_text)
    finally:
        handle.remove()
    assert seen.value.args == ((1, 4, 32, 32),)


def test_attention_mean_is_measured_once_for_a_run(models, prompt, null_text_patch, sample, count_forwards):
    model, null_text = models("sd15"), prompt(3)
    patched = null_text_patch(model, null_text, "attention_mean")
    calls = count_forwards(model)
    sample(patched, null_text)
    assert len(calls) == 8 + 2
    sample(patched, null_text)
    assert len(calls) == 8 + 2 + 2


class Refuses(torch.nn.Module):
    """A layer that must not run; it keeps the weight that ComfyUI's bookkeeping reads."""

    def __init__(self, layer):
        super().__init__()
        self.weight = layer.weight

    def forward(self, *args, **kwargs):
        raise AssertionError("a removed layer ran")


def test_the_removed_layers_do_not_run(models, prompt, null_text_patch, sample):
    """q, k and norm2 never run; v and out see one vector for each call, the mean token, and never the image."""
    model, null_text = models("sd15"), prompt(3)
    patched = null_text_patch(model, null_text)
    expected = sample(patched, null_text)
    blocks = [m for m in model.model.diffusion_model.modules() if type(m).__name__ == "BasicTransformerBlock"]
    kept = [(block, block.attn2.to_q, block.attn2.to_k, block.norm2) for block in blocks]
    seen, handles = [], []
    try:
        for block in blocks:
            block.attn2.to_q, block.attn2.to_k = Refuses(block.attn2.to_q), Refuses(block.attn2.to_k)
            block.norm2 = Refuses(block.norm2)
            for layer in (block.attn2, block.attn2.to_v, block.attn2.to_out[0]):
                handles.append(layer.register_forward_pre_hook(lambda m, args: seen.append((m, tuple(args[0].shape)))))
        got = sample(patched, null_text)
        with pytest.raises(AssertionError, match="a removed layer ran"):
            sample(model, null_text)
    finally:
        for block, to_q, to_k, norm2 in kept:
            block.attn2.to_q, block.attn2.to_k, block.norm2 = to_q, to_k, norm2
        for handle in handles:
            handle.remove()
    assert torch.equal(got, expected)
    steps = 2
    ran = seen[: 2 * len(blocks) * steps]
    assert {shape[:2] for _, shape in ran} == {(1, 1)}
    assert not any(module is block.attn2 for module, _ in ran for block in blocks)


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_and_a_patched_clone_do_not_disturb_each_other(models, prompt, null_text_patch, sample, mode):
    model, null_text = models("sd15"), prompt(3)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    plain, patched = sample(model, null_text), sample(null_text_patch(model, null_text, mode), null_text)
    clone = null_text_patch(model, null_text, mode)
    for _ in range(3):
        assert torch.equal(sample(clone, null_text), patched)
        assert torch.equal(sample(model, null_text), plain)
        assert torch.equal(sample(clone.clone(), null_text), patched)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert relative(plain, patched) > 1e-3


def test_plain_and_patched_in_one_run(models, with_biases, prompt, null_text_patch, gcfg, latent, load_unet):
    """One sampling with the prior as base and its null-text clone as a term, against two separate loads."""
    from comfyui_gcfg.gcfg.terms import GuidanceTerm

    model, null_text = models("sd15"), prompt(3)
    other = load_unet(with_biases("sd15"))
    results = [
        gcfg(model, prompt(1), [GuidanceTerm(2.0, model=null_text_patch(term, null_text))], latent)
        for term in (model, other)
    ]
    assert torch.equal(*results)
    assert relative(results[0], gcfg(model, prompt(1), [GuidanceTerm(2.0, conditioning=null_text)], latent)) > 1e-3


def test_an_error_inside_the_evaluation_restores_the_blocks(models, prompt, null_text_patch, sample):
    model, null_text = models("sd15"), prompt(3)
    plain, modules = sample(model, null_text), list(model.model.modules())
    out = model.model.diffusion_model.out
    handle = out.register_forward_pre_hook(lambda *args: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            sample(null_text_patch(model, null_text), null_text)
    finally:
        handle.remove()
    assert all(a is b for a, b in zip(modules, model.model.modules(), strict=True))
    assert torch.equal(sample(model, null_text), plain)


def test_the_patch_can_be_removed(models, prompt, null_text_patch, sample):
    from comfyui_gcfg.nodes.runtime.null_text import remove_null_text

    model, null_text = models("sd15"), prompt(3)
    plain = sample(model, null_text)
    patched = null_text_patch(model, null_text)
    assert not torch.equal(sample(patched, null_text), plain)
    assert torch.equal(sample(remove_null_text(patched), null_text), plain)
    assert "model_function_wrapper" not in remove_null_text(patched).model_options
    assert torch.equal(sample(remove_null_text(model), null_text), plain)


def test_a_second_patch_replaces_the_first(models, prompt, null_text_patch, sample, count_forwards):
    model = models("sd15")
    twice = null_text_patch(null_text_patch(model, prompt(3), "attention_mean"), prompt(4))
    calls = count_forwards(model)
    got = sample(twice, prompt(3))
    assert len(calls) == 2, "the first patch must not measure"
    assert torch.equal(got, sample(null_text_patch(model, prompt(4)), prompt(3)))


def test_another_models_wrapper_still_runs(models, prompt, null_text_patch, sample):
    """model_function_wrapper is the hook every version has; the patch may come before or after it."""
    model, null_text = models("sd15").clone(), prompt(3)
    sizes = []

    def wrapper(apply_model, args):
        sizes.append(args["input"].shape[0])
        return apply_model(args["input"], args["timestep"], **args["c"]) * 0.5

    model.set_model_unet_function_wrapper(wrapper)
    patched = null_text_patch(model, null_text)
    expected = sample(model, mean_token(null_text))
    sizes.clear()
    assert relative(sample(patched, null_text), expected) < REORDERED
    assert sizes == [2, 2]
    plain = sample(model, null_text)
    assert not torch.equal(plain, expected)
    from comfyui_gcfg.nodes.runtime.null_text import remove_null_text

    assert torch.equal(sample(remove_null_text(patched), null_text), plain)


def test_a_cross_attention_replacement_says_why_it_cannot_work(models, prompt, null_text_patch, sample):
    """IPAdapter replaces attn2 of a block; a null-text block has none."""
    model, null_text = models("sd15").clone(), prompt(3)
    model.set_model_attn2_replace(lambda n, context, value, extra: n, "input", 1)
    said = refusal(sample, null_text_patch(model, null_text), null_text)
    assert said.startswith("Null-text model: a patch asked for attn2.to_q, expected by IPAdapter")


def test_an_output_patch_gets_the_shape_it_expects(models, prompt, null_text_patch, sample):
    model, null_text = models("sd15").clone(), prompt(3)
    shapes = []
    model.set_model_attn2_output_patch(lambda n, extra: shapes.append(tuple(n.shape)) or n)
    sample(null_text_patch(model, null_text), null_text)
    assert set(shapes) == {(2, 64, NARROW)}


def test_the_weights_stay_unreferenced_by_the_patch(load_unet, weights, prompt, null_text_patch, sample, comfy):
    """A patch must not keep a model alive: ComfyUI frees models by letting them go."""
    import gc
    import weakref

    model, null_text = load_unet(weights("sd15", 0)), prompt(3)
    patched = null_text_patch(model, null_text, "attention_mean")
    sample(patched, null_text)
    sample(patched, null_text)
    unet = weakref.ref(model.model.diffusion_model)
    from comfyui_gcfg.nodes.runtime.null_text import KEY

    if hasattr(patched, "get_wrappers"):
        wrapper = patched.get_wrappers("apply_model", KEY)[0]
    else:
        wrapper = patched.model_options["model_function_wrapper"]
    comfy.model_management.unload_all_models()
    del model, patched
    gc.collect()
    assert unet() is None
    assert wrapper is not None


NO_TEXT = "connect a CLIP Text Encode node with no text."
OWN_CLIP = "encode the empty prompt with this model's own CLIP."


@pytest.mark.parametrize(
    ("family", "tokens", "message"),
    [
        ("sd21", [(1, 77, 768)], f"is 768 wide, expected 1024 for this model; {OWN_CLIP}"),
        ("sd15", [], f"holds 0 prompts, expected the one empty prompt; {NO_TEXT}"),
        ("sd15", [(1, 77, 768)] * 2, f"holds 2 prompts, expected the one empty prompt; {NO_TEXT}"),
        ("sd15", [(77, 768)], f"has the shape (77, 768), expected (1, tokens, width); {NO_TEXT}"),
        (
            *("sdxl", [(1, 77, 2048)]),
            f"has no pooled_output, expected one for the mode attention_mean with this model; {OWN_CLIP}",
        ),
    ],
    ids=["width", "empty", "combined", "flat", "no-pooled"],
)
def test_bad_input(models, null_text_patch, family, tokens, message):
    conditioning = [[torch.zeros(shape), {}] for shape in tokens]
    said = refusal(null_text_patch, models(family), conditioning, "attention_mean")
    assert said == f"Null-Text Patch: null_text {message}"


def test_a_model_without_cross_attention_blocks(models, prompt, null_text_patch):
    model = models("sd15").clone()
    model.add_object_patch("diffusion_model", torch.nn.Sequential(torch.nn.Linear(4, 4)))
    assert refusal(null_text_patch, model, prompt(3)) == (
        "Null-Text Patch: model (Sequential) has no UNet with one cross-attention in each transformer block, expected "
        "an SD1.x, SD2.x or SDXL model."
    )
