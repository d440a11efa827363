/** Finding things of TreeRPO in the page: nodes by what an artist types, templates in the order in which one should try them. */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

// ---------------------------------------------------------------- the templates in the order in which one should try them

const TRY = ["start_here", "teach_my_taste", "first_steps", "trainer", "compare", "gamed_reward", "pick_the_winner", "best_of_n", "rank_images"];
const turn = (name) => (TRY.includes(name) ? TRY.indexOf(name) : TRY.length);

function sortTemplates() { // the server lists them in the order of its file system
  const listed = api.getWorkflowTemplates;
  api.getWorkflowTemplates = async function (...given) {
    const all = await listed.apply(this, given);
    for (const names of Object.values(all))
      if (Array.isArray(names) && TRY.every((name) => names.includes(name))) names.sort((a, b) => turn(a) - turn(b) || a.localeCompare(b));
    return all;
  };
}

// ---------------------------------------------------------------- the node search

const WHOLE = ["TreeRPOTeach", "TreeRPOSimple", "TreeRPOTrainer"]; // what does the whole job comes first

/** ComfyUI 0.33 orders what its search finds by names alone: whom an alias fits comes behind all whose names resemble the word a little
 * ("rank": Empty Latent Image). Ours come behind those which have the word in their name. scores: [0 to 5 = in the name, 9 = not, ..., how far from the words] */
function foundByAlias(scores) {
  const all = Object.getPrototypeOf(this).postProcessSearchScores?.call(this, scores) ?? scores;
  return scores[0] === 9 && scores.at(-1) < 0.2 ? [WHOLE.includes(this.name) ? 2.5 : 2.6, ...all.slice(1)] : all; // 2 = a whole word of the name, 3 = a part of one
}

app.registerExtension({
  name: "TreeRPO.Search",
  setup: sortTemplates,
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name.startsWith("TreeRPO")) nodeData.postProcessSearchScores = foundByAlias;
  },
});
