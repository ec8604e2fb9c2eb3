"use strict";

const KEPT = `gcfg-abtest-${TEST.id}`;
const SMALL = 256; // pixels below which an image is shown in its own squares
const byId = (id) => document.getElementById(id);
const study = new Study(TEST, kept(), Math.random);

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT));
  } catch {
    return null; // a browser that keeps nothing for files: the choices live as long as the page
  }
}

function keep() {
  try {
    localStorage.setItem(KEPT, JSON.stringify(study.state));
  } catch {
    // see kept()
  }
}

function picture(name) {
  const image = new Image();
  image.onload = () => image.classList.toggle("small", image.naturalWidth < SMALL);
  image.src = name;
  return image;
}

function choice(name, place, chosen) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(picture(name), String(place + 1));
  button.setAttribute("aria-label", `Image ${place + 1}`);
  button.classList.toggle("chosen", name === chosen);
  button.onclick = () => choose(place);
  return button;
}

function show() {
  const now = study.current();
  const done = Object.keys(study.state.choices).length;
  byId("question").textContent = now ? TEST.question : "Thank you!";
  byId("prompt").textContent = now ? now.prompt : "Save your choices, and send the file to the person who asked you.";
  byId("condition").hidden = !now?.condition;
  if (now?.condition) byId("condition").src = now.condition;
  byId("images").replaceChildren(...(now ? now.images.map((name, place) => choice(name, place, now.chosen)) : []));
  byId("progress").max = TEST.trials.length;
  byId("progress").value = done;
  byId("status").textContent = `${done} of ${TEST.trials.length} chosen. Click an image or press its number.`;
  byId("back").disabled = study.state.position === 0;
  study.upcoming().forEach(picture);
}

function choose(place) {
  study.choose(place, new Date().toISOString());
  keep();
  show();
}

function back() {
  study.back();
  keep();
  show();
}

function save() {
  const file = new Blob([JSON.stringify(study.file(), null, 1)], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = `choices-${TEST.id}-${study.state.session}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}

document.title = TEST.title;
byId("back").onclick = back;
byId("save").onclick = save;
document.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (/^[1-9]$/.test(event.key)) choose(Number(event.key) - 1);
  else if (event.key === "ArrowLeft" || event.key === "Backspace") back();
  else if (event.key.toLowerCase() === "s") save();
};
keep();
show();
