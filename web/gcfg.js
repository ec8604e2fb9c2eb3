// The pack's one extension: sockets that grow, a live chart, a curve preview, and a check of prompts while typing.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Chart } from "./chart.mjs";
import { attachCurve } from "./curve.mjs";
import { colourLinks, fitSockets, keepSavedSockets, nameSockets } from "./sockets.mjs";
import { attachCheck } from "./prompt.mjs";
import { useLanguage } from "./texts.mjs";
import { addPanel, after, findNode, later } from "./nodes.mjs";

const SUMMING = new Set(["GCFGGuider", "GCFGKSampler", "GCFGKSamplerAdvanced", "GCFGModel", "GCFGWeightSweep"]);
const CHARTED = new Set(["GCFGGuider", "GCFGKSampler", "GCFGKSamplerAdvanced", "GCFGModel"]);
const TERMS = new Set([
  "GCFGGuidanceTerm", "GCFGDecoupledPrompt", "GCFGRegionTerms", "GCFGGuidanceRelation", "GCFGGuidanceCache",
]);

/** Bring all sockets and their names up to date, once the editor has finished what it is doing. */
const refresh = later((graph) => {
  for (const node of graph?._nodes ?? []) {
    if (SUMMING.has(node.comfyClass)) {
      fitSockets(node);
      nameSockets(node);
    }
  }
  graph?.setDirtyCanvas?.(true, true);
});

app.registerExtension({
  name: "gcfg.editor",

  setup() {
    useLanguage(app);
    colourLinks(app);
    api.addEventListener("gcfg.step", ({ detail }) => chartOf(detail.node)?.add(detail));
    api.addEventListener("executed", ({ detail }) => {
      const report = detail.output?.gcfg?.[0];
      if (report) chartOf(detail.node)?.show(report);
    });
    api.addEventListener("executing", ({ detail }) => detail ?? recallCharts());
  },

  nodeCreated(node) {
    if (SUMMING.has(node.comfyClass) || TERMS.has(node.comfyClass)) {
      for (const handler of ["onConnectionsChange", "onAdded"]) after(node, handler, () => refresh(node.graph));
      after(node, "onConfigure", (saved) => {
        node.gcfgSize = saved?.size && [saved.size[0], saved.size[1]]; // as it was saved, with its sockets
        if (SUMMING.has(node.comfyClass)) keepSavedSockets(node, saved);
        refresh(node.graph);
      });
    }
    if (CHARTED.has(node.comfyClass)) {
      node.gcfgChart = new Chart();
      addPanel(node, "guidance_chart", node.gcfgChart.element, 160);
    }
    if (node.comfyClass === "GCFGGuidanceTerm") attachCurve(node, api);
    if (node.comfyClass === "GCFGDecoupledPrompt") attachCheck(node, api);
    if (TERMS.has(node.comfyClass)) {
      for (const widget of node.widgets ?? []) {
        if (widget.name === "label" || widget.name === "text") after(widget, "callback", () => refresh(node.graph));
      }
    }
  },
});

function chartOf(id) {
  return findNode(app.rootGraph ?? app.graph, id)?.gcfgChart;
}

/** Fill empty charts after a run: ComfyUI sends nothing for results that it had kept, but its history has them. */
async function recallCharts() {
  const { output } = await app.graphToPrompt();
  const empty = Object.keys(output).filter((id) => chartOf(id)?.readings.length === 0);
  if (!empty.length) return;
  const runs = Object.values(await (await api.fetchApi("/history?max_items=64")).json()).reverse();
  for (const id of empty) {
    const own = JSON.stringify(output[id].inputs);
    const run = runs.find((r) => r.outputs?.[id]?.gcfg && JSON.stringify(r.prompt[2][id].inputs) === own);
    if (run) chartOf(id)?.show(run.outputs[id].gcfg[0]); // unless another graph was opened meanwhile
  }
}
