"""The update: its gradient against finite differences, against the per-edge gradient, on any split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import grown

from core.lora.ema import Ema
from core.method.advantage import backup
from core.method.memory import MicroBatch
from core.method.noise import NoiseSchedule
from core.method.objective import Objective, clipped_surrogate
from core.method.steps import KINDS, step
from core.method.tree import TreeShape
from core.method.update import policy_gradient, update

WIDE = Objective(clip_low=10.0, clip_high=10.0)
RANDOM_KINDS = [kind for kind in KINDS if kind != "ode"]


def case(kind="cps", shape=TreeShape(3, 2, trees=2), prompts=(0, 1), start=1):
    forest, velocity = grown(
        shape,
        prompts=prompts,
        start=start,
        schedule=NoiseSchedule(kind, level=0.5, shape="linear", beta=0.3, rho_min=0.5),
    )
    draw = torch.Generator().manual_seed(3)
    leaf = torch.randn(len(forest.leaves), generator=draw, dtype=torch.float64)
    return forest, velocity, backup(forest.log_probs, leaf, forest.branching)


def gradient(forest, velocity, advantages, objective=WIDE, **kwargs):
    velocity.delta.grad = None
    metrics = policy_gradient(velocity, forest, advantages, objective, **kwargs)
    return velocity.delta.grad.clone(), metrics


def per_edge_loss(forest, velocity, advantages):
    """The same loss with every edge forwarded on its own: the definition, without any sharing."""
    losses = []
    for layer, advantage in enumerate(advantages):
        s, n = forest.sigma(layer)
        for edge in range(len(advantage)):
            parent = edge // forest.branching
            x = forest.states[layer][parent : parent + 1]
            v = velocity(x, s, forest.rows(layer)[parent : parent + 1])
            new = step(
                forest.kind,
                x,
                v,
                s,
                n,
                forest.levels[layer],
                float(forest.sigmas[1]),
                next_latent=forest.states[layer + 1][edge : edge + 1],
                rho_min=forest.rho_min,
            ).log_prob
            losses.append(
                clipped_surrogate(
                    new - forest.log_probs[layer][edge : edge + 1], advantage[edge : edge + 1], 10.0, 10.0
                )[0]
            )
    return torch.cat(losses).mean()


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_ratio_is_one_before_any_update(kind, start):
    forest, velocity, advantages = case(kind, start=start)
    _, metrics = gradient(forest, velocity, advantages)
    assert abs(metrics["ratio_mean"] - 1) < 1e-12 and metrics["clip_frac"] == 0


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_gradient_equals_the_per_edge_gradient_and_finite_differences(kind):
    forest, velocity, advantages = case(kind, TreeShape(2, 2))
    with torch.no_grad():
        # off policy
        velocity.delta += 0.01 * torch.randn(
            velocity.delta.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
        )
    shared, metrics = gradient(forest, velocity, advantages)
    loss = per_edge_loss(forest, velocity, advantages)
    (by_edge,) = torch.autograd.grad(loss, velocity.delta)
    torch.testing.assert_close(shared, by_edge, atol=1e-12, rtol=1e-9)
    before = velocity.forwards
    unshared, _ = gradient(forest, velocity, advantages, shared=False)
    torch.testing.assert_close(unshared, by_edge, atol=1e-12, rtol=1e-9)
    assert velocity.forwards - before == sum(len(a) for a in advantages)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-12)
    direction = torch.randn(velocity.delta.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            velocity.delta += sign * 1e-5 * direction
            values.append(float(per_edge_loss(forest, velocity, advantages)))
            velocity.delta -= sign * 1e-5 * direction
    assert float((shared * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_on_policy_gradient_is_the_derived_one():
    """dL/dmu(node) = -(1/(tau D)) sum_c A_c z_c / edges: docs/method_learning.md, the tree gradient."""
    forest, velocity, advantages = case("flow_sde", TreeShape(3, 1), prompts=(0,))
    s, n = forest.sigma(0)
    x = forest.states[0]
    v = velocity(x, s, [0]).detach().requires_grad_()
    edge = step(
        "flow_sde",
        x.repeat(3, 1, 1, 1),
        v.repeat(3, 1, 1, 1),
        s,
        n,
        forest.levels[0],
        float(forest.sigmas[1]),
        next_latent=forest.states[1],
    )
    edge.mean.retain_grad()
    (-(torch.exp(edge.log_prob - forest.log_probs[0]) * advantages[0]).sum() / 3).backward()
    tau, z = float(edge.std), (forest.states[1] - edge.mean.detach()) / edge.std
    expected = -(advantages[0].view(3, 1, 1, 1) * z) / (tau * x[0].numel() * 3)
    torch.testing.assert_close(edge.mean.grad, expected, atol=1e-12, rtol=1e-9)


@settings(deadline=None, max_examples=25)
@given(
    branching=st.integers(1, 3),
    depth=st.integers(1, 3),
    trees=st.integers(1, 2),
    prompts=st.integers(1, 2),
    micro_batch=st.integers(1, 7),
)
def test_any_split_gives_the_same_update(branching, depth, trees, prompts, micro_batch):
    forest, velocity, advantages = case("exact", TreeShape(branching, depth, trees), range(prompts))
    whole, _ = gradient(forest, velocity, advantages)
    before = velocity.forwards
    parts, _ = gradient(forest, velocity, advantages, micro_batch=MicroBatch(micro_batch))
    torch.testing.assert_close(parts, whole, atol=1e-14, rtol=1e-9)
    assert velocity.forwards - before == prompts * trees * sum(branching**k for k in range(depth))


def test_clipping_stops_the_gradient_where_it_should():
    new = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.05], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    loss, _, clipped = clipped_surrogate(new, advantage, 0.1, 0.2)
    loss.sum().backward()
    assert clipped.tolist() == [True, False, False, True, False]
    assert (new.grad != 0).tolist() == [False, True, True, False, True]


def test_the_update_makes_better_edges_likelier():
    forest, velocity, advantages = case()
    before = velocity.delta.detach().clone()
    optimizer = torch.optim.SGD(velocity.parameters(), lr=1.0)
    metrics = update(velocity, forest, advantages, optimizer, WIDE, max_grad_norm=0)
    assert not torch.equal(velocity.delta, before) and metrics["grad_norm"] > 0
    with torch.no_grad():
        after = float(per_edge_loss(forest, velocity, advantages))
    assert after < metrics["loss"]


def test_inner_updates_report_the_first_ratio_and_clip_later():
    forest, velocity, advantages = case()
    metrics = update(
        velocity,
        forest,
        advantages,
        torch.optim.AdamW(velocity.parameters(), lr=0.05),
        Objective(1e-4, 1e-4),
        inner_updates=3,
    )
    assert metrics["ratio_first"] == pytest.approx(1, abs=1e-12) and metrics["clip_frac"] > 0
    assert metrics["update_forwards"] == 3 * 2 * 2 * 4


def test_groups_without_advantage_cost_nothing_and_change_nothing():
    forest, velocity, advantages = case()
    nothing = [torch.zeros_like(a) for a in advantages]
    before = velocity.delta.detach().clone()
    metrics = update(
        velocity, forest, nothing, torch.optim.AdamW(velocity.parameters(), lr=1.0, weight_decay=0.5), WIDE
    )
    assert torch.equal(velocity.delta, before) and metrics["update_forwards"] == 0 and metrics["edges_trained"] == 0


def test_a_gradient_that_is_not_finite_changes_nothing():
    forest, velocity, advantages = case()
    advantages[0][0] = float("inf")
    before = velocity.delta.detach().clone()
    metrics = update(velocity, forest, advantages, torch.optim.AdamW(velocity.parameters(), lr=1.0), WIDE)
    assert metrics["skipped"] == 1 and torch.equal(velocity.delta, before)


class Stop(BaseException):
    """As ComfyUI's interrupt, which is no Exception."""


def test_the_average_moves_on_with_every_step_that_is_taken_and_no_other():
    forest, velocity, advantages = case()
    optimizer, ema = torch.optim.AdamW(velocity.parameters(), lr=0.05), Ema(velocity.parameters(), 0.5)
    update(velocity, forest, advantages, optimizer, WIDE, inner_updates=3, ema=ema)
    assert ema.steps == 3 and not torch.equal(ema.shadow[0], velocity.delta.float())
    update(velocity, forest, [torch.zeros_like(a) for a in advantages], optimizer, WIDE, ema=ema)  # nothing to learn
    update(velocity, forest, [torch.full_like(a, torch.nan) for a in advantages], optimizer, WIDE, ema=ema)
    assert ema.steps == 3


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("moment", range(1, 14))
def test_an_update_that_is_stopped_at_any_moment_leaves_policy_and_optimizer_as_they_were(moment, steps_before):
    """moment: before the n-th slice of three inner updates of four slices each; the last ones hit inside the
    optimizer's step.
    """
    forest, velocity, advantages = case()
    optimizer = torch.optim.AdamW(velocity.parameters(), lr=0.05)
    if steps_before:
        update(velocity, forest, advantages, optimizer, WIDE, inner_updates=steps_before)
    ema = Ema(velocity.parameters(), 0.5)
    parameters = [p.detach().clone() for p in velocity.parameters()]
    state, average = str(optimizer.state_dict()), str(ema.state_dict())
    count = 0

    def check():
        nonlocal count
        count += 1
        if count == moment:
            raise Stop

    if moment == 13:

        def step():
            with torch.no_grad():
                velocity.delta.add_(1)
            raise Stop

        optimizer.step = step
    with pytest.raises(Stop):
        sliced = dict(micro_batch=MicroBatch(4), check=check)
        update(velocity, forest, advantages, optimizer, WIDE, inner_updates=3, ema=ema, **sliced)
    assert str(ema.state_dict()) == average
    assert all(torch.equal(a, b) for a, b in zip(parameters, velocity.parameters()))
    assert str(optimizer.state_dict()) == state
    assert all(p.grad is None for p in velocity.parameters())
