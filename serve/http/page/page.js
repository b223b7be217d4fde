// The page of the service: send images, show predictions. No build step, no library, no other host.

const byId = (id) => document.getElementById(id);
const MAX_CONCURRENT_REQUESTS = 4;
const MIN_CARDS = 24; // results kept on the page, or all of the last files if those are more
const PIXELATED_BELOW = 120; // pixels of width: smaller images are enlarged without smoothing

const KEY_ITEM = "imago-api-key"; // of sessionStorage, which each tab has for itself

// The answer of GET /model.
let model = null;
let maxCards = MIN_CARDS;

function createElement(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function formatPercent(share) {
  if (share >= 0.9995 && share < 1) return "> 99.9 %";
  return `${(100 * share).toFixed(1)} %`;
}

function showStatus(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

// Send a request with the API key of this tab, if there is one, and ask for the key if it is refused.
async function fetchWithKey(url, options = {}) {
  const key = sessionStorage.getItem(KEY_ITEM);
  const headers = { ...options.headers };
  if (key) headers["X-API-Key"] = key;
  const response = await fetch(url, { ...options, headers });
  if (response.status === 401) {
    byId("key-form").hidden = false;
    byId("key").focus();
  }
  return response;
}

async function loadModel() {
  try {
    const response = await fetchWithKey("model");
    if (response.status === 401) {
      const isWrong = sessionStorage.getItem(KEY_ITEM);
      showStatus(isWrong ? "This API key is wrong." : "This service needs an API key.", isWrong);
      return;
    }
    if (!response.ok) throw new Error(await readProblem(response));
    model = await response.json();
  } catch (error) {
    showStatus(`The service is not ready: ${error.message}`, true);
    return;
  }

  byId("model").textContent = `${model.name}, version ${model.version}`;
  document.title = `Imago: ${model.name}`;
  byId("report").hidden = !model.report;
  if (model.keeps_images) byId("keeping").textContent = "which keeps a sample of them to be labelled";
  byId("cam-option").hidden = !model.explains.includes("cam");
  byId("top").max = String(model.classes.length);
  byId("strip").replaceChildren();
  model.samples.forEach(addSample);
  byId("samples").hidden = model.samples.length === 0;
}

// A link can't send the key, so with a key the report is fetched, and shown in place of this page.
async function openReport(event) {
  if (!sessionStorage.getItem(KEY_ITEM)) return;
  event.preventDefault();
  const response = await fetchWithKey("report");
  if (response.ok) location.assign(URL.createObjectURL(await response.blob()));
  else showStatus(await readProblem(response), true);
}

// Images arrive by the file dialog, by drag and drop anywhere on the page, or from the clipboard.
function addListeners() {
  byId("report").addEventListener("click", openReport);
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY_ITEM, byId("key").value.trim());
    byId("key-form").hidden = true;
    showStatus("");
    loadModel();
  });

  const drop = byId("drop");
  byId("files").addEventListener("change", (event) => {
    classifyAll([...event.target.files]);
    event.target.value = ""; // so that the same file can be chosen again
  });

  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("dragging");
    });
  }
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("dragging");
    classifyAll([...event.dataTransfer.files]);
  });

  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length === 0) return;
    event.preventDefault();
    classifyAll(files);
  });
}

function addSample(sample, index) {
  const image = createElement("img");
  showSample(image, `samples/${index}`);
  image.alt = `Sample ${index + 1}, true class ${sample.label}`;
  image.loading = "lazy";

  const button = createElement("button");
  button.type = "button";
  button.append(image);
  button.addEventListener("click", async () => {
    const response = await fetchWithKey(`samples/${index}`);
    if (!response.ok) {
      showStatus(await readProblem(response), true);
      return;
    }
    const blob = await response.blob();
    const name = sample.file ?? `sample-${index}`;
    classifyAll([new File([blob], name, { type: blob.type })], sample.label);
  });
  byId("strip").append(button);
}

// An image element can't send the key, so with a key the image is fetched.
async function showSample(image, url) {
  if (!sessionStorage.getItem(KEY_ITEM)) {
    image.src = url;
    return;
  }
  const response = await fetchWithKey(url);
  if (!response.ok) return;
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  image.src = URL.createObjectURL(await response.blob());
}

async function classifyAll(files, trueLabel) {
  if (files.length === 0) return;
  const isSingle = files.length === 1;
  showStatus(isSingle ? `Sending ${files[0].name}` : `Sending ${files.length} images`);

  // Answers come in any order. Each card replaces the placeholder of its file.
  const queue = files.map((file) => ({ file, placeholder: document.createComment("") }));
  byId("results").prepend(...queue.map(({ placeholder }) => placeholder));
  maxCards = Math.max(MIN_CARDS, files.length);
  let answered = 0;
  const classifyQueued = async () => {
    while (queue.length > 0) {
      const { file, placeholder } = queue.shift();
      if (await classify(file, trueLabel, placeholder)) answered += 1;
    }
  };
  const workers = Math.min(MAX_CONCURRENT_REQUESTS, files.length);
  await Promise.all(Array.from({ length: workers }, classifyQueued));

  if (isSingle) return; // the status already shows its result
  if (answered === files.length) showStatus(`${answered} images answered`);
  else showStatus(`${answered} of ${files.length} images answered`, true);
}

function buildRequest(file) {
  const query = new URLSearchParams({ top_k: byId("top").value || "5" });
  if (byId("cam").checked && !byId("cam-option").hidden) query.set("explain", "cam");
  const headers = { "Content-Type": file.type || "application/octet-stream" };
  return { url: new URL(`predict?${query}`, document.baseURI).href, headers };
}

// Send one image and replace its placeholder by a card with its prediction or its error. Returns whether it
// was answered.
async function classify(file, trueLabel, placeholder) {
  const { url, headers } = buildRequest(file);
  const curl = buildCurlCommand(file, url, headers);
  const startTime = performance.now();
  let response;
  let answer;
  try {
    response = await fetchWithKey(url, { method: "POST", headers, body: file });
    if (!response.ok) throw new Error(await readProblem(response));
    answer = await response.json();
  } catch (error) {
    fillWithError(addCard(file, trueLabel, curl, placeholder), file, error.message);
    return false;
  }

  const timings = formatTimings(response, performance.now() - startTime);
  const card = addCard(file, trueLabel, curl, placeholder);
  fillWithPrediction(card, file, answer.predictions[0], timings);
  return true;
}

async function readProblem(response) {
  try {
    const problem = await response.json();
    return problem.detail || problem.title || `status ${response.status}`;
  } catch {
    return `status ${response.status}`;
  }
}

// The durations of the Server-Timing header, and that of the whole request, in milliseconds.
function formatTimings(response, roundTrip) {
  const parts = [];
  for (const entry of (response.headers.get("Server-Timing") ?? "").split(",")) {
    const match = /^\s*(\w+);dur=([\d.]+)/.exec(entry);
    if (match) parts.push(`${match[1]}\u00a0${Number(match[2]).toFixed(1)}\u00a0ms`);
  }
  parts.push(`round\u00a0trip\u00a0${roundTrip.toFixed(1)}\u00a0ms`);
  return parts.join(" · ");
}

function buildCurlCommand(file, url, headers) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [
    `curl -sS ${quote(url)}`,
    `  -H ${quote(`Content-Type: ${headers["Content-Type"]}`)}`,
  ];
  if (sessionStorage.getItem(KEY_ITEM)) lines.push('  -H "X-API-Key: $IMAGO_API_KEY"');
  lines.push(`  --data-binary ${quote(`@${file.name}`)}`);
  return lines.join(" \\\n");
}

// Replace the placeholder by a card with what does not depend on the answer.
function addCard(file, trueLabel, curl, placeholder) {
  const card = byId("result").content.cloneNode(true).firstElementChild;
  const hasTrueLabel = trueLabel !== undefined;
  card.querySelector(".file").textContent = hasTrueLabel
    ? `${file.name}, true class ${trueLabel}`
    : file.name;
  card.querySelector("pre").textContent = curl;
  card.querySelector(".copy").addEventListener("click", (event) => {
    copyCommand(event.target, card.querySelector("pre"));
  });

  byId("empty").hidden = true;
  placeholder.replaceWith(card);
  while (byId("results").children.length > maxCards) byId("results").lastElementChild.remove();
  return card;
}

async function copyCommand(button, command) {
  try {
    await navigator.clipboard.writeText(command.textContent);
    button.textContent = "Copied";
  } catch { // over plain HTTP browsers offer no clipboard, except for localhost
    getSelection().selectAllChildren(command);
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  }
}

function fillWithError(card, file, message) {
  card.querySelector(".label").textContent = "No answer";
  card.querySelector(".badges").append(createElement("li", "error", message));
  showPhoto(card, file, {}, "This browser can't show the file.");
  showStatus(`${file.name}: ${message}`, true);
}

function fillWithPrediction(card, file, prediction, timings) {
  const confidence = formatPercent(prediction.confidence);
  const label = card.querySelector(".label");
  const answer = prediction.abstain ? `Not sure, perhaps ${prediction.label}` : prediction.label;
  label.append(`${answer} `, createElement("small", "", confidence));

  const warnings = listWarnings(prediction);
  for (const { text, isSevere } of warnings) {
    card.querySelector(".badges").append(createElement("li", isSevere ? "error" : "", text));
  }
  for (const choice of prediction.top) card.querySelector(".bars").append(createBar(choice));

  const classes = prediction.prediction_set;
  const names = classes?.length ? classes.join(", ") : "empty";
  card.querySelector(".set").textContent = classes ? `Prediction set: ${names}` : "";
  card.querySelector(".timings").textContent = timings;
  showPhoto(card, file, prediction, "This browser can't show the image; the service can read it.");

  const spokenWarnings = warnings.map(({ text }) => `, ${text.toLowerCase()}`).join("");
  showStatus(`${file.name}: ${answer}, ${confidence}${spokenWarnings}`);
}

function listWarnings(prediction) {
  const warnings = [];
  if (prediction.abstain) {
    const threshold = formatPercent(model.calibration.abstain_threshold);
    const text = `Abstains: the confidence is below ${threshold}, and such answers are wrong more often`;
    warnings.push({ text, isSevere: false });
  }
  if (prediction.out_of_distribution) {
    warnings.push({ text: "Out of distribution: unlike the training images", isSevere: true });
  }
  return warnings;
}

function createBar(choice) {
  const fill = createElement("div", "fill");
  fill.style.width = `${100 * choice.confidence}%`;
  const track = createElement("div", "track");
  track.setAttribute("aria-hidden", "true");
  track.append(fill);

  const name = createElement("span", "name", choice.label);
  name.title = choice.label;
  const item = createElement("li");
  item.append(name, track, createElement("span", "share", formatPercent(choice.confidence)));
  return item;
}

function showPhoto(card, file, prediction, fallbackText) {
  const photo = card.querySelector(".photo");
  photo.alt = `Your image ${file.name}`;
  photo.addEventListener("load", () => {
    URL.revokeObjectURL(photo.src);
    photo.classList.toggle("tiny", photo.naturalWidth < PIXELATED_BELOW);
    if (prediction.cam) showHeatMap(card, photo, prediction.cam);
  });
  photo.addEventListener("error", () => {
    photo.replaceWith(createElement("p", "photo fallback", fallbackText));
  });
  photo.src = URL.createObjectURL(file);
}

// The part of an image that the network receives, in pixels of the image. By the resize policy it is the
// centre (crop), all of the image (stretch), or the image with a border (pad).
function computeInputBox(width, height) {
  const { height: inputHeight, width: inputWidth, resize, short_side: shortSide } = model.input;
  if (resize === "stretch") return { x: 0, y: 0, width, height };

  const scale = resize === "pad"
    ? Math.min(inputHeight / height, inputWidth / width)
    : Math.max(shortSide ?? 0, inputHeight, inputWidth) / Math.min(width, height);
  const boxWidth = inputWidth / scale;
  const boxHeight = inputHeight / scale;
  return {
    x: (width - boxWidth) / 2,
    y: (height - boxHeight) / 2,
    width: boxWidth,
    height: boxHeight,
  };
}

async function showHeatMap(card, photo, cam) {
  const map = new Image();
  map.src = `data:image/png;base64,${cam}`;
  await map.decode();

  const canvas = card.querySelector(".heat");
  drawInColour(canvas, map);
  const align = () => alignWithPhoto(canvas, photo);
  new ResizeObserver(align).observe(photo);
  align();

  const toggle = card.querySelector(".heat-switch");
  toggle.querySelector("input").addEventListener("change", (event) => {
    canvas.hidden = !event.target.checked;
  });
  toggle.hidden = false;
  canvas.hidden = false;
}

function drawInColour(canvas, map) {
  canvas.width = map.width;
  canvas.height = map.height;
  const context = canvas.getContext("2d");
  context.drawImage(map, 0, 0);
  const pixels = context.getImageData(0, 0, map.width, map.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.set(mapColour(pixels.data[i] / 255), i);
  }
  context.putImageData(pixels, 0, 0);
}

// Place the heat map over the part of the photo that the network receives.
function alignWithPhoto(canvas, photo) {
  const scale = Math.min(
    photo.clientWidth / photo.naturalWidth,
    photo.clientHeight / photo.naturalHeight,
  );
  const left = photo.offsetLeft + (photo.clientWidth - scale * photo.naturalWidth) / 2;
  const top = photo.offsetTop + (photo.clientHeight - scale * photo.naturalHeight) / 2;
  const box = computeInputBox(photo.naturalWidth, photo.naturalHeight);
  canvas.style.left = `${left + scale * box.x}px`;
  canvas.style.top = `${top + scale * box.y}px`;
  canvas.style.width = `${scale * box.width}px`;
  canvas.style.height = `${scale * box.height}px`;
}

// Map a value of 0 to 1 to [red, green, blue, alpha]: from blue over green and yellow to red, transparent
// where the value is low.
function mapColour(value) {
  const channel = (centre) => 255 * Math.min(1, Math.max(0, 1.5 - Math.abs(4 * value - centre)));
  return [channel(3), channel(2), channel(1), 255 * Math.min(1, 1.6 * value)];
}

addListeners();
loadModel();
