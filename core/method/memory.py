"""Micro-batches that shrink when memory runs out, and the memory a retained graph needs."""

import gc
import logging
from collections.abc import Callable

import torch
from torch import Tensor


class MicroBatch:
    """Latents per model call. Halves when the device runs out of memory, and stays there for the rest of the run."""

    def __init__(self, size: int = 0, fixed: bool = False):
        self.size = size  # 0 = as many as there are
        self.fixed = fixed  # never halve: other processes make the same calls

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
                if self.fixed:
                    raise RuntimeError(
                        f"{last - first} latents at once do not fit into the memory, and a sharded model cannot try "
                        "fewer by itself: set micro_batch lower."
                    ) from error
                if last - first == 1:
                    raise RuntimeError(
                        "Not even one latent fits into the memory: train at a smaller size, turn on checkpointing in "
                        "Tree Policy, or free memory by unloading other models."
                    ) from error
                self.size = (last - first + 1) // 2
            else:
                first = last
                continue
            # Outside the except block, whose traceback would keep the failed call's tensors alive.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logging.warning(
                "TreeRPO: out of memory with %d latents at once; going on with %d.", last - first, self.size
            )


class Retained:
    """The graphs a rollout keeps for its update, by (layer, first node of the slice), while they fit into `budget`
    bytes.

    The first graph is measured unless bytes_per_node is known; if as many as the window needs would not fit, none is
    kept and the update recomputes.
    """

    def __init__(self, budget: float, nodes: int, weights: list[Tensor], bytes_per_node: float | None = None):
        self.budget, self.nodes, self.weights, self.bytes_per_node = budget, nodes, weights, bytes_per_node
        self.graphs: dict[tuple[int, int], Tensor] = {}

    @property
    def wanted(self) -> bool:
        return self.bytes_per_node is None or self.bytes_per_node * self.nodes <= self.budget

    def call(self, layer: int, first: int, work: Callable[[], Tensor]) -> Tensor:
        """work() with gradients on, its graph kept where it fits; returns the value without the graph."""
        if self.bytes_per_node is None:
            used, output = saved_bytes(work, self.weights)
            self.bytes_per_node = used / len(output)
            if not self.wanted:
                logging.info(
                    "TreeRPO: retaining %d graphs of %.0f MB each does not fit; the update recomputes them.",
                    self.nodes,
                    self.bytes_per_node / 1e6,
                )
        else:
            output = work()
        if self.wanted:
            self.graphs[layer, first] = output
        return output.detach()


def saved_bytes(work: Callable[[], Tensor], weights: list[Tensor]) -> tuple[int, Tensor]:
    """Bytes that the autograd graph of work() keeps alive, the weights' own not counted, and its output."""
    known = {p.untyped_storage().data_ptr() for p in weights}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = work()
    return sum(seen.values()), output
