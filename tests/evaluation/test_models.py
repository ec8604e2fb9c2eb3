"""The networks of an evaluation, beside diffusers' own from the same weights."""

from copy import deepcopy

import pytest
import torch
from comfyui_gcfg.evaluation import models as networks
from comfyui_gcfg.evaluation.controlnet import load_controlnet
from comfyui_gcfg.evaluation.models import Models, read_unet, trained_parameters
from comfyui_gcfg.evaluation.recipe import Recipe, Term
from comfyui_gcfg.evaluation.sampling import denoiser
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.training.concept import null_text_features, predict, to_null_text
from comfyui_gcfg.training.export import export_unet
from comfyui_gcfg.training.methods.textual_inversion import add_word, read_embedding
from comfyui_gcfg.training.prior.model import open_prior
from comfyui_gcfg.training.prior.text_encoder import Conditions, encode_ids, token_ids
from comfyui_gcfg.training.sampling import starting_noise
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CPU = torch.device("cpu")
PROMPT = "a b c"


@pytest.fixture
def models(evaluation_config):
    return Models(evaluation_config(), CPU)


def output(unet, seed=0):
    x = starting_noise(range(2), (4, 8, 8))
    text = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return predict(unet, x, torch.tensor([700, 20]), Conditions(text))


@pytest.mark.parametrize("file", ["concept.safetensors", "compact.safetensors"])
def test_a_null_text_unet_reads_no_text(world, checkpoint, concept_unet, file):
    unet = read_unet(world / file, open_prior(checkpoint), "models.concept.unet")
    torch.testing.assert_close(output(unet), output(concept_unet))
    assert torch.equal(output(unet, seed=1), output(unet, seed=2))


def test_a_fine_tuned_unet_reads_text(world, checkpoint, tuned_unet):
    unet = read_unet(world / "tuned.safetensors", open_prior(checkpoint), "models.tuned.unet")
    assert torch.equal(output(unet), output(tuned_unet))
    assert not torch.allclose(output(unet, seed=1), output(unet, seed=2))


def test_a_unet_of_another_architecture_is_refused(tmp_path, world, checkpoint, tiny_unet):
    config = dict(tiny_unet.config) | {"cross_attention_dim": 64}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "wide")
    weights = load_file(world / "compact.safetensors")
    weights["input_blocks.0.0.weight"] = weights["input_blocks.0.0.weight"][:16].contiguous()
    save_file(weights, tmp_path / "narrow.safetensors")
    for path in (tmp_path / "wide", tmp_path / "narrow.safetensors"):
        with pytest.raises(GuidanceError, match=r"models\.x\.unet is of another architecture than the SD1\.x prior"):
            read_unet(path, open_prior(checkpoint), "models.x.unet")


def test_a_file_states_its_trained_parameters(world):
    assert trained_parameters(world / "tuned.safetensors", "models.tuned") == 123456
    assert trained_parameters(world / "compact.safetensors", "models.concept") is None


def test_a_recipe_becomes_networks_and_what_they_read(models, world, checkpoint):
    recipe = Recipe(
        unconditional="b",
        terms=(
            Term(model="concept", control=True),
            Term(prompt="a {prompt}"),
            Term(model="tuned", prompt="a"),
            Term(model="word", prompt="a <d>"),
        ),
    )
    guidance = models.guidance(recipe, (1.0, 2.0, 3.0, 4.0), "c")
    prior, tokenizer = open_prior(checkpoint), world / "tokenizer"
    word = read_embedding(world / "word.safetensors", "<d>", "word")

    def text(prompt, word=None):
        if word is None:
            return prior.encode_prompt(prompt, None, tokenizer).context
        model = prior.load_text_model()
        add_word(model, word, "word")
        return encode_ids([model], prior.family, token_ids(prompt, tokenizer, word.text)).context

    concept, prompted, tuned, worded = guidance.terms
    assert guidance.weights == (1.0, 2.0, 3.0, 4.0)
    assert torch.equal(guidance.base.conditions.context, text("b"))
    assert torch.equal(prompted.conditions.context, text("a c"))
    assert torch.equal(tuned.conditions.context, text("a"))
    assert torch.equal(worded.conditions.context, text("a <d>", word))
    assert not torch.allclose(worded.conditions.context, text("a"))
    assert guidance.base.unet is prompted.unet is worded.unet
    assert len({id(each.unet) for each in (guidance.base, concept, tuned)}) == 3
    assert [each.control is None for each in (guidance.base, *guidance.terms)] == [True, False, True, True, True]
    assert torch.equal(concept.control.context, text(""))  # the ControlNet reads text though the concept does not


def test_each_prompt_is_encoded_once_by_an_encoder_read_once(models, monkeypatch):
    calls = {"load_text_models": 0, "encode_ids": 0}
    for name in calls:
        original = getattr(networks, name)

        def counted(*args, name=name, original=original):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(networks, name, counted)
    recipe = Recipe(terms=(Term(prompt="{prompt}"), Term(model="tuned", prompt="{prompt}")))
    first = models.guidance(recipe, (1.0, 1.0), "a b")
    second = models.guidance(recipe, (2.0, 1.0), "a b")
    models.guidance(recipe, (1.0, 1.0), "c")
    assert calls == {"load_text_models": 1, "encode_ids": 3}
    assert first.terms[0].conditions is second.terms[1].conditions  # so that its keys and values are kept


def test_models_of_other_methods_are_let_go(models):
    recipe = Recipe(terms=(Term(model="tuned"), Term(model="concept")))
    before = models.guidance(recipe, (1.0, 1.0))
    models.keep({"concept"})
    after = models.guidance(recipe, (1.0, 1.0))
    assert before.base.unet is after.base.unet
    assert before.terms[1].unet is after.terms[1].unet
    assert before.terms[0].unet is not after.terms[0].unet


def control_output(controlnet):
    x, text = starting_noise(range(2), (4, 4, 4)), torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1))
    hint = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        down, middle = controlnet(x, 500, text, controlnet_cond=hint, return_dict=False)
    return [*down, middle]


@pytest.mark.parametrize("form", ["LDM", "diffusers", "folder"])
def test_a_controlnet_from_every_kind_of_file(tmp_path, world, checkpoint, controlnet, form):
    path = {"LDM": world / "control.safetensors", "folder": tmp_path / "folder"}.get(form, tmp_path / "a.safetensors")
    if form == "diffusers":
        save_file(controlnet.state_dict(), path)
    if form == "folder":
        controlnet.save_pretrained(path)
    found = load_controlnet(path, open_prior(checkpoint).unet.config, "prior.controlnet")
    for own, expected in zip(control_output(found), control_output(controlnet), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(own, expected)


def test_what_is_no_controlnet_of_the_prior_is_refused(tmp_path, checkpoint, controlnet, tiny_unet):
    config = open_prior(checkpoint).unet.config
    with pytest.raises(GuidanceError, match=r"prior\.controlnet holds no ControlNet: expected 'input_hint_block"):
        load_controlnet(checkpoint, config, "prior.controlnet")
    wide = ControlNetModel.from_config(dict(controlnet.config) | {"cross_attention_dim": 64})
    wide.save_pretrained(tmp_path / "wide")
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    lacking = {key: value for key, value in controlnet.state_dict().items() if "mid_block" not in key}
    save_file(lacking, tmp_path / "lacking.safetensors")
    for name in ("wide", "wide.safetensors", "lacking.safetensors"):
        with pytest.raises(GuidanceError, match=r"prior\.controlnet does not fit the prior's UNet"):
            load_controlnet(tmp_path / name, config, "prior.controlnet")


def test_a_missing_file_of_the_prior_names_its_setting(evaluation_config):
    with pytest.raises(GuidanceError, match=r"prior\.checkpoint is not set"):
        Models(evaluation_config(prior={"checkpoint": ""}), CPU)
    with pytest.raises(GuidanceError, match=r"prior\.checkpoint '.*nothing.safetensors' was not found"):
        Models(evaluation_config(prior={"checkpoint": "nothing.safetensors"}), CPU)
    with pytest.raises(GuidanceError, match=r"prior\.tokenizer: "):
        Models(evaluation_config(prior={"tokenizer": ""}), CPU).guidance(Recipe(unconditional="a"), ())


def test_bf16_networks_stay_near(evaluation_config):
    recipe = Recipe(terms=(Term(model="tuned", prompt=PROMPT),))
    x = starting_noise(range(2), (4, 8, 8))
    outputs = []
    for precision in ("fp32", "bf16"):
        (term,) = Models(evaluation_config(sampling={"precision": precision}), CPU).guidance(recipe, (1.0,)).terms
        dtype = next(term.unet.parameters()).dtype
        with torch.no_grad():
            outputs.append(predict(term.unet, x.to(dtype), torch.full((2,), 500), term.conditions))
    assert outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[1].float(), outputs[0], atol=0.1, rtol=0.1)


@pytest.fixture
def sdxl(tmp_path, tiny_vae):
    """A tiny SDXL folder, and a null-text UNet made from it."""
    torch.manual_seed(7)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        use_linear_projection=True,
        cross_attention_dim=96,
        attention_head_dim=(1, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 64,
    ).eval()
    unet.save_pretrained(tmp_path / "sdxl" / "unet")
    tiny_vae.save_pretrained(tmp_path / "sdxl" / "vae")
    for name, kind, width in (
        ("text_encoder", CLIPTextModel, 32),
        ("text_encoder_2", CLIPTextModelWithProjection, 64),
    ):
        sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}
        kind(CLIPTextConfig(**sizes, projection_dim=width, eos_token_id=49407)).save_pretrained(
            tmp_path / "sdxl" / name
        )
    concept = deepcopy(unet)
    to_null_text(concept, null_text_features(concept, "zero"))
    export_unet(concept.state_dict(), tmp_path / "sdxl.safetensors", "compact", "fp32", 96, {})
    return unet, concept


def test_sdxls_pooled_text_and_sizes_reach_every_network(evaluation_config, sdxl):
    unet, concept = sdxl
    config = evaluation_config(prior={"checkpoint": "sdxl"}, models={"concept": {"unet": "sdxl.safetensors"}})
    models = Models(config, CPU)
    recipe = Recipe(terms=(Term(model="concept"), Term(prompt="a b")))
    x, times = starting_noise(range(2), (4, 4, 4)), torch.full((2,), 600)
    found = denoiser(models.guidance(recipe, (1.5, 2.0)), models.objective)(x, times)

    texts = [models.prior.encode_prompt(prompt, None, config.path("tokenizer")) for prompt in ("", "", "a b")]
    with torch.no_grad():
        base, *terms = (
            network(
                x,
                times,
                text.context.expand(2, -1, -1),
                added_cond_kwargs={
                    "text_embeds": text.pooled.expand(2, -1),
                    "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]] * 2),
                },
            ).sample
            for network, text in zip((unet, concept, unet), texts, strict=True)
        )
    eps = base + 1.5 * (terms[0] - base) + 2.0 * (terms[1] - base)
    torch.testing.assert_close(found, models.objective.denoised(x, eps, times), atol=1e-4, rtol=1e-4)
