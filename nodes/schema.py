"""What the nodes' schemas share: socket types, and the fields older ComfyUI versions do not know."""

import dataclasses

from comfy_api.latest import io

CATEGORY = "TreeRPO"

PolicySocket = io.Custom("TREERPO_POLICY")  # nodes.policy.LivePolicy
ShapeSocket = io.Custom("TREERPO_SHAPE")  # core.method.tree.TreeShape
NoiseSocket = io.Custom("TREERPO_NOISE")  # core.method.noise.NoiseSchedule
TreeSocket = io.Custom("TREERPO_TREE")  # nodes.sample.SampledTree
RewardSocket = io.Custom("TREERPO_REWARD")  # anything with core.rewards' score()
ScoresSocket = io.Custom("TREERPO_REWARDS")  # nodes.reward.Scored
AdvantagesSocket = io.Custom("TREERPO_ADVANTAGES")  # nodes.train.Credit
PromptsSocket = io.Custom("TREERPO_PROMPTS")  # core.runs.prompts.PromptList
ObjectiveSocket = io.Custom("TREERPO_OBJECTIVE")  # (core.method.objective.Objective, only_good)
LoraSocket = io.Custom("LORA_MODEL")  # core's type: dict of tensors

# Windows has no files of these names, whatever follows after a dot
DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789¹²³"
}
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters and signs that show nothing
LONGEST_NAME = 200  # bytes, of the 255 that file systems take: endings and temporary names are added

_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(node_id: str, display_name: str, **fields) -> io.Schema:
    """io.Schema without the fields this ComfyUI does not have yet (search_aliases before 0.4)."""
    fields.setdefault("category", CATEGORY)
    fields["inputs"] = [
        part for field in fields.get("inputs", []) for part in (field if isinstance(field, list) else [field])
    ]
    return io.Schema(
        node_id=node_id, display_name=display_name, **{name: value for name, value in fields.items() if name in _KNOWN}
    )


def expert(field: io.Input) -> io.Input:
    """An input shown under "advanced"; ComfyUI 0.3.64 has no argument for it."""
    field.extra_dict = {**field.extra_dict, "advanced": True}
    return field


def plain_name(text: str, what: str) -> str:
    """`text` as a file or folder name, or a ValueError: it may not lead anywhere else."""
    name = text.strip()
    beginning = name.partition(".")[0].rstrip().upper()
    if not name or name in (".", "..") or any(c in name for c in '/\\:*?"<>|'):
        why = 'use a plain name without slashes or any of :*?"<>|'
    elif not name.replace("\u3000", " ").isprintable() or any(c in name for c in BLANK):
        why = "it has signs that cannot be seen, such as tabs or marks of direction: type it anew"
    elif beginning in DEVICES:
        why = f"{beginning} is a device on Windows: choose another name"
    elif name.startswith(".") or name.endswith("."):
        why = "a dot at its beginning hides it, one at its end is lost on Windows: leave it out"
    elif len(name.encode()) > LONGEST_NAME:
        why = f"it has {len(name.encode())} bytes, and {LONGEST_NAME} is the most: choose a shorter one"
    else:
        return name
    raise ValueError(f"{name[:40]!r} cannot be a {what} name: {why}.")


def growing(kind, name: str, prefix: str, most: int) -> io.Input | list[io.Input]:
    """Inputs that grow as they are connected; on ComfyUI without such inputs, `most` optional ones under the same
    names.
    """
    if hasattr(io, "Autogrow"):
        return io.Autogrow.Input(
            name, template=io.Autogrow.TemplatePrefix(kind.Input(prefix), prefix=prefix, min=1, max=most)
        )
    return [kind.Input(f"{name}.{prefix}{i}", optional=True) for i in range(most)]


def grown(together: dict | None, apart: dict, name: str, prefix: str, most: int) -> list:
    """What is connected to growing inputs, in their order: a dict on new ComfyUI, single inputs on old."""
    found = {**{key.removeprefix(f"{name}."): value for key, value in apart.items()}, **(together or {})}
    return [found[key] for key in (f"{prefix}{i}" for i in range(most)) if found.get(key) is not None]


def micro_batch_input(tooltip: str) -> io.Int.Input:
    """How many latents go through the model at once."""
    return io.Int.Input("micro_batch", default=0, min=0, max=4096, optional=True, tooltip=tooltip)
