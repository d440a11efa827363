/** A graph of TreeRPO that is queued without its model files: which, how large, from where, and into which folder. ComfyUI only says how many errors it has. */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { el, findNode, heading, isOurs, openDialog, place, say, setWidget } from "./treerpo.js";

const known = fetch(new URL("model_files.json", import.meta.url)).then((reply) => reply.json()).catch(() => ({})); // name: [folder of models/, GB, address]

/** [files not there, rewards without weights] of what ComfyUI refused: [[name, input]], [[node, what it says]]. */
function missing(errors) {
  const files = new Map(), rewards = new Map();
  for (const [id, { errors: found, class_type }] of Object.entries(errors ?? {})) for (const { type, details, extra_info } of found) {
    const value = extra_info?.received_value;
    if (type === "value_not_in_list" && /\.(safetensors|sft|gguf|pt|pth|ckpt|bin)$/i.test(value)) files.set(value, extra_info.input_name);
    if (type === "custom_validation_failed" && class_type.startsWith("TreeRPO") && /is not there yet/.test(details)) rewards.set(id, details.replace(/^\w+ - /, ""));
  }
  return [[...files], [...rewards]];
}

async function tell(errors) {
  if (!app.graph.nodes.some(isOurs)) return;
  const [files, rewards] = missing(errors), sources = await known;
  if (!files.length && !rewards.length) return;
  const root = openDialog(say("Files to download"));
  const size = files.reduce((sum, [name]) => sum + (sources[name]?.[1] ?? 0), 0), count = files.length + rewards.length;
  const rows = files.map(([name, input]) => {
    const [folder, gb, address] = sources[name] ?? [];
    return el("tr", {}, el("td", {}, address ? el("a", { href: address, target: "_blank", rel: "noreferrer" }, name) : name),
      el("td", {}, folder ? say("into models/{0}", folder) : say("chosen as {0}; another file will do", input)), el("td", {}, gb ? say("about {0} GB", gb) : ""));
  });
  const switches = rewards.map(([id, said]) => {
    const button = el("button", { onclick: () => { if (setWidget(findNode(id), "download", true)) button.replaceChildren(say("It is fetched when you press Run")); button.disabled = true; } }, say("Switch on download"));
    return el("div", { class: "row" }, el("span", { class: "prompt" }, said), button);
  });
  root.replaceChildren(heading(count > 1 ? say("This graph needs {0} files that are not there yet", count) : say("This graph needs 1 file that is not there yet"),
    size > 0 && say("about {0} GB of models", Math.ceil(size))),
    rows.length && el("table", {}, ...rows), ...switches,
    el("div", { class: "hint" }, say("Click a name to download it, move it into its folder, press R in the graph, and Run. A file you have under another name: choose it in its node.")));
  place(root);
}

app.registerExtension({
  name: "TreeRPO.MissingFiles",
  setup() {
    const fetchApi = api.fetchApi;
    api.fetchApi = function (route, ...more) {
      const reply = fetchApi.call(this, route, ...more); // returned as it is: no error is to look as if it came from here
      if (route === "/prompt") reply.then((one) => one.status === 400 && one.clone().json().then(({ node_errors }) => tell(node_errors))).catch(() => {});
      return reply;
    };
  },
});
