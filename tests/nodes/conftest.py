"""A ComfyUI in this process, on the CPU, and small models of it."""

import contextlib
import gc
import importlib.util
import sys

import pytest
import torch
from comfyui_gcfg.testkit.checks import bent_prior
from comfyui_gcfg.testkit.inprocess import import_comfyui
from comfyui_gcfg.testkit.layouts import CHANNELS, NARROW


@pytest.fixture(scope="session", autouse=True)
def comfy(comfyui_path):
    """Import ComfyUI as its own launcher would, on the CPU; its loaders know SD at any width."""
    comfy = import_comfyui(comfyui_path, cpu=True)
    for family in comfy.supported_models.models:
        if family.unet_config.get("model_channels") == CHANNELS:
            del family.unet_config["model_channels"]
    return comfy


@pytest.fixture(scope="module", autouse=True)
def let_go_of_models(comfy):
    """The oldest ComfyUI keeps every model it ever loaded; gigabytes, over a whole suite."""
    yield
    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.fixture(scope="session")
def load_unet(comfy):
    """Load a bare UNet state dict through ComfyUI's own loader."""

    def load(state_dict):
        state_dict = {key: value.clone() for key, value in state_dict.items()}  # loaders empty the dict they are given
        name = "load_diffusion_model_state_dict"
        loader = getattr(comfy.sd, name) if hasattr(comfy.sd, name) else comfy.sd.load_unet_state_dict
        return loader(state_dict)

    return load


@pytest.fixture(scope="session")
def weights():
    """State dicts of small UNets by (family, seed), made once."""
    from comfyui_gcfg.testkit.models import unet_state_dict

    made = {}

    def get(family="sd15", seed=0):
        if (family, seed) not in made:
            made[family, seed] = unet_state_dict(family, seed, channels=NARROW)
        return made[family, seed]

    return get


@pytest.fixture(scope="session")
def prior(load_unet, weights):
    """An SD1.5-layout model; tests must leave it as they found it."""
    return load_unet(weights("sd15", 0))


@pytest.fixture(scope="session")
def concept(load_unet, weights):
    """A second model of the same family with other weights."""
    return load_unet(weights("sd15", 1))


@pytest.fixture(scope="session")
def lora(comfy, weights):
    """A clone of a model with LoRA number `seed`, made as the stock loader node makes it."""
    from comfyui_gcfg.testkit.models import lora_state_dict

    def add(model, seed=1):
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora_state_dict(weights(), seed), 1.0, 0.0)
        assert patched.patches, "the LoRA fits no weight"
        return patched

    return add


@pytest.fixture(scope="session")
def prompt():
    """A CONDITIONING by seed, as CLIPTextEncode makes it."""

    def make(seed, width=768, **options):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(1, 77, width, generator=generator)
        pooled = torch.randn(1, 1280, generator=generator)
        return [[tokens, {"pooled_output": pooled, **options}]]

    return make


@pytest.fixture
def latent():
    """An empty latent batch of 8x8."""
    return {"samples": torch.zeros(1, 4, 8, 8)}


@pytest.fixture(autouse=True)
def inference_mode():
    """ComfyUI executes nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def stock(comfy):
    """The stock KSampler's result."""
    nodes = sys.modules["nodes"]

    def sample(
        model, positive, negative, latent, cfg=7.5, seed=1, steps=4, sampler="euler", scheduler="normal", **more
    ):
        return nodes.common_ksampler(model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, **more)[
            0
        ]["samples"]

    if not hasattr(nodes, "common_ksampler"):
        nodes.common_ksampler = importlib.import_module("comfy.nodes.base_nodes").common_ksampler
    return sample


@pytest.fixture(scope="session")
def gcfg(comfy):
    """The result of our KSampler node."""
    from comfyui_gcfg.nodes.sampling import GCFGKSampler

    def sample(model, unconditional, terms, latent, seed=1, steps=4, sampler="euler", scheduler="normal", denoise=1.0):
        node = GCFGKSampler()
        return node.sample(model, seed, steps, sampler, scheduler, unconditional, latent, denoise, term_1=tuple(terms))[
            0
        ]["samples"]

    return sample


@pytest.fixture(scope="session")
def extra(comfy):
    """A module of ComfyUI's own further nodes; None where this version has none of the name."""

    def find(name):
        for package in ("comfy_extras", "comfy_extras.nodes"):
            with contextlib.suppress(ModuleNotFoundError):
                return importlib.import_module(f"{package}.{name}")
        return None

    return find


@pytest.fixture(scope="session")
def custom_advanced(comfy, extra):
    """The latent of the stock SamplerCustomAdvanced with a guider: Euler, the schedule "normal"."""
    custom = extra("nodes_custom_sampler")

    def sample(guider, latent, steps, seed=1):
        sampling = guider.model_patcher.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
        noise, euler = custom.Noise_RandomNoise(seed), comfy.samplers.sampler_object("euler")
        out = custom.SamplerCustomAdvanced().sample(noise, guider, euler, sigmas, latent)
        return getattr(out, "result", out)[0]

    return sample


@pytest.fixture(scope="session")
def gcfg_model(comfy):
    """A model with terms on it, by our node, for whatever samples it."""
    from comfyui_gcfg.nodes.model import GCFGModel
    from comfyui_gcfg.nodes.runtime import versions

    def make(model, *terms):
        if not versions.HAS_HOOKS:
            pytest.skip("this ComfyUI has no wrappers around a run")
        return GCFGModel().make(model, term_1=terms)[0]

    return make


@pytest.fixture
def count_forwards():
    """Record (module id, batch) of every UNet call."""
    calls, handles = [], []

    def watch(*patchers):
        for patcher in patchers:
            unet = patcher.model.diffusion_model
            handles.append(
                unet.register_forward_pre_hook(lambda module, args: calls.append((id(module), args[0].shape[0])))
            )
        return calls

    yield watch
    for handle in handles:
        handle.remove()


@pytest.fixture
def calls():
    """What the exact models were asked: (name, batch)."""
    return []


@pytest.fixture
def exact(calls):
    """Models whose prediction is elementwise, so that a row's numbers do not depend on the batch that it is in."""

    def make(patcher, name, offset):
        def denoise(apply_model, args):
            x, sigma = args["input"], args["timestep"].reshape(-1, 1, 1, 1)
            calls.append((name, len(x)))
            return bent_prior(x, sigma, offset + args["c"]["c_crossattn"][:, :1, :1, None])

        clone = patcher.clone()
        clone.set_model_unet_function_wrapper(denoise)
        return clone

    return make


@pytest.fixture
def base(exact, prior):
    """The sampler's own model of those whose prediction is elementwise."""
    return exact(prior, "prior", 0.0)
