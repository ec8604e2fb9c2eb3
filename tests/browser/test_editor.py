"""What a user sees and does in the graph editor."""

import json
import re
from pathlib import Path

import pytest
from comfyui_gcfg.testkit.errors import PromptFailed
from comfyui_gcfg.testkit.workflow import to_prompt, unknown_nodes

WORKFLOWS = sorted(path.stem for path in (Path(__file__).parents[2] / "workflows").glob("*.json"))
FIELDS = "(node.inputs ?? []).filter((input) => input.name.startsWith('term_'))"
SOCKETS = f"(id) => {{ const node = window.app.graph.getNodeById(id); return {FIELDS}.map((i) => i.label ?? i.name); }}"
CHARTS = "() => window.app.graph._nodes.filter((n) => n.gcfgChart).map((n) => n.gcfgChart.readings.length)"


@pytest.fixture
def add(editor):
    """Add a node by its type and return its id."""

    def make(kind, x, y, **widgets):
        node = editor.evaluate(
            """([kind, x, y, widgets]) => {
                const node = window.LiteGraph.createNode(kind);
                node.pos = [x, y];
                window.app.graph.add(node);
                for (const widget of node.widgets ?? []) {
                    if (widget.name in widgets) {
                        widget.value = widgets[widget.name];
                        widget.callback?.(widget.value);
                    }
                }
                return node.id;
            }""",
            [kind, x, y, widgets],
        )
        editor.settle()
        return node

    return make


@pytest.fixture
def connect(editor):
    """Connect a term to a socket of a sampler, by its name; or disconnect the socket."""

    def link(term, sampler, socket):
        editor.evaluate(
            """([term, sampler, socket]) => {
                const graph = window.app.graph, target = graph.getNodeById(sampler);
                const slot = target.inputs.findIndex((input) => input.name === socket);
                if (term === null) target.disconnectInput(slot);
                else graph.getNodeById(term).connect(0, target, slot);
            }""",
            [term, sampler, socket],
        )
        editor.settle()

    return link


def set_widgets(editor, kind, **values):
    """Set widgets of every node of a type, as typing into them does."""
    editor.evaluate(
        """([kind, values]) => {
            for (const node of window.app.graph._nodes.filter((n) => n.type === kind)) {
                for (const widget of node.widgets ?? []) {
                    if (!(widget.name in values)) continue;
                    widget.value = values[widget.name];
                    widget.callback?.(widget.value);
                }
            }
        }""",
        [kind, values],
    )
    editor.settle()


def shrink(editor, seed=1):
    """Make a graph small enough for a test."""
    set_widgets(editor, "EmptyLatentImage", width=64, height=64)
    for kind in ("GCFGKSampler", "GCFGWeightSweep"):
        set_widgets(editor, kind, steps=3, seed=seed, control_after_generate="fixed")


def inputs_of(prompt):
    """What the server gets; "upload" is a button of old editors."""
    return {
        node: (entry["class_type"], {name: value for name, value in entry["inputs"].items() if name != "upload"})
        for node, entry in prompt.items()
    }


def size_of(node):
    size = node["size"]
    return [round(size[key]) for key in ("0", "1")] if isinstance(size, dict) else [round(value) for value in size]


def element(name):
    return f"window.app.graph._nodes.flatMap((n) => n.widgets ?? []).find((w) => w.name === '{name}').element"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_drops_as_it_is_in_its_file(editor, root, server, name):
    file = root / "workflows" / f"{name}.json"
    workflow = json.loads(file.read_text(encoding="utf-8"))
    unknown = unknown_nodes(workflow, server.client.object_info)
    if unknown:
        pytest.skip(f"{name}: this ComfyUI has no node {', '.join(unknown)}")
    editor.drop(file)
    assert inputs_of(editor.prompt()) == inputs_of(to_prompt(workflow, server.client.object_info))
    for node in workflow["nodes"]:
        sockets = [name for name in (i["name"] for i in node.get("inputs", ())) if name.startswith("term_")]
        if sockets:
            assert len(editor.evaluate(SOCKETS, node["id"])) == len(sockets)
    boxes = editor.evaluate("() => window.app.graph._nodes.map((n) => [n.id, ...n.pos, ...n.size])")
    places = {str(node["id"]): node["pos"] for node in workflow["nodes"]}
    if any([round(x), round(y)] != places[str(node)] for node, x, y, *_ in boxes):
        return  # the Vue nodes of 0.8.0 spread a graph by a fifth, and need more than that
    for i, (a, x, y, w, h) in enumerate(boxes):
        for b, x2, y2, w2, h2 in boxes[:i]:
            title = 30
            apart = x + w <= x2 or x2 + w2 <= x or y + h <= y2 - title or y2 + h2 <= y - title
            assert apart, f"nodes {a} and {b} overlap"


def test_sockets_grow_shrink_and_are_named(editor, add, connect):
    sampler = add("GCFGKSampler", 900, 100)
    assert editor.evaluate(SOCKETS, sampler) == ["term_1"]
    terms = [add("GCFGGuidanceTerm", 100, 300 * i, label=f"guide {i}") for i in range(8)]
    for number, term in enumerate(terms, start=1):
        connect(term, sampler, f"term_{number}")
        names = [f"{n} guide {n - 1}" for n in range(1, number + 1)]
        assert editor.evaluate(SOCKETS, sampler) == [*names, *([f"term_{number + 1}"] if number < 8 else [])]
    connect(None, sampler, "term_3")
    assert editor.evaluate(SOCKETS, sampler)[2:4] == ["term_3", "4 guide 3"]  # one in the middle keeps its place
    for number in (8, 7, 6, 5):
        connect(None, sampler, f"term_{number}")
    assert editor.evaluate(SOCKETS, sampler) == ["1 guide 0", "2 guide 1", "term_3", "4 guide 3", "term_5"]
    set_widgets(editor, "GCFGGuidanceTerm", label="renamed")
    assert editor.evaluate(SOCKETS, sampler)[0] == "1 renamed"
    connect(terms[5], terms[0], "terms")
    assert editor.evaluate(SOCKETS, sampler)[0] == "1 renamed + renamed"  # a chain
    links = editor.evaluate(
        "() => [window.app.canvas.constructor.link_type_colors.GCFG_TERMS, "
        "getComputedStyle(document.documentElement).getPropertyValue('--color-datatype-GCFG_TERMS').trim()]"
    )
    assert links[0] == links[1] == "#e0a03c"


def test_sockets_are_named_through_the_nodes_between(editor, add, connect):
    left, right, rest = (add("GCFGGuidanceTerm", 100, 300 * i, label=name) for i, name in enumerate(("l", "r", "bg")))
    regions, relation = add("GCFGRegionTerms", 500, 100), add("GCFGGuidanceRelation", 900, 100)
    model = add("GCFGModel", 1300, 100)
    assert editor.evaluate(SOCKETS, model) == ["term_1"]
    connect(relation, model, "term_1")
    connect(regions, relation, "terms")
    connect(left, regions, "regions")
    connect(rest, regions, "background")
    assert editor.evaluate(SOCKETS, model) == ["1 l + bg", "term_2"]
    connect(right, left, "terms")
    assert editor.evaluate(SOCKETS, model)[0] == "1 r + l + bg"


def test_undo_brings_a_link_and_its_socket_back(editor, add, connect):
    def look():
        """The editor remembers the graph after each click."""
        editor.page.mouse.click(300, 900)
        editor.settle()

    sampler, term = add("GCFGKSampler", 700, 100), add("GCFGGuidanceTerm", 200, 100, label="first")
    connect(term, sampler, "term_1")
    look()
    connect(None, sampler, "term_1")
    look()
    assert editor.evaluate(SOCKETS, sampler) == ["term_1"]
    editor.page.keyboard.press("Control+z")
    editor.wait_for(f"(id) => ({SOCKETS})(id).length === 2", sampler)
    assert editor.evaluate(SOCKETS, sampler) == ["1 first", "term_2"]


def test_copies_keep_their_links_and_sockets(editor, add, connect):
    sampler = add("GCFGKSampler", 700, 100)
    for number in (1, 2):
        connect(add("GCFGGuidanceTerm", 200, 350 * number - 300, label=f"t{number}"), sampler, f"term_{number}")
    editor.evaluate(
        """() => {
            const canvas = window.app.canvas;
            canvas.selectNodes(window.app.graph._nodes);
            canvas.copyToClipboard();
            canvas.pasteFromClipboard();
        }"""
    )
    editor.settle()
    samplers = editor.evaluate(
        "() => window.app.graph._nodes.filter((n) => n.type === 'GCFGKSampler').map((n) => n.id)"
    )
    assert len(samplers) == 2
    for node in samplers:
        assert editor.evaluate(SOCKETS, node) == ["1 t1", "2 t2", "term_3"]
    origins = editor.evaluate(
        """(ids) => ids.map((id) => {
            const graph = window.app.graph, inputs = graph.getNodeById(id).inputs;
            const links = inputs.filter((input) => input.link != null).map((input) => input.link);
            return links.map((link) => String((graph.links.get?.(link) ?? graph.links[link]).origin_id));
        })""",
        samplers,
    )
    assert len({*origins[0], *origins[1]}) == 4  # each sampler has terms of its own


def test_saving_and_loading_changes_nothing(editor, root):
    editor.drop(root / "workflows" / "several-conditions.json")
    serialize = "() => JSON.parse(JSON.stringify(window.app.graph.serialize()))"
    first, prompt = editor.evaluate(serialize), editor.prompt()
    editor.evaluate("async (workflow) => { await window.app.loadGraphData(workflow); }", first)
    editor.settle()
    second = editor.evaluate(serialize)
    assert editor.prompt() == prompt
    for a, b in zip(*(sorted(w["nodes"], key=lambda node: int(node["id"])) for w in (first, second)), strict=True):
        assert a.get("widgets_values") == b.get("widgets_values")
        assert a.get("inputs") == b.get("inputs")
        assert size_of(a) == size_of(b), a["type"]
    (term, *_) = [node for node in second["nodes"] if node["type"] == "GCFGGuidanceTerm"]
    assert not any(term["widgets_values"][7:])  # the curve's picture has no value; old editors write a null for it


def test_chart_is_drawn_live_and_after_a_cached_run(editor, root):
    editor.drop(root / "workflows" / "text-guided-concept.json")
    shrink(editor, seed=2)
    seen = set()
    run = editor.run(lambda: seen.add(tuple(editor.evaluate(CHARTS))))
    editor.wait_for(f"() => ({CHARTS})()[0] === 3")
    assert seen & {(1,), (2,)}, seen  # while it ran
    report = run["outputs"]["9"]["gcfg"][0]
    assert report["labels"] == ["concept", "text"]
    box = editor.evaluate(
        f"() => {{ const b = {element('guidance_chart')}.getBoundingClientRect(); "
        "return [b.x, b.y, b.width, b.height]; }"
    )
    assert box[2] > 50
    assert box[3] > 30
    editor.page.mouse.move(box[0] + box[2] - 4, box[1] + box[3] / 2)  # the last evaluation
    readout = f"{element('guidance_chart')}.querySelector('[data-gcfg=readout]')"
    editor.wait_for(f"() => {readout}.style.display === 'block'")
    told = editor.evaluate(f"() => {readout}.textContent")
    last = report["readings"][-1]
    assert told.startswith("step 3 of 3, sigma ")
    for label, pull in zip(report["labels"], last["pulls"], strict=True):
        assert float(re.search(rf"{label}: .*pull (\S+)", told)[1]) == pytest.approx(pull, rel=0.006)
    assert float(re.search(r"cosine (\S+)", told)[1]) == pytest.approx(last["cosines"][0], abs=0.006)

    editor.open()
    editor.drop(root / "workflows" / "text-guided-concept.json")
    shrink(editor, seed=2)
    assert editor.evaluate(CHARTS) == [0]
    editor.run()  # everything is kept by the server
    editor.wait_for(f"() => ({CHARTS})()[0] === 3")


def test_a_chart_of_values_that_are_no_numbers(editor, add):
    """A run that was lost gives null for them."""
    add("GCFGKSampler", 300, 200)
    lost = {"step": 2, "sigma": None, "weights": [None, 1], "pulls": [None, None], "total": None}
    good = {"step": 1, "sigma": 14.6, "weights": [2, 1], "pulls": [0.5, 0.25], "total": 0.7, "cosines": [0.1]}
    readings = [{**good, "centre": ""}, {**lost, "cosines": [None], "centre": ""}]
    told = editor.evaluate(
        """(readings) => {
            const chart = window.app.graph._nodes[0].gcfgChart;
            chart.show({ labels: ["a", "b"], steps: 2, readings });
            chart.drawing.now();
            chart.at = 1;
            chart.tell();
            chart.drawing.now();
            return chart.readout.textContent;
        }""",
        readings,
    )
    assert told.split("\n") == [
        "step 2 of 2, sigma not a number",
        "a: weight not a number, pull not a number",
        "b: weight 1, pull not a number",
        "sum: not a number",
    ]


def test_the_chart_tells_what_a_term_is_measured_from(editor, add):
    """A report of an older version does not say it, nor does one of terms that have nothing but the base."""
    add("GCFGModel", 300, 200)
    reading = {"step": 1, "sigma": 14.6, "weights": [2, 1], "pulls": [0.5, 0.25], "total": 0.7, "cosines": [None]}
    report = {"labels": ["a", "b"], "steps": 2, "readings": [{**reading, "centre": ""}]}
    told = editor.evaluate(
        """(report) => {
            const chart = window.app.graph._nodes[0].gcfgChart;
            return [report, { ...report, relative: ["", "a"] }].map((shown) => {
                chart.add({ ...shown, first: 0 });
                chart.at = 0;
                chart.tell();
                return chart.readout.textContent.split("\\n").slice(1, 3);
            });
        }""",
        report,
    )
    plain = ["a: weight 2, pull 0.5", "b: weight 1, pull 0.25"]
    assert told == [plain, [plain[0], plain[1] + ", measured from a"]]


def test_a_sampler_in_a_subgraph_has_its_sockets_and_chart(editor, root):
    editor.drop(root / "workflows" / "text-guided-concept.json")
    shrink(editor, seed=3)
    before = editor.prompt()
    made = editor.evaluate(
        """() => {
            const graph = window.app.graph;
            if (!graph.convertToSubgraph) return null;
            const inside = graph._nodes.filter((n) => n.type.startsWith('GCFGG') || n.type === 'GCFGKSampler');
            return graph.convertToSubgraph(new Set(inside)).node.id;
        }"""
    )
    if made is None:  # an editor before subgraphs
        return
    editor.settle()
    inner = {node.split(":")[-1]: entry for node, entry in editor.prompt().items() if ":" in node}
    assert {before[node]["class_type"] for node in inner} == {"GCFGGuidanceTerm", "GCFGKSampler"}
    (sampler,) = [entry for entry in inner.values() if entry["class_type"] == "GCFGKSampler"]
    assert [name for name in sampler["inputs"] if name.startswith("term_")] == ["term_1", "term_2"]
    run = editor.run()
    assert any("gcfg" in output for output in run["outputs"].values())
    evaluations = editor.evaluate(
        """(id) => {
            const inner = (window.app.rootGraph ?? window.app.graph).getNodeById(id).subgraph._nodes;
            return inner.find((n) => n.type === 'GCFGKSampler').gcfgChart.readings.length;
        }""",
        made,
    )
    assert evaluations == 3


def wait_for_weights(editor, expected):
    """Wait until the drawn curve has these weights at these percents."""
    editor.wait_for(
        f"(expected) => {{ const drawn = JSON.parse({element('weight_curve')}.dataset.weights); "
        "return expected.every(([percent, weight]) => Math.abs(drawn[percent] - weight) < 1e-9); }",
        list(expected.items()),
    )


def test_the_curve_is_drawn_while_it_is_edited(editor, add):
    add("GCFGGuidanceTerm", 300, 200)
    curve = element("weight_curve")
    shown = """() => window.app.graph._nodes[0].widgets.filter((w) => !w.hidden).map((w) => w.name)"""
    assert {"end_weight", "points"}.isdisjoint(editor.evaluate(shown))
    set_widgets(editor, "GCFGGuidanceTerm", weight=4, start_percent=0.5, curve="linear", end_weight=2)
    wait_for_weights(editor, {49: 0, 50: 4, 75: 3, 100: 2})
    assert "end_weight" in editor.evaluate(shown)
    set_widgets(editor, "GCFGGuidanceTerm", start_percent=0, curve="points", points="0: 1, 50%: 5, 1: 0")
    wait_for_weights(editor, {0: 1, 25: 3, 50: 5, 100: 0})
    set_widgets(editor, "GCFGGuidanceTerm", points="0: 1, 2")
    editor.wait_for(f"() => {curve}.dataset.error.includes(\"pair 2 is '2', expected percent: weight\")")


def test_a_bad_line_is_named_while_it_is_typed_and_refused(editor, root, server):
    editor.drop(root / "workflows" / "decoupled-prompt.json")
    shrink(editor)
    told = f"() => {element('prompt_check')}.textContent"
    editor.wait_for(f"() => ({told})() === '3 guidances'")
    box = editor.page.locator("textarea").filter(visible=True)
    (text,) = [area for area in box.all() if "sunflower" in area.input_value()]
    text.click()
    text.press("Control+End")
    editor.page.keyboard.type("\nnonsense")
    editor.wait_for(f"() => ({told})().startsWith('line 4: expected weight | prompt')")
    with pytest.raises(PromptFailed, match=r"line 4: expected weight \| prompt"):
        server.client.run(editor.prompt())
    for _ in "nonsense":
        editor.page.keyboard.press("Backspace")
    editor.page.keyboard.type("1 | good")
    editor.wait_for(f"() => ({told})() === '4 guidances'")
    set_widgets(editor, "GCFGDecoupledPrompt", text="1 | " + "a" * 300_000)
    editor.wait_for(f"() => ({told})().includes('expected a JSON object of at most 262144 bytes.')")
    asked = [error.replace("/api/", "/") for error in editor.errors if "gcfg" in error]  # newer editors ask below /api
    assert asked == [f"400 {server.client.url}/gcfg/prompt"]
    editor.errors.clear()


def test_a_sweep_gives_one_sheet(editor, root):
    editor.drop(root / "workflows" / "weight-sweep.json")
    shrink(editor)
    set_widgets(editor, "GCFGWeightSweep", steps=2, weights_1="0, 2", weights_2="1, 4, 7")
    run = editor.run()
    ((sheet,),) = [output["images"] for output in run["outputs"].values() if "images" in output]
    size = editor.evaluate(
        """async (sheet) => {
            const image = new Image();
            image.src = `/view?${new URLSearchParams(sheet)}`;
            await image.decode();
            return [image.naturalWidth, image.naturalHeight];
        }""",
        sheet,
    )
    assert size[0] > 2 * 64  # two columns and their labels
    assert size[1] > 3 * 64
