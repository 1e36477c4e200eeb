// The dashboard: polls the public API and draws what it says.
//
// All text that comes from the API enters the page by textContent, never as markup. Rows are kept
// by id and changed in place, so that focus and selection survive a refresh.
"use strict";

const REFRESH_MS = 3000;
const REQUEST_TIMEOUT_MS = 15000;
const KEY_ITEM = "wrenn.api-key";

// How a state looks; any other state looks idle.
const LOOKS = {
  running: "good", alive: "good",
  pending: "busy", starting: "busy", pausing: "busy", resuming: "busy",
  stopping: "busy", snapshotting: "busy", cordoned: "busy", draining: "busy",
  suspect: "busy",
  missing: "bad", lost: "bad", error: "bad", down: "bad",
};

const byId = (id) => document.getElementById(id);
let key = sessionStorage.getItem(KEY_ITEM);
let timer = null;
let refreshing = false;
// Whether something was changed while a refresh was under way, so that its answer may be old.
let again = false;
let lastFresh = null;
// Capsules whose destruction was asked for here and not yet answered.
const leaving = new Set();

class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function api(method, path, body) {
  const response = await fetch(path, {
    method,
    headers: { "X-API-Key": key, ...(body ? { "Content-Type": "application/json" } : {}) },
    body: body ? JSON.stringify(body) : undefined,
    cache: "no-store",
    signal: AbortSignal.timeout(REQUEST_TIMEOUT_MS),
  });
  const text = await response.text();
  let json = null;
  try { json = text ? JSON.parse(text) : null; } catch { /* told by the status below */ }
  if (!response.ok) {
    const told = json && json.error && json.error.message;
    throw new ApiError(response.status, told || `the node answered ${response.status}`);
  }
  return json;
}

/* Drawing */

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function cell(row, index) {
  while (row.cells.length <= index) row.insertCell();
  return row.cells[index];
}

function child(parent, tag) {
  return parent.querySelector(tag) || parent.appendChild(document.createElement(tag));
}

function drawPill(parent, state, why) {
  const pill = child(parent, "span");
  setText(pill, state);
  pill.className = `pill ${Object.hasOwn(LOOKS, state) ? LOOKS[state] : ""}`;
  pill.title = why || "";
}

// Makes the rows of `body` those of `items`, in order, and has `draw` fill each.
function drawRows(body, items, draw) {
  const old = new Map([...body.rows].map((row) => [row.dataset.id, row]));
  items.forEach((item, index) => {
    const id = String(item.id);
    const row = old.get(id) || document.createElement("tr");
    old.delete(id);
    row.dataset.id = id;
    if (body.rows[index] !== row) body.insertBefore(row, body.rows[index] || null);
    draw(row, item);
  });
  old.forEach((row) => row.remove());
}

function memory(mib) {
  return mib >= 1024 ? `${+(mib / 1024).toFixed(1)} GiB` : `${mib} MiB`;
}

function ago(stamp) {
  const seconds = Math.round((Date.now() - Date.parse(stamp)) / 1000);
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
}

function drawTime(parent, stamp) {
  setText(parent, stamp ? ago(stamp) : "–");
  parent.title = stamp || "";
}

function drawCapsule(row, capsule) {
  const id = String(capsule.id);
  setText(child(cell(row, 0), "code"), id);
  const state = leaving.has(id) && capsule.status === "running" ? "stopping" : String(capsule.status);
  drawPill(cell(row, 1), state, capsule.reason);
  setText(cell(row, 2), String(capsule.template ?? "–"));
  setText(cell(row, 3), String(capsule.vcpus ?? "–"));
  setText(cell(row, 4), Number.isFinite(capsule.memory_mb) ? memory(capsule.memory_mb) : "–");
  cell(row, 3).className = cell(row, 4).className = "number";
  setText(cell(row, 5), String(capsule.node || "–"));
  drawTime(cell(row, 6), capsule.created_at);
  drawTime(cell(row, 7), capsule.last_active_at);
  const button = child(cell(row, 8), "button");
  button.type = "button";
  setText(button, "Destroy");
  button.setAttribute("aria-label", `Destroy ${id}`);
  button.disabled = state === "stopping" || leaving.has(id);
  button.onclick = () => askDestroy(id);
}

function drawCapsules(capsules) {
  drawRows(byId("capsules"), capsules, drawCapsule);
  byId("no-capsules").hidden = capsules.length > 0;
  const running = capsules.filter((capsule) => capsule.status === "running");
  const sum = (field) => running.reduce((total, one) => total + (Number(one[field]) || 0), 0);
  setText(byId("count-running"), String(running.length));
  setText(byId("count-other"), String(capsules.length - running.length));
  setText(byId("sum-vcpus"), String(sum("vcpus")));
  setText(byId("sum-memory"), memory(sum("memory_mb")));
}

function nodeState(node) {
  if (node.state && node.state !== "alive") return String(node.state);
  if (node.alive === false) return "down";
  if (node.draining) return "draining";
  return node.cordoned ? "cordoned" : "alive";
}

function drawNodes(nodes) {
  byId("nodes-card").hidden = nodes === null;
  drawRows(byId("nodes"), nodes || [], (row, node) => {
    setText(cell(row, 0), String(node.name || node.id));
    cell(row, 0).title = String(node.id);
    drawPill(cell(row, 1), nodeState(node), node.reason);
    setText(cell(row, 2), `${node.role || "member"}${node.leader ? ", leader" : ""}`);
    setText(child(cell(row, 3), "code"), String(node.url || node.address || "–"));
  });
}

function drawFreshness() {
  const stale = lastFresh === null || Date.now() - lastFresh > 2 * REFRESH_MS + 1000;
  byId("dot").className = key ? `dot ${stale ? "stale" : "live"}` : "dot";
  const since = lastFresh === null ? "no answer yet" : `updated ${ago(new Date(lastFresh).toISOString())}`;
  setText(byId("freshness"), key ? since : "not signed in");
}

function tell(message) {
  byId("problem").hidden = !message;
  setText(byId("problem"), message || "");
}

/* Acting */

function asList(value) {
  if (!Array.isArray(value)) throw new ApiError(0, "the node's answer is not a list");
  return value.filter((item) => item && typeof item === "object");
}

// Nodes are listed where the API offers it; a node without that route is no problem.
async function listNodes() {
  try {
    const answer = await api("GET", "v1/nodes");
    return asList(Array.isArray(answer) ? answer : answer && answer.nodes);
  } catch (error) {
    if (error instanceof ApiError && error.status !== 401) return null;
    throw error;
  }
}

async function refresh() {
  if (!key) return;
  if (refreshing) { again = true; return; }
  refreshing = true;
  again = false;
  clearTimeout(timer);
  const used = key;
  try {
    const [capsules, nodes] = await Promise.all([api("GET", "v1/capsules"), listNodes()]);
    if (used !== key) return; // signed out, or in as someone else, meanwhile
    drawCapsules(asList(capsules));
    drawNodes(nodes);
    lastFresh = Date.now();
    if (byId("problem").dataset.from === "refresh") tell("");
  } catch (error) {
    if (used === key) failed(error, "refresh");
  } finally {
    refreshing = false;
    drawFreshness();
    const wait = document.hidden ? 10 * REFRESH_MS : REFRESH_MS;
    if (key) timer = setTimeout(refresh, again ? 0 : wait);
  }
}

function failed(error, from) {
  if (error instanceof ApiError && error.status === 401) {
    signOut("This API key is not accepted.");
    return;
  }
  const lost = error.name === "TimeoutError" ? "the node did not answer in time" : "the node cannot be reached";
  byId("problem").dataset.from = from;
  tell(error instanceof ApiError ? `Sorry, ${error.message}` : `Sorry, ${lost}.`);
}

async function create(event) {
  event.preventDefault();
  const fields = new FormData(event.target);
  const button = byId("create-button");
  button.disabled = true;
  try {
    tell("");
    await api("POST", "v1/capsules", {
      template: String(fields.get("template")).trim(),
      vcpus: Number(fields.get("vcpus")),
      memory_mb: Number(fields.get("memory_mb")),
      timeout_sec: Number(fields.get("timeout_sec")),
    });
    await refresh();
  } catch (error) {
    failed(error, "action");
  } finally {
    button.disabled = false;
  }
}

function askDestroy(id) {
  setText(byId("confirm-id"), id);
  byId("confirm-yes").onclick = () => { byId("confirm").close(); destroy(id); };
  byId("confirm").showModal();
}

async function destroy(id) {
  leaving.add(id);
  try {
    tell("");
    await api("DELETE", `v1/capsules/${encodeURIComponent(id)}`);
  } catch (error) {
    failed(error, "action");
  }
  // From here on the list says what became of it.
  leaving.delete(id);
  await refresh();
}

function show() {
  byId("sign-in").hidden = Boolean(key);
  byId("board").hidden = byId("sign-out").hidden = !key;
  drawFreshness();
  if (key) refresh(); else byId("key").focus();
}

function signIn(event) {
  event.preventDefault();
  key = byId("key").value.trim();
  byId("key").value = "";
  if (!/^[\x21-\x7e]+$/.test(key)) {
    key = null;
    tell("An API key is one word of plain characters.");
    return;
  }
  sessionStorage.setItem(KEY_ITEM, key);
  tell("");
  show();
}

function signOut(why) {
  key = null;
  lastFresh = null;
  clearTimeout(timer);
  sessionStorage.removeItem(KEY_ITEM);
  leaving.clear();
  drawRows(byId("capsules"), [], () => {});
  drawNodes(null);
  if (byId("confirm").open) byId("confirm").close();
  tell(why || "");
  show();
}

byId("sign-in").addEventListener("submit", signIn);
byId("create").addEventListener("submit", create);
byId("sign-out").addEventListener("click", () => signOut());
byId("confirm-no").addEventListener("click", () => byId("confirm").close());
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
setInterval(drawFreshness, 1000);
show();
