"""The config file: presets, overrides, one sentence for each mistake, and help that knows every field."""

import pytest
from comfyui_gcfg.command.main import app
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.training.config import changed_on_resume, fields
from comfyui_gcfg.training.config_file import load_config
from typer.testing import CliRunner


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(("preset", "images"), [("ffhq", 70_000), ("afhq", 15_803)])
def test_the_presets_are_the_papers_settings(written, preset, images):
    config = load_config(written(f'preset = "{preset}"'))
    assert (config.train.learning_rate, config.train.batch_size, config.train.warmup_steps) == (1e-5, 32, 0)
    assert (config.train.optimizer, config.data.resolution, config.data.fit) == ("adamw", 512, "resize")
    assert (config.model.mode, config.model.train_null_text) == ("null_text", False)
    assert config.output.name == preset
    assert 80 < config.train.steps * config.train.batch_size / images < 110  # passes over the data


def test_what_is_nearer_wins(written):
    path = written('preset = "ffhq"\n[train]\nsteps = 7\nlearning_rate = 2e-5\n')
    assert load_config(path).train.steps == 7
    config = load_config(path, ["train.steps=9", "output.name=my faces", "sample.weights=[0, 2.5]", "data.flips=false"])
    assert (config.train.steps, config.train.learning_rate, config.train.batch_size) == (9, 2e-5, 32)
    assert (config.output.name, config.sample.weights, config.data.flips) == ("my faces", (0.0, 2.5), False)
    assert load_config(path, ["preset=afhq"]).output.name == "afhq"


def test_paths_are_relative_to_the_file(written, tmp_path, monkeypatch):
    path = written('[model]\ncheckpoint = "a/b.safetensors"\nnull_text = "c.safetensors"\n[data]\nimages = "/abs"\n')
    monkeypatch.chdir("/")
    config = load_config(path)
    assert config.model.checkpoint == str(tmp_path / "a" / "b.safetensors")
    assert config.model.null_text == str(tmp_path / "c.safetensors")
    assert (config.data.images, config.data.cache) == ("/abs", str(tmp_path / "cache"))
    assert (config.model.vae, load_config(written("")).model.null_text) == ("", "uniform_mean")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[train]\nleaning_rate = 1e-5",
            "'train.leaning_rate' is no known setting (did you mean 'train.learning_rate'?)",
        ),
        ("[training]\nsteps = 5", "'training' is no known setting (did you mean 'train'?)"),
        ("learning_rate = 1", "'learning_rate' is no known setting (did you mean 'train.learning_rate'?)"),
        ("[data]\nbatch_size = 1", "'data.batch_size' is no known setting (did you mean 'train.batch_size'?)"),
        ("[train]\nsteps = 0", "'train.steps' is 0: input should be greater than 0"),
        ("[train]\nsteps = 'many'", "'train.steps' is 'many': input should be a valid integer"),
        ("[train]\nprecision = 'fp16'", "'train.precision' is 'fp16': input should be 'fp32' or 'bf16'"),
        ("[train]\nlearning_rate = nan", "'train.learning_rate' is nan"),
        ("[data]\nresolution = 100", "data.resolution is 100, expected a multiple of 8"),
        ("[model]\nmode = 'prompt'", "model.prompt is empty, expected the prompt"),
        ("[model]\nprompt = 'a face'", "model.prompt is set, expected mode 'prompt'"),
        (
            "[model]\nprediction = 'flow'\n[train]\nmin_snr_gamma = 5",
            "train.min_snr_gamma is set, expected 0 for a flow",
        ),
        ("preset = 'celeba'", "'preset' is 'celeba': input should be '', 'ffhq' or 'afhq'"),
        ("[train\nsteps = 5", "is not valid TOML"),
    ],
)
def test_a_mistake_gets_one_sentence(written, text, message):
    path = written(text)
    with pytest.raises(GuidanceError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    done = CliRunner().invoke(app, ["train", str(path)])
    assert (done.exit_code, done.stderr) == (1, f"Error: {caught.value}\n")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.steps", "--set 'train.steps' has no '=', expected key=value"),
        ("train.setps=4", "'train.setps' is no known setting (did you mean 'train.steps'?)"),
        ("train.steps.more=4", "--set 'train.steps.more=4': 'steps' is no section"),
    ],
)
def test_a_mistaken_override_gets_one_sentence(written, option, message):
    with pytest.raises(GuidanceError) as caught:
        load_config(written("[train]\nsteps = 3"), [option])
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GuidanceError, match=r"none\.toml' cannot be read .* expected a TOML config file"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize("command", ["train", "cache"])
def test_help_shows_every_field_once(command):
    text = CliRunner().invoke(app, [command, "--help"]).stdout
    for name, _, default, description in fields():
        assert text.count(f"  {name} = {default}  (") == 1, name
        assert text.count(f"      {description}\n") == 1, name
        assert description.endswith("."), name


def test_what_decides_the_result_may_not_change_in_a_run(written):
    before = load_config(written("[train]\nsteps = 5\nseed = 1")).model_dump(mode="json")
    free = load_config(written("[train]\nsteps = 9\nseed = 1\nmicro_batch_size = 2\n[output]\nkeep_last = 7"))
    assert changed_on_resume(before, free) == []
    other = load_config(written("[train]\nlearning_rate = 1e-4\nema_decay = 0\n[model]\nnull_text = 'zero'"))
    assert changed_on_resume(before, other) == [
        "model.null_text was 'uniform_mean', now 'zero'",
        "train.learning_rate was 1e-05, now 0.0001",
        "train.ema_decay was 0.9999, now 0.0",
        "train.seed was 1, now 0",
    ]
