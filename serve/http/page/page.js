// The page of the service: images in, predictions out. No build step, no library, no other host.

const $ = (id) => document.getElementById(id);
const AT_ONCE = 4; // requests in flight
const SHOWN = 24; // result cards kept on the page
let model = null;

const percent = (share) => (share >= 0.9995 && share < 1 ? "> 99.9 %" : `${(100 * share).toFixed(1)} %`);
const element = (name, className, text) => {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const say = (text, bad = false) => {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
};

async function start() {
  listen();
  try {
    const answer = await fetch("model");
    if (!answer.ok) throw new Error(await problem(answer));
    model = await answer.json();
  } catch (error) {
    say(`The service is not ready: ${error.message}`, true);
    return;
  }
  $("model").textContent = `${model.name}, version ${model.version}`;
  document.title = `Imago: ${model.name}`;
  $("report").hidden = !model.report;
  $("cam-option").hidden = !model.explains.includes("cam");
  $("top").max = String(model.classes.length);
  model.samples.forEach(addSample);
  $("samples").hidden = model.samples.length === 0;
}

function listen() {
  const drop = $("drop");
  $("files").addEventListener("change", (event) => {
    classifyAll([...event.target.files]);
    event.target.value = ""; // the same file may be chosen again
  });
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    classifyAll([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) { event.preventDefault(); classifyAll(files); }
  });
}

function addSample(sample, index) {
  const button = element("button");
  button.type = "button";
  const image = element("img");
  image.src = `samples/${index}`;
  image.alt = `Sample ${index + 1}, true class ${sample.label}`;
  image.loading = "lazy";
  button.append(image);
  button.addEventListener("click", async () => {
    const answer = await fetch(image.src);
    if (!answer.ok) { say(await problem(answer), true); return; }
    const blob = await answer.blob();
    const name = sample.file ?? `sample-${index}`;
    classifyAll([new File([blob], name, { type: blob.type })], sample.label);
  });
  $("strip").append(button);
}

async function classifyAll(files, truth) {
  if (!files.length) return;
  const queue = [...files];
  let answered = 0;
  const one = async () => {
    for (let file = queue.shift(); file; file = queue.shift()) if (await classify(file, truth)) answered += 1;
  };
  say(files.length === 1 ? `Sending ${files[0].name}` : `Sending ${files.length} images`);
  await Promise.all(Array.from({ length: Math.min(AT_ONCE, files.length) }, one));
  const missed = files.length - answered;
  if (files.length > 1) say(missed ? `${answered} of ${files.length} images answered` : `${answered} images answered`, missed > 0);
}

function request(file) {
  const query = new URLSearchParams({ top_k: $("top").value || "5" });
  if ($("cam").checked && !$("cam-option").hidden) query.set("explain", "cam");
  const headers = { "Content-Type": file.type || "application/octet-stream" };
  if ($("key").value) headers["X-API-Key"] = $("key").value;
  return { url: new URL(`predict?${query}`, document.baseURI).href, headers };
}

// One image to a card of the page, which holds the prediction or what went wrong; true where it is a prediction.
async function classify(file, truth) {
  const { url, headers } = request(file);
  const began = performance.now();
  let answer, body;
  try {
    answer = await fetch(url, { method: "POST", headers, body: file });
    if (!answer.ok) throw new Error(await problem(answer));
    body = await answer.json();
  } catch (error) {
    if (answer?.status === 401) { $("key").closest("details").open = true; $("key").focus(); }
    refused(show(file, truth, command(file, url, headers)), file, error.message);
    return false;
  }
  const elapsed = performance.now() - began;
  predicted(show(file, truth, command(file, url, headers)), file, body.predictions[0], timings(answer, elapsed));
  return true;
}

async function problem(answer) {
  try {
    const said = await answer.json();
    return said.detail || said.title || `status ${answer.status}`;
  } catch {
    return `status ${answer.status}`;
  }
}

function timings(answer, elapsed) {
  const parts = (answer.headers.get("Server-Timing") ?? "").split(",")
    .map((part) => /^\s*(\w+);dur=([\d.]+)/.exec(part)).filter(Boolean)
    .map(([, name, ms]) => `${name}\u00a0${Number(ms).toFixed(1)}\u00a0ms`);
  return [...parts, `round\u00a0trip\u00a0${elapsed.toFixed(1)}\u00a0ms`].join(" · ");
}

function command(file, url, headers) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl -sS ${quote(url)}`, `  -H ${quote(`Content-Type: ${headers["Content-Type"]}`)}`];
  if (headers["X-API-Key"]) lines.push('  -H "X-API-Key: $IMAGO_API_KEY"');
  return [...lines, `  --data-binary ${quote(`@${file.name}`)}`].join(" \\\n");
}

// A new card, with what is known before there is an answer.
function show(file, truth, curl) {
  const card = $("result").content.cloneNode(true).firstElementChild;
  const find = (selector) => card.querySelector(selector);
  find(".file").textContent = truth === undefined ? file.name : `${file.name}, true class ${truth}`;
  find("pre").textContent = curl;
  find(".copy").addEventListener("click", async (event) => {
    const button = event.target;
    try {
      await navigator.clipboard.writeText(curl);
      button.textContent = "Copied";
    } catch { // browsers give a page no clipboard over plain HTTP, but from this machine
      getSelection().selectAllChildren(find("pre"));
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
  });
  $("empty").hidden = true;
  $("results").prepend(card);
  while ($("results").children.length > SHOWN) $("results").lastElementChild.remove();
  return card;
}

function refused(card, file, reason) {
  card.querySelector(".label").textContent = "No answer";
  card.querySelector(".badges").append(element("li", "bad", reason));
  picture(card, file, {}, "This browser can't show the file.");
  say(`${file.name}: ${reason}`, true);
}

function predicted(card, file, prediction, times) {
  const find = (selector) => card.querySelector(selector);
  find(".label").append(`${prediction.label} `, element("small", "", percent(prediction.confidence)));
  badges(prediction).forEach(([text, bad]) => find(".badges").append(element("li", bad ? "bad" : "", text)));
  prediction.top.forEach((entry) => find(".bars").append(bar(entry)));
  const classes = prediction.prediction_set;
  find(".set").textContent = classes ? `Prediction set: ${classes.length ? classes.join(", ") : "empty"}` : "";
  find(".times").textContent = times;
  picture(card, file, prediction, "This browser can't show the image; the service can read it.");
  const doubts = badges(prediction).map(([text]) => `, ${text.toLowerCase()}`).join("");
  say(`${file.name}: ${prediction.label}, ${percent(prediction.confidence)}${doubts}`);
}

function badges(prediction) {
  const found = [];
  if (prediction.abstain) found.push(["Abstains: not sure enough to answer", false]);
  if (prediction.out_of_distribution) found.push(["Out of distribution: unlike the training images", true]);
  return found;
}

function bar(entry) {
  const item = element("li");
  const track = element("div", "track");
  const fill = element("div", "fill");
  fill.style.width = `${100 * entry.confidence}%`;
  track.setAttribute("aria-hidden", "true");
  track.append(fill);
  const name = element("span", "name", entry.label);
  name.title = entry.label;
  item.append(name, track, element("span", "share", percent(entry.confidence)));
  return item;
}

function picture(card, file, prediction, unseen) {
  const photo = card.querySelector(".photo");
  photo.alt = `Your image ${file.name}`;
  photo.addEventListener("load", () => {
    URL.revokeObjectURL(photo.src);
    photo.classList.toggle("tiny", photo.naturalWidth < 120);
    if (prediction.cam) heat(card, photo, prediction.cam);
  });
  photo.addEventListener("error", () => {
    photo.replaceWith(element("p", "photo unseen", unseen));
  });
  photo.src = URL.createObjectURL(file);
}

// The map covers what the network saw: the centre of the image (crop), all of it (stretch), or it with a border (pad).
function seen(width, height) {
  const { height: h, width: w, resize, short_side: short } = model.input;
  if (resize === "stretch") return { x: 0, y: 0, w: width, h: height };
  const scale = resize === "pad" ? Math.min(h / height, w / width) : Math.max(short ?? 0, h, w) / Math.min(width, height);
  const size = { w: w / scale, h: h / scale };
  return { x: (width - size.w) / 2, y: (height - size.h) / 2, ...size };
}

async function heat(card, photo, cam) {
  const map = new Image();
  map.src = `data:image/png;base64,${cam}`;
  await map.decode();
  const canvas = card.querySelector(".heat");
  canvas.width = map.width;
  canvas.height = map.height;
  const context = canvas.getContext("2d");
  context.drawImage(map, 0, 0);
  const image = context.getImageData(0, 0, map.width, map.height);
  for (let i = 0; i < image.data.length; i += 4) image.data.set(colour(image.data[i] / 255), i);
  context.putImageData(image, 0, 0);
  const place = () => {
    const scale = Math.min(photo.clientWidth / photo.naturalWidth, photo.clientHeight / photo.naturalHeight);
    const left = photo.offsetLeft + (photo.clientWidth - scale * photo.naturalWidth) / 2;
    const top = photo.offsetTop + (photo.clientHeight - scale * photo.naturalHeight) / 2;
    const box = seen(photo.naturalWidth, photo.naturalHeight);
    Object.assign(canvas.style, {
      left: `${left + scale * box.x}px`, top: `${top + scale * box.y}px`,
      width: `${scale * box.w}px`, height: `${scale * box.h}px`,
    });
  };
  new ResizeObserver(place).observe(photo);
  place();
  const toggle = card.querySelector(".heat-switch");
  toggle.querySelector("input").addEventListener("change", (event) => { canvas.hidden = !event.target.checked; });
  toggle.hidden = canvas.hidden = false;
}

// Blue over green and yellow to red, clear where the map is low: value 0..1 to [r, g, b, a].
function colour(value) {
  const near = (centre) => 255 * Math.min(1, Math.max(0, 1.5 - Math.abs(4 * value - centre)));
  return [near(3), near(2), near(1), 255 * Math.min(1, 1.6 * value)];
}

start();
