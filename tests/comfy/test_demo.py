"""The demo command ends cleanly, whatever happens to it, and never leaves a server behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comfyui_gcfg.demo.__main__ import main
from PIL import Image

COMMAND = [sys.executable, "-m", "comfyui_gcfg.demo"]
OWN_FILES = ("concept-generation", "stylised-control", "gcfg-model-upscale")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def folder(model_folder, tmp_path):
    """A working directory whose demo cache already holds the small models."""
    (tmp_path / ".cache" / "demo" / "small").mkdir(parents=True)
    (tmp_path / ".cache" / "demo" / "small" / "models").symlink_to(model_folder, target_is_directory=True)
    return tmp_path


@pytest.fixture
def start(folder):
    """Start the demo with its output in `log.txt`; end it with the test."""
    started = []

    def go(*options):
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for name in ("MODEL", "CONCEPT"):
            env.pop(name, None)
        with (folder / "log.txt").open("wb") as log:
            demo = subprocess.Popen(
                [*COMMAND, *options], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        started.append(demo)
        return demo

    yield go
    for demo in started:
        if demo.poll() is None:
            demo.kill()
        demo.wait()


@pytest.fixture
def called(folder, monkeypatch, capfd):
    """Call the demo here, where no Python has to start; return its exit code and what it wrote."""
    for name in ("MODEL", "CONCEPT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["demo", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, "".join(capfd.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def log_of(folder):
    return (folder / "log.txt").read_text(encoding="utf-8", errors="replace")


def wait_for(condition, seconds, what):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)
    return result


def server_of(demo, folder):
    """The pid of the demo's server, once it exists."""
    children = Path(f"/proc/{demo.pid}/task/{demo.pid}/children")

    def find():
        assert demo.poll() is None, log_of(folder)
        for pid in map(int, children.read_text().split()):
            if b"--listen" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    return wait_for(find, 60, "the server's start")


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def sampling(demo, folder):
    def mid_run():
        assert demo.poll() is None, log_of(folder)
        return re.search(r"\b[2-9]/30\b", log_of(folder))

    wait_for(mid_run, 120, "the second step")


def test_runs_a_workflow_and_writes_a_contact_sheet(start, folder):
    """One for which there are models; one of large models is left out by name."""
    chosen = ("--only", "ideogram4-two-models", "--only", "text-guided-concept")
    demo = start(*chosen, "--size", "64", "--steps", "1")
    assert demo.wait(180) == 0, log_of(folder)
    text = log_of(folder)
    with Image.open(folder / "output" / "text-guided-concept.png") as image:
        assert image.size == (64, 64)
    with Image.open(folder / "output" / "contact-sheet.png") as sheet:
        assert sheet.width > 200
    with Image.open(folder / "output" / "thumbnails" / "text-guided-concept.jpg") as thumbnail:
        assert thumbnail.size == (384, 384)
    with Image.open(folder / "output" / "digits.png") as digits:
        assert digits.width > 3 * digits.height
    assert re.search(r"1 workflows, 1 images in \d+ s:", text)
    assert re.search(r"text-guided-concept +\d+\.\d s +output/text-guided-concept\.png", text)
    assert "Contact sheet: output/contact-sheet.png" in text
    (line,) = re.findall(r"^skipped .*$", text, re.MULTILINE)
    assert re.fullmatch(
        r"skipped ideogram4-two-models: (this ComfyUI has no node .*Ideogram4Scheduler.*|it also needs "
        r"flux2-vae\.safetensors, ideogram4_fp8_scaled\.safetensors, ideogram4_unconditional_fp8_scaled\.safetensors, "
        r"qwen3vl_8b_fp8_scaled\.safetensors)",
        line,
    )


def test_a_taken_port_is_said_in_one_sentence(called):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, text = called("--port", str(port))
    assert code == 1
    assert text.splitlines()[-1] == (
        f"Error: --port {port}: another program listens there; choose another port, or leave --port out."
    )
    assert "Traceback" not in text


@linux
def test_a_server_that_dies_in_mid_run(start, folder):
    demo = start("--only", "concept-generation", "--size", "128", "--steps", "30")
    pid = server_of(demo, folder)
    sampling(demo, folder)
    os.kill(pid, signal.SIGKILL)
    assert demo.wait(30) == 1
    text = log_of(folder)
    assert "Error: The ComfyUI server ended unexpectedly (exit code -9); the end of " in text
    assert "server.log" in text
    assert "Traceback" not in text.rsplit("Error: ", 1)[0]


@linux
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_stopped_demo_leaves_no_server(start, folder, number, code):
    demo = start("--only", "concept-generation")
    pid = server_of(demo, folder)
    time.sleep(0.5)
    os.kill(demo.pid, number)
    assert demo.wait(30) == code
    try:
        wait_for(lambda: gone(pid), 10, "the server's end")
    finally:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)
    if number != signal.SIGKILL:
        assert log_of(folder).splitlines()[-1] == "Stopped; the server has been shut down."
        assert "Traceback" not in log_of(folder)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--only", "nothing"], r"--only nothing: no such workflow; choose from autoguidance, .*\."),
        (["--device", "toaster"], r"--device toaster: expected auto, cpu or gpu\."),
        (["--model", "gone.safetensors"], r"MODEL: expected an SD1\.5 file, found none at gone\.safetensors; .*\."),
        (["--concept", "x.safetensors"], r"CONCEPT needs MODEL, the SD1\.5 checkpoint that it was trained from\."),
    ],
)
def test_wrong_options_are_said_in_one_sentence(called, options, sentence):
    code, text = called(*options)
    assert code == 1
    assert re.search(f"^Error: {sentence}$", text, re.MULTILINE), text
    assert "Traceback" not in text


def test_an_option_of_the_wrong_type(called):
    code, text = called("--steps", "many")
    assert code == 2
    assert "Invalid value for '--steps'" in text
    assert "Traceback" not in text


def test_a_wrong_comfyui_path(called, folder, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    code, text = called()
    assert code == 1
    assert text.splitlines()[-1] == (
        f"Error: COMFYUI_PATH: expected a ComfyUI folder with main.py, got {folder}; correct or unset it."
    )


def test_own_files_run_what_they_suffice_for(start, folder, model_folder, comfyui_path):
    """MODEL= and CONCEPT= stand in for the workflows' names; workflows that need more are named and left out.

    So is, on the oldest ComfyUI, that of GCFG Model.
    """
    model, concept = folder / "my model.safetensors", folder / "my-concept.safetensors"
    model.symlink_to(model_folder / "checkpoints" / "v1-5-pruned-emaonly-fp16.safetensors")
    concept.symlink_to(model_folder / "unet" / "ffhq-concept.safetensors")
    demo = start(
        *(option for name in OWN_FILES for option in ("--only", name)),
        *("--size", "64", "--steps", "2"),
        *("--model", str(model), "--concept", str(concept)),
    )
    assert demo.wait(180) == 0, log_of(folder)
    assert "skipped stylised-control: it also needs Counterfeit-V3.0_fp16.safetensors" in log_of(folder)
    assert (folder / "output" / "concept-generation.png").exists()
    oldest = comfyui_path is None  # the pip-packaged one
    assert ("skipped gcfg-model-upscale: this ComfyUI is too old for GCFGModel" in log_of(folder)) == oldest
    assert (folder / "output" / "gcfg-model-upscale-refined.png").exists() != oldest
