"""Do our numbers agree with the peers' where they should? Their own functions beside core.method on the same inputs."""

from pathlib import Path
from unittest import mock

import torch
from peer_code import bar, loaded, quiet, treegrpo_trainer
from peer_world import SHAPE, STEPS, Meter, World, sampling_scheduler

from core.method import cost
from core.method.advantage import edge_advantages, leaf_advantages
from core.method.objective import Objective
from core.method.steps import step
from core.method.tree import Forest
from core.method.update import policy_gradient

LEVEL = 0.7
TREES = ((4, 2, 0), (2, 4, 0), (3, 3, 3))  # branching, depth, first step


def difference(theirs, ours) -> float:
    return float((theirs - ours).abs().max())


def steps_agree(peer: str, folder: Path) -> dict[str, float]:
    """Largest differences of the next latent for the same noise and of its log-probability: over the steps that a
    window of ours may have, and in the last two.
    """
    scheduler, found = sampling_scheduler(), {}
    draw = torch.Generator().manual_seed(0)
    x, v = (torch.randn(4, *SHAPE, generator=draw) for _ in range(2))
    with loaded(peer, folder) as script:
        for i, t in enumerate(scheduler.timesteps):
            torch.manual_seed(i)
            if peer == "flow_grpo":
                latent, log_prob, *_ = script.sde_step_with_logprob(scheduler, v, t.expand(4), x, noise_level=LEVEL)
            else:
                name = "flow_match_euler_discrete_step_with_logprob"
                (latent,), (log_prob,) = getattr(script, name)(scheduler, v, t, x, noise_level=LEVEL)
            torch.manual_seed(i)
            sigmas = (*scheduler.sigmas[i : i + 2].tolist(), LEVEL, float(scheduler.sigmas[1]))
            drawn = step("flow_sde", x, v, *sigmas, noise=torch.randn_like(x))
            scored = step("flow_sde", x, v, *sigmas, next_latent=latent)
            where = "last_two" if i >= STEPS - 2 else "window"
            for name, value in (
                ("latent", difference(latent, drawn.latent)),
                ("log_prob", difference(log_prob, scored.log_prob)),
            ):
                found[f"{name}_{where}"] = max(value, found.get(f"{name}_{where}", 0.0))
    return found


def tree_costs(trainer, meter: Meter) -> list[dict]:
    """Forwards and backwards of one tree of theirs, counted at the network, and METHOD's closed form, per shape."""
    found = []
    for branching, depth, start in TREES:
        trainer.tree_steps, trainer.config.tree.k = list(range(start, start + depth)), branching
        before = meter.passes.forwards, meter.passes.backwards
        inputs = trainer.sample(meter.world.training[:1])
        sampled = meter.passes.forwards - before[0]
        trainer.train(inputs)
        learned = meter.passes.backwards - before[1]
        expected = cost.forwards(STEPS, start, depth, branching)
        found.append(
            {
                "branching": branching,
                "depth": depth,
                "start": start,
                "forwards": sampled,
                "backwards": learned,
                "closed_form": list(expected),
            }
        )
    return found


def forest_of(inputs: dict, velocity, prompts: int, branching: int, depth: int) -> tuple[Forest, list[torch.Tensor]]:
    """Their trees with the window at the start, and their advantages per layer, as ours hold them."""
    nodes = cost.nodes(depth, branching)
    layers = [
        [tree * nodes + cost.nodes(k, branching) + i for tree in range(prompts) for i in range(branching**k)]
        for k in range(depth)
    ]
    sigmas = sampling_scheduler().sigmas

    def of(key: str, layer: list[int]) -> torch.Tensor:
        parts = [inputs[key][node] for node in layer]
        return torch.cat([one for part in parts for one in (part if isinstance(part, list) else [part])])

    states = [of("hidden_states", layer) for layer in layers]
    last = of("output_latents", layers[-1])
    forest = Forest(
        prompts=list(range(prompts)),
        trees=1,
        branching=branching,
        start=0,
        sigmas=sigmas,
        kind="flow_sde",
        levels=[LEVEL] * depth,
        rho_min=0.0,
        states=[*states, last],
        log_probs=[of("log_prob", layer) for layer in layers],
        velocities=[
            velocity(x, float(sigmas[k]), torch.arange(prompts).repeat_interleave(branching**k))
            for k, x in enumerate(states)
        ],
        leaves=last,
        forwards=0,
    )
    return forest, [of("advantages", layer) for layer in layers]


class Parameters:
    """The trained ones of a network that another library has put them into."""

    def __init__(self, transformer):
        self.all = [parameter for parameter in transformer.parameters() if parameter.requires_grad]

    def parameters(self):
        return self.all


def trees_agree(trainer, meter: Meter) -> dict[str, float]:
    """Log-probabilities and advantages of trees that they sampled, and the gradient of their update without moving.

    Theirs adds up the losses of a node's children and divides by the nodes of an update, two updates per epoch; ours is
    the mean over all edges. On a trainer that has not trained yet: where the nodes are not an even number, what is left
    of an epoch stays in theirs and is added to the next one's gradient.
    """
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    prompts, branching, depth = 2, 4, 2
    trainer.tree_steps, trainer.config.tree.k = list(range(depth)), branching
    trainer.config.training.max_grad_norm = 1e9
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    texts, scored = meter.world.training[:prompts], len(meter.rewards)
    inputs = trainer.sample(texts)
    rewards = torch.tensor(meter.rewards[scored:])
    holder, gradients = Parameters(meter.transformer), []

    def caught(*_):
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in holder.all]))

    handle = register_optimizer_step_pre_hook(caught)
    trainer.train(inputs)
    handle.remove()

    velocity = meter.world.velocity(meter.transformer, texts, holder)
    with torch.no_grad():
        forest, theirs = forest_of(inputs, velocity, prompts, branching, depth)
        leaf, _ = leaf_advantages({"reward": rewards}, prompts)
        ours = edge_advantages("treegrpo", forest.log_probs, leaf, branching, prompts, "uniform")
        log_probs = [
            step(
                "flow_sde",
                x.repeat_interleave(branching, 0),
                v.repeat_interleave(branching, 0),
                *forest.sigma(k),
                LEVEL,
                float(forest.sigmas[1]),
                next_latent=below,
            ).log_prob
            for k, (x, v, below) in enumerate(zip(forest.states, forest.velocities, forest.states[1:]))
        ]
        for parameter in holder.all:
            parameter.grad = None
        policy_gradient(velocity, forest, ours, Objective(clip_low=1e-2, clip_high=1e-2))
    own = torch.cat([parameter.grad.flatten() for parameter in holder.all])
    whole = torch.stack(gradients).sum(0)
    edges, nodes = sum(layer.numel() for layer in ours), len(inputs["advantages"])
    expected = own * edges / (nodes // 2)
    return {
        "log_prob": max(difference(a, b) for a, b in zip(forest.log_probs, log_probs)),
        "advantage": max(difference(a, b) for a, b in zip(theirs, ours)),
        "gradient_cosine": float(torch.cosine_similarity(whole.double(), own.double(), dim=0)),
        "gradient_relative": float((whole - expected).norm() / whole.norm()),
    }


def check(world: World, folders: dict[str, Path]) -> dict:
    """All that can be compared with the folders that were given."""
    found = {f"step_{peer}": steps_agree(peer, folders[peer]) for peer in ("treegrpo", "flow_grpo") if peer in folders}
    if "treegrpo" in folders:
        meter = Meter(world, world.fresh(), 1.0, 1.0)
        with loaded("treegrpo", folders["treegrpo"]) as script, quiet(), meter:
            trainer = treegrpo_trainer(script, folders["treegrpo"], meter, 0, 1e-3)
            with mock.patch.object(script, "tqdm", bar):
                found["trees"] = trees_agree(trainer, meter)
                found["tree_costs"] = tree_costs(trainer, meter)
    return found
