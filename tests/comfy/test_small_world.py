"""The released models in a real ComfyUI: what the prompts ask for is drawn, by hand where the concept is a term."""

import io

import numpy
import pytest
import torch
from comfyui_gcfg.demo.digits import ROWS, WORDS, digit_sheet, varied
from comfyui_gcfg.reproduction.autoencoder import as_tensor
from comfyui_gcfg.reproduction.classifier import THINGS, features
from comfyui_gcfg.reproduction.scans import TRAINING, read_scans
from comfyui_gcfg.testkit import prompts, small_world
from comfyui_gcfg.testkit.workflow import to_prompt
from PIL import Image
from safetensors.torch import load_file

BATCH = 2
STEPS = 8


@pytest.fixture(scope="module")
def classifier():
    return features(small_world.TRAINED / "classifier.safetensors")


@pytest.fixture
def digits_prompt(client, load_workflow):
    prompt = prompts.shrunk(
        to_prompt(load_workflow("text-guided-concept"), client.object_info), small_world.SIZE, STEPS
    )
    return prompts.translated(prompt)


def drawn(client, prompt):
    """The images of a prompt, uint8, (N, 3, H, W)."""
    run = client.run(prompt)
    pictures = [numpy.asarray(Image.open(io.BytesIO(client.image(image))).convert("RGB")) for image in run.images]
    return torch.from_numpy(numpy.stack(pictures)).permute(0, 3, 1, 2)


@pytest.mark.slow
def test_guidance_of_both_writes_the_prompted_digit_by_hand(client, digits_prompt, classifier):
    """The prior alone prints what is asked; the concept alone writes what it likes; GCFG writes what is asked."""
    for entry in digits_prompt.values():
        if entry["class_type"] == "EmptyLatentImage":
            entry["inputs"]["batch_size"] = BATCH
    centre = classifier(as_tensor(read_scans()[0][TRAINING:])).mean(0)  # of scans that no network has seen
    right, far = {}, {}
    for title, without in ROWS:
        images = torch.cat(
            [drawn(client, varied(digits_prompt, word, seed, without)) for seed, word in enumerate(WORDS)]
        )
        seen = classifier(images)
        answers = classifier.answers(seen)
        truth = torch.arange(10).repeat_interleave(BATCH)
        right[title] = (answers["thing"].argmax(1) == truth).float().mean().item()
        far[title] = (seen.mean(0) - centre).norm().item()
    prior, concept, both = (title for title, _ in ROWS)
    assert THINGS[:10] == WORDS
    assert right[prior] > 0.6
    assert right[concept] < 0.35
    assert right[both] > 0.6
    assert far[concept] < 0.7 * far[prior]
    assert far[both] < 0.9 * far[prior]


def test_the_sheet_has_a_column_for_each_prompt_and_a_row_for_each_way(digits_prompt, tmp_path):
    """Each cell is the image of its own text, seed and guidances."""
    asked = []

    def run(prompt):
        text = {e["inputs"]["text"] for e in prompt.values() if e["inputs"].get("text")}
        weights = {e["inputs"]["label"]: e["inputs"]["weight"] for e in prompt.values() if "weight" in e["inputs"]}
        seeds = {e["inputs"]["seed"] for e in prompt.values() if "seed" in e["inputs"]}
        asked.append((text, seeds, weights))
        path = tmp_path / f"{len(asked)}.png"
        Image.new("RGB", (64, 64), (8 * len(asked), 0, 0)).save(path)
        return path

    sheet = numpy.asarray(digit_sheet(digits_prompt, run))
    assert [text for text, _, _ in asked] == [{word} for word in WORDS] * 3
    assert [seeds for _, seeds, _ in asked] == [{n} for n in range(10)] * 3
    without = [{label for label, weight in weights.items() if weight == 0} for _, _, weights in asked]
    assert without == [{"concept"}] * 10 + [{"text"}] * 10 + [set()] * 10
    reds = {tuple(pixel) for pixel in sheet.reshape(-1, 3)}
    assert all((8 * n, 0, 0) in reds for n in range(1, 31))


def test_the_released_models_fit_the_repository():
    """All of them together take at most 20 MB."""
    sizes = {path.name: path.stat().st_size for path in small_world.TRAINED.iterdir()}
    assert {"prior.safetensors", "concept.safetensors", "dreambooth.safetensors", "controlnet.safetensors"} <= set(
        sizes
    )
    assert sum(sizes.values()) <= 20_000_000
    assert all(
        tensor.isfinite().all()
        for name in sizes
        if name.endswith("safetensors")
        for tensor in load_file(small_world.TRAINED / name).values()
    )
