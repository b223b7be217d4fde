/* Buttons for each image: keep, relabel, leave out. The choices are saved by the server of
   `python -m train audit DATA --serve`; a page from a file offers them as a download. */

const ACTIONS = [["keep", "Keep", "k"], ["relabel", "Relabel", "r"], ["leave out", "Leave out", "l"]];

const editing = JSON.parse(document.getElementById("editing").textContent);
const items = [...document.querySelectorAll("[data-path]")];
const bulkButtons = [...document.querySelectorAll(".bulk")];
const choices = new Map(); // path -> {action, label}; it begins with those in the file
const unsaved = new Set(); // paths with a choice that is neither saved nor downloaded
const replaced = new Map(); // group of a bulk button -> choices before it was pressed

let hasChanged = false;
let isServed = false;
let isSaving = false;
let failure = ""; // of the last save
let current = null; // item that the keys act on

/* Choices */

function choose(path, choice) {
  if (choice) choices.set(path, choice);
  else choices.delete(path);
  unsaved.add(path);
  hasChanged = true;
}

function apply(path, choice) {
  choose(path, choice);
  refresh();
  save();
}

/* Take an action on an item, or take it back. Returns whether it is done: relabelling without a
   suggestion asks for the class first. */
function act(item, action) {
  const { path } = item.dataset;
  const isPressed = choices.get(path)?.action === action;
  const isPicking = item.classList.contains("picking");
  item.classList.remove("picking");
  if (isPicking && action === "relabel") {
    refreshItem(item);
    return false;
  }
  if (isPressed) {
    apply(path, null);
    return false;
  }
  const label = action === "relabel" ? suggestLabel(item) : "";
  if (action === "relabel" && !label) {
    item.classList.add("picking");
    refreshItem(item);
    item.querySelector("select").focus();
    return false;
  }
  apply(path, { action, label });
  return true;
}

function undo(item) {
  if (choices.has(item.dataset.path)) apply(item.dataset.path, null);
}

function suggestLabel(item) {
  const { label, suggested } = item.dataset;
  const others = editing.classes.filter((name) => name !== label);
  return suggested || (others.length === 1 ? others[0] : "");
}

function toggleGroup(name) {
  const paths = editing.groups[name];
  const previous = replaced.get(name);
  const isUndo = paths.every(isLeftOut);
  if (!isUndo) replaced.set(name, paths.map((path) => choices.get(path)));
  paths.forEach((path, i) => {
    choose(path, isUndo ? previous?.[i] : { action: "leave out", label: "" });
  });
  refresh();
  save();
}

function isLeftOut(path) {
  return choices.get(path)?.action === "leave out";
}

/* Controls */

function addControls(item) {
  const group = document.createElement("div");
  group.className = "choice";
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", `Correction of ${item.dataset.path}`);
  for (const [action, text, key] of ACTIONS) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.title = `${text} (${key.toUpperCase()})`;
    button.dataset.action = action;
    button.addEventListener("click", () => act(item, action));
    group.append(button);
  }

  const select = document.createElement("select");
  select.setAttribute("aria-label", "New label");
  select.hidden = true;
  select.addEventListener("change", () => {
    item.classList.remove("picking");
    apply(item.dataset.path, { action: "relabel", label: select.value });
  });
  group.append(select);
  item.querySelector(".about").append(group);
}

/* The label that the image has is no choice, unless it comes from a correction. */
function fillSelect(select, { path, label }) {
  const hint = new Option("to which class?", "");
  hint.disabled = true;
  const names = editing.classes.filter((name) => name !== label || name === choices.get(path)?.label);
  select.append(hint, ...names.map((name) => new Option(name, name)));
}

function refreshItem(item) {
  const choice = choices.get(item.dataset.path);
  for (const button of item.querySelectorAll("[data-action]")) {
    button.setAttribute("aria-pressed", button.dataset.action === choice?.action);
  }
  const select = item.querySelector("select");
  const isShown = choice?.action === "relabel" || item.classList.contains("picking");
  if (isShown && !select.options.length) fillSelect(select, item.dataset);
  select.hidden = !isShown;
  select.value = choice?.label || "";
}

function refresh() {
  items.forEach(refreshItem);
  for (const progress of document.querySelectorAll(".progress")) {
    const paths = [...progress.closest("section").querySelectorAll("[data-path]")].map((item) => item.dataset.path);
    const decided = paths.filter((path) => choices.has(path)).length;
    progress.textContent = paths.length ? `${decided} of ${paths.length} images decided.` : "";
  }
  for (const button of bulkButtons) {
    const paths = editing.groups[button.dataset.group];
    button.hidden = paths.length === 0;
    const offer = paths.length === 1 ? "Leave it out" : `Leave out all ${paths.length}`;
    button.textContent = paths.every(isLeftOut) ? "Undo" : offer;
  }
  refreshBar();
}

function refreshBar() {
  const counts = { keep: 0, relabel: 0, "leave out": 0 };
  for (const { action } of choices.values()) counts[action] += 1;
  document.getElementById("counts").textContent =
    `${counts.keep} kept, ${counts.relabel} relabelled, ${counts["leave out"]} left out`;
  const status = document.getElementById("status");
  status.textContent = describeStatus();
  status.classList.toggle("failed", failure !== "");
  document.getElementById("save").hidden = failure === "";
  document.getElementById("download").hidden = isServed && failure === "";
  document.getElementById("bar").hidden = choices.size === 0 && !hasChanged;
}

function describeStatus() {
  if (failure) return `Not saved: ${failure}`;
  if (!isServed) return unsaved.size ? `${unsaved.size} changed since the last download` : "";
  return isSaving || unsaved.size ? "Saving…" : `Saved to ${editing.name}`;
}

/* Saving */

async function save() {
  if (!isServed || isSaving || unsaved.size === 0) return;
  const paths = [...unsaved];
  const body = JSON.stringify({
    corrections: paths.map((path) => ({ path, action: null, label: "", ...choices.get(path) })),
  });
  unsaved.clear();
  isSaving = true;
  refreshBar();
  try {
    failure = await send(body);
  } catch {
    failure = "the server does not answer; start it again, or download the file";
  }
  isSaving = false;
  if (failure) paths.forEach((path) => unsaved.add(path));
  refreshBar();
  if (!failure) save();
}

/* Post the corrections. Returns the reason where the server refuses them, else nothing. */
async function send(body) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch("corrections", { method: "POST", headers, body });
  const answer = await response.json();
  return response.ok ? "" : answer.error;
}

function formatCsv() {
  const quote = (text) => (/[",;\t|\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const rows = [...choices].map(([path, { action, label }]) => [path, action, label]);
  return [["path", "action", "label"], ...rows].map((row) => `${row.map(quote).join(",")}\n`).join("");
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([formatCsv()], { type: "text/csv" }));
  link.download = editing.name;
  link.click();
  URL.revokeObjectURL(link.href);
  unsaved.clear();
  refreshBar();
}

/* Read what is saved now. A page from a file, or from another web server, has what it came with. */
async function load() {
  let saved = editing.corrections;
  if (location.protocol.startsWith("http")) {
    try {
      const response = await fetch("corrections");
      if (response.ok) saved = (await response.json()).corrections;
      isServed = response.ok;
    } catch {
      isServed = false;
    }
  }
  for (const { path, action, label } of saved) choices.set(path, { action, label });
  for (const note of document.querySelectorAll(".for-server")) note.hidden = !isServed;
  for (const note of document.querySelectorAll(".for-file")) note.hidden = isServed;
}

/* Keys */

function moveTo(item) {
  if (!item) return;
  item.focus({ preventScroll: true });
  item.scrollIntoView({ block: "nearest" });
}

function move(step) {
  const next = items.indexOf(current) + step;
  moveTo(items[Math.min(Math.max(next, 0), items.length - 1)]);
}

function moveToUndecided() {
  const following = items.slice(items.indexOf(current) + 1);
  moveTo(following.find((item) => !choices.has(item.dataset.path)) ?? current);
}

function handleKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target instanceof HTMLSelectElement) {
    if (event.key === "Escape") moveTo(current);
    if (event.key === "Enter" && event.target.value) moveToUndecided();
    return;
  }
  const key = event.key.toLowerCase();
  const action = ACTIONS.find((entry) => entry[2] === key)?.[0];
  if (key === "arrowright") move(1);
  else if (key === "arrowleft") move(-1);
  else if (!current) {
    if (action) move(1);
    return;
  } else if (key === "u") undo(current);
  else if (action && act(current, action)) moveToUndecided();
  else if (!action) return;
  event.preventDefault();
}

items.forEach(addControls);
await load();
document.addEventListener("keydown", handleKey);
document.addEventListener("focusin", (event) => {
  current = event.target.closest("[data-path]") ?? current;
});
document.getElementById("save").addEventListener("click", save);
document.getElementById("download").addEventListener("click", download);
for (const button of bulkButtons) button.addEventListener("click", () => toggleGroup(button.dataset.group));
window.addEventListener("beforeunload", (event) => {
  if (unsaved.size || isSaving) event.preventDefault();
});
refresh();
