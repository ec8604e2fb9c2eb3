"""The shared workflows of large models, run by ComfyUI's own executor with small models for their files."""

import asyncio
import importlib
import inspect
import json
import runpy
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_gcfg.testkit.checks import relative
from comfyui_gcfg.testkit.workflow import to_prompt

FAMILIES = runpy.run_path(str(Path(__file__).with_name("zoo.py")))["FAMILIES"]
MODELS = {  # file: (family, seed)
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": ("wan21", 0),
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": ("wan21", 1),
    "ideogram4_fp8_scaled.safetensors": ("ideogram4", 0),
    "ideogram4_unconditional_fp8_scaled.safetensors": ("ideogram4", 1),
    "z_image_bf16.safetensors": ("zimage", 0),
    "ltx-2-19b-dev-fp8.safetensors": ("ltxav", 0),
    "flux1-dev.safetensors": ("flux", 0),
}
SMALL = {  # by node: what is smaller than in the file
    "EmptyHunyuanLatentVideo": {"width": 32, "height": 32, "length": 9},
    "EmptyFlux2LatentImage": {"width": 64, "height": 64},
    "EmptySD3LatentImage": {"width": 64, "height": 64},
    "EmptyLTXVLatentVideo": {"width": 64, "height": 64, "length": 9},
    "LTXVEmptyLatentAudio": {"frames_number": 9},
}
PACK = ("guidance", "sampling")
# A latent that is handed from one sampler to the next is scaled back to a clean one and noised again, in float32.
HANDED_ON = 1e-5
REORDERED = 1e-5  # the same predictions added in another order, over 20 steps


class Text:
    """A CLIP whose conditioning depends on the text alone."""

    def __init__(self, family):
        self.family = family

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        return self.family.conditioning(zlib.crc32(text.encode()) % 1000)


class Decoder:
    """A VAE for pictures, video and audio that shows the first channels of a latent."""

    latent_channels = 8
    latent_frequency_bins = 16
    sample_rate = output_sample_rate = 16000

    @property
    def first_stage_model(self):  # older versions look for the same on the VAE itself
        return self

    def num_of_latents_from_frames(self, frames, rate):
        return frames

    def decode(self, latent):
        assert latent.isfinite().all()
        if latent.shape[1] == self.latent_channels:  # audio: two channels of samples
            return latent[:, :2].flatten(2).repeat(1, 1, 100).movedim(1, -1).tanh()
        return latent[:, :3].sigmoid().movedim(1, -1).repeat_interleave(8, -3).repeat_interleave(8, -2)

    def decode_tiled(self, latent, **tiles):
        return self.decode(latent)

    def temporal_compression_decode(self):
        return 8

    def spacial_compression_decode(self):
        return 32


def loader(makes, kinds, names):
    """A node class in place of a loader, which takes any file of the workflow."""
    inputs = {name: ("*",) for name in names}  # any value

    def load(self, **files):
        return makes(next(iter(files.values())))

    body = {
        "INPUT_TYPES": classmethod(lambda cls: {"required": inputs}),
        "RETURN_TYPES": kinds,
        "FUNCTION": "load",
        "CATEGORY": "test",
        "load": load,
    }
    return type("Loader", (), body)


class Keep:
    """Keeps a latent for the test."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "keep"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",)}}

    def keep(self, latent):
        return {"ui": {"kept": [latent["samples"]]}}


@pytest.fixture(scope="module")
def mappings(comfy):
    """Every node class of this ComfyUI, and the pack's."""
    nodes = sys.modules["nodes"]
    found = dict(nodes.NODE_CLASS_MAPPINGS)
    if not hasattr(nodes, "init_builtin_extra_nodes") or not inspect.iscoroutinefunction(
        nodes.init_builtin_extra_nodes
    ):
        pytest.skip("this ComfyUI has none of the models")
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    for name in PACK:
        module = importlib.import_module(f"comfyui_gcfg.nodes.{name}")
        nodes.NODE_CLASS_MAPPINGS.update({kind: cls for kind, _, cls in module.NODES})
    yield nodes.NODE_CLASS_MAPPINGS
    nodes.NODE_CLASS_MAPPINGS.clear()
    nodes.NODE_CLASS_MAPPINGS.update(found)


def described(cls):
    """What /object_info says of a class, as far as it concerns inputs."""
    if hasattr(cls, "GET_NODE_INFO_V1"):
        return cls.GET_NODE_INFO_V1()
    inputs = cls.INPUT_TYPES()
    return {"input": inputs, "input_order": {group: list(entries) for group, entries in inputs.items()}}


@pytest.fixture
def load(mappings, root):
    """A shared workflow in API form, small."""

    def make(name):
        workflow = json.loads((root / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        kinds = {node["type"] for node in workflow["nodes"]} - {"Note"}
        missing = sorted(kinds - set(mappings))
        if missing:
            pytest.skip(f"{name}: this ComfyUI has no node {', '.join(missing)}")
        prompt = to_prompt(workflow, {kind: described(mappings[kind]) for kind in kinds})
        for entry in prompt.values():
            entry["inputs"].update(SMALL.get(entry["class_type"], {}))
        return prompt

    return make


@pytest.fixture
def models(comfy):
    """The small models by the names of the files that they stand in for."""
    made = {}

    def get(file):
        if file not in made:
            name, seed = MODELS[file]
            try:
                made[file] = FAMILIES[name].model(seed)
            except LookupError as missing:
                pytest.skip(str(missing))
        return made[file]

    return get


@pytest.fixture
def run(mappings, models, monkeypatch, tmp_path):
    """Validate and execute a prompt; returns the streams of what its Keep nodes got, by their id."""
    execution = importlib.import_module("execution")
    sys.modules["folder_paths"].set_output_directory(str(tmp_path))

    def execute(prompt):
        files = [value for entry in prompt.values() for value in entry["inputs"].values() if isinstance(value, str)]
        family = next(FAMILIES[MODELS[file][0]] for file in files if file in MODELS)
        loaders = {
            "UNETLoader": (lambda file: (models(file),), ("MODEL",)),
            "CLIPLoader": (lambda file: (Text(family),), ("CLIP",)),
            "DualCLIPLoader": (lambda file: (Text(family),), ("CLIP",)),
            "VAELoader": (lambda file: (Decoder(),), ("VAE",)),
            "CheckpointLoaderSimple": (lambda file: (models(file), None, Decoder()), ("MODEL", "CLIP", "VAE")),
            "LTXAVTextEncoderLoader": (lambda file: (Text(family),), ("CLIP",)),
            "LTXVAudioVAELoader": (lambda file: (Decoder(),), ("VAE",)),
        }
        monkeypatch.setitem(mappings, "Keep", Keep)
        for entry in prompt.values():
            kind = entry["class_type"]
            if kind in loaders:
                monkeypatch.setitem(mappings, kind, loader(*loaders[kind], list(entry["inputs"])))
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("test", prompt, None))
        assert valid, (error, node_errors)
        server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *args: None)
        options = {"cache_args": {"lru": 0, "ram": 0, "ram_inactive": 0}}
        named = inspect.signature(execution.PromptExecutor).parameters
        executor = execution.PromptExecutor(server, **{name: options[name] for name in options.keys() & named})
        executor.execute(prompt, "test", {}, outputs)
        failed = [data for event, data in executor.status_messages if event == "execution_error"]
        assert executor.success, [(data["node_type"], data["exception_message"]) for data in failed]
        shown = executor.history_result["outputs"]
        return {node: streams(ui["kept"][0]) for node, ui in shown.items() if "kept" in ui}

    return execute


def streams(latent):
    return list(latent.unbind()) if getattr(latent, "is_nested", False) else [latent]


def node_of(prompt, kind):
    (node,) = [node for node, entry in prompt.items() if entry["class_type"] == kind]
    return node


def term_of(prompt, label):
    (node,) = [node for node, entry in prompt.items() if entry["inputs"].get("label") == label]
    return node


def keeping(prompt, source):
    """The prompt with a node that keeps a latent, and nothing behind it."""
    return {**prompt, "kept": {"class_type": "Keep", "inputs": {"latent": source}}}


def changed(prompt, node, **inputs):
    return {**prompt, node: {**prompt[node], "inputs": {**prompt[node]["inputs"], **inputs}}}


def of_outputs(prompt, sampler, **more):
    """Nodes without the sampler and what follows it, and others in its place."""
    behind = {sampler}
    while True:
        found = {
            node
            for node, entry in prompt.items()
            if any(isinstance(value, list) and value[0] in behind for value in entry["inputs"].values())
        }
        if found <= behind:
            break
        behind |= found
    return {**{node: entry for node, entry in prompt.items() if node not in behind}, **more}


def difference(a, b):
    """The largest, relative to the largest value."""
    assert all(torch.isfinite(part).all() and float(part.std()) > 0 for part in b)
    return max(relative(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("name", "sampler", "labels"),
    [
        # without its own negative term the first half still has the sampler's prediction, which is the same
        ("wan22-high-low-noise", "GCFGKSampler", ["high noise", "low noise", "low noise, negative"]),
        ("ideogram4-two-models", "SamplerCustomAdvanced", ["text", "text, at the end"]),
        ("zimage-text-and-style", "GCFGKSampler", ["subject", "style"]),
        ("ltx2-audio-video", "SamplerCustomAdvanced", ["scene", "sound"]),
        ("flux-negative-prompt", "SamplerCustomAdvanced", ["against the negative"]),
    ],
)
def test_runs_to_its_end_and_every_term_acts(load, run, tmp_path, name, sampler, labels):
    prompt = keeping(load(name), None)
    prompt["kept"]["inputs"]["latent"] = [node_of(prompt, sampler), 0]
    whole = run(prompt)["kept"]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1  # the picture or the video
    for label in labels:
        assert difference(run(changed(prompt, term_of(prompt, label), weight=0.0))["kept"], whole) > 1e-3


def test_wan_in_one_sampler_is_two_samplers_in_a_row(load, run, models, record_property):
    prompt = load("wan22-high-low-noise")
    sampler = node_of(prompt, "GCFGKSampler")
    calls = []
    for file, (name, seed) in MODELS.items():
        if name == "wan21":
            watch = models(file).model.diffusion_model
            watch.register_forward_pre_hook(lambda module, args, seed=seed: calls.append((seed, len(args[0]))))
    got = run(keeping(prompt, [sampler, 0]))["kept"]
    assert calls == [(0, 2)] * 10 + [(1, 2)] * 10  # each with the prompt and the negative prompt, and nothing else

    settings, term = prompt[sampler]["inputs"], {label: prompt[term_of(prompt, label)]["inputs"] for label in NOISE}
    common = {
        "noise_seed": settings["seed"],
        "steps": 20,
        "cfg": 3.5,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": term["high noise"]["conditioning"],
        "negative": term["high noise, negative"]["conditioning"],
    }

    def half(label, add_noise, latent, start, end, leftover):
        own = {"model": term[label]["model"], "add_noise": add_noise, "latent_image": latent}
        own |= {"start_at_step": start, "end_at_step": end, "return_with_leftover_noise": leftover}
        return {"class_type": "KSamplerAdvanced", "inputs": common | own}

    first = half("high noise", "enable", settings["latent_image"], 0, 10, "enable")
    second = half("low noise", "disable", ["first", 0], 10, 20, "disable")
    stock = of_outputs(prompt, sampler, first=first, second=second)
    calls.clear()
    expected = run(keeping(stock, ["second", 0]))["kept"]
    assert calls == [(0, 2)] * 10 + [(1, 2)] * 10
    record_property("difference", difference(got, expected))
    assert difference(got, expected) < HANDED_ON


NOISE = ("high noise", "high noise, negative", "low noise")


def test_ideogram_is_the_dual_model_guider(load, run):
    """With the template's CFG Override, which the workflow's second term stands for."""
    prompt = load("ideogram4-two-models")
    sampler, guider = node_of(prompt, "SamplerCustomAdvanced"), node_of(prompt, "GCFGGuider")
    got = run(keeping(prompt, [sampler, 0]))["kept"]
    term = prompt[term_of(prompt, "text")]["inputs"]
    override = {"model": term["model"], "cfg": 3.0, "start_percent": 0.7, "end_percent": 1.0}
    dual = {
        "model": ["override", 0],
        "model_negative": prompt[guider]["inputs"]["model"],
        "positive": term["conditioning"],
        "negative": prompt[guider]["inputs"]["unconditional"],
        "cfg": 7.0,
    }
    stock = {
        **prompt,
        guider: {"class_type": "DualModelGuider", "inputs": dual},
        "override": {"class_type": "CFGOverride", "inputs": override},
    }
    assert all(map(torch.equal, got, run(keeping(stock, [sampler, 0]))["kept"]))


def test_zimage_without_its_style_is_the_ksampler(load, run):
    prompt = load("zimage-text-and-style")
    sampler, subject = node_of(prompt, "GCFGKSampler"), term_of(prompt, "subject")
    without = changed(prompt, term_of(prompt, "style"), weight=0.0)
    got = run(keeping(without, [sampler, 0]))["kept"]
    settings = {name: value for name, value in prompt[sampler]["inputs"].items() if not name.startswith("term_")}
    settings["negative"] = settings.pop("unconditional")
    settings |= {"positive": prompt[subject]["inputs"]["conditioning"], "cfg": 4.0}
    stock = of_outputs(prompt, sampler, stock={"class_type": "KSampler", "inputs": settings})
    assert all(map(torch.equal, got, run(keeping(stock, ["stock", 0]))["kept"]))


def test_ltx_with_equal_streams_and_no_sound_term_is_stock_cfg(load, run):
    prompt = load("ltx2-audio-video")
    sampler, guider = node_of(prompt, "SamplerCustomAdvanced"), node_of(prompt, "GCFGGuider")
    scene, sound = term_of(prompt, "scene"), term_of(prompt, "sound")
    without = changed(changed(prompt, sound, weight=0.0), scene, stream_weights="")
    got = run(keeping(without, [sampler, 0]))["kept"]
    of = prompt[guider]["inputs"]
    inputs = {
        "model": of["model"],
        "positive": prompt[scene]["inputs"]["conditioning"],
        "negative": of["unconditional"],
        "cfg": 4.0,
    }
    stock = {**prompt, guider: {"class_type": "CFGGuider", "inputs": inputs}}
    expected = run(keeping(stock, [sampler, 0]))["kept"]
    assert [part.ndim for part in expected] == [5, 4]
    assert all(map(torch.equal, got, expected))


def test_flux_against_a_negative_prompt_is_stock_cfg_of_one_more(load, run):
    """D + w (D - D_neg) = D_neg + (1 + w) (D - D_neg), at every step."""
    prompt = load("flux-negative-prompt")
    sampler, guider = node_of(prompt, "SamplerCustomAdvanced"), node_of(prompt, "GCFGGuider")
    term = term_of(prompt, "against the negative")
    got = run(keeping(changed(prompt, term, end_percent=1.0), [sampler, 0]))["kept"]
    inputs = {
        "model": prompt[guider]["inputs"]["model"],
        "positive": prompt[guider]["inputs"]["unconditional"],
        "negative": prompt[term]["inputs"]["relative_conditioning"],
        "cfg": 1.0 + prompt[term]["inputs"]["weight"],
    }
    stock = {**prompt, guider: {"class_type": "CFGGuider", "inputs": inputs}}
    assert difference(got, run(keeping(stock, [sampler, 0]))["kept"]) < REORDERED
