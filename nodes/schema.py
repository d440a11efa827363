"""What the nodes' schemas share: socket types, and the fields older ComfyUI versions do not know."""
import dataclasses

from comfy_api.latest import io

CATEGORY = "TreeRPO"

Policy = io.Custom("TREERPO_POLICY")          # nodes.policy.LivePolicy
TreeShape = io.Custom("TREERPO_SHAPE")        # core.tree.TreeShape
Noise = io.Custom("TREERPO_NOISE")            # core.noise.NoiseSchedule
Tree = io.Custom("TREERPO_TREE")              # nodes.sample.SampledTree
RewardModel = io.Custom("TREERPO_REWARD")     # anything with core.rewards' score()
Rewards = io.Custom("TREERPO_REWARDS")        # nodes.reward.Scores
EdgeAdvantages = io.Custom("TREERPO_ADVANTAGES")  # nodes.train.Credit
LoraModel = io.Custom("LORA_MODEL")           # core's type: dict of tensors

_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(node_id: str, display_name: str, **fields) -> io.Schema:
    """io.Schema without the fields this ComfyUI does not have yet (search_aliases before 0.4)."""
    fields.setdefault("category", CATEGORY)
    return io.Schema(node_id=node_id, display_name=display_name, **{name: value for name, value in fields.items() if name in _KNOWN})


def expert(field: io.Input) -> io.Input:
    """An input shown under "advanced"; ComfyUI 0.3.64 has no argument for it."""
    field.extra_dict = {**field.extra_dict, "advanced": True}
    return field


def plain_name(text: str, what: str) -> str:
    """`text` as a file or folder name, or a ValueError: it may not lead anywhere else."""
    name = text.strip()
    if not name or name in (".", "..") or any(c in name for c in '/\\:*?"<>|'):
        raise ValueError(f"'{text}' cannot be a {what} name: use a plain name without slashes or any of :*?\"<>|.")
    return name
