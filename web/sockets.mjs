// Sockets for terms: as many as are used and one more, named after what is connected.

import { drawAgain, fitSize } from "./nodes.mjs";

const TERMS = "GCFG_TERMS";
const COLOURS = { GCFG_TERMS: "#e0a03c", GCFG_REPORT: "#5fb3a1" };
const MOST = 8;

const number = (input) => Number(/^term_(\d+)$/.exec(input.name)?.[1] ?? 0);

/** Remove the sockets after the first free one behind the last connected one, or add that one. */
export function fitSockets(node) {
  const sockets = (node.inputs ?? []).filter(number);
  const last = Math.max(0, ...sockets.filter((input) => input.link != null).map(number));
  const wanted = Math.min(last + 1, MOST);
  const size = [...node.size]; // changing sockets resets it
  removeSockets(node, (input) => number(input) > wanted);
  for (let next = 1; next <= wanted; next++) {
    if (!node.inputs.some((input) => number(input) === next)) addSocket(node, next);
  }
  const more = wanted - sockets.length;
  if (more) fitSize(node, node.gcfgSize ?? [size[0], size[1] + more * LiteGraph.NODE_SLOT_HEIGHT]);
  delete node.gcfgSize;
}

/** Leave only the sockets that were saved: links of a pasted node are made by the places of its sockets. */
export function keepSavedSockets(node, saved) {
  const names = new Set((saved?.inputs ?? []).map((input) => input.name));
  if (names.size) removeSockets(node, (input) => number(input) && input.link == null && !names.has(input.name));
}

function removeSockets(node, unwanted) {
  for (let index = node.inputs.length - 1; index >= 0; index--) {
    const { name, localized_name } = node.inputs[index];
    if (!unwanted(node.inputs[index])) continue;
    (node.gcfgNames ??= {})[name] = localized_name; // in the user's language
    node.removeInput(index);
  }
  placeLinks(node);
}

/** Add a socket behind those that are there: an editor that loads or pastes the node expects them in this order. */
function addSocket(node, next) {
  const name = `term_${next}`;
  node.addInput(name, TERMS, { shape: 7, localized_name: node.gcfgNames?.[name] }); // 7: drawn as optional
  const [socket] = node.inputs.splice(node.inputs.length - 1, 1);
  const before = node.inputs.findLastIndex((input) => number(input) && number(input) < next);
  const sockets = node.inputs.findLastIndex((input) => !input.widget);
  node.inputs.splice((before < 0 ? sockets : before) + 1, 0, socket);
  placeLinks(node);
}

/** Tell each link which socket it ends in. */
function placeLinks(node) {
  node.inputs.forEach((input, index) => {
    const link = input.link == null ? null : linkOf(node.graph, input.link);
    if (link && String(link.target_id) === String(node.id)) link.target_slot = index;
  });
}

const linkOf = (graph, id) => graph?.links?.get?.(id) ?? graph?.links?.[id] ?? graph?.getLink?.(id);

/** Show on each socket the label of the term that is connected to it. */
export function nameSockets(node) {
  for (const [index, input] of (node.inputs ?? []).entries()) {
    if (!number(input)) continue;
    const names = input.link == null ? [] : namesBehind(node.graph, input.link);
    const label = names.length ? `${number(input)} ${names.join(" + ")}` : undefined;
    if (input.label !== label) {
      input.label = label;
      if (LiteGraph.vueNodesMode) node.inputs[index] = new input.constructor(input, node); // Vue looks at new ones only
      drawAgain(node);
    }
  }
}

/** Labels of the terms that come through a link, those of a chain first to last. */
function namesBehind(graph, linkId, depth = 0) {
  const link = linkOf(graph, linkId);
  const origin = link && (graph.getNodeById(Number(link.origin_id)) ?? graph.getNodeById(link.origin_id));
  if (!origin || depth > 64) return [];
  const before = (origin.inputs ?? []).filter((input) => input.type === TERMS || origin.type === "Reroute");
  const names = before.flatMap((input) => (input.link == null ? [] : namesBehind(graph, input.link, depth + 1)));
  const value = (name) => origin.widgets?.find((widget) => widget.name === name)?.value;
  if (origin.comfyClass === "GCFGGuidanceTerm") names.push(String(value("label") ?? "").trim() || "·");
  if (origin.comfyClass === "GCFGDecoupledPrompt") {
    const lines = String(value("text") ?? "").split("\n");
    names.push(...lines.filter((line) => line.includes("|")).map((line) => line.split("|")[1].trim().slice(0, 16)));
  }
  return names;
}

/** Give the links and sockets of the pack's types colours of their own, which a user's palette may override. */
export function colourLinks(app) {
  const own = Object.entries(COLOURS);
  for (const colours of [app.canvas?.constructor?.link_type_colors, app.canvas?.default_connection_color_byType]) {
    for (const [type, colour] of colours ? own : []) {
      let used = colour;
      // A palette that does not know the type sets it to nothing.
      Object.defineProperty(colours, type, { get: () => used, set: (value) => (used = value || colour), enumerable: true });
    }
  }
  const style = document.createElement("style"); // for Vue nodes
  style.textContent = `:root { ${own.map(([type, colour]) => `--color-datatype-${type}: ${colour};`).join(" ")} }`;
  document.head.append(style);
}
