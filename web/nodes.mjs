// What the editor's nodes need, in every version of the editor.

/** Add an element below the widgets of a node; it belongs to the view and is never saved. */
export function addPanel(node, name, element, height) {
  element.dataset.gcfg = name;
  const widget = node.addDOMWidget(name, `gcfg_${name}`, element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getMaxHeight: () => height,
    getValue: () => undefined,
    setValue: () => {},
  });
  widget.serialize = false; // old editors look here
  widget.computeSize = (width) => [width, height]; // and ask the widget itself
  return widget;
}

/** The node of an id in a prompt: "7", or "12:7" for node 7 inside the subgraph node 12. */
export function findNode(graph, id) {
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

/** `act` for each argument once, after the present event: a graph is loaded node by node and link by link. */
export function later(act, milliseconds = 0) {
  const waiting = new Map();
  return (argument) => {
    clearTimeout(waiting.get(argument));
    waiting.set(
      argument,
      setTimeout(() => {
        waiting.delete(argument);
        act(argument);
      }, milliseconds),
    );
  };
}

/** Values of a node's widgets by name. */
export function widgetValues(node) {
  return Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value]));
}

/** Ask one of the pack's routes. */
export async function ask(api, path, body) {
  const answer = await api.fetchApi(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  return answer.json();
}
