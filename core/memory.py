"""Micro-batches that shrink when memory runs out, and the memory a retained graph needs."""
import gc
import logging
from typing import Callable

import torch
from torch import Tensor


class MicroBatch:
    """Latents per model call. Halves when the device runs out of memory, and stays there for the rest of the run."""

    def __init__(self, size: int = 0):
        self.size = size  # 0 = as many as there are

    def run(self, count: int, work: Callable[[int, int], None]) -> None:
        """Call work(first, last) over 0..count in slices. A slice that runs out of memory is tried again in halves.

        `work` must leave nothing behind when it raises.
        """
        first = 0
        while first < count:
            last = min(first + (self.size or count), count)
            try:
                work(first, last)
            except torch.cuda.OutOfMemoryError as error:
                if last - first == 1:
                    raise RuntimeError("Not even one latent fits into the memory: train at a smaller size, turn on checkpointing in Tree Policy, or "
                                       "free memory by unloading other models.") from error
                self.size = (last - first + 1) // 2
            else:
                first = last
                continue
            # Outside the except block, whose traceback would keep the failed call's tensors alive.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logging.warning("TreeRPO: out of memory with %d latents at once; going on with %d.", last - first, self.size)


def saved_bytes(work: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that the autograd graph of one call of `work` keeps alive, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = work()
    del output
    return sum(seen.values())
