"""One real ComfyUI server for all tests of this folder, with the demo's small models and this pack in it."""

import io
import json
import shutil

import numpy
import pytest
from comfyui_gcfg.testkit import models, prompts
from comfyui_gcfg.testkit.server import Server
from comfyui_gcfg.testkit.workflow import to_prompt
from PIL import Image
from safetensors.torch import save_file

LORA = "style-lora.safetensors"


@pytest.fixture(scope="session")
def server(work_folder, comfyui_path):
    work = work_folder("server")
    unet = models.unet_state_dict("sd15")
    save_file(models.lora_state_dict(unet, seed=6), work / "models" / "loras" / LORA)
    with Server(work, comfyui=comfyui_path, options=["--preview-method", "latent2rgb"]) as running:
        yield running
    shutil.rmtree(work, ignore_errors=True)


@pytest.fixture
def client(server):
    return server.client


@pytest.fixture
def load_workflow(root):
    return lambda name: json.loads((root / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def api_prompt(client, load_workflow):
    """A shared workflow in API form, small enough for a test: 64 pixels, 2 steps."""

    def make(name, size=64, steps=2):
        return prompts.shrunk(to_prompt(load_workflow(name), client.object_info), size, steps)

    return make


@pytest.fixture
def pixels(client):
    """The image of a run as an array of 8-bit values (height, width, 3)."""

    def get(run, index=0):
        return numpy.asarray(Image.open(io.BytesIO(client.image(run.images[index]))).convert("RGB"))

    return get


@pytest.fixture
def node_of():
    """The id of the only node of a class in a prompt."""

    def find(prompt, class_type):
        (node,) = [node for node, entry in prompt.items() if entry["class_type"] == class_type]
        return node

    return find
