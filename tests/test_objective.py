"""Every term of the loss: gradients against finite differences, and what each setting must do."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import grown
from test_update import RANDOM_KINDS, case

from core.method.cost import learning_forwards
from core.method.matching import renoise
from core.method.memory import MicroBatch, saved_bytes
from core.method.noise import NoiseSchedule
from core.method.objective import (
    LOSSES,
    MATCHING,
    Objective,
    best_leaves,
    clip_ranges,
    dppo,
    gaussian_kl,
    log_ratio,
    node_values,
    path_log_probs,
    relative,
    sft_targets,
    sft_weights,
    softmax_tb_advantage,
    softmax_tb_shares,
    step_weights,
)
from core.method.steps import step
from core.method.tree import TreeShape
from core.method.update import _Loss, policy_gradient, score_edges

WIDE = dict(clip_low=10.0, clip_high=10.0)
TERMS = {
    "plain": Objective(**WIDE),
    "guard": Objective(ratio="guard", step_weight="guard", **WIDE),
    "tau": Objective(step_weight="tau", **WIDE),
    "clip": Objective(clip_low=0.01, clip_high=0.02),
    "dynamic clip": Objective(clip_low=0.005, clip_high=0.005, sensitivity=2.0),
    "kl": Objective(kl=0.3, **WIDE),
    "sft best-path": Objective(sft=0.5, target="best-path", **WIDE),
    "sft best-leaf": Objective(sft=0.5, target="best-leaf", **WIDE),
    "sft images": Objective(sft=0.5, target="images", **WIDE),
    "layer": Objective(step_weight="layer", **WIDE),
    "flash": Objective(step_weight="flash", **WIDE),
    "regression": Objective(loss="regression", eta=0.7),
    "regression to the base": Objective(loss="regression", anchor=1.0, step_weight="layer"),
    "dppo": Objective(loss="dppo"),
    "dppo guard": Objective(loss="dppo", trust=1e-4, ratio="guard", step_weight="tau"),
    "softmax_tb": Objective(loss="softmax_tb", beta=2.0, trust=10.0, reference=3.0),
    "softmax_tb clipped": Objective(loss="softmax_tb", trust=0.01, kl=0.1, step_weight="layer"),
    "regression within a node": Objective(loss="regression", anchor=0.3, leaf_weights="node", kl=0.2, sft=0.2),
    "nft": Objective(loss="nft", step_weight="layer"),
    "nft on nodes": Objective(loss="nft", states="window", beta=0.1, kl=0.2, step_weight="tau"),
    "nft on both": Objective(loss="nft", states="both", per_image=2, sft=0.1),
    "awm": Objective(loss="awm", per_image=2),
    "awm on nodes": Objective(loss="awm", states="window", weighting="t", trust=0.01, kl=0.2),
    "awm on both": Objective(loss="awm", states="both", weighting="uniform", kl=0.3),
    "regression on both": Objective(loss="regression", states="both", eta=0.7, anchor=0.2, per_image=3),
    "everything": Objective(0.01, 0.02, 1.0, "guard", "tau", 0.1, 0.2, "best-leaf"),
}


def move(velocity):
    """Another policy than the one that sampled."""
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        velocity.delta += 0.02 * torch.randn(velocity.delta.shape, generator=draw, dtype=torch.float64)


def off_policy(kind="cps", shape=TreeShape(3, 2)):
    forest, velocity, advantages = case(kind, shape)
    move(velocity)
    return forest, velocity, advantages


def images(forest):
    return torch.randn(
        len(forest.prompts), *forest.leaves.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )


def noisy(objective, forest):
    return renoise(forest, objective.per_image, seed=5) if objective.on_renoised else None


def total(objective, forest, velocity, advantages, renoised=None):
    states = len(renoised.x) if renoised else 0
    loss_of = _Loss(
        velocity,
        forest,
        advantages,
        objective,
        torch.ones(len(forest.prompts), dtype=torch.bool),
        images(forest),
        sum(layer.numel() for layer in advantages),
        renoised,
        states,
    )
    value = 0.0
    for layer in range(forest.depth) if objective.on_window else ():
        v = velocity(forest.states[layer], forest.sigma(layer)[0], forest.rows(layer))
        value = value + loss_of(layer, slice(0, len(v)), v)[0]
    for level in forest.sigmas[:-1] if renoised else ():
        chosen = torch.arange(states)[renoised.sigmas == level]
        v = velocity(renoised.x[chosen], level, renoised.rows[chosen])
        value = value + loss_of.of_renoised(chosen, v)[0]
    return value


def hold(monkeypatch, *places):
    """What has no gradient stays, in every later pass, what it was in the first one."""
    for place in places:
        module, name = place.rsplit(".", 1)
        real, held, calls = getattr(importlib.import_module(module), name), [], itertools.count()

        def same(*args, real=real, held=held, calls=calls):
            if not same.replay:
                held.append(real(*args))
                return held[-1]
            return held[next(calls) % len(held)]

        same.replay = False
        monkeypatch.setattr(place, same)
        yield same


@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
@pytest.mark.parametrize("name", TERMS)
def test_gradient_of_every_term_equals_finite_differences(name, kind, monkeypatch):
    objective = TERMS[name]
    forest, velocity, advantages = case(kind, TreeShape(3, 2))
    states = noisy(objective, forest)
    if states:  # the sampling policy's velocities, as a first inner update leaves them
        states.remember(torch.arange(len(states.x)), velocity(states.x, states.sigmas, states.rows))
    move(velocity)
    held = list(hold(monkeypatch, "core.method.update.softmax_tb_advantage", "core.method.matching.adaptive_weight"))
    policy_gradient(velocity, forest, advantages, objective, images=images(forest), renoised=states)
    for function in held:
        function.replay = True
    direction = torch.randn(velocity.delta.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    slope = float((velocity.delta.grad * direction).sum())
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            velocity.delta += sign * 1e-6 * direction
            values.append(float(total(objective, forest, velocity, advantages, states)))
            velocity.delta -= sign * 1e-6 * direction
    assert abs(slope) > 1e-6 and slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=2e-5)


@pytest.mark.parametrize("name", TERMS)
def test_every_term_is_the_same_on_any_split_and_with_retained_graphs(name):
    objective = TERMS[name]
    forest, velocity, advantages = case()
    rest = {"images": images(forest)}
    before = velocity.forwards
    metrics = policy_gradient(velocity, forest, advantages, objective, **rest, renoised=noisy(objective, forest))
    assert abs(metrics["ratio_mean"] - 1) < 1e-12
    cost = learning_forwards(TreeShape(3, 2, trees=2), objective)
    assert velocity.forwards - before == 2 * cost
    whole, velocity.delta.grad = velocity.delta.grad, None
    states = noisy(objective, forest)
    policy_gradient(velocity, forest, advantages, objective, **rest, renoised=states, micro_batch=MicroBatch(3))
    torch.testing.assert_close(velocity.delta.grad, whole, atol=1e-13, rtol=1e-9)

    kept, fresh = grown(
        TreeShape(3, 2, trees=2),
        start=1,
        schedule=NoiseSchedule("cps", level=0.5, shape="linear", beta=0.3, rho_min=0.5),
        retain=1e9,
    )
    if not objective.on_window:
        with pytest.raises(ValueError, match="has no graphs to keep: turn retain_graphs off"):
            policy_gradient(fresh, kept, advantages, objective, **rest, renoised=states)
        return
    before = fresh.forwards
    policy_gradient(fresh, kept, advantages, objective, **rest, renoised=noisy(objective, kept))
    torch.testing.assert_close(fresh.delta.grad, whole, atol=1e-13, rtol=1e-9)
    assert not kept.graphs
    assert fresh.forwards - before == 2 * learning_forwards(TreeShape(3, 2, trees=2), objective, retained=True)


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_normalised_ratio_has_no_bias_and_no_scale(kind):
    """GRPO-Guard: log r = mean(z dmu). The plain log ratio has mean -mean(dmu^2)/(2 tau^2)."""
    x, v = (torch.randn(1, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    z = torch.randn(20000, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    args = (kind, x.expand(20000, 6))
    old = step(*args, v.expand(20000, 6), 0.8, 0.6, 0.5, 0.96, noise=z)
    new = step(*args, (v + 0.1).expand(20000, 6), 0.8, 0.6, 0.5, 0.96, next_latent=old.latent)
    guard = log_ratio("guard", new, old.log_prob, old.mean)
    torch.testing.assert_close(guard, (z * (new.mean - old.mean)).mean(1), atol=1e-12, rtol=1e-9)
    assert abs(float(guard.mean())) < 4 * float(guard.std()) / 20000**0.5
    plain = log_ratio("plain", new, old.log_prob, old.mean)
    assert float(plain.mean()) == pytest.approx(
        -float(gaussian_kl(new.mean, old.mean, old.std)[0]), abs=4 * float(plain.std()) / 20000**0.5
    )


def test_kl_is_the_gaussian_one_and_zero_at_the_reference():
    mean, other, std = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 2.5]]), torch.tensor([[0.3]])
    torch_kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(other, std)
    ).mean(1)
    torch.testing.assert_close(gaussian_kl(mean, other, std), torch_kl)
    assert gaussian_kl(mean, other, torch.zeros(1, 1)).tolist() == [0.0]
    forest, velocity, advantages = case()
    with torch.no_grad():
        velocity.delta.zero_()
    assert policy_gradient(velocity, forest, advantages, Objective(kl=1.0))["kl"] == 0


def test_dynamic_clip_widens_for_the_deserving():
    low, high = clip_ranges(Objective(clip_low=0.1, clip_high=0.2, sensitivity=3.0), torch.tensor([0.0, 0.5, 1.0]))
    assert low.tolist() == pytest.approx([0.4, 0.25, 0.1]) and high.tolist() == pytest.approx([0.2, 0.5, 0.8])
    low, high = clip_ranges(Objective(clip_low=0.1, clip_high=0.2), torch.tensor([0.0, 0.5, 1.0]))
    assert low.tolist() == pytest.approx([0.1] * 3) and high.tolist() == pytest.approx([0.2] * 3)


def test_step_weights_have_mean_one():
    forest, _, _ = case()
    for kind in ("none", "tau", "guard", "flash"):
        assert sum(step_weights(kind, forest, [0.2, 0.6])) / 2 == pytest.approx(1)
    assert step_weights("tau", forest, [0.2, 0.6]) == pytest.approx([0.5, 1.5])
    first, second = step_weights("layer", forest, [0.2, 0.6])
    assert first == pytest.approx(3 * second) and (first * 3 + second * 9) / 12 == pytest.approx(1)


def test_layer_weights_give_every_layer_its_own_mean():
    forest, velocity, advantages = off_policy()
    whole = total(Objective(step_weight="layer", **WIDE), forest, velocity, advantages)
    means = []
    for layer, advantage in enumerate(advantages):
        v = velocity(forest.states[layer], forest.sigma(layer)[0], forest.rows(layer))
        log_prob = score_edges(forest, layer, slice(0, len(v)), v).log_prob
        means.append(-(torch.exp(log_prob - forest.log_probs[layer]) * advantage).mean())
    torch.testing.assert_close(whole, sum(means) / 2)


@settings(deadline=None, max_examples=30)
@given(
    branching=st.integers(2, 4),
    depth=st.integers(1, 3),
    trees=st.integers(1, 2),
    beta=st.floats(0.1, 20),
    scale=st.floats(0.01, 5),
    seed=st.integers(0, 99),
)
def test_softmax_tbs_residual_splits_exactly_over_the_edges(branching, depth, trees, beta, scale, seed):
    """A path's residual, as TMPO defines it over a whole tree, is the sum of its edges' shares."""
    forest, _, _ = case(shape=TreeShape(branching, depth, trees))
    draw = torch.Generator().manual_seed(seed)
    forest.log_probs = [scale * torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in forest.log_probs]
    leaf = torch.randn(len(forest.leaves), generator=draw, dtype=torch.float64)
    shares, onward = softmax_tb_shares(Objective(loss="softmax_tb", beta=beta), forest, leaf)
    parts = [softmax_tb_advantage(p, *edge, branching) for p, *edge in zip(forest.log_probs, shares, onward)]
    tree = branching**depth
    whole = torch.log_softmax(beta * leaf.view(-1, tree), 1) - torch.log_softmax(
        path_log_probs(forest.log_probs, branching).view(-1, tree), 1
    )
    torch.testing.assert_close(path_log_probs(parts, branching), whole.flatten(), atol=1e-12, rtol=1e-12)


def test_softmax_tb_on_one_layer_is_tmpos_loss():
    """tmpo/losses: A = log_softmax(beta R) - log_softmax(log p), ratio exp(d - mean d), clip 0.2, reference 0.1; at any
    policy, as many optimizer steps as one likes after the rollout."""
    forest, velocity, advantages = off_policy(shape=TreeShape(4, 1))
    leaf, v = advantages[-1].view(2, 4), velocity(forest.states[0], forest.sigma(0)[0], forest.rows(0))
    new = score_edges(forest, 0, slice(0, 2), v).log_prob.view(2, 4)
    d = new - forest.log_probs[0].view(2, 4)
    residual = (torch.log_softmax(15 * leaf, 1) - torch.log_softmax(new, 1)).detach()
    ratio = torch.exp(d - d.mean(1, keepdim=True))  # tmpo's code stops the mean's gradient, see softmax_tb
    published = torch.maximum(-residual * ratio, -residual * ratio.clamp(0.8, 1.2)).mean() + 0.1 * (d**2).mean()
    torch.testing.assert_close(total(Objective(loss="softmax_tb"), forest, velocity, advantages), published)


def test_softmax_tb_needs_siblings():
    forest, velocity, advantages = case(shape=TreeShape(1, 2, trees=3))
    with pytest.raises(ValueError, match="compares siblings, and these trees have none: raise branching"):
        policy_gradient(velocity, forest, advantages, Objective(loss="softmax_tb"))


def test_dppo_drops_only_edges_that_are_far_and_going_further():
    """UniRL's flowdppo.py: kl >= threshold and the ratio already on its advantage's side of 1."""
    log_r = torch.tensor([0.1, 0.1, -0.1, -0.1, 0.1], requires_grad=True)
    advantage, kl = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-6])
    each, ratio, dropped = dppo(log_r, advantage, kl, 1e-5)
    assert dropped.tolist() == [True, False, True, False, False]
    torch.testing.assert_close(each, torch.where(dropped, 0.0, -torch.exp(log_r) * advantage))
    (slope,) = torch.autograd.grad(each.sum(), log_r)
    assert (slope == 0).tolist() == dropped.tolist() and torch.equal(ratio, torch.exp(log_r).detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_flat_groups_teach_nothing_in_whatever_slice_they_are(loss):
    """Off policy, where even a leaf without advantage would pull: a flat group's nodes alone, or beside others."""
    forest, velocity, advantages = off_policy()
    half = [layer * (torch.arange(len(layer)) < len(layer) // 2) for layer in advantages]
    objective = Objective(loss=loss, states="both" if loss in MATCHING else "auto")
    states = noisy(objective, forest)
    policy_gradient(velocity, forest, half, objective, renoised=states)
    whole, velocity.delta.grad = velocity.delta.grad, None
    before = velocity.forwards
    policy_gradient(velocity, forest, half, objective, renoised=states, micro_batch=MicroBatch(1))
    assert velocity.forwards - before == learning_forwards(TreeShape(3, 2, trees=1), objective)  # one of two prompts
    torch.testing.assert_close(velocity.delta.grad, whole, atol=1e-14, rtol=1e-9)


def leaf_by_leaf(objective, forest, velocity, leaf):
    """Tree regression as it is defined: every leaf of every node on its own."""
    losses = []
    for layer in range(forest.depth):
        below = len(leaf) // len(forest.states[layer])
        for node, x in enumerate(forest.states[layer]):
            sigma, row = forest.sigma(layer)[0], forest.rows(layer)[node : node + 1]
            old, own = forest.velocities[layer][node], range(node * below, (node + 1) * below)
            mean = sum(leaf[l] for l in own) / below if objective.leaf_weights == "node" else 0.0
            pull = sum((leaf[l] - mean) * ((x - forest.leaves[l]) / sigma - old) for l in own) / below
            with velocity.reference(), torch.no_grad():
                base = velocity(x[None], sigma, row)[0]
            goal = (1 - objective.anchor) * old + objective.anchor * base + objective.eta * pull
            losses.append(((velocity(x[None], sigma, row)[0] - goal) ** 2).mean())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("leaf_weights", ["group", "node"])
@pytest.mark.parametrize("anchor", [0.0, 0.4, 1.0])
def test_tree_regression_is_its_leaf_by_leaf_definition(anchor, leaf_weights):
    objective = Objective(loss="regression", eta=0.6, anchor=anchor, leaf_weights=leaf_weights)
    forest, velocity, advantages = off_policy(shape=TreeShape(3, 2, trees=2))
    torch.testing.assert_close(
        total(objective, forest, velocity, advantages), leaf_by_leaf(objective, forest, velocity, advantages[-1])
    )


def test_regression_without_advantages_and_anchor_costs_nothing():
    forest, velocity, advantages = case()
    before = velocity.forwards
    none = [torch.zeros_like(layer) for layer in advantages]
    metrics = policy_gradient(velocity, forest, none, Objective(loss="regression"))
    assert velocity.forwards == before and metrics["edges_trained"] == 0


def test_on_the_sampling_policy_regression_without_anchor_is_diffusion_nfts_loss():
    """DiffusionNFT (arXiv 2509.16117) on one leaf: its implicit positive and negative velocities around v_old.
    Its minimiser is v_old + (2r - 1)/beta (u - v_old), so both gradients point the same way at any policy."""
    forest, velocity, _ = off_policy(shape=TreeShape(1, 1))
    beta, r = 0.5, torch.tensor(0.8, dtype=torch.float64)
    x, sigma, old = forest.states[0], forest.sigma(0)[0], forest.velocities[0]
    u = (x - forest.leaves) / sigma
    v = velocity(x, sigma, forest.rows(0))
    positive, negative = (1 - beta) * old + beta * v, (1 + beta) * old - beta * v
    r = r.expand(len(x)).view(-1, 1, 1, 1)
    published = (r * (positive - u) ** 2 + (1 - r) * (negative - u) ** 2).flatten(1).mean(1).mean()
    (theirs,) = torch.autograd.grad(published, velocity.delta)
    leaf = (2 * r.flatten() - 1) / beta
    ours = _Loss(velocity, forest, [leaf], Objective(loss="regression"), torch.ones(2, dtype=torch.bool), None, 2)
    (mine,) = torch.autograd.grad(ours(0, slice(0, len(x)), velocity(x, sigma, forest.rows(0)))[0], velocity.delta)
    torch.testing.assert_close(theirs, beta**2 * mine)


def test_imitation_targets():
    forest, _, advantages = case()
    leaf = advantages[-1]
    best = best_leaves(leaf, forest)
    per_prompt = forest.leaves_per_prompt
    for prompt in range(2):
        group = leaf[prompt * per_prompt : (prompt + 1) * per_prompt]
        assert leaf[best[prompt]] == group.max()
    for layer in range(2):
        nodes = len(forest.states[layer]) // 2
        path = sft_targets(Objective(target="best-path"), forest, leaf, layer)
        own = best // forest.branching ** (2 - layer)
        for prompt in range(2):
            assert torch.equal(
                path[prompt * nodes : (prompt + 1) * nodes],
                forest.velocities[layer][own[prompt]].expand(nodes, -1, -1, -1),
            )
        flow = sft_targets(Objective(target="best-leaf"), forest, leaf, layer)
        # following the target velocity to sigma 0 gives the best leaf
        reached = forest.states[layer] - forest.sigma(layer)[0] * flow
        torch.testing.assert_close(reached, forest.leaves[best].repeat_interleave(nodes, 0))
    with pytest.raises(ValueError, match="no images are connected"):
        sft_targets(Objective(target="images"), forest, leaf, 0)


def test_the_worst_learn_most_and_bad_groups_are_not_imitated():
    forest, _, advantages = case()
    shares = relative(node_values(advantages[-1], forest), forest)
    weights = sft_weights(shares[-1], torch.tensor([True, False]))
    assert float(weights[:18].max()) == 1 and float(weights[:18].min()) == 0 and float(weights[18:].abs().max()) == 0


def test_unknown_choices_are_named():
    for name in ("ratio", "step_weight", "target", "loss", "leaf_weights", "states", "weighting"):
        bad = {name: "x"}
        with pytest.raises(ValueError, match="choose one of"):
            Objective(**bad)
    with pytest.raises(ValueError, match="a share between 0 and 1, not 2"):
        Objective(anchor=2.0)


def test_out_of_memory_halves_the_batch_and_goes_on():
    calls, batch = [], MicroBatch(8)

    def work(first, last):
        if last - first > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        calls.append((first, last))

    batch.run(10, work)
    assert batch.size == 2 and calls == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    with pytest.raises(RuntimeError, match="Not even one latent fits"):
        MicroBatch(1).run(2, lambda first, last: work(0, 99))


def test_an_update_interrupted_by_lack_of_memory_is_the_same_update():
    forest, velocity, advantages = case()
    policy_gradient(velocity, forest, advantages, TERMS["plain"])
    whole, velocity.delta.grad = velocity.delta.grad, None
    plain_call = type(velocity).__call__

    class Tight(type(velocity)):
        def __call__(self, x, sigma, rows):
            if len(x) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return plain_call(self, x, sigma, rows)

    velocity.__class__ = Tight
    policy_gradient(velocity, forest, advantages, TERMS["plain"])
    torch.testing.assert_close(velocity.delta.grad, whole, atol=1e-14, rtol=1e-9)


def test_saved_bytes_counts_activations_once_and_no_weights():
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(10, 64)
    used, output = saved_bytes(lambda: torch.relu(x @ weight), [weight])
    assert used == 2 * 10 * 64 * 4  # the input and relu's output
    assert torch.equal(output, torch.relu(x @ weight))


def test_graphs_that_do_not_fit_are_recomputed():
    schedule = NoiseSchedule("cps", level=0.5)
    fits, velocity = grown(TreeShape(3, 2), schedule=schedule, retain=1e9)
    assert sorted(fits.graphs) == [(0, 0), (1, 0)]
    tight, velocity = grown(TreeShape(3, 2), schedule=schedule, retain=1)
    assert not tight.graphs and torch.equal(tight.leaves, fits.leaves)
    before = velocity.forwards
    policy_gradient(velocity, tight, [torch.ones_like(p) for p in tight.log_probs], TERMS["plain"])
    assert velocity.forwards - before == 2 * 4


def test_scoring_uses_only_the_given_parents():
    forest, velocity, _ = case()
    v = forest.velocities[1]
    whole = score_edges(forest, 1, slice(0, len(v)), v).log_prob
    part = score_edges(forest, 1, slice(2, 5), v[2:5]).log_prob
    torch.testing.assert_close(part, whole[6:15])
