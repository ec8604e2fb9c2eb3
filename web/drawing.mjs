// A canvas that fills its element, sharp at any zoom, drawn once per frame at most.

export class Drawing {
  constructor(parent, draw) {
    this.canvas = document.createElement("canvas");
    // Out of the flow: the element decides the canvas's size, never the other way round.
    this.canvas.style.cssText = "position: absolute; inset: 0; width: 100%; height: 100%;";
    parent.append(this.canvas);
    this.draw = draw;
    this.width = 0;
    this.asked = 0;
    parent.style.position = "relative";
    new ResizeObserver(() => this.redraw()).observe(parent);
  }

  redraw() {
    if (!this.asked) this.asked = requestAnimationFrame(() => this.now());
  }

  now() {
    this.asked = 0;
    const { clientWidth, clientHeight } = this.canvas;
    if (!clientWidth || !clientHeight) return; // not shown; the observer asks again when it is
    const scale = 2 * (window.devicePixelRatio || 1); // graphs are zoomed into
    const size = [Math.round(clientWidth * scale), Math.round(clientHeight * scale)];
    if (this.canvas.width !== size[0] || this.canvas.height !== size[1]) [this.canvas.width, this.canvas.height] = size;
    const context = this.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, clientWidth, clientHeight);
    this.width = clientWidth;
    this.draw(context, clientWidth, clientHeight);
  }
}

/** The colours of the editor's theme. */
export function palette() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name, fallback) => style.getPropertyValue(name).trim() || fallback;
  return { text: colour("--input-text", "#ddd"), faint: colour("--descrip-text", "#999") };
}
