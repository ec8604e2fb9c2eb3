// Decoupled Prompt: bad lines are named while the text is typed, by the code that reads it when it runs.

import { addPanel, after, ask, later, widgetValues } from "./nodes.mjs";
import { say } from "./texts.mjs";

export function attachCheck(node, api) {
  const element = document.createElement("div");
  element.style.cssText = "font: 10px/1.35 sans-serif; overflow: auto; white-space: pre-wrap; padding: 0 4px;";
  const update = later(async () => {
    const { lines = [], problems = [], error } = await ask(api, "/gcfg/prompt", {
      text: String(widgetValues(node).text ?? ""),
    });
    const good = say(lines.length === 1 ? "{0} guidance" : "{0} guidances", lines.length);
    const bad = problems.map((problem) => `${say("line {0}", problem.line)}: ${problem.message}`).join("\n");
    element.textContent = error || bad || good;
    element.style.color = error || bad ? "#e06060" : "var(--descrip-text, #999)";
  }, 200);
  const text = node.widgets?.find((widget) => widget.name === "text");
  const input = text?.inputEl ?? text?.element;
  input?.addEventListener?.("input", () => update(node));
  if (text) after(text, "callback", () => update(node));
  after(node, "onConfigure", () => update(node));
  addPanel(node, "prompt_check", element, 44);
  update(node);
}
