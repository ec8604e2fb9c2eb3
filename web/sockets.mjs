// Sockets for terms: as many as are used and one more, named after what is connected.

const TERMS = "GCFG_TERMS";
const COLOURS = { GCFG_TERMS: "#e0a03c", GCFG_REPORT: "#5fb3a1" };
const MOST = 8;

const number = (input) => Number(/^term_(\d+)$/.exec(input.name)?.[1] ?? 0);

/** Remove the sockets after the first free one behind the last connected one, or add that one. */
export function fitSockets(node) {
  const sockets = (node.inputs ?? []).filter(number);
  const last = Math.max(0, ...sockets.filter((input) => input.link != null).map(number));
  const wanted = Math.min(last + 1, MOST);
  for (let index = node.inputs.length - 1; index >= 0; index--) {
    if (number(node.inputs[index]) > wanted) node.removeInput(index);
  }
  const present = new Set(node.inputs.map(number));
  for (let next = 1; next <= wanted; next++) {
    if (!present.has(next)) node.addInput(`term_${next}`, TERMS, { shape: 7 }); // 7: drawn as optional
  }
}

/** Show on each socket the label of the term that is connected to it. */
export function nameSockets(node) {
  for (const input of node.inputs ?? []) {
    if (!number(input)) continue;
    const names = input.link == null ? [] : namesBehind(node.graph, input.link);
    const label = names.length ? `${number(input)} ${names.join(" + ")}` : undefined;
    if (input.label !== label) input.label = label;
  }
}

/** Labels of the terms that come through a link, those of a chain first to last. */
function namesBehind(graph, linkId, depth = 0) {
  const link = graph?.links?.get?.(linkId) ?? graph?.links?.[linkId] ?? graph?.getLink?.(linkId);
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

/** Give the links of the pack's types colours of their own. */
export function colourLinks(app) {
  for (const [type, colour] of Object.entries(COLOURS)) {
    const onLinks = app.canvas?.constructor?.link_type_colors;
    if (onLinks) onLinks[type] = colour;
    if (app.canvas?.default_connection_color_byType) app.canvas.default_connection_color_byType[type] = colour;
    document.documentElement.style.setProperty(`--color-datatype-${type}`, colour); // Vue nodes
  }
}
