"""The methods of mode 'prompt': what each trains, what it keeps, and the files that come out."""

import json
import shutil

import pytest
import torch
from comfyui_gcfg.gcfg.concept_file import describe
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.unet_keys import diffusers_to_ldm, ldm_to_diffusers
from comfyui_gcfg.training.config import ModelConfig
from comfyui_gcfg.training.config_file import load_config
from comfyui_gcfg.training.data.shards import Latents, Recipe, vae_fingerprint
from comfyui_gcfg.training.dry_run import dry_run
from comfyui_gcfg.training.methods.adapters import add_oft
from comfyui_gcfg.training.methods.network import prompted
from comfyui_gcfg.training.methods.textual_inversion import LearnedToken, add_word, read_embedding
from comfyui_gcfg.training.prior.model import open_prior
from comfyui_gcfg.training.prior.text_encoder import encode_ids, token_ids
from comfyui_gcfg.training.run import train
from comfyui_gcfg.training.stream import SampleStream
from comfyui_gcfg.training.trained import export_run
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

RANK, BLOCK = 4, 8
METHODS = {
    "full": {},
    "cross_attention": {},
    "lora": {"rank": RANK},
    "oft": {"oft_block_size": BLOCK},
    "textual_inversion": {"token": "<digit>", "initializer": "e"},
}
ADAPTED = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
NETWORKS = ["full", "cross_attention", "lora", "oft"]


def letters(text):
    """What that tokenizer makes of words of single letters."""
    return [26 + ord(letter) - ord("a") for letter in text.split()]


def padded(ids):
    return torch.tensor([[49406, *ids, *[49407] * (76 - len(ids))]])


@pytest.fixture(scope="module")
def settings(tokenizer):
    """Return a config's sections for a method."""

    def of(method, **sections):
        prompt = "a <digit> b" if method == "textual_inversion" else "a e b"
        model = {"mode": "prompt", "method": method, "prompt": prompt, "tokenizer": str(tokenizer), **METHODS[method]}
        train = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "ema_decay": 0.5}
        return {"model": model, "train": {**train, **sections.pop("train", {})}, **sections}

    return of


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoint, digits, cache, write_config, settings):
    """Train with each method, once, with a sample grid; return its folder."""
    made = {}

    def run(method):
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            sections = settings(method, sample={"every": 4, "steps": 2, "weights": [1.0], "seeds": [3]})
            train(load_config(write_config(folder, checkpoint, digits, cache, **sections)))
            made[method] = folder
        return made[method]

    return run


def checkpoint_of(folder, part, step=4):
    return load_file(folder / "run" / "checkpoints" / f"step-{step:08d}" / f"{part}.safetensors")


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def weights_of(path, unet):
    """A UNet file's weights in diffusers' names."""
    return ldm_to_diffusers(load_file(path), unet.state_dict())


def as_unet(path, like):
    unet = UNet2DConditionModel.from_config(like.config).eval()
    unet.load_state_dict(weights_of(path, like))
    return unet


def of_method(name, method):
    """Whether a method may change a weight of the UNet."""
    if method == "cross_attention":
        return name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    return method == "full" or name.endswith(ADAPTED)


@pytest.mark.parametrize("method", NETWORKS)
def test_the_file_differs_from_the_prior_where_the_method_learns_and_nowhere_else(runs, tiny_unet, tmp_path, method):
    path = export_run(runs(method) / "run", tmp_path / "a.safetensors", dtype="fp32")
    assert describe(load_file(path)).form == "ordinary"
    assert set(load_file(path)) == set(diffusers_to_ldm(tiny_unet.state_dict()))
    after, before = weights_of(path, tiny_unet), tiny_unet.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if of_method(name, method)}
    assert changed
    assert load_file(runs(method) / "run" / "concept.safetensors").keys() == load_file(path).keys()


def count(method, unet):
    """Trained values, by arithmetic on the shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items() if of_method(name, method)}
    if method == "lora":
        return sum(RANK * (rows + columns) for rows, columns in shapes.values())
    if method == "oft":
        return sum(columns // BLOCK * (BLOCK * (BLOCK - 1) // 2) for _, columns in shapes.values())
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_file_says_its_method_and_what_it_trained(runs, tiny_unet, method, config_file, settings):
    expected = 32 if method == "textual_inversion" else count(method, tiny_unet)
    files = sorted((runs(method) / "run").glob("*.safetensors"))
    names = ["concept-lora.safetensors", "concept.safetensors"] if method == "lora" else ["concept.safetensors"]
    assert [file.name for file in files] == names
    for file in files:
        about = metadata_of(file)
        assert (about["gcfg.mode"], about["gcfg.method"]) == ("prompt", method)
        assert about["gcfg.trained_parameters"] == str(expected)
        assert about["gcfg.prompt"] in ("a e b", "a <digit> b")
        assert about["gcfg.steps"] == "4"
    assert dry_run(load_config(config_file(**settings(method)))).trained == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_what_was_trained_and_an_average_of_it(runs, tiny_unet, method):
    trained, averaged = (checkpoint_of(runs(method), part) for part in ("unet", "ema"))
    assert trained.keys() == averaged.keys()
    expected = 32 if method == "textual_inversion" else count(method, tiny_unet)
    assert sum(tensor.numel() for tensor in trained.values()) == expected
    assert any(not torch.equal(trained[name], averaged[name]) for name in trained)


@pytest.mark.parametrize("method", METHODS)
def test_a_grid_shows_what_was_learned(runs, method):
    with Image.open(runs(method) / "run" / "samples" / "step-00000004.png") as picture:
        assert picture.size == (32, 32 + 14)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_goes_on_equals_an_unbroken_one(runs, config_file, tmp_path, settings, method):
    train(load_config(config_file(**settings(method, train={"steps": 2}))))
    train(load_config(config_file(**settings(method, train={"steps": 4}))))
    for part in ("unet", "ema", "optimizer"):
        assert_same(checkpoint_of(tmp_path, part), checkpoint_of(runs(method), part))
    for file in (runs(method) / "run").glob("*.safetensors"):
        assert_same(load_file(tmp_path / "run" / file.name), load_file(file))


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("method", ["lora", "oft", "textual_inversion"])
def test_gradient_checkpointing_and_micro_batches_change_nothing(runs, config_file, tmp_path, settings, method):
    saving = {"gradient_checkpointing": True, "micro_batch_size": 1}
    train(load_config(config_file(**settings(method, train={"steps": 2, **saving}))))
    lines = [(f / "run" / "log.jsonl").read_text().splitlines()[:2] for f in (tmp_path, runs(method))]
    ours, theirs = ([(each["loss"], each["grad_norm"]) for each in map(json.loads, part)] for part in lines)
    assert ours == [pytest.approx(step, rel=1e-3) for step in theirs]


# --- adapters


@pytest.mark.parametrize("method", ["lora", "oft"])
def test_the_merged_unet_computes_what_peft_computes(runs, checkpoint, tiny_unet, tmp_path, method):
    model = ModelConfig(mode="prompt", prompt="a", method=method, **METHODS[method])
    network = prompted(open_prior(checkpoint), model, seed=5).eval()
    averaged = checkpoint_of(runs(method), "ema")
    missing, unexpected = network.load_state_dict(averaged, strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora_" in name or "oft_" in name]
    merged = as_unet(export_run(runs(method) / "run", tmp_path / "a.safetensors", dtype="fp32"), tiny_unet)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.randn(1, 77, 32).expand(2, -1, -1)
    with torch.no_grad():
        expected, before = network(x, t, context).sample, tiny_unet(x, t, context).sample
        torch.testing.assert_close(merged(x, t, context).sample, expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2


def test_a_lora_is_the_sum_of_its_file_and_the_prior(runs, tiny_unet, tmp_path):
    path = export_run(runs("lora") / "run", tmp_path / "a.safetensors", dtype="fp32")
    lora, merged = load_file(tmp_path / "a-lora.safetensors"), weights_of(path, tiny_unet)
    names = [name.removesuffix(".weight") for name in tiny_unet.state_dict() if of_method(name, "lora")]
    assert len(lora) == 3 * len(names)
    for name in names:
        key = "lora_unet_" + name.replace(".", "_")
        down, up = (lora[f"{key}.lora_{half}.weight"] for half in ("down", "up"))
        assert down.shape[0] == up.shape[1] == lora[f"{key}.alpha"] == RANK
        expected = tiny_unet.state_dict()[f"{name}.weight"] + up @ down
        torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_the_first_half_of_a_lora_follows_the_seed(checkpoint):
    model = ModelConfig(mode="prompt", prompt="a", method="lora", rank=RANK)
    state = torch.random.get_rng_state()
    one, same, other = (prompted(open_prior(checkpoint), model, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    halves = [name for name in one if "lora_A" in name]
    assert halves
    for name in halves:
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])


def test_oft_turns_the_inputs_of_a_projection_and_nothing_else(runs, tiny_unet, tmp_path):
    """W' = W R with R orthogonal, in blocks: W' W'^T = W W^T, and R is 0 outside of its blocks."""
    path = export_run(runs("oft") / "run", tmp_path / "a.safetensors", dtype="fp32")
    merged = weights_of(path, tiny_unet)
    for name, before in tiny_unet.state_dict().items():
        if not of_method(name, "oft"):
            continue
        before, after = before.double(), merged[name].double()
        torch.testing.assert_close(after @ after.T, before @ before.T, rtol=1e-4, atol=1e-5)
        for start in range(0, before.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            a, b = after[:, block], before[:, block]
            rotation = torch.linalg.lstsq(b, a).solution
            torch.testing.assert_close(b @ rotation, a, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rotation.T @ rotation, torch.eye(BLOCK).double(), rtol=1e-3, atol=1e-4)
            assert not torch.allclose(rotation, torch.eye(BLOCK).double(), atol=1e-3)


@pytest.mark.parametrize("size", [0, 16])
def test_the_rotations_of_sd15(size):
    """Four blocks by default: then the blocks hold 23.3 M values, the 23 M of the paper's Table 1."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        widths = [shape[1] for name, shape in shapes_of(unet) if name.endswith(ADAPTED)]
        add_oft(unet, size)
    sides = [size or width // 4 for width in widths]
    found = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    assert found == sum(width // side * side * (side - 1) // 2 for width, side in zip(widths, sides, strict=True))
    if not size:
        assert sum(width * side for width, side in zip(widths, sides, strict=True)) == 23_304_192


def shapes_of(unet):
    return [(name, tuple(tensor.shape)) for name, tensor in unet.state_dict().items()]


def test_a_block_size_that_does_not_fit(config_file, settings):
    sections = settings("oft")
    sections["model"]["oft_block_size"] = 24
    with pytest.raises(GuidanceError, match=r"^model\.oft_block_size is 24, expected a divisor of .* has 32; choose"):
        train(load_config(config_file(**sections)))


# --- Textual Inversion


def test_inversion_starts_as_its_initializer_and_moves_the_vector_only(
    runs, tiny_clip, settings, config_file, tmp_path
):
    """With '<digit>' meaning 'e' the first loss of 'a <digit> b' is that of 'a e b', on which the others train."""
    first = [json.loads((runs(m) / "run" / "log.jsonl").read_text().splitlines()[0]) for m in METHODS]
    assert [line["loss"] for line in first] == pytest.approx([first[0]["loss"]] * 5, rel=1e-5)
    before = tiny_clip.get_input_embeddings().weight[letters("e")]
    after = checkpoint_of(runs("textual_inversion"), "unet")["token"]
    assert after.shape == (1, 32)
    assert 1e-3 < (after - before).abs().max() < 0.1
    file = load_file(runs("textual_inversion") / "run" / "concept.safetensors")
    averaged = checkpoint_of(runs("textual_inversion"), "ema")["token"]
    assert file.keys() == {"emb_params"}
    assert torch.equal(file["emb_params"], averaged.half())


def with_table(clip, table, ids):
    """Call a text encoder with another table of token vectors."""
    (name,) = (name for name, _ in clip.named_parameters() if name.endswith("token_embedding.weight"))
    return torch.func.functional_call(clip, {name: table}, (ids,))


def test_inversion_follows_the_gradient_of_its_vector(
    config_file, settings, tiny_unet, tiny_vae, tiny_clip, cache, tmp_path
):
    """The first step is that of AdamW on the gradient that torch gives for a text encoder with a changed row."""
    train(load_config(config_file(**settings("textual_inversion", train={"steps": 1, "max_grad_norm": 0.0}))))
    latents = Latents.open(cache, Recipe(vae_fingerprint(tiny_vae), 32, "resize", True))
    batch = SampleStream(latents, 0, tiny_vae.config.scaling_factor).batch(range(2))
    t = (batch.u * 1000).long()
    schedule = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    table = tiny_clip.get_input_embeddings().weight
    vector = table[letters("e")].detach().clone().requires_grad_()
    rows = table.detach().clone()
    rows = torch.cat((rows[:100], vector, rows[101:]))  # row 100 stands for the new word
    ids = padded([*letters("a"), 100, *letters("b")])
    changed = with_table(tiny_clip, rows, ids)
    context = changed.last_hidden_state.expand(2, -1, -1)
    out = tiny_unet(schedule.add_noise(batch.x0, batch.noise, t), t, context).sample
    (out - batch.noise).square().mean().backward()
    optimizer = torch.optim.AdamW([vector], 1e-2, weight_decay=1e-2)
    optimizer.step()
    torch.testing.assert_close(checkpoint_of(tmp_path, "unet", 1)["token"], vector.detach(), rtol=1e-4, atol=1e-5)


def test_a_prompt_with_a_learned_word(checkpoint, tiny_clip, tokenizer, tmp_path):
    """What `add_word` makes of it is what the text encoder makes of a row that holds the vector."""
    vector = torch.randn(1, 32)
    save_file({"emb_params": vector.half()}, tmp_path / "word.safetensors")
    word = read_embedding(tmp_path / "word.safetensors", "<digit>", "x")
    assert torch.equal(word.vector, vector.half().float())
    table = tiny_clip.get_input_embeddings().weight.detach().clone()
    table[100] = word.vector
    ids = padded([*letters("a"), 100, *letters("b"), 100])
    changed = with_table(tiny_clip, table, ids)
    prior = open_prior(checkpoint)
    model = prior.load_text_model()
    add_word(model, word, "x")

    def encoded(prompt):
        return encode_ids([model], prior.family, token_ids(prompt, tokenizer, word.text)).context

    torch.testing.assert_close(encoded("a <digit> b<digit>"), changed.last_hidden_state)
    assert torch.equal(encoded("a e"), prior.encode_prompt("a e", None, tokenizer).context)


def refusal(call, *arguments):
    with pytest.raises(GuidanceError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_embedding_is_refused(checkpoint, tmp_path):
    path = tmp_path / "word.safetensors"
    save_file({"clip_g": torch.zeros(1, 1280)}, path)
    assert refusal(read_embedding, path, "<digit>", "word.safetensors") == (
        "word.safetensors holds no 'emb_params', expected an SD1.x or SD2.x embedding; name the file that `gcfg train` "
        "wrote with model.method 'textual_inversion'."
    )
    for shape in ((1, 48), (2, 32)):
        word = LearnedToken("<digit>", torch.zeros(shape))
        message = refusal(add_word, open_prior(checkpoint).load_text_model(), word, "x")
        assert f"for which the embedding of '<digit>' has the shape {shape}, expected (1, 32); use the prior" in message


def test_an_initializer_of_several_tokens(config_file, settings):
    sections = settings("textual_inversion")
    sections["model"]["initializer"] = "face"
    message = refusal(lambda: train(load_config(config_file(**sections))))
    assert message.startswith("model.initializer 'face' is 4 tokens to the text encoder, expected a word of one; ")


# --- settings and the prior of a merge


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"method": "lora"}, "model.method is 'lora', expected mode 'prompt' with it"),
        ({"mode": "prompt", "prompt": "a", "token": "<x>"}, "model.token is set, expected it empty with method 'full'"),
        (
            {"mode": "prompt", "prompt": "a <x>", "method": "textual_inversion", "token": "<x>"},
            "model.initializer is empty, expected a word with method 'textual_inversion'",
        ),
        (
            {"mode": "prompt", "prompt": "a", "method": "textual_inversion", "token": "<x>", "initializer": "a"},
            "model.token '<x>' is not in model.prompt 'a', expected it there",
        ),
        ({"mode": "prompt", "prompt": "a", "method": "lora", "rank": 0}, "'model.rank' is 0: input should be greater"),
    ],
)
def test_settings_that_do_not_fit_together(config_file, model, message):
    assert message in refusal(lambda: load_config(config_file(model=model)))


def test_a_run_of_another_method_is_not_gone_on_with(runs, settings, write_config, checkpoint, digits, cache, tmp_path):
    shutil.copytree(runs("lora") / "run", tmp_path / "run")
    config = load_config(write_config(tmp_path, checkpoint, digits, cache, **settings("oft")))
    assert "model.method was 'lora', now 'oft'" in refusal(train, config)


def test_a_merge_wants_the_prior_of_the_run(runs, tmp_path, tiny_unet):
    shutil.copytree(runs("lora") / "run", tmp_path / "run")
    manifest = tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json"
    about = json.loads(manifest.read_text())
    about["config"]["model"]["checkpoint"] = str(tmp_path / "gone.safetensors")
    manifest.write_text(json.dumps(about))
    assert refusal(export_run, tmp_path / "run").startswith(f"model.checkpoint {str(tmp_path / 'gone.safetensors')!r}")
    weights = diffusers_to_ldm(tiny_unet.state_dict())
    save_file({key: value + 1e-3 for key, value in weights.items()}, tmp_path / "gone.safetensors")
    assert (
        "holds another UNet than at the start of the run, expected the one that method 'lora' has changed"
        in refusal(export_run, tmp_path / "run")
    )
