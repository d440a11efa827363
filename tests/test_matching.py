"""DiffusionNFT, AWM and regression on re-noised images: their definitions state by state, their states, their cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objective import MATCHING, move, noisy, total
from test_tree import grown
from test_update import case

from core.method.cost import learning_forwards
from core.method.matching import adaptive_weight, matched, nft, renoise
from core.method.memory import MicroBatch
from core.method.objective import Objective
from core.method.tree import TreeShape
from core.method.update import policy_gradient, update

FLAT = TreeShape(1, 1, trees=5)  # independent images


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=15)
@given(
    branching=st.integers(1, 3),
    trees=st.integers(1, 3),
    prompts=st.integers(1, 3),
    per_image=st.integers(1, 10),
)
def test_states_are_images_with_fresh_noise_at_levels_of_the_schedule(branching, trees, prompts, per_image):
    forest, _ = grown(TreeShape(branching, 2, trees), prompts=range(prompts))
    states = renoise(forest, per_image, seed=3)
    images = forest.leaves.repeat_interleave(per_image, 0)
    sigma = states.sigmas.view(-1, 1, 1, 1)
    eps = (states.x - (1 - sigma) * images) / sigma
    torch.testing.assert_close(eps, eps.float().double(), atol=1e-12, rtol=1e-12)  # what was drawn, in float32
    assert len({tuple(row.flatten().tolist()) for row in states.x}) == len(images)
    for levels in states.sigmas.view(-1, per_image).tolist():
        assert set(levels) <= set(forest.sigmas[:-1].tolist()) and len(set(levels)) == min(per_image, 8)
    assert states.rows.tolist() == [i for i in range(prompts) for _ in range(len(images) // prompts)]
    assert abs(float(eps.std()) - 1) < 0.5


def test_states_depend_on_seed_iteration_prompt_and_tree_alone():
    shape = TreeShape(2, 2, trees=2)
    forest, _ = grown(shape)
    whole = renoise(forest, 2, seed=3)
    assert torch.equal(whole.x, renoise(forest, 2, seed=3).x) and not torch.equal(whole.x, renoise(forest, 2, 4).x)
    own = renoise(forest.only(torch.tensor([False, True])), 2, seed=3)  # a prompt left out
    assert torch.equal(own.x, whole.x[16:]) and own.rows.tolist() == [1] * 16
    forest.iteration += 1
    assert not torch.equal(whole.x, renoise(forest, 2, seed=3).x)
    second, _ = grown(TreeShape(2, 2), first_tree=1)  # the second of each prompt's trees, in another process
    split = renoise(second, 2, seed=3, first_tree=1).sigmas
    assert torch.equal(split, whole.sigmas.view(4, 8)[1::2].flatten())


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_is_its_public_codes_loss_on_denoised_images(beta):
    x0, eps, v, old = (drawn(6, 2, 3, 3, seed=i) for i in range(4))
    sigma, advantage = torch.linspace(0.1, 1, 6, dtype=torch.float64), torch.tensor([-7.0, -5, -1, 0, 2.5, 9])
    t, xt = sigma.view(-1, 1, 1, 1), None
    xt = (1 - t) * x0 + t * eps
    r = torch.tensor([0.0, 0, 0.4, 0.5, 0.75, 1])
    losses = []
    for policy in (beta * v + (1 - beta) * old, (1 + beta) * old - beta * v):
        error = xt - t * policy - x0
        losses.append((error**2 / error.abs().mean((1, 2, 3), keepdim=True)).mean((1, 2, 3)))
    published = 5 * (r * losses[0] + (1 - r) * losses[1]) / beta
    ours = nft(v, old, (eps - x0).unsqueeze(1), advantage.unsqueeze(1), sigma, beta)[:, 0]
    torch.testing.assert_close(ours, published)


@settings(deadline=None, max_examples=25)
@given(beta=st.floats(0.05, 2), r=st.floats(0, 1), seed=st.integers(0, 99))
def test_nfts_two_policies_are_one_quadratic(beta, r, seed):
    """r ||d + b dv||^2 + (1-r) ||d - b dv||^2 = ||d||^2 + 2b (2r-1) <dv, d> + b^2 ||dv||^2, d = v_old - goal, where
    both adaptive weights are the same: here d is positive throughout and dv small and of mean 0."""
    goal, d, dv = (
        drawn(1, 1, 4, 4, seed=seed),
        1 + drawn(1, 1, 4, 4, seed=seed + 1).abs(),
        drawn(1, 1, 4, 4, seed=seed + 2),
    )
    dv = 0.1 * (dv - dv.mean()) / dv.abs().max()
    old, sigma = goal + d, torch.tensor([0.7], dtype=torch.float64)
    advantage = torch.tensor([[10 * (r - 0.5)]], dtype=torch.float64)
    found = nft(old + dv, old, goal.unsqueeze(1), advantage, sigma, beta)
    expansion = (d**2 + 2 * beta * (2 * r - 1) * dv * d + beta**2 * dv**2).mean()
    torch.testing.assert_close(found[0, 0], 5 * 0.7**2 * expansion / (0.7 * d.mean()) / beta)


def test_on_policy_nft_awm_and_regression_point_the_same_way_at_every_image():
    """In v, up to each image's own factor: the velocity moves to good images and away from bad ones."""
    forest, velocity, advantages = case(shape=FLAT)
    leaf, directions = advantages[-1], {}
    states = renoise(forest, 1, seed=5)
    v = velocity(states.x, states.sigmas, states.rows).detach()
    goal = (states.x - forest.leaves) / states.sigmas.view(-1, 1, 1, 1)
    expected = leaf.view(-1, 1) * (goal - v).flatten(1)
    for loss in MATCHING:
        own = v.clone().requires_grad_()
        objective = Objective(loss=loss, states="renoised")
        each, _ = matched(objective, own, v, goal.unsqueeze(1), leaf.unsqueeze(1), states.sigmas)
        (slope,) = torch.autograd.grad(each.sum(), own)
        directions[loss] = torch.cosine_similarity(-slope.flatten(1), expected, dim=1)
    for loss, cosine in directions.items():
        torch.testing.assert_close(cosine, torch.ones_like(cosine), msg=loss)


def state_by_state(objective, forest, velocity, leaf, states):
    """The loss as it is defined: every noisy image with its own image, every window node with each of its leaves."""

    def one(v, old, goal, a, sigma):
        if objective.loss == "regression":
            return ((v - (old + objective.eta * a * (goal - old))) ** 2).mean()
        if objective.loss == "awm":
            ratio = torch.exp(sigma * (old - goal).square().mean() - sigma * (v - goal).square().mean())
            return -torch.minimum(ratio * a, ratio.clamp(0.7, 1.3) * a)
        r = min(max(0.5 + float(a) / 10, 0.0), 1.0)
        parts = [sigma * (old + sign * objective.beta * (v - old) - goal) for sign in (1, -1)]
        parts = [error.square().mean() / error.detach().abs().mean() for error in parts]
        return 5 * (r * parts[0] + (1 - r) * parts[1]) / objective.beta

    means = []
    if states is not None:
        losses = []
        for x, sigma, row, image, old in zip(states.x, states.sigmas, states.rows, states.leaves, states.old):
            v = velocity(x[None], sigma, row[None])[0]
            losses.append(one(v, old, (x - forest.leaves[image]) / sigma, leaf[image], sigma))
        means.append(sum(losses) / len(losses))
    if objective.on_window:
        losses = []
        for layer in range(forest.depth):
            below, sigma = len(leaf) // len(forest.states[layer]), forest.sigma(layer)[0]
            for node, x in enumerate(forest.states[layer]):
                v, old = (
                    velocity(x[None], sigma, forest.rows(layer)[node : node + 1])[0],
                    forest.velocities[layer][node],
                )
                own = range(node * below, (node + 1) * below)
                if objective.loss == "regression":  # one target for all of a node's images
                    pull = sum(leaf[i] * ((x - forest.leaves[i]) / sigma - old) for i in own) / below
                    losses.append(((v - (old + objective.eta * pull)) ** 2).mean())
                else:
                    each = [one(v, old, (x - forest.leaves[i]) / sigma, leaf[i], sigma) for i in own]
                    losses.append(sum(each) / below)
        means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


@pytest.mark.parametrize("states", ["window", "renoised", "both"])
@pytest.mark.parametrize("loss", MATCHING)
def test_every_matching_loss_is_its_state_by_state_definition(loss, states):
    objective = Objective(loss=loss, states=states, per_image=2, beta=0.3, trust=0.3, weighting="t", eta=0.6)
    forest, velocity, advantages = case(shape=TreeShape(2, 2, trees=2), prompts=(0,))
    noise = noisy(objective, forest)
    if noise:
        noise.remember(torch.arange(len(noise.x)), velocity(noise.x, noise.sigmas, noise.rows))
    move(velocity)
    expected = state_by_state(objective, forest, velocity, advantages[-1], noise)
    torch.testing.assert_close(total(objective, forest, velocity, advantages, noise), expected)


@settings(deadline=None, max_examples=10)
@given(
    branching=st.integers(1, 3),
    depth=st.integers(1, 2),
    trees=st.integers(1, 3),
    per_image=st.integers(1, 3),
    inner=st.integers(1, 3),
    kl=st.sampled_from([0.0, 0.1]),
    states=st.sampled_from(["auto", "window", "both"]),
    loss=st.sampled_from(["nft", "awm"]),
    micro_batch=st.integers(0, 5),
)
def test_updates_cost_what_the_closed_form_says(
    branching, depth, trees, per_image, inner, kl, states, loss, micro_batch
):
    shape = TreeShape(branching, depth, trees)
    forest, velocity, advantages = case(shape=shape)
    if shape.leaves == 1:
        return
    objective = Objective(loss=loss, states=states, per_image=per_image, kl=kl)
    optimizer, batch = torch.optim.SGD([velocity.delta], 0.01), MicroBatch(micro_batch)
    noise = noisy(objective, forest)
    row = update(
        velocity, forest, advantages, optimizer, objective, inner_updates=inner, micro_batch=batch, renoised=noise
    )
    assert row["update_forwards"] == 2 * learning_forwards(shape, objective, inner) and row["grad_norm"] > 0
    assert row["ratio_first"] == pytest.approx(1, abs=1e-12) and (row["ratio_mean"] != 1) == (inner > 1)


@pytest.mark.parametrize("loss", ["nft", "awm"])
def test_later_inner_updates_know_the_first_ones_velocities_on_any_split(loss):
    found = []
    for micro_batch in (0, 1, 3):
        forest, velocity, advantages = case(shape=FLAT)
        noise = renoise(forest, 2, seed=5)
        before = velocity(noise.x, noise.sigmas, noise.rows).detach()
        options = dict(inner_updates=3, micro_batch=MicroBatch(micro_batch), renoised=noise)
        optimizer = torch.optim.SGD([velocity.delta], 0.1)
        update(velocity, forest, advantages, optimizer, Objective(loss=loss, per_image=2), **options)
        torch.testing.assert_close(noise.old, before)
        found.append(velocity.delta.detach().clone())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_model_call_has_states_of_one_level_alone():
    """Conditioning that begins or ends at a level is ComfyUI's for a whole batch."""
    forest, velocity, advantages = case(shape=FLAT)
    seen, call = [], type(velocity).__call__

    class Watched(type(velocity)):
        def __call__(self, x, sigma, rows):
            seen.append((sigma, len(x)))
            return call(self, x, sigma, rows)

    velocity.__class__ = Watched
    objective = Objective(loss="nft", per_image=3)
    policy_gradient(velocity, forest, advantages, objective, renoised=noisy(objective, forest))
    levels = [sigma for sigma, _ in seen]
    assert all(isinstance(sigma, float) for sigma in levels) and len(set(levels)) == len(levels)
    assert sum(count for _, count in seen) == 2 * 5 * 3


def test_what_does_not_go_together_is_refused_in_one_sentence():
    for loss in ("grpo", "dppo", "softmax_tb"):
        with pytest.raises(ValueError, match=f"'{loss}' needs a tree's branches.*set states to window"):
            Objective(loss=loss, states="renoised")
    with pytest.raises(ValueError, match="needs the tree's nodes.*window or both"):
        Objective(loss="nft", sft=0.1)
    with pytest.raises(ValueError, match="at least 1 noisy state, not 0"):
        Objective(loss="nft", per_image=0)
    forest, velocity, advantages = case(shape=FLAT)
    with pytest.raises(ValueError, match="given to objectives that learn from them"):
        policy_gradient(velocity, forest, advantages, Objective(loss="nft"))


def test_the_adaptive_weight_has_no_gradient_and_a_floor():
    error = torch.tensor([[[3.0, -1.0]], [[0.0, 0.0]]], requires_grad=True)
    weight = adaptive_weight(error, torch.tensor([[0.5], [0.5]]))
    assert weight.flatten().tolist() == pytest.approx([1.0, 1e-5]) and not weight.requires_grad
