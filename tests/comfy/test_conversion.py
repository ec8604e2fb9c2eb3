"""Graph-editor JSON to API prompt: what the editor does on "Queue", and what the check finds. No server."""

import copy

import pytest
from comfyui_gcfg.testkit.errors import CommandError
from comfyui_gcfg.testkit.workflow import problems, to_prompt

INFO = {
    "Load": {"input": {"required": {"file": [["a.safetensors", "b.safetensors"]]}}, "output": ["MODEL", "CLIP"]},
    "Patch": {
        "input": {"required": {"model": ["MODEL"], "strength": ["FLOAT", {"default": 1.0}]}},
        "output": ["MODEL"],
    },
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"default": 0}],
                "steps": ["INT", {"default": 20}],
                "sampler": ["COMBO", {"options": ["euler", "ddim"]}],
            },
            "optional": {"mask": ["MASK"], "label": ["STRING", {"default": "none"}]},
        },
        "output": ["LATENT"],
    },
}


def node(number, kind, inputs=(), outputs=(), widgets=(), mode=0):
    return {
        "id": number,
        "type": kind,
        "mode": mode,
        "inputs": [{"name": name, "type": type_, "link": link} for name, type_, link in inputs],
        "outputs": [{"type": type_, "links": links} for type_, links in outputs],
        "widgets_values": list(widgets),
    }


def workflow():
    """Load -> Patch -> Reroute -> Sample."""
    return {
        "nodes": [
            node(1, "Load", (), [("MODEL", [1]), ("CLIP", [])], ["a.safetensors"]),
            node(2, "Patch", [("model", "MODEL", 1)], [("MODEL", [2])], [0.5]),
            node(3, "Reroute", [("", "*", 2)], [("MODEL", [3])]),
            node(
                4,
                "Sample",
                [("model", "MODEL", 3), ("mask", "MASK", None)],
                [("LATENT", [])],
                [7, "randomize", 9, "ddim", "mine"],
            ),
            node(5, "Note", widgets=["words"]),
        ],
        "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "*"], [3, 3, 0, 4, 0, "MODEL"]],
    }


def inputs(prompt):
    return {number: entry["inputs"] for number, entry in prompt.items()}


def test_links_widgets_and_the_value_after_a_seed():
    assert inputs(to_prompt(workflow(), INFO)) == {
        "1": {"file": "a.safetensors"},
        "2": {"strength": 0.5, "model": ["1", 0]},
        "4": {"seed": 7, "steps": 9, "sampler": "ddim", "label": "mine", "model": ["2", 0]},
    }
    assert problems(workflow(), INFO) == []


def test_an_older_file_without_the_value_after_a_seed_and_the_last_widget():
    graph = workflow()
    graph["nodes"][3]["widgets_values"] = [7, 9, "ddim"]
    assert inputs(to_prompt(graph, INFO))["4"] == {
        "seed": 7,
        "steps": 9,
        "sampler": "ddim",
        "label": "none",
        "model": ["2", 0],
    }


def test_a_widget_turned_into_an_input_keeps_its_place_in_the_values():
    graph = workflow()
    graph["nodes"].append(node(6, "PrimitiveNode", (), [("INT", [4])], [33, "fixed"]))
    graph["nodes"][3]["inputs"].append({"name": "steps", "type": "INT", "link": 4, "widget": {"name": "steps"}})
    graph["links"].append([4, 6, 0, 4, 2, "INT"])
    converted = inputs(to_prompt(graph, INFO))["4"]
    assert (converted["steps"], converted["sampler"], converted["seed"]) == (33, "ddim", 7)
    assert problems(graph, INFO) == []


def test_a_bypassed_node_hands_its_input_on():
    graph = workflow()
    graph["nodes"][1]["mode"] = 4
    converted = inputs(to_prompt(graph, INFO))
    assert "2" not in converted
    assert converted["4"]["model"] == ["1", 0]


def test_a_muted_node_hands_nothing_on():
    graph = workflow()
    graph["nodes"][1]["mode"] = 2
    converted = inputs(to_prompt(graph, INFO))
    assert "2" not in converted
    assert "model" not in converted["4"]


def test_the_order_of_inputs_is_the_servers():
    info = copy.deepcopy(INFO)
    info["Sample"]["input_order"] = {"required": ["model", "steps", "seed", "sampler"], "optional": ["mask", "label"]}
    graph = workflow()
    graph["nodes"][3]["widgets_values"] = [9, 7, "fixed", "ddim"]
    converted = inputs(to_prompt(graph, info))["4"]
    assert (converted["steps"], converted["seed"], converted["sampler"]) == (9, 7, "ddim")


def test_refuses_what_it_cannot_convert():
    graph = workflow()
    graph["nodes"][0]["type"] = "Gone"
    with pytest.raises(CommandError, match=r"^This ComfyUI has no node Gone \(node 1\); update it or its pack\.$"):
        to_prompt(graph, INFO)
    with pytest.raises(CommandError, match="subgraphs"):
        to_prompt({**workflow(), "definitions": {"subgraphs": [{}]}}, INFO)
    with pytest.raises(CommandError, match="Expected a graph-editor workflow"):
        to_prompt({"1": {"class_type": "Load"}}, INFO)


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda g: g["nodes"][0].update(type="Gone"), "Gone (node 1): this ComfyUI has no such node."),
        (lambda g: g["nodes"][1]["inputs"][0].update(name="modle"), "Patch (node 2): it has no input modle."),
        (lambda g: g["nodes"][1]["inputs"][0].update(link=None), "Patch (node 2): input model is not connected."),
        (
            lambda g: g["nodes"][0].update(widgets_values=["c.safetensors"]),
            "Load (node 1): file is 'c.safetensors', the server offers ['a.safetensors', 'b.safetensors'].",
        ),
        (lambda g: g["links"].pop(0), "Patch (node 2): input model refers to link 1, which does not exist."),
        (lambda g: g["links"].append([9, 8, 0, 4, 0, "MODEL"]), "Link 9: node 8 or 4 is not in the workflow."),
        (lambda g: g["links"][0].__setitem__(2, 1), "Link 1: output 1 of node 1 does not list it."),
        (lambda g: g["links"][0].__setitem__(4, 1), "Link 1: input 1 of node 2 does not refer to it."),
        (lambda g: g["links"][0].__setitem__(5, "CLIP"), "Link 1: types ['CLIP', 'MODEL'] differ along it."),
        (
            lambda g: g["nodes"][0]["outputs"].reverse(),
            "Load (node 1): its outputs are ['CLIP', 'MODEL'], the server's node has ['MODEL', 'CLIP'].",
        ),
    ],
)
def test_the_check_finds_each_fault(break_it, sentence):
    graph = workflow()
    break_it(graph)
    assert sentence in problems(graph, INFO)
