"""The processes of a job: connected, a base model spread over them, and let go."""

import importlib
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from core.method.ranks import Ranks


def connect(per_prompt: int = 1, timeout: float = 1800.0) -> tuple[Ranks, torch.device]:
    """The processes that `accelerate launch` (or torchrun) has started, and this one's device.

    timeout: seconds to wait for another process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks(per_prompt=per_prompt), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        state_of = importlib.import_module("accelerate").PartialState
    except ImportError as error:
        raise ImportError(
            "Training on several processes needs the package accelerate: pip install accelerate"
        ) from error
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and os.environ.get("FSDP_VERSION") != "2":
        raise ValueError(
            "accelerate's configuration asks for FSDP of version 1: set fsdp_version: 2 under fsdp_config."
        )
    wait = timedelta(seconds=timeout)
    state = state_of(cpu=not torch.cuda.is_available(), timeout=wait)
    # notices at once when a process is gone, and needs no GPU memory
    group = dist.new_group(backend="gloo", timeout=wait)
    return Ranks(state.process_index, state.num_processes, per_prompt, sharded, group), torch.device(
        state.device.type, state.device.index or 0
    )


def shard(network: nn.Module, whole: list[nn.Parameter], ranks: Ranks, device: torch.device) -> None:
    """Spread a frozen network's weights over the processes of each machine, block by block (FSDP2, torch's
    fully_shard).

    Every machine holds all weights, as gathering them from other machines for every model call would cost more than the
    memory is worth.
    whole: parameters that every process keeps.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    sizes = (ranks.size,) if ranks.size % local or local == ranks.size else (ranks.size // local, local)
    options = {
        "mesh": init_device_mesh(device.type, sizes, mesh_dim_names=("machines", "shards")[-len(sizes) :]),
        "ignored_params": set(whole),
        "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false",
    }
    for stack in network.children():
        if isinstance(stack, nn.ModuleList):
            for block in stack:
                fully_shard(block, **options)
    fully_shard(network, **options)


def disconnect() -> None:
    """Let go of the other processes. Does nothing where there are none."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        # A thread of gloo may still let go of the last collective's tensors, for which it waits for Python's lock: an
        # interpreter that ends meanwhile aborts, and the job with it (one of five on a busy machine, torch 2.11).
        time.sleep(0.5)
