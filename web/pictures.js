/** What runs show below the nodes of TreeRPO. In Nodes 2.0: each picture once, and in the room that its node has. In classic nodes: whole sentences. */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { el, findNode, isOurs } from "./treerpo.js";

const live = new Set(); // ids of nodes with a live picture
let once, own; // <style>

/** Nodes 2.0 shows the live picture below the node's output, which is the same picture, also when the run is over. */
api.addEventListener("b_preview_with_metadata", ({ detail }) => {
  const node = findNode(detail.displayNodeId), body = `[data-node-id="${node?.id}"] [data-testid^="node-body"]:has(.image-preview) > img`;
  if (!isOurs(node) || live.has(node.id)) return;
  live.add(node.id);
  once.append(`${body}, ${body} + * { display: none }`);
});

const rooms = new Map(); // of nodes with room of their own for a picture: how high it may be there
const PREVIEW = "$$canvas-image-preview"; // the classic nodes' widget

/** How high a node's picture is at least: a node that has some room for it, as in the templates, would else grow over its neighbours. */
function lowest(node) {
  const room = node.size[1] - node.computeSize()[1] - 70; // widgets are higher in Nodes 2.0
  const most = node.widgets?.some((widget) => widget.element?.matches?.("textarea")) ? 180 : 60; // beside a text box it does not grow by itself
  return room > 0 ? Math.max(60, Math.min(most, room)) : 220; // 220 is the page's own
}

api.addEventListener("executed", ({ detail }) => {
  const node = findNode(detail.display_node ?? detail.node);
  if (!isOurs(node) || !detail.output?.images || !window.LiteGraph?.vueNodesMode) return;
  rooms.set(node.id, lowest(node));
  own.textContent = [...rooms].map(([id, high]) => `[data-node-id="${id}"] .image-preview { min-height: ${high}px }`).join("\n");
});

function inItsRoom(node) {
  const add = node.addCustomWidget;
  node.addCustomWidget = function (widget) {
    const minHeight = widget.name === PREVIEW ? lowest(this) : 0;
    if (minHeight) widget.computeLayoutSize = () => ({ minHeight, minWidth: 1 });
    return add.call(this, widget);
  };
}

/** Classic nodes have room for three lines of text, and what comes next stands below them. */
api.addEventListener("progress_text", ({ detail }) => setTimeout(() => { // the page makes the text's widget first
  const node = findNode(detail.nodeId), shown = node?.widgets?.find((one) => one.name === "$$node-text-preview");
  if (!isOurs(node) || !shown?.options || window.LiteGraph?.vueNodesMode) return;
  const letters = Math.max(20, (node.size[0] - 50) / 7.6), lines = detail.text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)), 0);
  shown.options.getMinHeight = () => Math.max(58, Math.min(200, 16.5 * lines + 26));
  node.setDirtyCanvas?.(true, true);
}));

app.registerExtension({
  name: "TreeRPO.Pictures",
  setup() { document.head.append(once = el("style"), own = el("style")); },
  nodeCreated(node) { if (isOurs(node)) inItsRoom(node); },
});
