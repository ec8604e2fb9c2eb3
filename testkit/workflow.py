"""Graph-editor JSON to API prompt, as the editor's own "Queue" button does it, and a check against a live server.

Pure functions of the workflow and of the server's /object_info.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .client import Prompt
from .errors import CommandError

Workflow = dict[str, Any]
Node = dict[str, Any]
ObjectInfo = dict[str, Any]

NOTES = {"Note", "MarkdownNote"}
VIRTUAL = NOTES | {"Reroute", "PrimitiveNode"}  # live in the editor only, the server never sees them
MUTED, BYPASSED = 2, 4
NEEDS = {"GCFGModel": "CreateHookLora"}  # our node: a stock node that came with what it needs of ComfyUI
SEEDS = ("seed", "noise_seed")
AFTER_SEED = {"fixed", "increment", "decrement", "randomize"}
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"  # a drop-down each of whose choices has inputs of its own
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC_COMBO}


def input_specs(info: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the inputs of a node class, required ones first, in the order of its widgets."""
    groups = info.get("input", {})
    order = info.get("input_order") or {}
    return {
        name: groups[group][name]
        for group in ("required", "optional")
        for name in order.get(group, groups.get(group, {}))
        if name in groups.get(group, {})
    }


def _options(spec: list[Any]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def choices(spec: list[Any]) -> list[Any] | None:
    """Return what a drop-down offers, or None if the input is not one."""
    if isinstance(spec[0], list):
        return spec[0]
    if spec[0] == DYNAMIC_COMBO:
        return [option["key"] for option in _options(spec)["options"]]
    return _options(spec).get("options") if spec[0] == "COMBO" else None


def is_widget(spec: list[Any]) -> bool:
    """Whether an input has a widget, and so an entry in widgets_values."""
    kind = _options(spec).get("widgetType", spec[0])  # of an input of several types
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not _options(spec).get("forceInput")


def widgets(node: Node, info: dict[str, Any]) -> Iterator[tuple[str, list[Any], Any]]:
    """Yield the name, description and value of the node's widgets.

    The editor stores them as a list in input order, with one more after each seed (what happens to it after a run),
    and as a dict in some packs; what an older file lacks takes its default.
    """
    stored = node.get("widgets_values") or []
    specs = [(name, spec) for name, spec in input_specs(info).items() if is_widget(spec)]
    if isinstance(stored, dict):
        yield from ((name, spec, stored[name]) for name, spec in specs if name in stored)
        return
    queue = list(stored)
    while specs:
        name, spec = specs.pop(0)
        if queue:
            value = queue.pop(0)
            controlled = name in SEEDS or _options(spec).get("control_after_generate")
            if controlled and queue and queue[0] in AFTER_SEED:
                queue.pop(0)
        elif "default" in _options(spec):
            value = _options(spec)["default"]
        elif options := choices(spec):
            value = options[0]
        else:
            continue
        yield name, spec, value
        specs = [*_widgets_of_choice(name, spec, value), *specs]


def _widgets_of_choice(name: str, spec: list[Any], value: Any) -> list[tuple[str, list[Any]]]:
    """The widgets that a drop-down brings with what is chosen in it, named after it."""
    if spec[0] != DYNAMIC_COMBO:
        return []
    offered: list[dict[str, Any]] = _options(spec)["options"]
    chosen = next((option for option in offered if option["key"] == value), {})
    specs = input_specs({"input": chosen.get("inputs", {})})
    return [(f"{name}.{own}", spec) for own, spec in specs.items() if is_widget(spec)]


def widget_values(node: Node, info: dict[str, Any]) -> dict[str, Any]:
    """Return the node's widget values by input name."""
    return {name: value for name, _, value in widgets(node, info)}


def unknown_nodes(workflow: Workflow, object_info: ObjectInfo) -> list[str]:
    """Return the node classes of a workflow that the server lacks."""
    return sorted({node["type"] for node in Graph(workflow).active()} - set(object_info))


def refusing_nodes(workflow: Workflow, object_info: ObjectInfo) -> list[str]:
    """Return the node classes of a workflow that the server has, but that refuse to run on so old a ComfyUI."""
    used = {node["type"] for node in Graph(workflow).active()}
    return sorted(kind for kind, needed in NEEDS.items() if kind in used and needed not in object_info)


class Graph:
    """Index of a workflow's nodes and links.

    Raises: CommandError: if the file is not a workflow, or uses subgraphs, which the API does not know.
    """

    def __init__(self, workflow: Workflow) -> None:
        if not isinstance(workflow, dict) or not isinstance(workflow.get("nodes"), list):
            raise CommandError("Expected a graph-editor workflow with a list of nodes; save it with Workflow > Save.")
        if (workflow.get("definitions") or {}).get("subgraphs"):
            raise CommandError("The workflow has subgraphs, which cannot be queued over the API; unpack them first.")
        self.nodes: dict[int, Node] = {int(node["id"]): node for node in workflow["nodes"]}
        self.links: dict[int, tuple[int, int, int, int, str]] = {
            int(link[0]): (int(link[1]), int(link[2]), int(link[3]), int(link[4]), str(link[5]))
            for link in workflow.get("links", [])
        }

    def source(self, link_id: int | None) -> tuple[Node, int] | None:
        """Return the node and output slot that a link really comes from, None if that is switched off.

        Reroutes are followed; a bypassed node hands on its input of the same type; a muted one hands on nothing.
        """
        while link_id is not None:
            if link_id not in self.links:
                raise CommandError(f"The workflow refers to link {link_id}, which its list of links lacks.")
            node_id, slot = self.links[link_id][:2]
            node = self.nodes[node_id]
            if node.get("mode", 0) == MUTED:
                return None
            if node["type"] == "Reroute":
                link_id = node["inputs"][0].get("link")
            elif node.get("mode", 0) == BYPASSED:
                inputs, kind = node.get("inputs") or [], node["outputs"][slot]["type"]
                same_slot = [i for i in inputs[slot : slot + 1] if i["type"] == kind]
                matching = same_slot or [i for i in inputs if i["type"] == kind and i.get("link") is not None]
                link_id = matching[0].get("link") if matching else None
            else:
                return node, slot
        return None

    def active(self) -> Iterator[Node]:
        """Yield the nodes that the server will see."""
        for node in self.nodes.values():
            if node["type"] not in VIRTUAL and node.get("mode", 0) not in (MUTED, BYPASSED):
                yield node


def to_prompt(workflow: Workflow, object_info: ObjectInfo) -> Prompt:
    """Convert graph-editor JSON to the API's prompt.

    Raises: CommandError: if the server lacks a node of the workflow.
    """
    graph = Graph(workflow)
    prompt: Prompt = {}
    for node in graph.active():
        if node["type"] not in object_info:
            raise CommandError(f"This ComfyUI has no node {node['type']} (node {node['id']}); update it or its pack.")
        inputs = widget_values(node, object_info[node["type"]])
        for socket in node.get("inputs") or []:
            source = graph.source(socket.get("link"))
            if source is None:
                continue
            origin, slot = source
            if origin["type"] == "PrimitiveNode":
                inputs[socket["name"]] = origin["widgets_values"][0]
            else:
                inputs[socket["name"]] = [str(origin["id"]), slot]
        title = node.get("title") or node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def problems(workflow: Workflow, object_info: ObjectInfo, files: bool = True) -> list[str]:
    """Return what in the workflow does not fit the server, one sentence each; an empty list if all does.

    Every node id, input name, link (both ends, and the types along it) and drop-down value is checked.

    Args:
        workflow: graph-editor JSON.
        object_info: the server's.
        files: whether a drop-down value must be on offer; without model files it is not.
    """
    graph = Graph(workflow)
    found = []
    for node in graph.nodes.values():
        name = f"{node['type']} (node {node['id']})"
        if node["type"] in VIRTUAL:
            continue
        if node["type"] not in object_info:
            found.append(f"{name}: this ComfyUI has no such node.")
            continue
        info = object_info[node["type"]]
        specs = input_specs(info)
        linked = {i["name"] for i in node.get("inputs") or [] if i.get("link") is not None}
        for socket in node.get("inputs") or []:
            if socket["name"] not in specs:
                found.append(f"{name}: it has no input {socket['name']}.")
            if socket.get("link") is not None and socket["link"] not in graph.links:
                found.append(f"{name}: input {socket['name']} refers to link {socket['link']}, which does not exist.")
        for required, spec in info["input"].get("required", {}).items():
            if not is_widget(spec) and required not in linked:
                found.append(f"{name}: input {required} is not connected.")
        for widget, spec, value in widgets(node, info):
            options = choices(spec)
            if files and options is not None and widget not in linked and value not in options:
                found.append(f"{name}: {widget} is {value!r}, the server offers {options}.")
        outputs = [o["type"] for o in node.get("outputs") or []]
        if outputs != [t if isinstance(t, str) else "COMBO" for t in info["output"]][: len(outputs)]:
            found.append(f"{name}: its outputs are {outputs}, the server's node has {info['output']}.")
    return found + [text for link_id in graph.links for text in _link_problems(graph, link_id, object_info)]


def _link_problems(graph: Graph, link_id: int, object_info: ObjectInfo) -> Iterator[str]:
    from_id, from_slot, to_id, to_slot, kind = graph.links[link_id]
    if from_id not in graph.nodes or to_id not in graph.nodes:
        yield f"Link {link_id}: node {from_id} or {to_id} is not in the workflow."
        return
    outputs, inputs = graph.nodes[from_id].get("outputs") or [], graph.nodes[to_id].get("inputs") or []
    if from_slot >= len(outputs) or link_id not in (outputs[from_slot].get("links") or []):
        yield f"Link {link_id}: output {from_slot} of node {from_id} does not list it."
        return
    if to_slot >= len(inputs) or inputs[to_slot].get("link") != link_id:
        yield f"Link {link_id}: input {to_slot} of node {to_id} does not refer to it."
        return
    target = object_info.get(graph.nodes[to_id]["type"])
    spec = input_specs(target).get(inputs[to_slot]["name"]) if target else None
    wanted = inputs[to_slot]["type"] if spec is None else "COMBO" if choices(spec) is not None else spec[0]
    types = {outputs[from_slot]["type"], kind, inputs[to_slot]["type"], wanted} - {"*"}
    if len(types) > 1:
        yield f"Link {link_id}: types {sorted(types)} differ along it."
