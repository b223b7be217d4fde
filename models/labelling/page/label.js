// The labelling page: one image after another. No build step, no library, no other host.
//
// A label is stored in this browser first, then sent. It leaves the browser's store when the server
// has written it, so nothing is lost when the page or the server ends in between.

const byId = (id) => document.getElementById(id);
const KEY_ITEM = "imago-api-key"; // of sessionStorage, as on the page of the service
const WHO_ITEM = "imago-label-who";
const ORDER_ITEM = "imago-label-order";
const UNSAVED_ITEM = "imago-unsaved-labels";
const MAX_BUTTONS = 9;
const FEW_ITEMS_LEFT = 8; // then more are fetched
const PREFETCHED_IMAGES = 3;
const MAX_UNDO = 200;
const FIRST_RETRY_MS = 1000;
const LAST_RETRY_MS = 30000;
const PIXELATED_BELOW = 120; // pixels of width: smaller images are enlarged without smoothing

const client = crypto.getRandomValues(new Uint32Array(2)).join("-");
const images = new Map(); // id -> promise of the URL of an image
const answered = new Set(); // ids that got a label, or were skipped, on this page
const history = []; // for undo: {items, verdict}
const useCounts = new Map(); // class -> how often it was chosen here

let state = null; // the last answer of /items
let queue = []; // items to show; the first one is on the page
let shownClasses = []; // classes of the buttons, by their numbers
let lookAlikes = [];
let isSending = false;
let retryMs = FIRST_RETRY_MS;
let sentRequests = 0; // with labels, that were answered

/* Requests */

async function fetchWithKey(path, options = {}) {
  const key = sessionStorage.getItem(KEY_ITEM);
  const headers = { ...options.headers };
  if (key) headers["X-API-Key"] = key;
  const response = await fetch(new URL(path, document.baseURI), { ...options, headers });
  if (response.status === 401) askForKey();
  return response;
}

async function readError(response) {
  try {
    return (await response.json()).detail ?? response.statusText;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

function showStatus(text) {
  byId("status").textContent = text;
}

function askForKey() {
  byId("start").hidden = false;
  byId("key-row").hidden = false;
  byId("key").focus();
}

/* Images to label */

async function loadItems() {
  const query = new URLSearchParams({
    order: byId("order").value || localStorage.getItem(ORDER_ITEM) || "teach",
    show: byId("show").value,
    client,
  });
  const sentBefore = sentRequests;
  let response;
  try {
    response = await fetchWithKey(`label/items?${query}`);
  } catch {
    showStatus("The server does not answer. Labels stay in this browser until it does.");
    return false;
  }
  if (!response.ok) {
    showStatus(response.status === 401 ? "This page needs the API key." : await readError(response));
    return false;
  }
  const isFirst = state === null;
  const loaded = await response.json();
  if (sentRequests > sentBefore) {
    // Labels were saved meanwhile, so the counts that came with them are newer.
    loaded.labelled = state.labelled;
    loaded.total = state.total;
  }
  state = loaded;
  if (isFirst) {
    fillOrders();
    adoptUnsaved();
  }
  const waiting = new Set(readUnsaved().map((label) => label.id));
  const known = new Set(queue.map((item) => item.id));
  const isNew = (item) => !known.has(item.id) && !waiting.has(item.id) && !answered.has(item.id);
  queue.push(...state.items.filter(isNew));
  showProgress();
  return true;
}

function fillOrders() {
  const chosen = localStorage.getItem(ORDER_ITEM) ?? "teach";
  const options = Object.entries(state.orders).map(([key, text]) => new Option(text, key));
  byId("order").replaceChildren(...options);
  byId("order").value = chosen in state.orders ? chosen : "teach";
  showOrder();
  byId("place").textContent = `Labels are saved in ${state.location}`;
}

function showOrder() {
  const [name] = state.orders[byId("order").value].split(":");
  byId("order-summary").textContent = `Order and settings. Order now: ${name}`;
}

async function restart() {
  queue = [];
  answered.clear();
  if (await loadItems()) showCurrent();
}

// An image element can't send the key, so images are fetched.
function loadImage(id) {
  if (!images.has(id)) {
    const fetched = fetchWithKey(`label/images/${encodeURIComponent(id)}`).then(async (response) => {
      if (!response.ok) throw new Error(await readError(response));
      return URL.createObjectURL(await response.blob());
    });
    fetched.catch(() => images.delete(id));
    images.set(id, fetched);
  }
  return images.get(id);
}

// Free the images that are neither on the page nor next.
async function forgetImages() {
  const needed = new Set([...queue.slice(0, 1 + PREFETCHED_IMAGES), ...lookAlikes].map((item) => item.id));
  for (const [id, fetched] of [...images]) {
    if (needed.has(id)) continue;
    images.delete(id);
    const url = await fetched.catch(() => null);
    if (url) URL.revokeObjectURL(url);
  }
}

async function showCurrent() {
  closeLookAlikes();
  byId("find").value = "";
  const item = queue[0];
  byId("main").hidden = !item;
  byId("done").hidden = Boolean(item);
  if (!item) return;

  showButtons();
  showConflict(item);
  const picture = byId("image");
  picture.alt = describe(item);
  byId("caption").textContent = describe(item);
  queue.slice(1, 1 + PREFETCHED_IMAGES).forEach((next) => loadImage(next.id).catch(() => {}));
  try {
    const url = await loadImage(item.id);
    if (queue[0] !== item) return;
    picture.src = url;
    forgetImages();
  } catch (error) {
    if (queue[0] !== item) return;
    picture.removeAttribute("src");
    showStatus(`The image can't be shown: ${error.message}`);
  }
}

function formatPercent(share) {
  return `${(100 * share).toFixed(0)} %`;
}

function describe(item) {
  const [guess] = item.guesses;
  const parts = [];
  if (guess) parts.push(`The model's guess is ${guess.label}, ${formatPercent(guess.confidence)}`);
  if (item.training_label) parts.push(`the data says ${item.training_label}`);
  if (item.reasons.length > 0) parts.push(item.reasons.join(", ").replaceAll("_", " "));
  return `${parts.join("; ")}.`;
}

function nameVerdict({ verdict, label }) {
  if (verdict === "class") return label;
  return verdict === "none" ? "none of these" : "not an image of ours";
}

function showConflict(item) {
  const labels = [item.label, ...item.others].filter(Boolean);
  byId("conflict").hidden = labels.length === 0;
  const texts = labels.map((label) => `${label.who} says ${nameVerdict(label)}`);
  byId("conflict").textContent = texts.join("; ");
}

function showProgress() {
  const changes = readUnsaved().map((label) => (label.verdict === "withdrawn" ? -1 : 1));
  const unsaved = changes.reduce((sum, change) => sum + change, 0);
  const labelled = Math.min(state.labelled + unsaved, state.total);
  const conflicts = state.conflicts ? `, ${state.conflicts} with a conflict` : "";
  byId("progress-text").textContent = `${labelled} of ${state.total} labelled${conflicts}`;
  byId("progress").max = Math.max(state.total, 1);
  byId("progress").value = labelled;
}

/* Classes */

// The guesses first, then what is chosen most, then the others. With a text, those that contain it.
function listClasses() {
  const item = queue[0];
  const guesses = item.guesses.map((guess) => guess.label);
  const training = item.training_label ? [item.training_label] : [];
  const used = [...useCounts.entries()].sort((one, other) => other[1] - one[1]).map(([name]) => name);
  const all = [...new Set([...guesses, ...training, ...used, ...state.classes])];
  const text = byId("find").value.trim().toLowerCase();
  if (!text) return all;
  const starting = all.filter((name) => name.toLowerCase().startsWith(text));
  const containing = all.filter((name) => name.toLowerCase().includes(text));
  return [...new Set([...starting, ...containing])];
}

function showButtons() {
  const item = queue[0];
  const text = byId("find").value.trim();
  const found = listClasses();
  const isKnown = found.some((name) => name === text);
  const canAdd = state.allows_new_classes && text && !isKnown;
  shownClasses = found.slice(0, canAdd ? MAX_BUTTONS - 1 : MAX_BUTTONS);
  const shares = new Map(item.guesses.map((guess) => [guess.label, guess.confidence]));
  const buttons = shownClasses.map((name, i) => makeButton(name, name, i, shares.get(name)));
  if (canAdd) {
    buttons.push(makeButton(`New class “${text}”`, text, shownClasses.length));
    shownClasses.push(text);
  }
  const focused = [...byId("classes").children].indexOf(document.activeElement);
  byId("classes").replaceChildren(...buttons);
  if (focused >= 0) buttons[Math.min(focused, buttons.length - 1)]?.focus();
}

function makeButton(text, name, position, share) {
  const button = document.createElement("button");
  button.type = "button";
  const key = document.createElement("kbd");
  key.textContent = position + 1;
  const label = document.createElement("span");
  label.textContent = text;
  button.append(key, label);
  if (share !== undefined) {
    const percent = document.createElement("span");
    percent.className = "share";
    percent.textContent = formatPercent(share);
    button.append(percent);
    button.classList.toggle("guess", name === queue[0].guesses[0].label);
  }
  button.addEventListener("click", () => choose("class", name));
  return button;
}

/* Labels */

function choose(verdict, label = "") {
  const item = queue[0];
  if (!item) return;
  const items = [item, ...checkedLookAlikes()];
  if (verdict === "class") {
    useCounts.set(label, (useCounts.get(label) ?? 0) + 1);
    if (!state.classes.includes(label)) {
      state.classes.push(label);
    }
  }
  history.push({ items });
  if (history.length > MAX_UNDO) history.shift();
  submit(items, verdict, label);
  const others = items.length > 1 ? ` and ${countLookAlikes(items.length - 1)}` : "";
  advance(items, `Labelled ${nameVerdict({ verdict, label })}${others}.`);
}

function advance(items, text) {
  const ids = new Set(items.map((item) => item.id));
  items.forEach((item) => answered.add(item.id));
  queue = queue.filter((item) => !ids.has(item.id));
  const [next] = queue;
  showStatus(next ? `${text} Next: ${describe(next)}` : text);
  byId("undo").disabled = history.length === 0;
  showProgress();
  showCurrent();
  if (queue.length < FEW_ITEMS_LEFT) loadMore();
}

async function loadMore() {
  const wasEmpty = queue.length === 0;
  if ((await loadItems()) && wasEmpty && queue.length > 0) showCurrent();
}

function skip() {
  const item = queue[0];
  if (!item) return;
  answered.add(item.id);
  queue.shift();
  showStatus("Skipped.");
  showCurrent();
  if (queue.length < FEW_ITEMS_LEFT) loadMore();
}

function undo() {
  const last = history.pop();
  if (!last) return;
  submit(last.items, "withdrawn");
  last.items.forEach((item) => answered.delete(item.id));
  queue.unshift(...last.items);
  byId("undo").disabled = history.length === 0;
  showStatus(`Undone. ${describe(queue[0])}`);
  showProgress();
  showCurrent();
}

function submit(items, verdict, label = "") {
  const who = localStorage.getItem(WHO_ITEM);
  const number = Date.now();
  const labels = items.map((item, i) => ({ id: item.id, verdict, label, who, key: `${number}-${i}-${client}` }));
  writeUnsaved([...readUnsaved(), ...labels]);
  send();
}

// Each page has its own list. The next page takes over those that an earlier page has left.
function unsavedItem() {
  return `${UNSAVED_ITEM} ${state.location} ${client}`;
}

function readUnsaved() {
  return JSON.parse(localStorage.getItem(unsavedItem())) ?? [];
}

function writeUnsaved(labels) {
  if (labels.length > 0) localStorage.setItem(unsavedItem(), JSON.stringify(labels));
  else localStorage.removeItem(unsavedItem());
}

function adoptUnsaved() {
  const prefix = `${UNSAVED_ITEM} ${state.location} `;
  const others = Object.keys(localStorage).filter((item) => item.startsWith(prefix) && item !== unsavedItem());
  for (const item of others) {
    writeUnsaved([...readUnsaved(), ...JSON.parse(localStorage.getItem(item))]);
    localStorage.removeItem(item);
  }
}

function showUnsaved(reason) {
  const count = readUnsaved().length;
  byId("unsaved").hidden = !reason || count === 0;
  byId("unsaved").textContent = `${count} not saved yet, kept in this browser: ${reason}`;
}

// Labels are sent in their order, one request at a time.
async function send() {
  if (isSending) return;
  isSending = true;
  let reason = "";
  try {
    for (let labels = readUnsaved(); labels.length > 0; labels = readUnsaved()) {
      const part = labels.slice(0, 100);
      reason = await sendPart(part);
      if (reason) break;
      const sent = new Set(part.map((label) => label.key));
      writeUnsaved(readUnsaved().filter((label) => !sent.has(label.key)));
      showProgress();
    }
  } finally {
    isSending = false;
  }
  showUnsaved(reason);
  if (reason) {
    setTimeout(send, retryMs);
    retryMs = Math.min(2 * retryMs, LAST_RETRY_MS);
  } else {
    retryMs = FIRST_RETRY_MS;
  }
}

// Returns why the labels were not saved, or an empty text. A label that is refused is left out.
async function sendPart(labels) {
  let response;
  try {
    response = await fetchWithKey("label/labels", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ page: state.page, labels }),
    });
  } catch {
    return "the server does not answer";
  }
  if (response.status === 400 && labels.length > 1) {
    for (const label of labels) {
      const reason = await sendPart([label]);
      if (reason) return reason;
    }
    return "";
  }
  if (response.status === 400) {
    showStatus(`A label was refused: ${await readError(response)}`);
    return "";
  }
  if (!response.ok) return readError(response);
  const { gone, total, labelled } = await response.json();
  sentRequests += 1;
  state.total = total;
  state.labelled = labelled;
  if (gone.length > 0) showStatus(`Not saved, since the image is gone: ${gone.length}`);
  gone.forEach((id) => {
    queue = queue.filter((item) => item.id !== id);
  });
  return "";
}

/* Look-alikes */

async function openLookAlikes() {
  const item = queue[0];
  if (!item) return;
  if (!byId("alike").hidden) {
    closeLookAlikes();
    return;
  }
  const response = await fetchWithKey(`label/similar/${encodeURIComponent(item.id)}`);
  if (!response.ok || queue[0] !== item) return;
  const found = (await response.json()).items;
  lookAlikes = found.filter((other) => !answered.has(other.id));
  if (lookAlikes.length === 0) {
    showStatus("No image without a label looks like this one.");
    return;
  }
  byId("alike-list").replaceChildren(...lookAlikes.map(makeLookAlike));
  byId("alike").hidden = false;
  byId("show-alike").setAttribute("aria-expanded", "true");
  showStatus(`Checked: ${countLookAlikes(lookAlikes.length)}, to get the same label.`);
}

function countLookAlikes(count) {
  return count === 1 ? "1 look-alike" : `${count} look-alikes`;
}

function makeLookAlike(item) {
  const label = document.createElement("label");
  const box = document.createElement("input");
  box.type = "checkbox";
  box.checked = true;
  const picture = document.createElement("img");
  picture.alt = describe(item);
  loadImage(item.id).then((url) => (picture.src = url), () => {});
  label.append(box, picture);
  return label;
}

function checkedLookAlikes() {
  const boxes = [...byId("alike-list").querySelectorAll("input")];
  return lookAlikes.filter((_, i) => boxes[i]?.checked);
}

function closeLookAlikes() {
  lookAlikes = [];
  byId("alike-list").replaceChildren();
  byId("alike").hidden = true;
  byId("show-alike").setAttribute("aria-expanded", "false");
}

/* Keys */

const KEYS = {
  0: () => choose("none"),
  "-": () => choose("foreign"),
  "+": openLookAlikes,
  "=": openLookAlikes, // the same key without Shift
  ArrowRight: skip,
  Backspace: undo,
};

function pressKey(event) {
  if (byId("main").hidden && event.key !== "Backspace") return;
  if (event.altKey || event.metaKey) return;
  if (event.ctrlKey) {
    if (event.key === "z") {
      event.preventDefault();
      undo();
    }
    return;
  }
  const { target } = event;
  const isFinding = target === byId("find");
  const isField = target.matches("input:not([type=checkbox]), select, textarea");
  if (isField && !(isFinding && target.value === "")) return;

  if (/^[1-9]$/.test(event.key)) {
    const name = shownClasses[Number(event.key) - 1];
    event.preventDefault();
    if (name !== undefined) choose("class", name);
    return;
  }
  const action = KEYS[event.key];
  if (action) {
    event.preventDefault();
    action();
    return;
  }
  const isLetter = event.key.length === 1 && event.key !== " ";
  if (isLetter && !isFinding) byId("find").focus(); // the letter goes into the field
}

function pressKeyInFind(event) {
  if (event.key === "Enter") {
    event.preventDefault();
    const [first] = shownClasses;
    if (byId("find").value.trim() && first !== undefined) choose("class", first);
  } else if (event.key === "Escape") {
    byId("find").value = "";
    showButtons();
    byId("find").blur();
  }
}

/* Start */

function start() {
  const who = localStorage.getItem(WHO_ITEM);
  byId("start").hidden = Boolean(who);
  byId("who").value = who ?? "";
  if (!who) {
    byId("who").focus();
    return;
  }
  byId("name").textContent = who;
  restart().then(() => {
    if (state !== null) send();
  });
}

byId("start").addEventListener("submit", (event) => {
  event.preventDefault();
  const who = byId("who").value.trim();
  if (!who) return;
  localStorage.setItem(WHO_ITEM, who);
  const key = byId("key").value.trim();
  if (key) sessionStorage.setItem(KEY_ITEM, key);
  byId("key-row").hidden = true;
  showStatus("");
  start();
});
byId("find").addEventListener("input", showButtons);
byId("find").addEventListener("keydown", pressKeyInFind);
document.addEventListener("keydown", pressKey);
byId("none").addEventListener("click", () => choose("none"));
byId("foreign").addEventListener("click", () => choose("foreign"));
byId("undo").addEventListener("click", undo);
byId("skip").addEventListener("click", skip);
byId("show-alike").addEventListener("click", openLookAlikes);
byId("again").addEventListener("click", restart);
byId("order").addEventListener("change", () => {
  localStorage.setItem(ORDER_ITEM, byId("order").value);
  showOrder();
  restart();
});
byId("show").addEventListener("change", restart);
byId("change-name").addEventListener("click", () => {
  byId("start").hidden = false;
  byId("who").focus();
});
byId("image").addEventListener("load", () => {
  byId("image").classList.toggle("small", byId("image").naturalWidth < PIXELATED_BELOW);
});
start();
