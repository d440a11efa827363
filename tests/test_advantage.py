"""Group normalisation and backup: against the peers' values and against what they must obey."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.method.advantage import backup, branch_advantages, edge_advantages, leaf_advantages, total_reward

REFERENCE = json.loads((Path(__file__).parent / "data" / "step_values.json").read_text())


def layers_of(values, branching, depth):
    """A level-order list of edges as one tensor per layer."""
    values, out = torch.tensor(values, dtype=torch.float64), []
    for k in range(1, depth + 1):
        out.append(values[: branching**k])
        values = values[branching**k :]
    return out


def names(branching, depth):
    """Node names of the reference, layer by layer: r0, r1, r00 ..."""
    layer, out = ["r"], []
    for _ in range(depth):
        layer = [name + str(child) for name in layer for child in range(branching)]
        out.append(layer)
    return out


@pytest.mark.parametrize(
    "case",
    [c for c in REFERENCE["tree"] if "node_reward" in c],
    ids=lambda c: f"k{c['k']}d{c['d']}-weighted{c['use_prob_weighted']}",
)
def test_backup_agrees_with_branchgrpo(case):
    log_probs = layers_of(case["edge_logps_level_order"], case["k"], case["d"])
    leaf = torch.tensor(case["leaf_rewards"], dtype=torch.float64)
    ours = backup(log_probs, leaf, case["k"], "mean-logprob" if case["use_prob_weighted"] else "uniform")
    for layer, layer_names in zip(ours, names(case["k"], case["d"])):
        expected = torch.tensor([case["node_reward"][name] for name in layer_names], dtype=torch.float64)
        torch.testing.assert_close(layer, expected, atol=1e-6, rtol=0)  # the peer works in fp32
    if not case["use_prob_weighted"]:
        for layer, layer_names in zip(
            branch_advantages(leaf, case["d"], case["k"], prompts=1), names(case["k"], case["d"])
        ):
            expected = torch.tensor([case["node_advantage"][name] for name in layer_names], dtype=torch.float64)
            torch.testing.assert_close(layer, expected, atol=1e-4, rtol=0)


def test_leaf_advantages_agree_with_flow_grpo():
    """The peer's PerPromptStatTracker divides by std + 1e-4, ours by std + 1e-8."""
    case = next(c for c in REFERENCE["advantage"] if not c["global_std"])
    for prompt in ("a", "b", "c"):
        chosen = [i for i, p in enumerate(case["prompts"]) if p == prompt]
        rewards = torch.tensor([case["rewards"][i] for i in chosen], dtype=torch.float64)
        ours, flat = leaf_advantages({"r": rewards}, 1)
        std = rewards.std(correction=0)
        expected = (
            torch.tensor([case["advantages"][i] for i in chosen], dtype=torch.float64) * (std + 1e-4) / (std + 1e-8)
        )
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)
        assert bool(flat) == (prompt == "c")


groups = st.integers(1, 3), st.integers(2, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 10**6)


@settings(deadline=None, max_examples=50)
@given(*groups)
def test_advantages_sum_to_zero_per_group(prompts, branching, depth, trees, seed):
    leaves = trees * branching**depth
    draw = torch.Generator().manual_seed(seed)
    rewards = {
        "a": torch.rand(prompts * leaves, generator=draw),
        "b": 100 + 10 * torch.rand(prompts * leaves, generator=draw),
    }
    leaf, flat = leaf_advantages(rewards, prompts, {"a": 0.8, "b": 0.2}, clip=1e9)
    assert not flat.any() and leaf.view(prompts, -1).sum(1).abs().max() < 1e-3
    for estimator in ("trajectory", "branchgrpo"):
        log_probs = [torch.zeros(prompts * trees * branching ** (k + 1)) for k in range(depth)]
        for layer in edge_advantages(estimator, log_probs, leaf, branching, prompts):
            assert layer.view(prompts, -1).sum(1).abs().max() < 1e-3


def test_two_rewards_are_scaled_before_they_are_weighted():
    small, large = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([900.0, 300.0, 600.0])
    together, _ = leaf_advantages({"small": small, "large": large}, 1, {"small": 0.5, "large": 0.5})
    alone = [leaf_advantages({"r": r}, 1)[0] for r in (small, large)]
    torch.testing.assert_close(together, 0.5 * alone[0] + 0.5 * alone[1])
    rescaled, _ = leaf_advantages({"small": 1000 * small - 7, "large": large}, 1, {"small": 0.5, "large": 0.5})
    torch.testing.assert_close(rescaled, together, atol=1e-5, rtol=0)


def test_softmax_weights_prefer_the_likelier_child():
    log_probs = [torch.tensor([0.0, 0.0]), torch.tensor([2.0, 0.0, 0.0, 0.0])]
    leaf = torch.tensor([1.0, -1.0, 1.0, -1.0])
    mean, total = backup(log_probs, leaf, 2), backup(log_probs, leaf, 2, "sum-logprob", elements=1000)
    assert mean[0].tolist() == pytest.approx(
        [(torch.tensor(2.0).exp() - 1).item() / (torch.tensor(2.0).exp() + 1).item(), 0.0]
    )
    assert total[0].tolist() == pytest.approx([1.0, 0.0])
    assert backup(log_probs, leaf, 2, "uniform")[0].tolist() == [0.0, 0.0]


def test_a_group_without_spread_trains_nothing():
    rewards = torch.cat([torch.full((4,), 0.3), torch.tensor([0.1, 0.2, 0.3, 0.4])])
    leaf, flat = leaf_advantages({"r": rewards}, 2)
    assert flat.tolist() == [True, False] and leaf[:4].abs().max() == 0 and leaf[4:].abs().min() > 0


def test_outliers_are_clipped():
    leaf, _ = leaf_advantages({"r": torch.tensor([0.0] * 99 + [1.0])}, 1)
    assert float(leaf.max()) == 5


@pytest.mark.parametrize(
    "rewards, prompts, message",
    [
        ({}, 1, "no reward"),
        ({"r": torch.ones(3)}, 3, "group of one"),
        ({"r": torch.ones(5)}, 2, "5 scores for 2 prompts"),
        ({"r": torch.tensor([float("nan"), float("inf")])}, 1, "'r' is not a number for any of the 2 images"),
    ],
)
def test_bad_rewards_are_refused(rewards, prompts, message):
    with pytest.raises(ValueError, match=message):
        leaf_advantages(rewards, prompts)


@pytest.mark.parametrize("hole", [float("nan"), float("inf"), float("-inf")])
def test_a_missing_score_is_masked_and_never_counts_as_zero(hole):
    known = torch.tensor([3.0, 5.0, 9.0])
    alone, _ = leaf_advantages({"r": known}, 1)
    masked, flat = leaf_advantages({"r": torch.tensor([3.0, hole, 5.0, 9.0])}, 1)
    torch.testing.assert_close(masked[[0, 2, 3]], alone)
    assert masked[1] == 0 and not flat
    other = torch.tensor([1.0, 2.0, 3.0, 4.0])
    both, _ = leaf_advantages({"r": torch.tensor([3.0, hole, 5.0, 9.0]), "other": other}, 1)
    torch.testing.assert_close(both, masked + leaf_advantages({"other": other}, 1)[0])


def test_a_group_without_any_score_trains_nothing_and_leaves_the_others_alone():
    rewards = torch.tensor([float("nan")] * 3 + [1.0, 2.0, 4.0])
    leaf, flat = leaf_advantages({"r": rewards}, 2)
    assert flat.tolist() == [True, False] and leaf[:3].abs().max() == 0
    torch.testing.assert_close(leaf[3:], leaf_advantages({"r": rewards[3:]}, 1)[0])


def test_the_raw_sum_lets_the_larger_numbers_count_more():
    small, large = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([400.0, 100.0, 300.0, 200.0])
    raw, _ = leaf_advantages({"small": small, "large": large}, 1, {"small": 2.0, "large": 0.5}, raw=True)
    torch.testing.assert_close(raw, leaf_advantages({"sum": 2 * small + 0.5 * large}, 1)[0])
    assert raw.argsort().tolist() == large.argsort().tolist()
    hole, _ = leaf_advantages({"small": small, "large": torch.tensor([400.0, float("nan"), 300.0, 200.0])}, 1, raw=True)
    assert hole[1] == 0 and hole.isfinite().all()


def test_the_total_is_missing_where_a_part_is():
    total = total_reward({"a": torch.tensor([1.0, float("nan")]), "b": torch.tensor([2.0, 2.0])}, {"a": 3.0})
    assert total[0] == 5 and total[1].isnan()


def test_slas_is_its_formula_and_its_scale_is_the_batchs():
    rewards = torch.tensor([0.0, 1.0, 2.0, 5.0, 0.1, 0.2, 0.3, 0.4, 7.0, 7.0, 7.0, 7.0, 1.0, torch.nan, 3.0, torch.nan])
    gamma = 0.5
    shaped, flat = leaf_advantages({"r": rewards}, 4, clip=100.0, shaping="slas", gamma=gamma)
    distance = torch.tensor([-2.0, -1, 0, 3, -0.15, -0.05, 0.05, 0.15, 0, 0, 0, 0, -1, 0, 1, 0])
    power = distance.sign() * distance.abs() ** (1 + gamma)
    expected = power / power[rewards.isfinite()].std(correction=0)
    torch.testing.assert_close(shaped, expected, atol=1e-6, rtol=1e-5)
    assert flat.tolist() == [False, False, True, False]
    again, _ = leaf_advantages({"r": 3 * rewards + 2}, 4, clip=100.0, shaping="slas", gamma=gamma)
    torch.testing.assert_close(again, shaped, atol=1e-5, rtol=1e-4)
    z, _ = leaf_advantages({"r": rewards}, 4, clip=100.0)
    # the second prompt's small spread counts little, as it does not for z-scores
    assert shaped[4:8].abs().max() < 0.1 < z[4:8].abs().min()


def test_shapings_are_checked():
    with pytest.raises(ValueError, match="Unknown shaping 'x': choose one of z-score, slas"):
        leaf_advantages({"r": torch.arange(4.0)}, 1, shaping="x")
    with pytest.raises(ValueError, match="0 or more, not -1"):
        leaf_advantages({"r": torch.arange(4.0)}, 1, shaping="slas", gamma=-1.0)
