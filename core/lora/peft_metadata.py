"""diffusers' adapter metadata in the header of a LoRA file: PEFT's ranks and alphas as JSON."""

import json
import math
import re
from collections import Counter

from torch import Tensor

from ..patterns import search

ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' key in the file's header: the PEFT config as JSON


def peft_config(header: dict[str, str] | None) -> dict:
    """The transformer's PEFT config from a file's header; {} where there is none."""
    try:
        config = json.loads((header or {}).get(ADAPTER_METADATA) or "{}")
        config = {
            key.removeprefix("transformer."): value for key, value in config.items() if key.startswith("transformer.")
        }
        for alpha in (config.get("lora_alpha", 1), *(config.get("alpha_pattern") or {}).values()):
            float(alpha)
        return config
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"The file's {ADAPTER_METADATA} cannot be read ({error}): without it the LoRA's strength is not known."
        ) from None


def peft_alpha(config: dict, module: str, rank: int) -> float:
    """The alpha that gives the strength PEFT would give this layer."""
    patterns = config.get("alpha_pattern") or {}
    matching = (value for key, value in patterns.items() if _names(key, module))
    alpha = float(next(matching, config.get("lora_alpha", rank)))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _names(key: str, module: str) -> bool:
    """Whether a key of PEFT's patterns, a regular expression, names this layer."""
    pattern = rf"^(.*\.)?({key})$"
    if re.fullmatch(r"[\w.^-]*", key):  # a plain name, as diffusers writes it: it needs no time
        return bool(re.search(pattern, module))
    try:
        return search(pattern, [module])[1][0].count > 0
    except ValueError as error:
        raise ValueError(
            f"The file's alpha_pattern '{key[:60]}' is no expression that can be used ({error})."
        ) from None


def peft_metadata(state: dict[str, Tensor]) -> str:
    """The header's adapter metadata for a state in the diffusers form: alpha = rank in every layer."""
    ranks = {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): len(tensor)
        for key, tensor in state.items()
        if key.endswith(".lora_A.weight")
    }
    common = Counter(ranks.values()).most_common(1)[0][0]
    # "^" keeps proj_out from meaning single_transformer_blocks.0.proj_out as well.
    other = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
    config = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
    }
    return json.dumps({f"transformer.{key}": value for key, value in config.items()})
