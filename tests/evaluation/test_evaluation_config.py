"""The evaluation's config file: presets, overrides, and what is wrong with it in one sentence."""

from pathlib import Path

import numpy as np
import pytest
from comfyui_gcfg.evaluation.config import TASKS, Config
from comfyui_gcfg.evaluation.config_file import fields, load_config
from comfyui_gcfg.evaluation.measures import labelled_prompts
from comfyui_gcfg.evaluation.recipe import Term
from comfyui_gcfg.evaluation.tasks import ALIGNMENT_TOLERANCE
from comfyui_gcfg.gcfg.errors import GuidanceError


def written(folder, text):
    path = folder / "evaluation.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fid.cuont = 5", r"'fid\.cuont' is no known setting \(did you mean 'fid\.count'\?\)"),
        ("[[methods]]", r"'methods' is "),
        ("sampling.size = 100", r"sampling\.size is 100, expected a multiple of 8"),
        ("models.x = {}", "a model needs either a unet or an embedding"),
        ('models.x = {unet = "a", embedding = "b", token = "c"}', "a model needs either a unet or an embedding"),
        ('models.x = {embedding = "b"}', "embedding and token belong together"),
        ('models.prior = {unet = "a"}', r"models\.prior is the prior itself"),
        ('models."a/b" = {unet = "a"}', "the name 'a/b' has other characters"),
        ('methods.m.fid = {base = "x"}', r"methods\.m\.fid\.base is 'x', expected one of 'prior'"),
        ('methods.m.canny.terms = [{}, {model = "x"}]', r"methods\.m\.canny\.terms\.1\.model is 'x', expected one of"),
        ("methods.m.diversity.terms = [{weight = [1, 2]}]", r"methods\.m\.diversity has a list as weight"),
        (
            "sweep.recipe.terms = [{weight = [1, 2]}]",
            r"sweep\.recipe has 1 weights that are lists, expected exactly two",
        ),
        ("methods.m.fid.terms = [{weight = []}]", r"methods\.m\.fid\.terms\.0\.weight"),
        ("diversity.per_prompt = 1", r"'diversity\.per_prompt' is 1"),
        ("preset = 'afhq'", r"'preset' is 'afhq'"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, text, message):
    with pytest.raises(GuidanceError, match=message):
        load_config(written(tmp_path, text))


def test_paths_lead_from_the_file_and_stay_as_they_were_written(tmp_path):
    config = load_config(written(tmp_path, 'prior.checkpoint = "a/b"\noutput.folder = "/c"'))
    assert config.path(config.prior.checkpoint) == tmp_path / "a" / "b"
    assert config.path("") is None
    assert str(config.output_folder) == "/c"
    assert config.model_dump()["prior"]["checkpoint"] == "a/b"


def test_the_preset_has_the_papers_settings(tmp_path):
    text = 'preset = "ffhq"\nmodels.ours.unet = "mine.safetensors"\nfid.images = "faces"'
    config = load_config(written(tmp_path, text), ["fid.count=7"])
    assert (config.sampling.size, config.sampling.steps) == (512, 100)
    assert (config.fid.count, config.fid.images, config.fid.resize) == (7, "faces", "torchmetrics")
    assert load_config(written(tmp_path, 'preset = "ffhq"')).fid.count == 50_000
    assert config.models["ours"].unet == "mine.safetensors"
    assert (config.alignment.per_prompt, config.canny.count, config.canny.per_condition) == (100, 200, 5)
    prompts = [each.prompt for each in labelled_prompts(config)]
    assert len(prompts) == 10
    assert {"wearing glasses", "male", "square face"} <= set(prompts)
    rows = {"prior", "textual_inversion", "dreambooth", "custom_diffusion", "oft", "lora", "ours"}
    assert {name for name, method in config.methods.items() if method.group == "methods"} == rows
    for name in rows:
        assert all(config.methods[name].recipe(task) for task in TASKS if task != "diversity"), name
    for place, recipe in config.recipes():
        for term in recipe.terms:
            if isinstance(term.weight, tuple):
                np.testing.assert_allclose(np.diff(term.weight), 0.25, err_msg=place)  # paper, D.2
    text, control = config.methods["ours"].alignment, config.methods["dreambooth"].alignment
    assert [term.prompt for term in text.terms] == ["", "{prompt}"]  # "only use control prompt for our method"
    assert control.terms[0].reads("smilling") == "a photo of face, smilling"
    assert (text.base, control.base) == ("prior", "dreambooth")


def test_a_term_reads_the_whole_prompt_or_a_part():
    assert Term(prompt="a {prompt}!").reads("b") == "a b!"
    assert Term(prompt="{prompt}").reads("b | c") == "b, c"
    assert Term(prompt="x {part2}, {part1}").reads("b | c") == "x c, b"
    with pytest.raises(GuidanceError, match=r"the task's prompt 'b' has 1 part\(s\), expected more"):
        Term(prompt="{part2}").reads("b")


def test_all_combinations_of_the_lists_are_searched():
    recipe = (
        Config.model_validate(
            {"methods": {"m": {"fid": {"terms": [{"weight": [1, 2]}, {"weight": 5}, {"weight": [3, 4]}]}}}}
        )
        .methods["m"]
        .fid
    )
    assert recipe.grid() == [(1, 5, 3), (1, 5, 4), (2, 5, 3), (2, 5, 4)]
    assert recipe.searched == (0, 2)


def test_every_setting_is_explained():
    names = [name for name, _, text in fields() if text]
    assert {"prior.controlnet", "models.NAME.token", "methods.NAME.canny", "RECIPE.terms.weight"} <= set(names)
    assert len(names) == len(list(fields()))


def test_the_config_of_the_page_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    block = page.split("## The config")[1].split("A recipe computes")[0].split("    [prior]")[1]
    text = "[prior]" + block
    config = load_config(written(tmp_path, "\n".join(line.removeprefix("    ") for line in text.splitlines())))
    assert config.methods["ours"].alignment.searched == (1,)
    assert config.fid.count == 5000


def test_the_page_tells_every_rule_and_task():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for task in TASKS:
        assert f"| `{task}` |" in page
    assert f"within {ALIGNMENT_TOLERANCE:g} of the best" in page
