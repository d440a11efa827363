/** "Go back to a picture": the trainers' held-out pictures over the iterations, and a click on one that prepares the run which goes on from there. */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { el, heading, kind, openDialog, picture, place, runAgain, say, setWidget } from "./treerpo.js";

const NAMES = { TreeRPOSimple: "lora_name", TreeRPOPolicy: "run_name" };
const value = (node, name) => node?.widgets?.find((one) => one.name === name)?.value;

/** The node that has the run's name and begin_from: a Simple Trainer itself, or the Tree Policy of a TreeRPO Trainer. */
const keeper = (node) => (kind(node) === "TreeRPOTrainer" ? node.getInputNode?.(node.findInputSlot("policy")) : node);

async function picturesOf(run) {
  const reply = await api.fetchApi(`/treerpo/pictures?${new URLSearchParams({ run })}`), said = await reply.json();
  if (!reply.ok) throw new Error(said.error);
  return said.pictures;
}

async function ask(node) {
  const root = openDialog(say("Go back to a picture"));
  const show = (hint, ...rest) => { root.replaceChildren(heading(say("Go back to a picture"), hint), ...rest); place(root, node); };
  const owner = keeper(node), named = NAMES[kind(owner)];
  if (!named) return show("", say("Connect a Tree Policy with a run_name first."));
  try {
    let run = value(owner, named), found = await picturesOf(run);
    const begun = /^(.*) @ [^@]*$/.exec(value(owner, "begin_from") ?? "")?.[1];
    if (!found.length && begun) found = await picturesOf(run = begun); // prepared by an earlier click, not run yet
    if (!found.length) return show("", say("“{0}” has no pictures of held-out prompts yet: they come with evaluate_every, in a Simple Trainer every ten iterations.", run));
    const said = el("div", { role: "status" });
    show(say("the same prompts and noise all along"), ...found.map((one) => el("button", { class: "strip", disabled: one.choice ? null : "", onclick: () => goBack(owner, named, one, said) },
      el("b", {}, one.iteration ? say("iteration {0}", one.iteration) : say("before")), picture(one.image, say("Held-out pictures at iteration {0}", one.iteration)),
      one.back !== one.iteration && el("span", { class: "hint" }, one.choice ? say("kept: {0}", one.back) : say("not kept any more")))), said);
  } catch (error) {
    show("", el("div", { class: "error", role: "alert" }, error.message));
  }
}

function goBack(owner, named, one, said) {
  const list = owner.widgets.find((widget) => widget.name === "begin_from")?.options?.values;
  if (Array.isArray(list) && !list.includes(one.choice)) list.push(one.choice); // the page's list is as old as the page
  setWidget(owner, "begin_from", one.choice);
  setWidget(owner, named, one.name);
  said.replaceChildren(one.back ? say("Run now begins “{0}” from iteration {1}; the old run stays as it is.", one.name, one.back)
    : say("Run now begins “{0}” from the base model; the old run stays as it is.", one.name), " ",
    el("button", { class: "main", onclick: runAgain }, say("Run")));
}

app.registerExtension({
  name: "TreeRPO.GoBack",
  nodeCreated(node) {
    if (!["TreeRPOSimple", "TreeRPOTrainer"].includes(kind(node))) return;
    const button = node.addWidget("button", "go_back", null, () => ask(node), { serialize: false });
    Object.assign(button, { label: say("Go back to a picture"), serialize: false });
  },
});
