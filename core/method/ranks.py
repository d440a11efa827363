"""Several processes that train one policy: how they share out the trees, what they add up, and how they end together.

Every process holds all adapters, the optimizer and the run, and learns the same from the same numbers; only trees,
images and scores are its own. There is no DistributedDataParallel around the model: it would add up gradients within
every backward pass, and needs as many of those on every process. Here their number differs with the share of prompts,
the slices that have nothing to learn, and the memory; the adapters' gradients are added up once.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


class OtherProcess(RuntimeError):
    """Another process has failed and said why; this one only ends with it."""


@dataclass
class Ranks:
    """The processes of a job as one of them sees them; alone by default, and then nothing here does anything.

    The processes of a team share the trees of a prompt; teams share out the prompts.
    """

    rank: int = 0  # number of this process
    size: int = 1  # processes in all
    per_prompt: int = 1  # processes in a team
    lockstep: bool = False  # the base model is sharded (FSDP2): every process must make as many model calls
    group: object = None  # of torch.distributed, for what is small and on the CPU; the default group adds up gradients

    def __post_init__(self):
        if self.per_prompt < 1 or self.size % self.per_prompt:
            raise ValueError(
                f"{self.size} processes cannot be shared out in teams of {self.per_prompt}: set processes.per_prompt "
                f"to a divisor of {self.size}."
            )

    def refuse(self, prompts: int, trees: int) -> None:
        """ValueError where some process would have nothing to do, or, in lockstep, less than another."""
        for count, shares, what in (
            (prompts, self.size // self.per_prompt, "prompts per iteration"),
            (trees, self.per_prompt, "trees per prompt"),
        ):
            if count < shares or (self.lockstep and count % shares):
                many = f"a multiple of {shares}, as FSDP needs equal shares" if self.lockstep else f"at least {shares}"
                raise ValueError(
                    f"There are {count} {what} for {shares} shares of {self.size} processes (processes.per_prompt "
                    f"{self.per_prompt}): use {many}, or other processes."
                )

    def prompts(self, count: int) -> list[int]:
        """Which of an iteration's prompts are this process's, by number."""
        teams, team = self.size // self.per_prompt, self.rank // self.per_prompt
        return list(range(team * count // teams, (team + 1) * count // teams))

    def trees(self, count: int) -> range:
        """Which of a prompt's trees are this process's."""
        place = self.rank % self.per_prompt
        return range(place * count // self.per_prompt, (place + 1) * count // self.per_prompt)

    def turns(self, count: int) -> list[int]:
        """Equally many of `count` things for every process; the last one is done again where they do not divide."""
        each = -(-count // self.size)
        return [min(self.rank * each + j, count - 1) for j in range(each)]

    def gather(self, value) -> list:
        """Every process's value, in their order. All must call this, in the same place."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value):
        """The first process's value."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def join(self, tensors: list[Tensor], prompts: int) -> list[Tensor]:
        """This process's tensors [its prompts * n] as those of all prompts and trees [P * N], in the order one process
        would have; on the CPU.

        prompts: how many are this process's.
        """
        if self.size == 1:
            return tensors
        shares = self.gather([tensor.detach().cpu().reshape(prompts, -1) for tensor in tensors])
        teams = [shares[first : first + self.per_prompt] for first in range(0, self.size, self.per_prompt)]
        return [
            torch.cat([torch.cat(parts, 1) for parts in ([share[i] for share in team] for team in teams)]).flatten()
            for i in range(len(tensors))
        ]

    def part(self, tensor: Tensor, prompts: list[int], count: int, trees: int) -> Tensor:
        """The rows of these prompts and of this process's trees, from a tensor [count * n] of all."""
        own = self.trees(trees)
        return tensor.view(count, trees, -1)[prompts, own.start : own.stop].flatten()

    def rows(self, kept: Tensor, prompts: list[int]) -> list[int]:
        """Places of these prompts among those that are kept [P]."""
        return [i for i, number in enumerate(kept.nonzero().flatten().tolist()) if number in prompts]

    def total(self, number: float) -> float:
        """The sum of a number over all processes."""
        return sum(self.gather(number))

    def most(self, number: int) -> int:
        return max(self.gather(number))

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Makes every gradient the sum over all processes, in one message; None stays None where no process has one, as
        it would with one process.
        """
        if self.size == 1:
            return
        anywhere = [any(flags) for flags in zip(*self.gather([parameter.grad is not None for parameter in parameters]))]
        wanted = [parameter for parameter, needed in zip(parameters, anywhere) if needed]
        if not wanted:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in wanted])
        dist.all_reduce(flat)
        for parameter, part in zip(wanted, flat.split([p.numel() for p in wanted])):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def refuse_drift(self, parameters: list[nn.Parameter]) -> None:
        """RuntimeError where the processes no longer hold the same policy, which only a broken machine or network can
        bring about.
        """
        if self.size > 1 and len(set(self.gather(tuple(float(p.detach().double().sum()) for p in parameters)))) > 1:
            raise RuntimeError(
                "The processes no longer hold the same policy: a machine or its network computes wrongly. Begin again "
                "from the last state."
            )

    @contextmanager
    def together(self):
        """What one process raises inside, all processes raise at the end of the block, so that none waits for it in
        vain.

        In lockstep the others may be waiting inside a model call, where nothing reaches them: there the launcher ends
        them.
        """
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except BaseException as raised:
            if self.lockstep:
                raise
            error = raised
        reasons = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
        if failed is not None:
            raise OtherProcess(f"Process {failed} has ended. {reasons[failed]}")


ALONE = Ranks()
