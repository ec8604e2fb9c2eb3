"""Help pages, Chinese names, blueprints and templates: as files, and as the server hands them to the editor."""

import itertools
import json
import re
from pathlib import Path

import pytest
from comfyui_gcfg.demo.english import names as english_names
from comfyui_gcfg.testkit import model_files, prompts
from comfyui_gcfg.testkit.workflow import choices, input_specs, is_widget, problems, to_prompt

ROOT = Path(__file__).parents[2]
PACK = "comfyui-gcfg"  # the folder in custom_nodes that the demo's server gives it
NODES = sorted(path.name for path in (ROOT / "web" / "docs").iterdir())
BLUEPRINTS = sorted(path.stem for path in (ROOT / "subgraphs").iterdir())
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
INSIDE, OUTSIDE = -10, -20  # the editor's ids for where links enter and leave a subgraph
ADDED = 1000  # ids from here on are of nodes that a test puts around a blueprint
WORDS = {"en": ("input", "output", "optional"), "zh": ("输入", "输出", "可选")}


@pytest.fixture(scope="module")
def serves(comfyui_path):
    """Whether this ComfyUI has a route, or looks into a folder, by its source."""
    app = None if comfyui_path is None else comfyui_path / "app"
    source = "".join(path.read_text(encoding="utf-8") for path in app.glob("*_manager.py")) if app else ""
    return lambda name: f'"{name}"' in source


@pytest.fixture
def get(client, serves):
    """What a route answers, None where this ComfyUI does not have it."""

    def ask(route):
        answer = client.request("GET", route)
        assert answer.status_code == (200 if serves(route) else 404)
        return answer.json() if serves(route) else None

    return ask


# --- help pages


def test_every_node_has_its_pages(client):
    assert {name for name in client.object_info if name.startswith("GCFG")} == set(NODES)


def table(page, heading):
    """{name: (type, optional)} of the rows of the table with this first heading, in order; term_1 … term_8 written out.

    A row is | `name`<br>TYPE | meaning | or, in Chinese, | `name`（名称）<br>TYPE，可选 | meaning |.
    """
    rows = itertools.takewhile(lambda line: line.startswith("|"), page.split(f"\n| {heading} |")[1].splitlines()[2:])
    found = {}
    for row in rows:
        cell = row.split(" | ")[0]
        name, kind, optional = re.fullmatch(r"\| `(.+?)`(?:.*?)<br>(\w+)(?:(?:, |\uff0c)(\w+))?", cell).groups()
        span = re.search(r"`term_(\d)` … `term_(\d)`", cell)
        names = [f"term_{n}" for n in range(int(span[1]), int(span[2]) + 1)] if span else [name]
        found.update(dict.fromkeys(names, (kind, optional)))
    return found


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("node", NODES)
def test_the_page_tells_inputs_and_outputs_of_the_live_node(client, node, language):
    info = client.object_info[node]
    pack = (info.get("python_module") or f"custom_nodes.{PACK}").split(".")[1]  # as the editor finds the page
    answer = client.request("GET", f"/extensions/{pack}/docs/{node}/{language}.md")
    assert answer.status_code == 200
    page = answer.content.decode()
    assert page == (ROOT / "web" / "docs" / node / f"{language}.md").read_text(encoding="utf-8")
    of_input, of_output, optional = WORDS[language]
    sockets = {name for name, spec in info["input"].get("optional", {}).items() if not is_widget(spec)}
    assert list(table(page, of_input).items()) == [
        (name, ("COMBO" if choices(spec) is not None else spec[0], optional if name in sockets else None))
        for name, spec in input_specs(info).items()
    ]
    assert table(page, of_output) == {
        name: (kind, None) for name, kind in zip(info["output_name"], info["output"], strict=True)
    }
    title = re.match(r"# (.*)\n", page)[1]
    assert title == info["display_name"] or (language == "zh" and f"\uff08{info['display_name']}\uff09" in title)


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("node", NODES)
def test_the_page_leads_to_the_paper_and_to_a_workflow_that_is_there(node, language):
    page = (ROOT / "web" / "docs" / node / f"{language}.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((.*?)\)", page) == ["https://arxiv.org/abs/2312.08195"]
    named = set(re.findall(r"\*\*([\w-]+)\*\*", page))
    assert named
    assert named <= set(WORKFLOWS)
    if language == "zh":
        english = (ROOT / "web" / "docs" / node / "en.md").read_text(encoding="utf-8")
        assert named == set(re.findall(r"\*\*([\w-]+)\*\*", english))


# --- English and Chinese names and tooltips


def test_the_english_names_are_those_of_the_live_nodes(client):
    """Written by demo/english.py; the Chinese ones stand beside them in the same form."""
    ours = {name: info for name, info in client.object_info.items() if name.startswith("GCFG")}
    if any("output_tooltips" not in info for info in ours.values()):
        pytest.skip("this ComfyUI tells no tooltips of outputs")
    stored = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert stored == {name: english_names(info) for name, info in ours.items()}
    assert not set("|@<$") & set(json.dumps(stored))  # the braces are JSON's


@pytest.fixture(scope="module")
def chinese():
    return json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))


def test_every_node_has_chinese_names(chinese):
    assert set(chinese) == set(NODES)


@pytest.mark.parametrize("node", NODES)
def test_every_input_and_output_has_a_chinese_name_and_tooltip(client, chinese, node):
    info, said = client.object_info[node], chinese[node]
    assert set(said) == {"display_name", "description", "inputs", "outputs"}
    assert list(said["inputs"]) == list(input_specs(info))
    assert list(said["outputs"]) == [str(number) for number in range(len(info["output"]))]
    tooltips = [entry["tooltip"] for group in ("inputs", "outputs") for entry in said[group].values()]
    names = [entry["name"] for group in ("inputs", "outputs") for entry in said[group].values()]
    # Nothing but these two: an option of a drop-down, once translated, would be sent in Chinese.
    assert all(set(entry) == {"name", "tooltip"} for group in ("inputs", "outputs") for entry in said[group].values())
    assert all(re.search(r"[\u4e00-\u9fff]", text) for text in (said["display_name"], said["description"], *tooltips))
    assert all(names)
    # vue-i18n's own syntax: a bar would cut the text, an @ or a brace would break it.
    assert not set("|@{}<$") & set("".join([said["display_name"], said["description"], *names, *tooltips]))


def test_the_editor_is_given_the_names(get, chinese):
    answer = get("/i18n")
    if answer is not None:
        assert set(NODES) <= set(answer["en"]["nodeDefs"])
        ours = {node: names for node, names in answer["zh"]["nodeDefs"].items() if node.startswith("GCFG")}
        assert ours == chinese
        assert answer["zh"]["nodeCategories"]["GCFG"]


# --- blueprints


def blueprint(name):
    return json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="ascii"))  # 0.8.0 reads in any encoding


def test_the_presets_are_there():
    assert BLUEPRINTS == [
        "Concept and Text Guidance (GCFG)",
        "Decoupled Prompt Sampler (GCFG)",
        "Drift Rectification (GCFG)",
        "Region (GCFG)",
        "Weighted Negative Prompt (GCFG)",
    ]
    ids = [blueprint(name)["definitions"]["subgraphs"][0]["id"] for name in BLUEPRINTS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_the_blueprint_is_one_node_around_its_graph(name):
    """What the editor asks of a blueprint, and every socket and widget of its node leads to something inside."""
    file = blueprint(name)
    (host,), (graph,) = file["nodes"], file["definitions"]["subgraphs"]
    assert (host["type"], host["title"], graph["name"]) == (graph["id"], name, name)
    assert graph["category"] == "GCFG"
    assert graph["description"] == file["extra"]["BlueprintDescription"]
    assert [(i["name"], i["type"]) for i in host["inputs"]] == [(i["name"], i["type"]) for i in graph["inputs"]]
    assert [(o["name"], o["type"]) for o in host["outputs"]] == [(o["name"], o["type"]) for o in graph["outputs"]]
    links = {link["id"]: link for link in graph["links"]}
    assert len(links) == len(graph["links"])
    nodes = {node["id"]: node for node in graph["nodes"]}
    for slot, given in enumerate(graph["inputs"]):
        assert given["linkIds"]
        for link in map(links.get, given["linkIds"]):
            target = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert (link["origin_id"], link["origin_slot"], target["link"]) == (INSIDE, slot, link["id"])
            assert link["type"] == target["type"] == given["type"]
            assert ("widget" in target) == ("widget" in host["inputs"][slot])
    for slot, made in enumerate(graph["outputs"]):
        (link,) = map(links.get, made["linkIds"])
        origin = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
        assert (link["target_id"], link["target_slot"]) == (OUTSIDE, slot)
        assert link["type"] == origin["type"] == made["type"]
    # 0.8.0 changes the seed after a run only where both of its widgets are named; it appends the linked others itself.
    samplers = [str(node["id"]) for node in graph["nodes"] if node["type"] == "GCFGKSampler"]
    assert host["properties"]["proxyWidgets"] == [
        [sampler, widget] for sampler in samplers for widget in ("seed", "control_after_generate")
    ]


SOURCES = {
    "model": ("CheckpointLoaderSimple", [model_files.PRIOR], 0),
    "clip": ("CheckpointLoaderSimple", [model_files.PRIOR], 1),
    "vae": ("CheckpointLoaderSimple", [model_files.PRIOR], 2),
    "latent_image": ("EmptyLatentImage", [64, 64, 1], 0),
    "mask": ("SolidMask", [1.0, 64, 64], 0),
    "concept_model": ("GCFGLoadConceptUNet", [model_files.CONCEPT, "default"], 0),
    "custom_model": ("CheckpointLoaderSimple", [model_files.CUSTOM], 0),
}


def opened(name, object_info):
    """The blueprint's graph as a workflow: its sockets connected to loaders, its latent decoded and saved."""
    (graph,) = blueprint(name)["definitions"]["subgraphs"]
    nodes, links, ids, loaders = graph["nodes"], [], itertools.count(ADDED), {}

    def add(kind, values, inputs=()):
        outputs = [{"name": o, "type": o, "links": []} for o in object_info[kind]["output"]]
        nodes.append({"id": next(ids), "type": kind, "widgets_values": values, "inputs": [], "outputs": outputs})
        for (origin, slot), socket in inputs:
            nodes[-1]["inputs"].append({"name": socket, "type": origin["outputs"][slot]["type"], "link": None})
            connect(origin, slot, nodes[-1], len(nodes[-1]["inputs"]) - 1)
        return nodes[-1]

    def connect(origin, slot, target, place):
        link = next(ids)
        origin["outputs"][slot]["links"] = [*origin["outputs"][slot]["links"], link]
        target["inputs"][place]["link"] = link
        links.append([link, origin["id"], slot, target["id"], place, origin["outputs"][slot]["type"]])

    def source(name):
        kind, values, slot = SOURCES[name]
        key = (kind, str(values))
        loaders[key] = loaders.get(key) or add(kind, values)
        return loaders[key], slot

    by_id = {node["id"]: node for node in nodes}
    for link in graph["links"]:
        target = by_id.get(link["target_id"])
        socket = graph["inputs"][link["origin_slot"]]["name"] if link["origin_id"] == INSIDE else None
        if socket in SOURCES:
            connect(*source(socket), target, link["target_slot"])
        elif socket is not None:  # a widget, or a socket that may stay free
            target["inputs"][link["target_slot"]]["link"] = None
        elif link["target_id"] != OUTSIDE:
            links.append(
                [link[part] for part in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")]
            )
        elif link["type"] in ("LATENT", "GCFG_TERMS"):
            latent = (by_id[link["origin_id"]], link["origin_slot"])
            if link["type"] == "GCFG_TERMS":
                empty = add("CLIPTextEncode", [""], [(source("clip"), "clip")])
                needed = [(source(name), name) for name in ("model", "latent_image")]
                wired = [*needed, ((empty, 0), "unconditional"), (latent, "term_1")]
                latent = (add("GCFGKSampler", [1, "fixed", 2, "euler", "normal", 1.0], wired), 0)
            image = add("VAEDecode", [], [(latent, "samples"), (source("vae"), "vae")])
            add("SaveImage", [name], [((image, 0), "images")])
    return {"nodes": nodes, "links": links}


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_the_blueprint_fits_the_live_server_and_runs(client, pixels, name):
    workflow = opened(name, client.object_info)
    assert problems(workflow, client.object_info) == []
    for node in workflow["nodes"]:  # every value is written down: no later default changes a preset
        widgets = [spec for spec in input_specs(client.object_info[node["type"]]).values() if is_widget(spec)]
        after_seed = node["type"] == "GCFGKSampler"
        assert node["id"] >= ADDED or len(node["widgets_values"]) == len(widgets) + after_seed
    prompt = to_prompt(workflow, client.object_info)
    run = client.run(prompts.shrunk(prompt, 64, 2))
    assert len(run.images) == 1
    assert pixels(run).std() > 4


def test_the_editor_is_given_the_blueprints(client, get):
    entries = get("/global_subgraphs")
    if entries is not None:
        ours = {key: entry for key, entry in entries.items() if entry["info"]["node_pack"] == f"custom_nodes.{PACK}"}
        assert sorted(entry["name"] for entry in ours.values()) == BLUEPRINTS
        for key, entry in ours.items():
            data = client.request("GET", f"/global_subgraphs/{key}").json()["data"]
            assert json.loads(data) == blueprint(entry["name"])
        others = {entry["name"] for key, entry in entries.items() if key not in ours}
        assert not others & set(BLUEPRINTS)


# --- the template browser


def test_the_template_browser_lists_every_workflow_with_its_picture(client, get, serves):
    # Newer versions take several folders for templates and serve only one of them.
    assert [name for name in ("example_workflows", "example", "examples", "workflow") if (ROOT / name).exists()] == []
    listed = get("/workflow_templates")
    if serves("workflows"):  # 0.3.29 looks into example_workflows only
        assert sorted(listed[PACK]) == WORKFLOWS
        for name in WORKFLOWS:
            for kind in ("json", "jpg"):
                answer = client.request("GET", f"/api/workflow_templates/{PACK}/{name}.{kind}")
                assert answer.status_code == 200
                assert answer.content == (ROOT / "workflows" / f"{name}.{kind}").read_bytes()
