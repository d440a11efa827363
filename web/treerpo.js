/** TreeRPO in the browser: the tree inside Tree View, the questions of Pick the Winner, folded inputs and socket colours. All nodes work without this file.
 *
 * Texts from workflows and from the server only ever become text nodes, never HTML. */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const TREE_VIEW = "TreeRPOTreeView", PICK = "TreeRPOPick";
const BETTER = [40, 120, 225], WORSE = [230, 120, 30], NEUTRAL = [150, 150, 156]; // core/pictures/plot.py's blue and orange, a little lighter for dark themes
const THUMB = 64, CELL = 76, LAYER = 46; // of the tree's drawing, in its own units

const SOCKETS = { POLICY: "#6fa8ff", PROMPTS: "#ffd166", SHAPE: "#3fbf7f", NOISE: "#2bb3b1", TREE: "#a3d977", REWARD: "#ff9e64", REWARDS: "#ff7a90", ADVANTAGES: "#c792ea", OBJECTIVE: "#e08fd0" };

// ---------------------------------------------------------------- small parts

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child || child === 0)); // strings become text nodes
  return node;
}
export const el = (tag, attributes = {}, ...children) => made(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => made(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** -1..1 -> orange .. grey .. blue, as core/pictures/plot.py shades. */
function shade(value) {
  const end = value > 0 ? BETTER : WORSE, share = Math.min(Math.abs(value || 0), 1) ** 0.7;
  return `rgb(${NEUTRAL.map((from, i) => Math.round(from + (end[i] - from) * share))})`;
}

const viewUrl = (image) => api.apiURL(`/view?${new URLSearchParams({ filename: image.filename, subfolder: image.subfolder, type: image.type })}`);
const short = (value) => (value == null ? "no score" : Number(value.toFixed(Math.abs(value) < 10 ? 4 : 2)).toString());
const signed = (value) => (value == null ? "-" : (value >= 0 ? "+" : "") + value.toFixed(2));
export const kind = (node) => node?.comfyClass ?? node?.type;
export const isOurs = (node) => Boolean(kind(node)?.startsWith("TreeRPO"));
const rootGraph = () => app.rootGraph ?? app.graph;

/** An <img>; tiny ones are shown with sharp pixels. */
export const picture = (image, alt) => el("img", { src: viewUrl(image), alt, draggable: "false",
  onload: (event) => event.target.classList.toggle("treerpo-pixels", event.target.naturalWidth <= 128) });

/** The node an execution id names; "4:12" is node 12 inside the subgraph node 4. */
export function findNode(id) {
  let node = { subgraph: rootGraph() };
  for (const part of String(id).split(":")) node = node?.subgraph?.getNodeById(Number(part));
  return node;
}

export function setWidget(node, name, value) {
  const widget = node?.widgets?.find((one) => one.name === name);
  if (!widget) return false;
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
  node.setDirtyCanvas?.(true, true);
  return true;
}

// ---------------------------------------------------------------- one dialog at a time

let dialog = null; // {root, keys, closed, focused}

/** keys: what a key does; whether it did anything. closed: called when it is. */
export function openDialog(label, keys = byEscape, closed) {
  closeDialog();
  dialog = { root: el("div", { class: "treerpo-dialog", role: "dialog", "aria-label": label, tabindex: "-1" }), keys, closed, focused: document.activeElement };
  document.body.append(dialog.root);
  if (!typing(document.activeElement)) dialog.root.focus();
  return dialog.root;
}

export function closeDialog() {
  const old = dialog;
  dialog = null;
  old?.root.remove();
  old?.focused?.focus?.();
  old?.closed?.();
}

const typing = (target) => target?.isContentEditable || target?.matches?.("input, textarea, select");

/** First of all listeners: while a dialog is open no key reaches ComfyUI's shortcuts, unless the user writes somewhere. */
window.addEventListener("keydown", (event) => {
  if (!dialog || typing(event.target)) return;
  event.stopImmediatePropagation();
  const button = event.target.closest?.(".treerpo-dialog button");
  const presses = event.key === " " || (event.key === "Enter" && !button?.dataset.number); // Enter on an image sends, as anywhere else
  if (event.ctrlKey || event.metaKey || event.altKey || (button && presses)) return;
  if (dialog.keys(event.key)) event.preventDefault();
}, true);

const byEscape = (key) => key === "Escape" && (closeDialog(), true);

/** The first line of a dialog that can be closed. */
export const heading = (title, hint) => el("header", {}, title, hint && el("span", { class: "hint" }, hint),
  el("button", { class: "close", "aria-label": say("Close"), title: say("Close (Esc)"), onclick: closeDialog }, "✕"));

/** Beside the node where there is room, and always inside the window; without a node, in the middle. */
export function place(root, node) {
  const box = root.getBoundingClientRect(), canvas = app.canvas?.canvas?.getBoundingClientRect?.();
  let left = (innerWidth - box.width) / 2, top = (innerHeight - box.height) / 2;
  if (node?.pos && canvas && node.graph === app.canvas.graph) {
    const { scale, offset } = app.canvas.ds, start = canvas.left + (node.pos[0] + offset[0]) * scale, end = start + node.size[0] * scale;
    left = end + 12 + box.width < innerWidth ? end + 12 : start - 12 - box.width;
    top = canvas.top + (node.pos[1] + offset[1]) * scale;
  }
  root.style.left = `${Math.max(8, Math.min(left, innerWidth - box.width - 8))}px`;
  root.style.top = `${Math.max(8, Math.min(top, innerHeight - box.height - 8))}px`;
}

// ---------------------------------------------------------------- Tree View

const trees = new Map(); // newest tree by workflow and node: they outlive their nodes when the user changes the workflow
const views = new Map(); // node -> its <div>
const treeKey = (workflow, node) => `${workflow}/${String(node).split(":").pop()}`;
const remember = (workflow, node, tree) => /[1-9a-f]/.test(workflow ?? "") && trees.set(treeKey(workflow, node), tree); // a graph opened from API format has the id 0

function addTreeView(node) {
  const root = el("div", { class: "treerpo-tree", "data-capture-wheel": "true", onwheel: (event) => onWheel(event, root) });
  const widget = node.addDOMWidget("tree_view", "treerpo_tree", root, { serialize: false, hideOnZoom: false, getMinHeight: () => (root.dataset.leaves ? 240 : 60) });
  widget.serialize = false;
  views.set(node, root);
  node.hideOutputImages = true; // the same tree as a picture: Nodes 2.0, and ...
  node.onDrawBackground = () => {}; // ... the classic canvas
  chain(node, "onExecuted", (output) => {
    const tree = output?.treerpo_tree?.[0];
    remember(rootGraph().id, node.id, tree);
    showTree(node, tree);
  });
  chain(node, "onConfigure", () => showTree(node));
  chain(node, "onRemoved", () => (views.delete(node), dialog?.root.treerpoNode === node && closeDialog()));
  showTree(node);
}

function chain(node, name, more) {
  const before = node[name];
  node[name] = function (...given) { before?.apply(this, given); more(...given); };
}

/** The wheel scrolls the tree; where there is nothing to scroll, it zooms the canvas. */
function onWheel(event, root) {
  if (!event.ctrlKey && (root.scrollHeight > root.clientHeight + 1 || (event.deltaX && root.scrollWidth > root.clientWidth + 1))) event.stopPropagation();
  else if (!window.LiteGraph?.vueNodesMode) app.canvas?.processMouseWheel?.(event); // Nodes 2.0 does this itself
}

function showTree(node, tree = trees.get(treeKey(rootGraph()?.id, node.id))) {
  const root = views.get(node);
  if (!tree?.prompts?.length) return root.replaceChildren(el("div", { class: "hint" }, "The tree appears here when the graph has run."));
  const fresh = !root.dataset.leaves, values = tree.prompts.flatMap((prompt) => [...prompt.edges.flat(), ...prompt.leaves.map((leaf) => leaf.standing)]);
  const peak = Math.max(...values.map((value) => Math.abs(value ?? 0)), 1e-9);
  root.dataset.leaves = tree.prompts[0].leaves.length;
  const zoom = (by) => {
    root.classList.toggle("fit", by === 0);
    root.style.setProperty("--zoom", by ? Math.min(8, Math.max(0.2, by * Number(root.style.getPropertyValue("--zoom") || 1))) : 1);
  };
  const text = `iteration ${tree.iteration}, steps ${tree.start + 1} to ${tree.start + tree.depth} of ${tree.steps} branch; blue: better than its group, orange: worse`;
  root.replaceChildren(
    el("div", { class: "bar" }, el("span", { class: "hint", title: text }, text),
      ...[["−", "Smaller", 1 / 1.3], ["fit", "Fit to the node", 0], ["+", "Larger", 1.3]].map(([text, title, by]) => el("button", { title, "aria-label": title, onclick: () => zoom(by) }, text))),
    ...tree.prompts.flatMap((prompt, p) => [el("h4", {}, prompt.text), drawPrompt(node, tree, p, peak)]));
  const grouped = node.graph?._groups?.some(({ pos, size }) => [0, 1].every((i) => node.pos[i] >= pos[i] && node.pos[i] < pos[i] + size[i]));
  if (!fresh || grouped || node.size[1] > node.computeSize()[1] + 220) return; // the user's own size stays, and in a group nothing else is covered
  const count = tree.prompts[0].leaves.length, width = Math.min(900, Math.max(node.size[0], count * 62 + 40)), each = (width - 40) / (count * CELL) * drawingHeight(tree) + 30;
  node.setSize([width, node.computeSize()[1] - 240 + Math.min(720, Math.max(240, 80 + each * tree.prompts.length))]);
}

const thumbHeight = (tree) => THUMB * Math.min(2, Math.max(0.5, tree.size[1] / tree.size[0]));
const drawingHeight = (tree) => 14 + LAYER * tree.depth + thumbHeight(tree) + 42;

function drawPrompt(node, tree, p, peak) {
  const { edges, leaves } = tree.prompts[p], b = tree.branching, high = thumbHeight(tree);
  const rows = [leaves.map((_, i) => CELL * (i + 0.5))];
  for (let k = 0; k < tree.depth; k++) rows.unshift(Array.from({ length: rows[0].length / b }, (_, i) => (rows[0][i * b] + rows[0][(i + 1) * b - 1]) / 2));
  const y = (k) => 12 + LAYER * k, drawing = svg("svg", { viewBox: `0 0 ${CELL * leaves.length} ${drawingHeight(tree)}`, role: "group", "aria-label": `Tree of ${tree.prompts[p].text}` });
  drawing.style.setProperty("--leaves", leaves.length);
  edges.forEach((layer, k) => layer.forEach((value, i) => drawing.append(svg("line", { x1: rows[k][Math.floor(i / b)], y1: y(k), x2: rows[k + 1][i], y2: y(k + 1),
    stroke: shade(value / peak), "stroke-width": 1.5 + 4.5 * Math.min(Math.abs(value ?? 0) / peak, 1), "stroke-linecap": "round" },
    svg("title", {}, `step ${tree.start + k + 1}, child ${i % b + 1} of ${b}: advantage ${signed(value)}`)))));
  rows.slice(0, -1).forEach((row, k) => row.forEach((x) => drawing.append(svg("circle", { cx: x, cy: y(k), r: 6, fill: "var(--input-text, #ddd)" }))));
  leaves.forEach((leaf, i) => {
    const left = rows.at(-1)[i] - THUMB / 2, top = y(tree.depth), number = p * leaves.length + i + 1, chosen = number === tree.chosen;
    drawing.append(svg("g", { class: "leaf", role: "button", tabindex: i ? "-1" : "0", "data-number": number, "aria-label": `Leaf ${number}, score ${short(leaf.total)}`,
      onclick: () => openLeaf(node, tree, number), onkeydown: (event) => moveFocus(event, node, tree, number) },
    svg("rect", { class: "frame", x: left - 4, y: top - 4, width: THUMB + 8, height: high + 8, rx: 5, fill: shade(leaf.standing / peak) }),
    svg("image", { href: viewUrl(leaf.image), x: left, y: top, width: THUMB, height: high, preserveAspectRatio: "xMidYMid slice", class: tree.size[0] <= 128 ? "treerpo-pixels" : "" }),
    svg("text", { x: left + THUMB / 2, y: top + high + 19, "font-weight": chosen ? 700 : 400 }, short(leaf.total)),
    svg("text", { x: left + THUMB / 2, y: top + high + 33, style: "font-size: 11px", opacity: chosen ? 1 : 0.6 }, chosen ? `★ ${number}` : number),
    svg("title", {}, `leaf ${number}: score ${short(leaf.total)}${chosen ? " (at the outputs)" : ""}`)));
  });
  return drawing;
}

/** Number of the leaf that a key leads to, or null. */
function neighbour(tree, number, key) {
  const count = tree.prompts[0].leaves.length, by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -count, ArrowDown: count }[key];
  return by && number + by >= 1 && number + by <= count * tree.prompts.length ? number + by : null;
}

function moveFocus(event, node, tree, number) {
  const next = neighbour(tree, number, event.key);
  if (next) views.get(node)?.querySelector(`[data-number="${next}"]`)?.focus();
  else if (event.key === "Enter" || event.key === " ") openLeaf(node, tree, number);
  else return;
  event.preventDefault();
  event.stopPropagation();
}

function openLeaf(node, tree, number) {
  const show = (wanted) => root.replaceChildren(...leafPanel(node, tree, (number = wanted), show));
  const root = openDialog("Leaf of the tree", (key) => {
    const next = neighbour(tree, number, key);
    if (next) show(next);
    else if (key === "Escape") closeDialog();
    return next || key === "Escape";
  });
  root.treerpoNode = node;
  show(number);
  place(root);
}

function leafPanel(node, tree, number, show) {
  const count = tree.prompts[0].leaves.length, p = Math.floor((number - 1) / count), i = (number - 1) % count, prompt = tree.prompts[p], leaf = prompt.leaves[i], b = tree.branching;
  const better = prompt.leaves.filter((other) => other.total > leaf.total).length, message = el("div", { class: "hint", role: "status" });
  const layers = tree.levels.map((level, k) => {
    const edge = Math.floor(i / b ** (tree.depth - 1 - k)), [from, to] = tree.sigmas.slice(tree.start + k);
    return [tree.start + k + 1, `${edge % b + 1} of ${b}`, short(level), `${from.toFixed(3)} to ${to.toFixed(3)}`, signed(prompt.edges[k]?.[edge])];
  });
  const table = (head, rows) => el("table", {}, el("tr", {}, ...head.map((cell) => el("th", {}, cell))), ...rows.map((row) => el("tr", {}, ...row.map((cell) => el("td", {}, cell)))));
  const button = (text, press, attributes = {}) => el("button", { ...attributes, onclick: async () => { message.textContent = (await press()) ?? ""; } }, text);
  const step = (key, text, label) => button(text, () => show(neighbour(tree, number, key)), { "aria-label": label, disabled: neighbour(tree, number, key) ? null : "" });
  const use = () => (setWidget(node, "leaf", number) ? `Leaf ${number} goes to the outputs when the graph runs again.` : "This node has no leaf to set.");
  return [
    heading(`Leaf ${number} of ${count * tree.prompts.length}`, leaf.total == null ? "no score" : better ? `number ${better + 1} of ${count} of its prompt` : "the best of its prompt"),
    el("div", { class: "leaf" }, picture(leaf.image, `Leaf ${number}`), el("div", {},
      el("div", { class: "prompt" }, prompt.text),
      table(["score", "advantage"], [[short(leaf.total), signed(leaf.advantage)]]),
      Object.keys(leaf.scores).length > 1 && table(["reward", "score"], Object.entries(leaf.scores).map(([name, value]) => [name, short(value)])),
      table(["step", "child", "noise", "sigma", "advantage"], layers),
      tree.trees > 1 && el("div", { class: "hint" }, `tree ${Math.floor(i / b ** tree.depth) + 1} of ${tree.trees}`),
      el("div", { class: "row" }, step("ArrowLeft", "◀", "Previous leaf"), step("ArrowRight", "▶", "Next leaf"),
        button("Use this leaf", use, { class: "main" }), button("To Load Image", () => toLoadImage(node, leaf.image, number))),
      message, el("div", { class: "hint" }, "Arrow keys: other leaves. Esc: close."))),
  ];
}

/** Copies the leaf into the input folder and puts it into a new Load Image node beside Tree View. Returns what to tell the user. */
async function toLoadImage(node, image, number) {
  try {
    const form = new FormData();
    form.append("image", await (await fetch(viewUrl(image))).blob(), `treerpo_leaf_${number}_${image.filename}`);
    const answer = await api.fetchApi("/upload/image", { method: "POST", body: form });
    if (!answer.ok) return `ComfyUI did not take the image (${answer.status}).`;
    const { name } = await answer.json(), loader = window.LiteGraph.createNode("LoadImage"), widget = loader.widgets.find((one) => one.name === "image");
    loader.pos = [node.pos[0] + node.size[0] + 40, node.pos[1]];
    node.graph.add(loader);
    if (Array.isArray(widget.options?.values) && !widget.options.values.includes(name)) widget.options.values.push(name);
    setWidget(loader, "image", name);
    return `Leaf ${number} is in a new Load Image node, right of Tree View.`;
  } catch (error) {
    return `The image could not be sent on: ${error.message}`;
  }
}

/** After the page was reloaded: trees of this session, as long as ComfyUI remembers them. */
async function recallTrees() {
  const history = await (await api.fetchApi("/history?max_items=16")).json();
  for (const { prompt, outputs } of Object.values(history)) {
    const found = Object.entries(outputs ?? {}).filter(([, output]) => output.treerpo_tree?.[0]);
    for (const [id, output] of found) remember(prompt?.[3]?.extra_pnginfo?.workflow?.id, id, output.treerpo_tree[0]);
  }
  for (const node of views.keys()) showTree(node);
}

// ---------------------------------------------------------------- Pick the Winner

const pending = new Map(); // questions by id, in the order they were asked
const answered = new Map(); // two-run questions by id, with their answers
const ROLES = { best: ["best"], "best and worst": ["best", "worst"] };
const winner = () => words[PICK]?.display_name ?? "Pick the Winner";
let chosen = [], notice = "", sending = false, away = false; // away: closed by the user though questions wait

const first = () => pending.values().next().value;
const asking = () => dialog?.root.dataset.pick;
export const runAgain = () => (closeDialog(), app.queuePrompt(0, 1));
const answerText = () => chosen.join(first().how === "ranking" ? " > " : " / ");

function ask(question) {
  for (const [id, old] of question.live ? [] : [...pending, ...answered]) { // a new run asks anew
    if (!old.live && old.node_id === question.node_id && old.group >= question.group) [pending, answered].forEach((map) => map.delete(id));
  }
  pending.set(question.id, { ...question, deadline: question.seconds_left == null ? null : Date.now() + 1000 * question.seconds_left });
  if (!away && pending.size === 1) showQuestion();
  tick();
}

function forget(id) {
  const shown = asking() && first()?.id === id;
  if (!pending.delete(id)) return;
  if (shown) chosen = [], pending.size ? showQuestion() : closeDialog();
  if (!pending.size) away = false;
  tick();
}

/** The clock, and the badge that brings closed questions back. Two-run questions go with their node. */
function tick() {
  for (const [id, question] of pending) if (!question.live && kind(findNode(question.node_id)) !== PICK) return forget(id);
  const end = first()?.deadline, clock = end == null ? "" : say("{0} s left", Math.max(0, Math.round((end - Date.now()) / 1000)));
  if (asking()) dialog.root.querySelector(".clock")?.replaceChildren(clock);
  let badge = document.querySelector(".treerpo-badge");
  if (!pending.size || asking()) return badge?.remove();
  if (!badge) document.body.append(badge = el("button", { class: "treerpo-badge", onclick: () => { away = false; showQuestion(); } }));
  badge.textContent = `${winner()}: ${say("{0} waiting", pending.size)}${clock && `, ${clock}`}`;
}

function pickKeys(key) {
  const question = first();
  if (key === "Escape") closeDialog();
  else if (!question && key === "Enter") runAgain();
  else if (!question) return false;
  else if (["0", "-", "s", "S"].includes(key)) send("-");
  else if (/^u$/i.test(key) && question.undo) send("undo");
  else if (/^n$/i.test(key) && question.live) send("none");
  else if (/^[1-9]$/.test(key) && Number(key) <= question.count) choose(Number(key));
  else if (key === "Backspace") chosen.pop(), showQuestion();
  else if (key === "Enter" && chosen.length) send(answerText());
  else return false;
  return true;
}

function choose(number) {
  chosen = chosen.includes(number) ? chosen.filter((other) => other !== number) : [...chosen, number];
  if (chosen.length === ROLES[first().how]?.length) send(answerText());
  else showQuestion();
}

async function send(answer) {
  const question = first();
  if (sending) return;
  if (!question.live) return write(question, answer);
  sending = true;
  try {
    const reply = await api.fetchApi("/treerpo/pick", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ id: question.id, answer }) });
    notice = reply.ok ? "" : (await reply.json().catch(() => ({}))).error ?? say("ComfyUI did not take the answer ({0}).", reply.status);
    if (reply.ok || reply.status === 404) forget(question.id); // answered, or nobody waits any more
  } catch (error) {
    notice = say("ComfyUI cannot be reached: {0}", error.message);
  }
  [sending, chosen] = [false, []];
  if (notice) pending.size ? showQuestion() : pickMessage(say("Too late"), notice);
}

/** Two-run mode: a line in the node's widget. When every group of this ask has one, older lines go. */
function write(question, answer) {
  answered.set(question.id, { ...question, answer });
  const node = findNode(question.node_id), mine = [...answered.values()].filter((one) => one.node_id === question.node_id).sort((a, b) => a.group - b.group);
  const old = (node.widgets.find((one) => one.name === "picks")?.value ?? "").split("\n").filter((line) => line.trim() && !mine.some((one) => line.trim().startsWith(one.id)));
  setWidget(node, "picks", [...(mine.length === question.groups ? [] : old), ...mine.map((one) => `${one.id}: ${one.answer}`)].join("\n"));
  forget(question.id);
  if (!pending.size) pickMessage(say("All answered"), say("Your picks are in the node. Run the graph again: it goes on with them."), el("button", { class: "main", onclick: runAgain }, say("Run")));
}

function pickDialog() {
  if (!asking()) openDialog(winner(), pickKeys, () => { away = pending.size > 0; chosen = []; tick(); }).dataset.pick = "1";
  return dialog.root;
}

function pickMessage(title, text, ...buttons) {
  const root = pickDialog();
  root.replaceChildren(el("header", {}, title), el("div", {}, text), el("div", { class: "row" }, ...buttons, el("button", { onclick: closeDialog }, say("Close"))));
  place(root);
}

function showQuestion() {
  const root = pickDialog(), question = first(), roles = ROLES[question.how], columns = Math.ceil(Math.sqrt(question.count)), rows = Math.ceil(question.count / columns);
  const where = [question.groups > 1 && (question.counted === "question" ? say("question {0} of {1}", question.group, question.groups) : say("prompt {0} of {1}", question.group, question.groups)),
    question.iteration != null && say("iteration {0}", question.iteration)].filter(Boolean).join(", ");
  const focused = document.activeElement?.dataset?.number, none = chosen.length ? null : "";
  const grid = el("div", { class: "grid" }, ...question.images.map((image, i) => {
    const at = chosen.indexOf(i + 1);
    return el("button", { "data-number": i + 1, "aria-label": say("Image {0}", i + 1), "aria-pressed": String(at >= 0), onclick: () => choose(i + 1) },
      picture(image, say("Image {0}", i + 1)), el("b", {}, `${i + 1}`), at < 0 ? null : el("i", {}, { best: say("best"), worst: say("worst") }[roles?.[at]] ?? `${at + 1}.`));
  }));
  grid.style.gridTemplateColumns = `repeat(${columns}, max-content)`;
  grid.style.setProperty("--side", `max(72px, min(256px, ${80 / columns}vw, ${58 / rows}vh))`);
  root.replaceChildren(
    el("header", {}, !roles ? say("Rank them, the best first") : roles[chosen.length] === "worst" ? say("Which is the worst?") : say("Which is the best?"), el("span", { class: "hint" }, where), el("span", { class: "clock", role: "timer" })),
    el("div", { class: "prompt" }, question.prompt), grid,
    el("div", { class: "row" }, question.how !== "best" && el("button", { class: "main", disabled: none, onclick: () => send(answerText()) }, say("Send")),
      question.how !== "best" && el("button", { disabled: none, onclick: () => pickKeys("Backspace") }, say("Take back")),
      question.live && el("button", { title: say("None of them is good"), onclick: () => send("none") }, say("None of these")), el("button", { onclick: () => send("-") }, say("Skip")),
      question.undo && el("button", { title: say("Take back the answer before: it is asked again"), onclick: () => send("undo") }, say("Undo")), el("button", { onclick: closeDialog }, say("Later")),
      el("span", { class: "hint" }, [say("Keys: 1 to 9"), question.how !== "best" && say("Enter = send, Backspace = take back"), question.live && say("N = none"), say("S = skip"),
        question.undo && say("U = undo"), say("Esc = later")].filter(Boolean).join(", "))),
    question.note && el("div", { class: "hint" }, question.note),
    notice && el("div", { class: "error", role: "alert" }, notice));
  place(root, findNode(question.node_id));
  if (!typing(document.activeElement)) (grid.querySelector(`[data-number="${focused}"]`) ?? root).focus();
  tick();
}

/** After the page was reloaded: questions that still wait. */
const recallQuestions = async () => (await (await api.fetchApi("/treerpo/pick")).json()).questions.forEach(ask);

api.addEventListener("treerpo.pick", (event) => ask(event.detail));
api.addEventListener("treerpo.pick_done", (event) => forget(event.detail.id));
api.addEventListener("execution_start", () => asking() && !pending.size && closeDialog()); // the user has queued the graph by other means
setInterval(tick, 500);

// ---------------------------------------------------------------- translations

let words = {}, sentences = {}; // locales/<language>/nodeDefs.json, by node; and main.json, by the English text

/** A text of ours in the page's language; {0}, {1} ... are the values. */
export const say = (text, ...values) => (sentences[text] ?? text).replace(/{(\d)}/g, (_, i) => values[i]);

/** What ComfyUI's own translations have no place for: the options of a list, and the grey text of an empty text box. */
function translateWidgets(node) {
  for (const widget of node.widgets ?? []) {
    const { name, options, placeholder } = words[kind(node)]?.inputs?.[widget.name] ?? {};
    if (options && widget.options) widget.options.getOptionLabel = (value) => ((options[value] ?? value) === value ? value ?? "" : `${options[value]} (${value})`);
    const text = widget.element?.placeholder;
    if (text) widget.element.placeholder = placeholder ?? (text === widget.name && name ? name : text); // classic nodes show no other label there
  }
}

app.registerExtension({
  name: "TreeRPO",
  async init() { // before any node is made
    try {
      const here = (await api.getCustomNodesI18n())[app.ui.settings.getSettingValue("Comfy.Locale")];
      words = here?.nodeDefs ?? {};
      sentences = here?.treerpo ?? {};
    }
    catch (error) { console.info("TreeRPO:", error.message); } // English then
  },
  afterConfigureGraph() { // classic nodes and all wires; a colour palette may have replaced them
    for (const [name, colour] of Object.entries(SOCKETS))
      for (const known of [window.LGraphCanvas?.link_type_colors, app.canvas?.default_connection_color_byType]) if (known) known[`TREERPO_${name}`] = colour;
  },
  async setup() {
    document.head.append(el("link", { rel: "stylesheet", href: new URL("treerpo.css", import.meta.url).href }),
      el("style", {}, `:root { ${Object.entries(SOCKETS).map(([name, colour]) => `--color-datatype-TREERPO_${name}: ${colour};`).join(" ")} }`)); // sockets of Nodes 2.0
    for (const recall of [recallTrees, recallQuestions]) recall().catch((error) => console.info("TreeRPO:", error.message)); // nothing depends on them
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("TreeRPO")) return;
    const created = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function () {
      created?.call(this);
      const advanced = (this.widgets ?? []).filter((widget) => widget.options?.advanced);
      if (!advanced.length) return;
      for (const widget of advanced) widget.advanced = true; // classic nodes: behind "Show Advanced" in their menu, as in Nodes 2.0
      this.setSize([this.size[0], this.computeSize()[1]]);
    };
    // or classic nodes would keep room for what they do not show
    nodeType.prototype.getLayoutWidgets = function () {
      return (this.widgets ?? []).filter((widget) => !widget.hidden && (!widget.advanced || this.showAdvanced));
    };
  },
  nodeCreated(node) {
    translateWidgets(node);
    if (kind(node) === TREE_VIEW) addTreeView(node);
  },
});
