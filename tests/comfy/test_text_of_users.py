"""Text of users and odd values over HTTP: what a real server says to them, and that it goes on answering."""

import gzip
import json
import socket
import threading
import time

import pytest
import requests
from comfyui_gcfg.testkit.errors import PromptFailed
from comfyui_gcfg.testkit.model_files import PRIOR

HALF = "a\ud83d"  # half an emoji, as a cut text leaves it


def graph(**term):
    """A graph of one term, with other widgets in it."""
    own = {"weight": 5.0, "start_percent": 0.0, "end_percent": 1.0, "conditioning": ["3", 0]}
    run = {"seed": 1, "steps": 2, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": ["1", 0], "unconditional": ["2", 0], "latent_image": ["4", 0], "term_1": ["5", 0]}
    nodes = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": PRIOR}),
        "2": ("CLIPTextEncode", {"clip": ["1", 1], "text": ""}),
        "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": "seven"}),
        "4": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "5": ("GCFGGuidanceTerm", {**own, **term}),
        "6": ("GCFGKSampler", {**run, **links}),
        "7": ("VAEDecode", {"samples": ["6", 0], "vae": ["1", 2]}),
        "8": ("PreviewImage", {"images": ["7", 0]}),
    }
    return {node: {"class_type": kind, "inputs": inputs} for node, (kind, inputs) in nodes.items()}


def chart(run):
    return run.outputs["6"]["gcfg"][0]


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_half_an_emoji_in_an_error_leaves_the_server_alive(client):
    """ComfyUI 0.33.0 never ended this prompt, nor any after it."""
    with pytest.raises(PromptFailed) as caught:
        client.run(graph(label=HALF, start_percent=0.5, end_percent=0.2), timeout=60)
    assert caught.value.details["exception_message"].strip() == (
        r"Guidance Term 'a\ud83d': start_percent is 0.5 and end_percent is 0.2, expected start_percent <= end_percent; "
        "swap them."
    )
    assert client.run(graph(label="next"), timeout=60).images


def test_labels_reach_log_and_chart_as_text_of_one_line(client, server):
    """A term that acts at no step is named in the log."""
    late = {"start_percent": 0.99, "end_percent": 0.992}
    assert chart(client.run(graph(label=f"{HALF}\n\x1b[31mred", **late)))["labels"] == [r"a\ud83d\n\x1b[31mred"]
    assert chart(client.run(graph(label="向日葵 🌻", **late)))["labels"] == ["向日葵 🌻"]
    log = server.log_file.read_text(encoding="utf-8")
    assert r"Guidance Term 'a\ud83d\n\x1b[31mred': no step of this run lies between" in log
    assert "Guidance Term '向日葵 🌻': no step of this run lies between" in log
    assert "--- Logging error ---" not in log


def test_a_refused_text_names_what_it_found(client):
    prompt = graph()
    prompt["5"] = {
        "class_type": "GCFGDecoupledPrompt",
        "inputs": {"clip": ["1", 1], "text": f"1 | {HALF}\n\x1b[2J | b"},
    }
    with pytest.raises(PromptFailed) as caught:
        client.run(prompt)
    assert r"line 1: expected whole characters; found \ud83d" in str(caught.value)
    assert r"found '\x1b[2J | b'" in str(caught.value)


def test_a_curve_beyond_the_range_is_refused(client):
    with pytest.raises(PromptFailed, match="the weight of pair 1 is 1e\\+308, expected a number from -100 to 100"):
        client.run(graph(curve="points", points="0: 1e308, 1: -1e308"))


def test_the_history_of_a_run_is_json(client):
    run = client.run(graph(label="strict", curve="points", points="0: 100, 1: -100"))
    text = client.request("GET", f"/history/{run.prompt_id}").text
    assert json.loads(text, parse_constant=refuse)[run.prompt_id]["outputs"]["6"]["gcfg"]


# --- what the editor asks ---

CURVE = {"weight": 8, "start_percent": 0.25, "end_percent": 0.75, "curve": "linear", "end_weight": 0, "points": ""}
BODIES = {
    "nothing": b"",
    "no json": b"{",
    "a list": b"[]",
    "deep": b'{"text":' * 30_000,
    "deep lists": b"[" * 200_000,
    "another encoding": '{"text": "é"}'.encode("latin-1"),
    "nan": b'{"weight": NaN}',
    "a giant integer": b'{"weight": ' + b"9" * 100_000 + b', "text": ' + b"9" * 100_000 + b"}",
    "a list for text": b'{"text": ["x"], "points": ["y"]}',
    "too large": b'{"text": "' + b"1 | a\\n" * 200_000 + b'"}',
    "much too large": b'{"text": "' + b" " * 20_000_000 + b'"}',
    "no text": b'{"text": null, "weight": null}',
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("path", ["prompt", "curve"])
def test_a_question_that_is_none_is_answered_with_400_and_a_sentence(client, path, body):
    answer = client.request("POST", f"/gcfg/{path}", data=BODIES[body])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error.startswith(f"/gcfg/{path}: ")
    assert error.endswith(".")


@pytest.mark.parametrize("charset", ["application/json; charset=no-such", "text/plain; charset=utf-7"])
def test_another_charset_is_not_looked_at(client, charset):
    answer = client.request("POST", "/gcfg/curve", data=json.dumps(CURVE), headers={"Content-Type": charset})
    assert len(answer.json()["weights"]) == 101


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_body_that_cannot_be_unpacked(client, encoding):
    """ComfyUI's web server may close the connection too, before its answer was read."""
    try:
        answer = requests.post(
            f"{client.url}/gcfg/curve", b"no" * 99, headers={"Content-Encoding": encoding}, timeout=60
        )
        assert answer.status_code == 400
    except requests.ConnectionError:
        pass
    assert client.request("POST", "/gcfg/curve", data=json.dumps(CURVE)).ok


def test_a_question_that_nobody_waits_for_any_more(client, server):
    """Its end never comes, and the log keeps quiet about it."""
    host, port = client.url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /gcfg/prompt HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.2)
    assert client.request("POST", "/gcfg/curve", data=json.dumps(CURVE)).ok
    assert "Error handling request" not in server.log_file.read_text(encoding="utf-8")


def test_a_body_that_unpacks_to_more_than_the_cap(client):
    packed = gzip.compress(b'{"text": "' + b" " * 50_000_000 + b'"}')
    answer = client.request("POST", "/gcfg/prompt", data=packed, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 400
    assert answer.json() == {"error": "/gcfg/prompt: expected a JSON object of at most 262144 bytes."}


def test_half_an_emoji_in_a_question(client):
    answer = client.request("POST", "/gcfg/prompt", data=json.dumps({"text": f"1 | {HALF}"}))
    assert answer.json()["problems"] == [
        {"line": 1, "message": r"expected whole characters; found \ud83d, half of one; delete it."}
    ]


def test_a_line_made_to_take_long_stops_nobody(client):
    """This line took 28 s, in which the server answered nobody."""
    line = "1 @" + "1" * 800 + "-" + "1" * 800 + "x | a"
    asked = threading.Thread(
        target=requests.post, args=(f"{client.url}/gcfg/prompt",), kwargs={"json": {"text": line}, "timeout": 120}
    )
    begin = time.monotonic()
    asked.start()
    assert client.request("GET", "/system_stats").ok
    asked.join()
    assert time.monotonic() - begin < 5
