// What the editor's nodes need, in every version of the editor.

const MARGINS = 20; // above and below an element on the canvas

// What old editors, which know no hidden widgets, do not draw.
const HIDDEN = "converted-widget";

/** Call `then` after an object's own handler of that name. */
export function after(object, handler, then) {
  const own = object[handler];
  object[handler] = function (...args) {
    const result = own?.apply(this, args);
    then(...args);
    return result;
  };
}

/** Add an element below the widgets of a node; it belongs to the view and is never saved. */
export function addPanel(node, name, element, height) {
  element.dataset.gcfg = name;
  element.style.minHeight = `${height - MARGINS}px`; // Vue nodes ask the element
  const widget = node.addDOMWidget(name, `gcfg_${name}`, element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getMaxHeight: () => height,
    getValue: () => undefined,
    setValue: () => {},
  });
  widget.serialize = false; // old editors look here
  return widget;
}

/** Give a node a size, or the smallest that holds its sockets and widgets. */
export function fitSize(node, [width, height]) {
  if (!window.comfyAPI) {
    // Old editors never move a widget again, unless they have forgotten where it was.
    for (const widget of node.widgets ?? []) delete widget.y, delete widget.last_y;
    node.setDirtyCanvas?.(true, true);
  }
  const least = node.computeSize();
  node.setSize([Math.max(width, least[0]), Math.max(height, least[1])]);
}

/** Show or hide a widget; its value is kept and sent either way. */
export function showWidget(widget, shown) {
  widget.hidden = !shown;
  if (widget.options) widget.options.hidden = !shown;
  if (shown) delete widget.computeSize;
  else widget.computeSize = () => [0, -4]; // some editors keep its place
  if (window.comfyAPI || shown === (widget.type !== HIDDEN)) return;
  if (!shown) widget.gcfgType = widget.type;
  widget.type = shown ? widget.gcfgType : HIDDEN;
}

/** Show what was changed: the canvas looks again by itself, Vue nodes are told. */
export function drawAgain(node) {
  node.graph?.trigger?.("node:slot-label:changed", { nodeId: node.id });
  node.graph?.setDirtyCanvas?.(true, true);
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
