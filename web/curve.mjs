// The weight of a Guidance Term over the sampling, drawn while it is edited.

import { Drawing, palette } from "./drawing.mjs";
import { say } from "./texts.mjs";
import { addPanel, after, ask, drawAgain, fitSize, later, showWidget, widgetValues } from "./nodes.mjs";

const USED = { end_weight: ["linear", "cosine"], points: ["points"] };

export function attachCurve(node, api) {
  const element = document.createElement("div");
  element.style.cssText = "width: 100%; height: 100%;";
  let state = {};
  const drawing = new Drawing(element, (context, width, height) => draw(context, width, height, state));
  const update = later(async () => {
    state = await ask(api, "/gcfg/curve", widgetValues(node));
    element.dataset.weights = JSON.stringify(state.weights ?? null);
    element.dataset.error = state.error ?? "";
    element.title = state.error ?? say("The weight over the sampling, from pure noise (left) to the image (right)");
    drawing.redraw();
  }, 60);
  const edited = () => {
    hideUnused(node);
    update(node);
  };
  for (const widget of node.widgets ?? []) after(widget, "callback", edited);
  after(node, "onConfigure", edited);
  addPanel(node, "weight_curve", element, 56);
  hideUnused(node); // before it is drawn for the first time
  update(node);
}

/** Show only the widgets that the chosen curve uses. */
function hideUnused(node) {
  const { curve } = widgetValues(node);
  const before = node.computeSize()[1];
  for (const widget of node.widgets ?? []) {
    if (USED[widget.name]) showWidget(widget, USED[widget.name].includes(curve));
  }
  fitSize(node, [node.size[0], node.size[1] + node.computeSize()[1] - before]);
  drawAgain(node);
}

function draw(context, width, height, { weights, error }) {
  const { faint } = palette();
  context.font = "10px sans-serif";
  context.textBaseline = "middle";
  if (error) {
    context.fillStyle = "#e06060";
    wrapped(context, error, width).forEach((line, index) => context.fillText(line, 4, 8 + 12 * index));
    return;
  }
  if (!weights) return;
  const low = Math.min(0, ...weights);
  const high = Math.max(0, ...weights, low + 1e-9);
  const left = 30;
  const x = (index) => left + (index / (weights.length - 1)) * (width - left - 6);
  const y = (weight) => 6 + (1 - (weight - low) / (high - low)) * (height - 12);
  context.fillStyle = context.strokeStyle = faint;
  context.textAlign = "right";
  for (const mark of new Set([low, 0, high])) {
    context.globalAlpha = 0.6;
    context.beginPath();
    context.moveTo(left, y(mark));
    context.lineTo(width - 6, y(mark));
    context.stroke();
    context.fillText(String(Number(mark.toPrecision(3))), left - 3, y(mark));
  }
  context.globalAlpha = 1;
  context.strokeStyle = "#e0a03c";
  context.lineWidth = 1.5;
  context.beginPath();
  weights.forEach((weight, index) => (index ? context.lineTo(x(index), y(weight)) : context.moveTo(x(index), y(weight))));
  context.stroke();
  context.lineWidth = 1;
}

function wrapped(context, text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (context.measureText(longer).width > width - 8 && lines.at(-1)) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}
