"""Which network a LoRA is for, by its layers' names and sizes."""

import re

from .file_forms import MODELS
from .layer_names import comfy_name, networks_naming, networks_of, parts_of, shape_of
from .networks import NETWORKS
from .pairs import Pair, swapped

# of networks whose layers' sizes are all multiples of one hidden size
BLOCK = re.compile(r"^(double_blocks|joint_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.(\d+)\.")
# Others have the same names and the size of a published one: hidden size -> its number of transformer_blocks.
FOREIGN = {3072: 20}  # HunyuanVideo


def find_network(pairs: dict[str, Pair], form: str, told: str | None) -> str:
    """The key of NETWORKS; the first of those that have all the layers, where it makes no difference which it is."""
    candidates, width = having(pairs, form), hidden_size(pairs)
    blocks = [block for block in map(BLOCK.match, pairs) if block and not block[1].startswith("single_")]
    last = max((int(block[2]) for block in blocks), default=-1)
    reached = {network: NETWORKS[network].published.get(width) for network in candidates}
    published = [network for network in candidates if reached[network]]
    within = [network for network in candidates if reached[network] is None or last < reached[network]]
    alien = last + 1 == FOREIGN.get(width) and told not in within
    if published and (alien or not any(reached[network] for network in within)):
        raise ValueError(
            f"This LoRA reaches block {last}, where {NETWORKS[published[0]].title} of this size has "
            f"{reached[published[0]]} blocks from 0 on: it is of another model, and only those of {MODELS} are "
            "converted."
        )
    if told in within:
        return told
    within = within if form == "diffusers" else of_these_shapes(pairs, within)
    if len({_outcome(pairs, form, network) for network in within}) == 1:
        return within[0]
    published = [network for network in within if reached[network]]
    if not published:
        titles = ", ".join(f"{NETWORKS[network].title} ('{network}')" for network in within)
        raise ValueError(
            f"The layers of this LoRA are in {titles}, and its size is of no published model: say which it is (network "
            f"'{within[0]}', ...)."
        )
    return published[0]


def having(pairs: dict[str, Pair], form: str) -> list[str]:
    """The networks that have all of these layers. ValueError where none has."""
    candidates = list(NETWORKS)
    for module in pairs:
        known = networks_naming(module) if form == "diffusers" else networks_of(module)
        have = [network for network in candidates if network in known]
        if not have:
            titles = " or ".join(NETWORKS[network].title for network in candidates)
            raise ValueError(
                f"'{module}' does not go with the other layers of this LoRA, which are {titles}'s: two models are "
                "mixed in one file."
            )
        candidates = have
    # Only SD3 has modulations of two parts (its last block) and of nine (where there is a second attention).
    parts = {(module.partition(".norm1")[2], len(pair.up) / pair.down.shape[1]) for module, pair in pairs.items()}
    only_sd3 = form == "diffusers" and "sd3" in candidates and parts & {("_context.linear", 2), (".linear", 9)}
    return ["sd3"] if only_sd3 else candidates


def of_these_shapes(pairs: dict[str, Pair], networks: list[str]) -> list[str]:
    """Those of the networks whose layers (ComfyUI's names) have these shapes; the first where no network's have."""
    fitting = [
        network
        for network in networks
        if all(
            abs((shape_of(module, network) or ratio) - ratio) < 1e-2
            for module, ratio in ((module, len(pair.up) / pair.down.shape[1]) for module, pair in pairs.items())
        )
    ]
    return fitting or networks[:1]


def _outcome(pairs: dict[str, Pair], form: str, network: str) -> tuple:
    """What the layers are called in the other world."""
    return tuple(
        comfy_name(module, network)
        if form == "diffusers"
        else (*parts_of(module, network), swapped(module, pair, network) is pair)
        for module, pair in pairs.items()
    )


def hidden_size(pairs: dict[str, Pair]) -> int | None:
    """The smallest side of any layer in a block, which is the network's hidden size; None where no block is adapted."""
    return min(
        (min(len(pair.up), pair.down.shape[1]) for module, pair in pairs.items() if BLOCK.match(module)), default=None
    )


def check_sizes(pairs: dict[str, Pair], network: str) -> None:
    """ValueError unless every layer (ComfyUI's names) has rows for all parts, and the sizes of those in a BLOCK are
    multiples of one hidden size.
    """
    width = hidden_size(pairs)
    for module, pair in pairs.items():
        rows, columns, count = len(pair.up), pair.down.shape[1], len(parts_of(module, network))
        block = BLOCK.match(module)
        uneven = block and (rows % width or columns % width or count == 3 and rows != 3 * columns)
        short = count == 3 and (rows <= columns or (rows - columns) % 2) or count == 4 and rows <= 3 * columns
        if uneven or short:
            raise ValueError(
                f"The LoRA of '{module}' is for a layer of {columns} to {rows}, which does not fit "
                + (f"the others' hidden size of {width}" if count == 1 else f"its {count} parts")
                + ": the file is damaged, or of another model."
            )
