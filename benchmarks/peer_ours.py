"""Our own training runs in the world of peer_world.py, for benchmarks/peers.py."""

import torch
from peer_world import ALPHA, RANK, TARGETS, Done, Meter

from core.hosts.peft import Attached, new_adapters
from core.method import iteration
from core.method.advantage import Scores
from core.method.objective import Objective
from core.runs.prompts import order
from standalone.demo import noise_schedule, tree_shape
from standalone.figures import graph


def train_ours(meter: Meter, seed: int, rate: float, loss: str) -> None:
    """Until the meter's Done: the trees and the objective of the template `trainer` (loss "regression"), or GRPO on the
    same trees.
    """
    world, template = meter.world, graph("trainer")
    shape, schedule = tree_shape(template["Shape"]), noise_schedule(template["Noise"])
    goal = template["Objective"]
    objective = (
        Objective(loss="regression", anchor=goal["anchor"], step_weight=goal["step_weight"])
        if loss == "regression"
        else Objective(clip_low=1e-2, clip_high=1e-2)
    )
    adapters = new_adapters(meter.transformer, RANK, ALPHA, TARGETS, seed=seed)
    attached = Attached(adapters, meter.transformer)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=rate, weight_decay=0.0)
    per, number = template["Trainer"]["per_iteration"], 0
    with meter, torch.no_grad():
        while True:
            try:
                meter.check()
            except Done:
                return
            chosen = [world.training[i] for i in order(len(world.training), per, number, seed)]
            velocity = world.velocity(meter.transformer, chosen, attached)
            sampled = iteration.sample(
                velocity,
                lambda drawn: drawn,
                world.sigmas,
                shape,
                schedule,
                iteration=number,
                seed=seed,
                prompts=list(range(per)),
            )
            texts = [text for text in chosen for _ in range(shape.leaves)]
            rewards = meter.score(world.decode(sampled.forest.leaves), texts)
            found = Scores({"demo": rewards}, {"demo": 1.0}, False)
            iteration.learn(velocity, sampled, iteration.credit(sampled, found), optimizer, objective)
            number += 1
