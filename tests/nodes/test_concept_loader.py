"""Load Concept UNet: every form, key naming and prefix, against the STOCK loader on the folded file."""

import inspect
import json
import logging
import struct
import sys

import pytest
import torch
from comfyui_gcfg.gcfg.concept_file import compact, fold
from comfyui_gcfg.gcfg.safetensors_file import read_header
from comfyui_gcfg.testkit.checks import refusal
from comfyui_gcfg.testkit.layouts import NARROW
from comfyui_gcfg.testkit.models import lora_state_dict
from safetensors.torch import save_file

WIDTHS = {"sd15": 768, "sd21": 1024, "sdxl": 2048}
FORMS = ["ordinary", "folded", "compact"]
PREFIXES = {"bare": "", "checkpoint": "model.diffusion_model."}


@pytest.fixture(scope="module")
def nodes(comfy):
    return sys.modules["nodes"]


@pytest.fixture
def folders(comfy, tmp_path):
    """Empty model folders, as ComfyUI's folder_paths knows them; yields (the UNet folder, the checkpoints folder)."""
    folder_paths = sys.modules["folder_paths"]
    kinds = [
        kind for kind in ("diffusion_models", "unet", "checkpoints") if kind in folder_paths.folder_names_and_paths
    ]
    kept = {}
    for kind in kinds:
        paths = folder_paths.folder_names_and_paths[kind][0]
        kept[kind] = (paths, list(paths))
        paths[:] = [str(tmp_path / kind)]
        (tmp_path / kind).mkdir()
    yield tmp_path / kinds[0], tmp_path / "checkpoints"
    for paths, before in kept.values():
        paths[:] = before


@pytest.fixture
def loader(comfy, folders):
    """The node; its pair of folders is empty."""
    from comfyui_gcfg.nodes.concept import GCFGLoadConceptUNet

    return lambda name, weight_dtype="default": GCFGLoadConceptUNet().load(name, weight_dtype)[0]


@pytest.fixture(scope="module")
def constants(weights):
    def get(family):
        generator = torch.Generator().manual_seed(5)
        names = [key.removesuffix(".norm2.bias") for key in weights(family) if key.endswith(".norm2.bias")]
        return {name: torch.randn(NARROW, generator=generator) for name in names}

    return get


@pytest.fixture(scope="module")
def diffusers_names(comfy, load_unet, weights):
    """LDM -> diffusers names by ComfyUI's own table for this layout, which none of our code reads."""
    made = {}

    def get(family):
        if family not in made:
            config = load_unet(weights(family)).model.model_config.unet_config
            table = {ldm: name for name, ldm in comfy.utils.unet_to_diffusers(dict(config)).items()}
            for ldm, name in list(table.items()):
                if ldm.endswith("attn2.to_v.weight"):
                    table[ldm.replace("to_v.weight", "null_text_feature")] = name.replace(
                        "to_v.weight", "null_text_feature"
                    )
            made[family] = table
        return made[family]

    return get


@pytest.fixture(scope="module")
def state_dict(weights, constants, diffusers_names):
    def make(family, form="ordinary", naming="LDM", prefix=""):
        sd = weights(family)
        if form != "ordinary":
            sd = fold(sd, constants(family))
        if form == "compact":
            sd = compact(sd)
        if naming == "diffusers":
            sd = {diffusers_names(family)[key]: value for key, value in sd.items()}
        sd = {prefix + key: value for key, value in sd.items()}
        return sd | {"first_stage_model.quant_conv.bias": torch.zeros(8)} if prefix else sd

    return make


@pytest.fixture
def evaluate(prompt):
    """One evaluation of a model as the samplers make it."""

    def run(patcher, family, text=1):
        model = patcher.model
        generator = torch.Generator().manual_seed(9)
        x, sigma = torch.randn(2, 4, 8, 8, generator=generator) * 5, torch.tensor([4.9, 0.7])
        tokens = prompt(text, WIDTHS[family])[0][0]
        extra = {}
        if family == "sdxl":
            pooled = prompt(1, WIDTHS[family])[0][1]["pooled_output"]
            extra["y"] = model.encode_adm(pooled_output=pooled).repeat(2, 1)
        return model.apply_model(x, sigma, c_crossattn=tokens.repeat(2, 1, 1), **extra)

    return run


@pytest.fixture(scope="module")
def stock_outputs():
    return {}


def cases():
    """Everything for SD1.x; for the larger families each form and naming once, the prefixes in turn."""
    for form in FORMS:
        for naming in ("LDM", "diffusers"):
            for where in PREFIXES:
                yield "sd15", form, naming, where
            yield "sd21", form, naming, "bare" if naming == "diffusers" else "checkpoint"
        yield "sdxl", form, "diffusers" if form == "compact" else "LDM", "checkpoint"


@pytest.mark.parametrize(("family", "form", "naming", "where"), list(cases()))
def test_every_form_naming_and_prefix(
    loader, folders, state_dict, load_unet, evaluate, stock_outputs, caplog, family, form, naming, where
):
    kind = "ordinary" if form == "ordinary" else "null-text"
    if (family, kind) not in stock_outputs:
        stock_outputs[family, kind] = evaluate(
            load_unet(state_dict(family, "ordinary" if kind == "ordinary" else "folded")), family
        )
    folder = folders[where == "checkpoint"]
    save_file(state_dict(family, form, naming, PREFIXES[where]), folder / "model.safetensors")
    with caplog.at_level(logging.INFO):
        model = loader("model.safetensors")
    assert torch.equal(evaluate(model, family), stock_outputs[family, kind])
    ignores_text = torch.equal(evaluate(model, family, text=2), stock_outputs[family, kind])
    assert ignores_text == (kind == "null-text")

    keys = list(model.model.diffusion_model.state_dict())
    blocks = sum(key.endswith(".norm3.bias") for key in keys)
    place = f"below {PREFIXES[where]!r}" if PREFIXES[where] else "bare"
    line = (
        f"Load Concept UNet: unet_name 'model.safetensors': {form} UNet, {naming} keys {place}, "
        f"{blocks} transformer blocks; "
    )
    if form == "ordinary":
        assert line + "loaded as it is" in caplog.messages
        return
    assert not [key for key in keys if ".attn2.to_" in key or ".norm2." in key]
    assert sum(key.endswith("attn2.null_text_feature") for key in keys) == blocks
    width = WIDTHS[family]
    # q, out; k, v; bias, norm2, constant
    parameters = blocks * (2 * NARROW * NARROW + 2 * NARROW * width + NARROW + 2 * NARROW - NARROW)
    mebibytes = parameters * 4 / 2**20
    assert (
        line + f"null-text, freed {parameters:,} parameters of unused attention ({mebibytes:.1f} MiB)"
        in caplog.messages
    )


def test_the_freed_bytes_leave_comfyui_s_accounting(loader, folders, state_dict, load_unet, comfy):
    save_file(state_dict("sd15", "folded"), folders[0] / "model.safetensors")
    model, stock = loader("model.safetensors"), load_unet(state_dict("sd15", "folded"))
    dead = sum(v.numel() * 4 for k, v in state_dict("sd15").items() if ".attn2." in k or ".norm2." in k)
    kept = sum(v.numel() * 4 for k, v in state_dict("sd15", "compact").items() if "null_text" in k)
    assert stock.model_size() - model.model_size() == dead - kept
    assert model.model_size() == comfy.model_management.module_size(model.model)
    assert model.clone().model_size() == model.model_size()


def test_a_half_precision_file_keeps_its_bytes(loader, folders, state_dict, load_unet, evaluate):
    """Weights and constants of a float16 file, against the stock loader on the same file."""
    sd = {key: value.half() for key, value in state_dict("sd15", "folded").items()}
    save_file(sd, folders[0] / "model.safetensors")
    model, stock = loader("model.safetensors"), load_unet(sd)
    assert torch.equal(evaluate(model, "sd15"), evaluate(stock, "sd15"))
    ours, theirs = model.model.diffusion_model, stock.model.diffusion_model
    assert ours.dtype == theirs.dtype
    assert {p.dtype for n, p in ours.named_parameters() if "null_text" not in n} == {
        p.dtype for p in theirs.parameters()
    }


def test_weight_dtype_offers_what_the_stock_node_offers(nodes, folders):
    from comfyui_gcfg.nodes.concept import GCFGLoadConceptUNet

    stock = nodes.UNETLoader.INPUT_TYPES()["required"].get("weight_dtype", (["default"],))[0]
    assert GCFGLoadConceptUNet.INPUT_TYPES()["required"]["weight_dtype"][0] == stock


def test_weight_dtype_means_what_the_stock_node_means(nodes, loader, folders, state_dict, evaluate):
    save_file(state_dict("sd15"), folders[0] / "prior.safetensors")
    save_file(state_dict("sd15", "compact"), folders[0] / "concept.safetensors")
    options = nodes.UNETLoader.INPUT_TYPES()["required"].get("weight_dtype", (["default"],))[0]
    for option in options:
        takes_dtype = "weight_dtype" in inspect.signature(nodes.UNETLoader.load_unet).parameters
        stock = nodes.UNETLoader().load_unet("prior.safetensors", *([option] if takes_dtype else []))[0]
        prior, concept = loader("prior.safetensors", option), loader("concept.safetensors", option)
        theirs = {name: p.dtype for name, p in stock.model.diffusion_model.named_parameters()}
        for model in (prior, concept):
            ours = {name: p.dtype for name, p in model.model.diffusion_model.named_parameters()}
            shared = ours.keys() & theirs.keys()
            assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
            assert model.model.manual_cast_dtype == stock.model.manual_cast_dtype
            assert (
                model.model.model_config.optimizations == stock.model.model_config.optimizations
                if takes_dtype
                else True
            )
        assert torch.equal(evaluate(prior, "sd15"), evaluate(stock, "sd15"))
        assert torch.isfinite(evaluate(concept, "sd15")).all()
        if option != "default":
            assert any(p.dtype.itemsize == 1 for p in concept.model.diffusion_model.parameters())


def test_files_of_both_folders_are_listed(folders):
    from comfyui_gcfg.nodes.concept import GCFGLoadConceptUNet

    unets, checkpoints = folders
    for path in (
        unets / "a.safetensors",
        unets / "old.ckpt",
        checkpoints / "b.safetensors",
        checkpoints / "a.safetensors",
    ):
        path.write_bytes(b"")
    listed = GCFGLoadConceptUNet.INPUT_TYPES()["required"]["unet_name"][0]
    assert sorted(listed) == ["a.safetensors", "b.safetensors", "old.ckpt"]
    from comfyui_gcfg.nodes.concept import find_model

    assert find_model("a.safetensors") == str(unets / "a.safetensors"), "a name in both folders means the UNet"
    assert find_model("b.safetensors") == str(checkpoints / "b.safetensors")


def test_a_file_in_a_subfolder(folders, loader, state_dict, evaluate):
    (folders[0] / "cats").mkdir()
    save_file(state_dict("sd15", "compact"), folders[0] / "cats" / "v1.safetensors")
    assert loader("cats/v1.safetensors").model_size() > 0


def test_sampling_with_a_lora_and_a_clone(loader, folders, state_dict, stock, prompt, latent, comfy):
    """A LoRA acts on what is left; its attn2 part has nothing to act on, and neither breaks the other."""
    import importlib

    loras = importlib.import_module("comfy.lora")
    save_file(state_dict("sd15", "compact"), folders[0] / "model.safetensors")
    model = loader("model.safetensors")
    plain = stock(model, prompt(1), prompt(2), latent)
    file = lora_state_dict(state_dict("sd15"), 1)
    patched = model.clone()
    added = patched.add_patches(loras.load_lora(file, loras.model_lora_keys_unet(model.model, {})), 1.0)
    assert added
    assert not [key for key in added if "attn2" in key]
    with_lora = stock(patched, prompt(1), prompt(2), latent)
    assert (with_lora - plain).abs().max() > 1e-3
    assert torch.equal(stock(model, prompt(1), prompt(2), latent), plain)


def test_partly_loaded(loader, folders, state_dict, evaluate):
    """Low VRAM: most weights stay where they are and are cast in each call, and so is the constant."""
    save_file(state_dict("sd15", "compact"), folders[0] / "model.safetensors")
    model = loader("model.safetensors")
    expected = evaluate(model, "sd15")
    cpu = torch.device("cpu")
    if hasattr(model, "patch_model_lowvram"):
        model.patch_model_lowvram(cpu, lowvram_model_memory=2**20)
    else:
        model.load(cpu, lowvram_model_memory=2**20)
    try:
        cast = [m for m in model.model.modules() if getattr(m, "prev_comfy_cast_weights", None) is not None]
        assert cast, "nothing was left unloaded"
        assert torch.equal(evaluate(model, "sd15"), expected)
    finally:
        model.unpatch_model(cpu)


def test_a_copy_made_from_the_file(loader, folders, state_dict, evaluate):
    """New versions reload a model through the factory its loader registered."""
    save_file(state_dict("sd15", "compact"), folders[0] / "model.safetensors")
    model = loader("model.safetensors")
    if not hasattr(model, "cached_patcher_init"):
        pytest.skip("this ComfyUI does not reload models from their files")
    factory, arguments = model.cached_patcher_init
    for copy in (factory(*arguments, disable_dynamic=True), model.clone(force_deepcopy=True)):
        assert copy.model is not model.model
        assert torch.equal(evaluate(copy, "sd15"), evaluate(model, "sd15"))


def test_saving_a_concept_model_gives_a_compact_file_again(loader, folders, state_dict, evaluate):
    """What ModelSave would write: the model's own keys below the checkpoint's prefix."""
    save_file(state_dict("sd15", "folded"), folders[0] / "model.safetensors")
    model = loader("model.safetensors")
    sd = {f"model.diffusion_model.{k}": v for k, v in model.model.diffusion_model.state_dict().items()}
    save_file(sd, folders[1] / "saved.safetensors")
    assert torch.equal(evaluate(loader("saved.safetensors"), "sd15"), evaluate(model, "sd15"))


def test_a_concept_model_needs_no_null_text_patch(loader, folders, state_dict, prompt):
    from comfyui_gcfg.nodes.concept import GCFGNullTextPatch

    save_file(state_dict("sd15", "compact"), folders[0] / "model.safetensors")
    assert refusal(GCFGNullTextPatch().patch, loader("model.safetensors"), prompt(1), "uniform_mean") == (
        "Null-Text Patch: model is a null-text UNet already, expected one that reads text; use it without this patch."
    )


OUTSIDE = ["../../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x.safetensors", "C:\\x.safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, "C:x.safetensors", "\\\\server\\x.safetensors", "a\0.safetensors"])
def test_path_tricks(loader, folders, name):
    outside = folders[0].parent / "x.safetensors"
    save_file({"a": torch.zeros(1)}, outside)
    assert refusal(loader, name) == (
        f"Load Concept UNet: unet_name {name!r} leads out of the model folders, expected a name from the list."
    )


def test_a_name_with_a_colon_that_comfyui_lists(loader, folders, state_dict):
    (folders[0] / "12:30").mkdir()
    save_file(state_dict("sd15", "compact"), folders[0] / "12:30" / "a: b.safetensors")
    listed = sys.modules["folder_paths"].get_filename_list(folders[0].name)
    assert listed == ["12:30/a: b.safetensors"]
    assert loader(listed[0]).model_size() > 0
    assert refusal(loader, "12:30/c.safetensors").endswith(
        "leads out of the model folders, expected a name from the list."
    )


def test_missing_file(loader):
    message = refusal(loader, "none.safetensors")
    assert message.startswith("Load Concept UNet: unet_name 'none.safetensors' was not found in the model folders (")
    assert message.endswith("), expected a .safetensors file there; check the name and refresh the page.")


def test_truncated_file(loader, folders, state_dict):
    path = folders[0] / "cut.safetensors"
    save_file(state_dict("sd15", "compact"), path)
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 1)
    assert refusal(loader, "cut.safetensors") == (
        f"Load Concept UNet: unet_name 'cut.safetensors' is cut short: {whole - 1} bytes, expected {whole}; copy or "
        "download the file again."
    )


def test_wrong_file(loader, folders):
    (folders[0] / "page.safetensors").write_text("<html>")
    assert refusal(loader, "page.safetensors") == (
        "Load Concept UNet: unet_name 'page.safetensors' is no safetensors file although its name says so (6 bytes, no "
        "valid header); download it again."
    )
    save_file({"text_model.final_layer_norm.bias": torch.zeros(1)}, folders[0] / "clip.safetensors")
    assert refusal(loader, "clip.safetensors") == (
        "Load Concept UNet: unet_name 'clip.safetensors' holds no UNet: expected 'input_blocks.0.0.weight' (LDM) or "
        "'conv_in.weight' (diffusers) and what belongs to it, bare or below 'model.diffusion_model.', found "
        "'text_model.final_layer_norm.bias' (it looks like a text encoder; load it with a CLIP loader)."
    )


def test_a_pickle_is_refused_unopened(loader, folders):
    class Bomb:
        def __reduce__(self):
            return (print, ("a pickle was opened",))

    for name in ("old.ckpt", "old.pt", "old.pth", "old.bin", "renamed.safetensors"):
        torch.save({"state_dict": Bomb()}, folders[0] / name)
        message = refusal(loader, name)
        assert message.startswith(
            f"Load Concept UNet: unet_name {name!r} is a pickle, which can run any code when opened; expected "
            ".safetensors; "
        )
        assert message.endswith("run `gcfg convert FILE` with this file (docs/training.md tells how to install it).")


def test_a_file_that_lacks_a_layer_is_not_loaded_in_silence(loader, folders, state_dict):
    sd = dict(state_dict("sd15", "compact"))
    del sd["middle_block.0.in_layers.2.weight"]
    save_file(sd, folders[0] / "part.safetensors")
    assert refusal(loader, "part.safetensors") == (
        "Load Concept UNet: unet_name 'part.safetensors' is incomplete: 1 of the UNet's tensors are missing, first "
        f"'middle_block.0.in_layers.2.weight', found {len(sd)}; export or download the file again."
    )


def test_a_file_that_lacks_what_tells_its_family(loader, folders, state_dict):
    sd = dict(state_dict("sd15", "compact"))
    del sd["input_blocks.1.1.proj_in.weight"]
    save_file(sd, folders[0] / "part.safetensors")
    assert refusal(loader, "part.safetensors") == (
        "Load Concept UNet: unet_name 'part.safetensors' is incomplete: the UNet's tensor "
        f"'input_blocks.1.1.proj_in.weight' is missing, found {len(sd)}; export or download the file "
        "again."
    )


def test_a_layer_of_another_size(loader, folders, state_dict):
    sd = dict(state_dict("sd15", "compact"))
    sd["middle_block.0.in_layers.2.weight"] = torch.zeros(NARROW, 32, 3, 3)
    save_file(sd, folders[0] / "odd.safetensors")
    message = refusal(loader, "odd.safetensors")
    assert message.startswith(
        "Load Concept UNet: unet_name 'odd.safetensors' does not fit its own layout (size mismatch for "
        "middle_block.0.in_layers.2.weight: "
    )
    assert message.endswith("; export the file again.")


def test_a_unet_no_comfyui_knows(loader, folders, state_dict):
    sd = dict(state_dict("sd15"))
    for key in sd:
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            sd[key] = torch.zeros(NARROW, 100)
    save_file(sd, folders[0] / "odd.safetensors")
    assert refusal(loader, "odd.safetensors") == (
        f"Load Concept UNet: unet_name 'odd.safetensors' is a UNet of {len(sd)} tensors for text of width 100 that "
        "this ComfyUI does not recognise, expected one of the SD1.x, SD2.x or SDXL family."
    )


def test_a_header_that_lies_about_its_tensors(loader, folders):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**12]}}).encode()
    (folders[0] / "lie.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert refusal(loader, "lie.safetensors") == (
        "Load Concept UNet: unet_name 'lie.safetensors' is damaged: its tensor 'a' has the data_offsets "
        "[0, 1000000000000], expected 16 bytes for F32 of shape [4]; copy or download the file again."
    )


def test_a_file_that_shrinks_while_it_is_read(loader, folders, state_dict, monkeypatch):
    from comfyui_gcfg.nodes.runtime import concept

    path = folders[0] / "model.safetensors"
    save_file(state_dict("sd15", "compact"), path)

    def read_then_cut(*arguments):
        header = read_header(*arguments)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1)
        return header

    monkeypatch.setattr(concept, "read_header", read_then_cut)
    message = refusal(loader, "model.safetensors")
    assert message.startswith("Load Concept UNet: unet_name 'model.safetensors' could not be read to its end (")
    assert message.endswith(
        "), although it was good just now; wait until nothing writes to it any more, and try again."
    )


@pytest.mark.parametrize("form", FORMS)
def test_values_that_are_no_numbers_are_named_in_a_warning(loader, folders, state_dict, caplog, form):
    sd = {key: value.half() for key, value in state_dict("sd15", form).items()}
    save_file(sd, folders[0] / "good.safetensors")
    loader("good.safetensors")
    assert "NaN" not in caplog.text
    constant = {"compact": "attn2.null_text_feature", "folded": "attn2.to_out.0.bias"}
    key = f"input_blocks.1.1.transformer_blocks.0.{constant.get(form, 'attn2.to_k.weight')}"
    sd[key] = sd[key].clone()
    sd[key].view(-1)[-1] = float("nan")
    save_file(sd, folders[0] / "broken.safetensors")
    loader("broken.safetensors")
    (warning,) = (record for record in caplog.records if "NaN" in record.getMessage())
    assert warning.levelname == "WARNING"
    named = key if form == "ordinary" else "input_blocks.1.1.transformer_blocks.0.attn2.null_text_feature"
    assert warning.getMessage().startswith(
        "Load Concept UNet: unet_name 'broken.safetensors' has NaN or infinite values in 1 "
    )
    assert f", first {named!r}: its images will be black; " in warning.getMessage()


@pytest.mark.parametrize("family", ["SD15", "SDXL", "SD21"])
def test_key_names_of_the_published_models(comfy, family):
    """The full-size layouts, against ComfyUI's own table."""
    from comfyui_gcfg.gcfg.unet_keys import diffusers_to_ldm

    depth = {
        "SD15": ([1] * 6 + [0] * 2, [1] * 9 + [0] * 3, 1),
        "SDXL": ([0, 0, 2, 2, 10, 10], [0] * 3 + [2] * 3 + [10] * 3, 10),
    }
    down, up, middle = depth.get(family, depth["SD15"])
    config = {
        "num_res_blocks": [2] * (3 if family == "SDXL" else 4),
        "channel_mult": [1, 2, 4] if family == "SDXL" else [1, 2, 4, 4],
        "transformer_depth": list(down),
        "transformer_depth_output": list(up),
        "transformer_depth_middle": middle,
    }
    table = comfy.utils.unet_to_diffusers(config)
    last = len(config["channel_mult"]) - 1  # the table lists resizing layers that the last level does not have
    absent = (f"down_blocks.{last}.downsamplers", f"up_blocks.{last}.upsamplers", "class_embedding")
    table = {name: ldm for name, ldm in table.items() if not name.startswith(absent)}
    renamed = diffusers_to_ldm({name: name for name in table})
    assert renamed == {ldm: name for name, ldm in table.items()}
    assert len(renamed) > 600
