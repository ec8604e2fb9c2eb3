"""The published files: all models of the world's real sizes fit into what the repository may hold, and say the same."""

import pytest
import torch
from comfyui_gcfg.gcfg.concept_file import describe, features, fold
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.unet_keys import diffusers_to_ldm
from comfyui_gcfg.reproduction.autoencoder import new_autoencoder, to_taesd
from comfyui_gcfg.reproduction.emoji import publish as module
from comfyui_gcfg.reproduction.emoji.captions import BACKGROUNDS
from comfyui_gcfg.reproduction.emoji.judge import Judge
from comfyui_gcfg.reproduction.emoji.learned_controlnet import new_controlnet
from comfyui_gcfg.reproduction.emoji.learned_prior import new_unet
from comfyui_gcfg.reproduction.emoji.publish import publish
from comfyui_gcfg.reproduction.emoji.settings import read_settings
from comfyui_gcfg.reproduction.emoji.things import things
from comfyui_gcfg.reproduction.world import controlnet_to_ldm
from comfyui_gcfg.testkit import emoji_world, small_world
from comfyui_gcfg.testkit.models import save_checkpoint
from comfyui_gcfg.testkit.word_encoder import word_encoder
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture
def trained(tmp_path, drawings, monkeypatch):
    """The files of a reproduction, untrained but of full size."""
    torch.manual_seed(0)
    network = new_unet()
    unet = diffusers_to_ldm(network.state_dict())
    vae = to_taesd(new_autoencoder())
    folder = tmp_path / "long"
    folder.mkdir()
    (tmp_path / "drawings").rename(folder / "drawings")
    monkeypatch.setattr(module, "PLACED", ("Noto", "dog-face", "green"))  # the made-up world has no penguin
    save_checkpoint(folder / "prior.safetensors", unet, vae, word_encoder())
    save_file(vae, folder / "autoencoder.safetensors")
    control = controlnet_to_ldm(new_controlnet(network).state_dict())
    save_file({name: w.contiguous() for name, w in control.items()}, folder / "controlnet.safetensors")
    save_file(Judge().state_dict(), folder / "judge.safetensors")
    blocks = [name.removesuffix(".attn2.to_v.weight") for name in unet if name.endswith("attn2.to_v.weight")]
    folded = fold(unet, {block: torch.full((128,), i + 1.0) for i, block in enumerate(blocks)})
    lora = {"some.lora_up.weight": torch.ones(8, 4)}
    for name, state in (
        ("face/concept-0/concept", folded),
        ("animal/concept-0/concept", folded),
        ("face/dreambooth-0/dreambooth", unet),
        ("face/lora-0/lora-lora", lora),
        ("face/textual_inversion-0/textual_inversion", {"emb_params": torch.ones(1, 768)}),
    ):
        path = folder / "methods" / f"{name}.safetensors"
        path.parent.mkdir(parents=True)
        save_file({key: w.contiguous() for key, w in state.items()}, path)
    return folder, unet, folded


def test_all_models_fit_and_are_the_trained_ones(trained, tmp_path):
    folder, unet, folded = trained
    size = publish(folder, read_settings("long"), tmp_path / "published")
    files = {path.stem: path for path in (tmp_path / "published").iterdir()}
    weights = [path for path in files.values() if path.suffix == ".safetensors"]
    assert size == sum(path.stat().st_size for path in weights) < 40 * 2**20
    assert set(files) == {
        *("prior", "autoencoder", "controlnet", "judge", "concept_face", "concept_animal"),
        *("dreambooth", "lora", "textual_inversion", "truth", "placed"),
    }
    with Image.open(files["placed"]) as placed:
        assert placed.getpixel((48, 48))[3] == 0  # ComfyUI's mask is one where this is zero
        assert placed.getpixel((0, 0)) == (*BACKGROUNDS["green"], 255)
    prior, concept = load_file(files["prior"]), load_file(files["concept_face"])
    assert set(prior) == set(unet)
    assert all(torch.equal(prior[name], unet[name].half()) for name in unet)
    assert not any("attn2.to_" in name for name in concept)
    kept, expected = features(concept), features(folded)
    assert all(torch.equal(kept[block].float(), expected[block]) for block in expected)


def test_too_much_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST", 1000)
    with pytest.raises(GuidanceError, match=r"take [\d,]+ bytes, expected at most 1,000"):
        publish(trained[0], read_settings("long"), tmp_path / "published")


def test_the_demo_s_files_are_made_of_them(trained, tmp_path, monkeypatch):
    """At Stable Diffusion's width, in the keys that stock loaders want; the concept folded, which any loader runs."""
    publish(trained[0], read_settings("long"), tmp_path / "published")
    monkeypatch.setattr(small_world, "TRAINED", tmp_path / "published")
    for name in ("TRUTH", "PLACED"):
        monkeypatch.setattr(emoji_world, name, tmp_path / "published" / getattr(emoji_world, name).name)
    for unet in (small_world.prior(), small_world.custom(), emoji_world.concept(), emoji_world.concept("animal")):
        assert unet["input_blocks.0.0.weight"].shape == (320, 4, 3, 3)
        assert unet["input_blocks.0.0.weight"].dtype == torch.float16
    concept = emoji_world.concept()
    assert describe(concept).form == "folded"
    expected = features(trained[2])
    assert all(
        torch.equal(value[::5].float(), expected[block].half().float()) for block, value in features(concept).items()
    )
    assert small_world.controlnet()["control_model.input_blocks.0.0.weight"].shape == (320, 4, 3, 3)
    assert small_world.vae()["taesd_encoder.0.weight"].shape == (64, 3, 3, 3)
    assert "text_model.encoder.layers.11.mlp.fc1.weight" in emoji_world.clip()
    emoji_world.write_inputs(tmp_path / "input")
    assert sorted(path.name for path in (tmp_path / "input").iterdir()) == ["full-body.png", "portrait.png"]


def test_its_words_are_held_out_and_its_prompts_are_the_world_s():
    kept = {thing.words for thing in things() if thing.held_out}
    assert set(emoji_world.WORDS) <= kept
    assert set(emoji_world.PROMPTS) == set(small_world.PROMPTS)
