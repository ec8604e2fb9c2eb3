// The guidance chart: how strongly each term pulls at every evaluation, and which terms fight.

import { Drawing, palette } from "./drawing.mjs";
import { say } from "./texts.mjs";

const LEGEND = 14; // pixels of a legend line
const BARS = 3; // thickness of an interval bar

export class Chart {
  constructor() {
    this.element = document.createElement("div");
    this.element.style.cssText = "width: 100%; height: 100%; overflow: hidden;";
    this.drawing = new Drawing(this.element, (context, width, height) => this.draw(context, width, height));
    this.readout = document.createElement("div");
    this.readout.dataset.gcfg = "readout";
    this.readout.style.cssText =
      "position: absolute; top: 2px; right: 4px; display: none; pointer-events: none; padding: 2px 6px; " +
      "font: 10px/1.35 sans-serif; white-space: pre; border-radius: 4px; background: rgba(20, 20, 20, .88); color: #eee;";
    this.element.append(this.readout);
    this.element.addEventListener("pointermove", (event) => this.point(event));
    this.element.addEventListener("pointerleave", () => this.point(null));
    this.show({ labels: [], steps: 0, readings: [] });
  }

  /** Replace everything by the report of a whole run. */
  show({ labels, steps, readings, relative = [] }) {
    this.labels = labels;
    this.relative = relative; // reports of older versions have none
    this.steps = steps;
    this.readings = readings.slice();
    this.at = null;
    this.refresh();
  }

  /** Add the readings of a run that goes on; a first one begins a new chart. */
  add(news) {
    if (news.first === 0) this.show(news);
    else {
      this.readings.splice(news.first, this.readings.length, ...news.readings);
      this.refresh();
    }
  }

  refresh() {
    this.tell();
    this.drawing.redraw();
  }

  /** Where evaluation `index` stands: solvers may evaluate a step more than once, and more are to come. */
  x(index, area) {
    const count = Math.max(this.readings.length, this.readings.length ? this.steps : 1);
    return area.left + (count > 1 ? (index / (count - 1)) * area.width : area.width / 2);
  }

  draw(context, width, height) {
    const { text, faint } = palette();
    context.font = "10px sans-serif";
    context.textBaseline = "middle";
    if (!this.readings.length) {
      context.fillStyle = faint;
      context.textAlign = "center";
      context.fillText(say("Run to see what each guidance does"), width / 2, height / 2);
      return;
    }
    const bottom = this.labels.length * (BARS + 1) + 2;
    const top = this.drawLegend(context, width, text);
    const angles = this.labels.length > 1 ? Math.round((height - top - bottom) * 0.32) : 0;
    const area = { left: 30, width: width - 38 };
    this.drawPulls(context, { ...area, top: top + 3, height: height - top - bottom - angles - 14 }, faint, text);
    if (angles) this.drawCosines(context, { ...area, top: height - bottom - angles, height: angles - 2 }, faint);
    this.drawIntervals(context, { ...area, top: height - bottom + 2 });
    if (this.at !== null) {
      context.strokeStyle = faint;
      line(context, [[this.x(this.at, area), top], [this.x(this.at, area), height - 1]]);
    }
    this.area = area;
  }

  /** The lines' names, in as many rows as they need; returns their height. */
  drawLegend(context, width, text) {
    let [x, y] = [4, LEGEND / 2];
    context.textAlign = "left";
    for (const [index, label] of [...this.labels, say("sum")].entries()) {
      const short = label.length > 18 ? `${label.slice(0, 17)}…` : label;
      const needed = 18 + context.measureText(short).width;
      if (x > 4 && x + needed > width) [x, y] = [4, y + LEGEND];
      context.fillStyle = index < this.labels.length ? colourOf(index) : text;
      context.fillRect(x, y - 1, 8, 3);
      context.fillText(short, x + 11, y + 1);
      x += needed;
    }
    return y + LEGEND / 2;
  }

  drawPulls(context, area, faint, text) {
    const highest = Math.max(1e-9, ...this.readings.flatMap((r) => [r.total, ...r.pulls]));
    const y = (value) => area.top + area.height * (1 - value / highest);
    axis(context, area, faint, [[0, "0"], [highest, short(highest)]], y);
    this.labels.forEach((_, term) => {
      context.strokeStyle = colourOf(term);
      this.curve(context, area, y, (r) => (r.weights[term] === 0 ? null : r.pulls[term]));
    });
    context.strokeStyle = text;
    context.setLineDash([3, 3]);
    this.curve(context, area, y, (r) => r.total);
    context.setLineDash([]);
  }

  drawCosines(context, area, faint) {
    const y = (value) => area.top + (area.height * (1 - value)) / 2;
    axis(context, area, faint, [[-1, say("fight")], [0, "0"], [1, say("agree")]], y);
    pairs(this.labels.length).forEach(([i, j], pair) => {
      context.strokeStyle = colourOf(i);
      this.curve(context, area, y, (r) => r.cosines[pair]);
      context.strokeStyle = colourOf(j);
      context.setLineDash([4, 4]);
      this.curve(context, area, y, (r) => r.cosines[pair]);
      context.setLineDash([]);
    });
  }

  /** A bar for each term where its weight is not 0. */
  drawIntervals(context, area) {
    const half = this.x(1, area) - this.x(0, area);
    this.labels.forEach((_, term) => {
      context.fillStyle = colourOf(term);
      this.readings.forEach((r, index) => {
        if (r.weights[term] === 0) return;
        context.fillRect(this.x(index, area) - half / 2, area.top + term * (BARS + 1), Math.max(half, 2), BARS);
      });
    });
  }

  curve(context, area, y, value) {
    let points = [];
    this.readings.forEach((reading, index) => {
      const at = value(reading);
      if (at === null) {
        line(context, points);
        points = [];
      } else points.push([this.x(index, area), y(at)]);
    });
    line(context, points);
  }

  /** Read the values below the pointer. */
  point(event) {
    this.at = null;
    if (event && this.readings.length && this.area) {
      const box = this.element.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * this.drawing.width;
      const distance = (index) => Math.abs(this.x(index, this.area) - x);
      this.at = this.readings.reduce((best, _, index) => (distance(index) < distance(best) ? index : best), 0);
    }
    this.tell();
    this.drawing.redraw();
  }

  tell() {
    const reading = this.at === null ? null : this.readings[this.at];
    this.readout.style.display = reading ? "block" : "none";
    if (reading) this.readout.textContent = describe(reading, this.labels, this.steps, this.relative);
  }
}

/** The values of one evaluation as text; `relative` is what each term is measured from, "" for the base. */
export function describe(reading, labels, steps, relative = []) {
  const lines = [say("step {0} of {1}, sigma {2}", reading.step, steps, short(reading.sigma))];
  labels.forEach((label, term) => {
    const pull = reading.weights[term] === 0 ? say("off") : `${say("pull")} ${short(reading.pulls[term])}`;
    const from = relative[term] ? say(", measured from {0}", relative[term]) : "";
    lines.push(`${label}: ${say("weight")} ${short(reading.weights[term])}, ${pull}${from}`);
  });
  lines.push(`${say("sum")}: ${short(reading.total)}`);
  pairs(labels.length).forEach(([i, j], pair) => {
    const cosine = reading.cosines[pair];
    if (cosine !== null) lines.push(`${labels[i]} · ${labels[j]}: ${say("cosine")} ${cosine.toFixed(2)}`);
  });
  if (reading.centre) lines.push(say("measured from {0}", reading.centre));
  return lines.join("\n");
}

const COLOURS = ["#5b9bd5", "#ed7d31", "#70ad47", "#b07cc6", "#d6a11f", "#45b5aa", "#d9627e", "#9a8a78"];
const colourOf = (term) => COLOURS[term % COLOURS.length];

const short = (value) => (value === null ? "not a number" : Number(value.toPrecision(3)).toString());

const pairs = (count) =>
  Array.from({ length: count }, (_, i) => Array.from({ length: count - i - 1 }, (_, k) => [i, i + 1 + k])).flat();

function line(context, points) {
  if (!points.length) return;
  context.beginPath();
  points.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
  if (points.length === 1) context.lineTo(points[0][0] + 1, points[0][1]);
  context.stroke();
}

function axis(context, area, colour, marks, y) {
  context.strokeStyle = context.fillStyle = colour;
  context.textAlign = "right";
  context.globalAlpha = 0.6;
  for (const [value, label] of marks) {
    line(context, [[area.left, y(value)], [area.left + area.width, y(value)]]);
    context.fillText(label, area.left - 3, y(value));
  }
  context.globalAlpha = 1;
}
