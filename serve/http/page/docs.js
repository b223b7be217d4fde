// The forms of /docs: send a request of the API and show the response. No build step, no library.

const byId = (id) => document.getElementById(id);
const KEY_ITEM = "imago-api-key"; // of sessionStorage, as on the page

// The parameters of the form go into the path, the query and the headers.
function buildRequest(form) {
  let path = form.dataset.path;
  const query = new URLSearchParams();
  const headers = {};
  for (const input of form.querySelectorAll("[data-in]")) {
    const value = input.value.trim();
    if (input.dataset.in === "path") {
      path = path.replace(`{${input.name}}`, encodeURIComponent(value));
    } else if (value && input.dataset.in === "query") {
      query.set(input.name, value);
    } else if (value) {
      headers[input.name] = value;
    }
  }
  addKey(headers);

  const url = new URL(`.${path}`, document.baseURI); // the service may have a path prefix
  url.search = query.toString();
  return { url, headers };
}

function addKey(headers) {
  const key = byId("key").value.trim();
  if (key) headers["X-API-Key"] = key;
}

// One file is sent as it is, several as multipart. Without a file the JSON is sent.
function buildBody(form, headers) {
  const files = [...(form.querySelector("input[type=file]")?.files ?? [])];
  if (files.length === 1) {
    headers["Content-Type"] = files[0].type || "application/octet-stream";
    return files[0];
  }
  if (files.length > 1) {
    const parts = new FormData();
    for (const file of files) parts.append("file", file);
    return parts; // the browser sets the Content-Type with the boundary
  }

  const json = form.querySelector("textarea");
  if (!json) return undefined;
  headers["Content-Type"] = "application/json";
  return json.value;
}

async function readBody(response) {
  const type = response.headers.get("Content-Type") ?? "";
  if (type.startsWith("image/") || type.startsWith("application/octet-stream")) {
    const bytes = await response.arrayBuffer();
    return `${bytes.byteLength} bytes of ${type}`;
  }
  const text = await response.text();
  try {
    return JSON.stringify(JSON.parse(text), null, 1);
  } catch {
    return text;
  }
}

async function send(event) {
  event.preventDefault();
  const form = event.target;
  const output = form.querySelector("output");
  output.textContent = "Sending";
  const { url, headers } = buildRequest(form);
  const body = buildBody(form, headers);
  try {
    const response = await fetch(url, { method: form.dataset.method, headers, body });
    const status = `${response.status} ${response.statusText}`;
    output.textContent = `${status}\n\n${await readBody(response)}`;
  } catch (error) {
    output.textContent = `No response: ${error.message}`;
  }
}

// The examples of code name a local service and a model; put in the real ones.
const EXAMPLE_URL = "http://localhost:8000";
const EXAMPLE_MODEL = "/models/digits";

function replaceInCode(text, replacement) {
  for (const code of document.querySelectorAll("pre.code")) {
    code.textContent = code.textContent.replaceAll(text, replacement);
  }
}

// The name of the served model and its first sample are useful values to begin with.
async function fillIn() {
  const headers = {};
  addKey(headers);
  const response = await fetch("model", { headers });
  if (!response.ok) return;
  const { name } = await response.json();
  for (const input of document.querySelectorAll("input[name=name]")) input.value = name;
  replaceInCode(EXAMPLE_MODEL, `/models/${name}`);
  for (const input of document.querySelectorAll("input[name=index]")) input.value = "0";
}

for (const form of document.querySelectorAll("form")) form.addEventListener("submit", send);
replaceInCode(EXAMPLE_URL, new URL(".", document.baseURI).href.replace(/\/$/, ""));
byId("key").value = sessionStorage.getItem(KEY_ITEM) ?? "";
byId("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY_ITEM, byId("key").value.trim());
  fillIn();
});
fillIn();
