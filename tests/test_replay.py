"""Replay: what is remembered of a forest, the states made of it, and its loss and gradient."""

from types import SimpleNamespace

import pytest
import torch
from test_objective import off_policy
from test_tree import grown
from test_update import gradient

from core.method.objective import Objective
from core.method.replay import PER_VISIT, Replayed, remember, states
from core.method.tree import TreeShape
from core.references import EditPrompt, key_of
from core.runs.trainer import Settings, refuse_split

SHAPE = TreeShape(2, 2)
TEXTS = ["a cat", "a dog"]
SIGMAS = torch.linspace(1, 0, 9)


def test_the_best_of_the_good_ones_are_remembered_until_a_prompt_has_enough():
    forest, _ = grown(SHAPE, prompts=range(2))
    rewards = torch.tensor([0.5, 0.9, 0.8, 0.95, 0.1, torch.nan, 0.85, 0.7])
    store = {}
    remember(store, forest, TEXTS, rewards, 0.8, 3)
    expected = {"a cat": forest.leaves[[3, 1]].half(), "a dog": forest.leaves[[6]].half()}
    assert store.keys() == expected.keys() and all(torch.equal(store[key], expected[key]) for key in store)
    remember(store, forest, TEXTS, rewards, 0.8, 3)
    assert [len(kept) for kept in store.values()] == [3, 2] and torch.equal(store["a cat"][:2], expected["a cat"])
    remember(store, forest, TEXTS, rewards, 0.8, 3)
    remember(store, forest, TEXTS, rewards, 0.96, 9)
    assert [len(kept) for kept in store.values()] == [3, 3] and PER_VISIT == 2


def test_a_picture_that_is_no_number_is_not_remembered():
    forest, _ = grown(SHAPE, prompts=range(2))
    forest.leaves = forest.leaves.clone()
    forest.leaves[3, 0, 0, 0] = torch.nan
    store = {}
    remember(store, forest, TEXTS, torch.arange(8.0), 0.0, 1)
    assert torch.equal(store["a cat"], forest.leaves[[2]].half())


def test_prompts_are_told_apart_by_their_reference_image():
    pictures = torch.rand(2, 4, 4, 3)
    assert len({key_of("a cat"), *(key_of(EditPrompt("a cat", picture)) for picture in pictures)}) == 3


def stored(count=11):
    return {"a cat": torch.randn(count, 4, 2, 2).half(), "a dog": torch.randn(3, 4, 2, 2).half()}


def test_states_are_the_prompts_pictures_with_fresh_noise_at_levels_of_the_schedule():
    store = stored()
    made = states(store, ["a dog", "a bird", "a cat"], SIGMAS, 0.5, 11, seed=3, iteration=7)
    assert made.weight == 0.5 / 33 and sorted(made.rows.tolist()) == [0] * 3 + [2] * 11
    assert set(made.sigmas.tolist()) <= set(SIGMAS[:-1].tolist()) and len(made.sigmas.unique()) <= 2
    pictures = made.x - made.sigmas.view(-1, 1, 1, 1) * made.goal  # x = (1 - s) x0 + s eps, goal = eps - x0
    known = torch.cat([store["a dog"], store["a cat"]]).float()
    found = torch.cdist(pictures.flatten(1), known.flatten(1)).min(1)
    assert found.values.max() < 1e-4 and len(found.indices.unique()) == 14
    for row, place in zip(made.rows.tolist(), found.indices.tolist()):
        assert (row == 0) == (place < 3)
    same = states(store, ["a dog", "a bird", "a cat"], SIGMAS, 0.5, 11, 3, 7)
    other = states(store, ["a dog", "a bird", "a cat"], SIGMAS, 0.5, 11, 3, 8)
    assert torch.equal(same.x, made.x) and not torch.equal(other.x, made.x)
    assert states(store, ["a bird"], SIGMAS, 0.5, 11, 3, 7) is None


@pytest.mark.parametrize("loss", ["regression", "grpo"])
def test_the_gradient_is_the_objectives_and_that_of_imitation(loss):
    forest, model, advantages = off_policy(shape=SHAPE)
    objective = Objective(loss=loss)
    shape = forest.leaves.shape[1:]
    draw = torch.Generator().manual_seed(0)
    x, goal = (torch.randn((5, *shape), generator=draw, dtype=torch.float64) for _ in range(2))
    replayed = Replayed(x, torch.tensor([0.5, 0.25, 0.5, 0.75, 0.25]), torch.tensor([0, 1, 1, 0, 0]), goal, 0.3)

    before = model.forwards
    alone, row = gradient(forest, model, advantages, objective)
    cost = model.forwards - before
    both, told = gradient(forest, model, advantages, objective, replayed=replayed)
    assert model.forwards - before == 2 * cost + 5
    with model.grad():
        v = torch.cat([model(x[i : i + 1], float(replayed.sigmas[i]), replayed.rows[i : i + 1]) for i in range(5)])
        value = 0.3 * (v - goal).square().flatten(1).mean(1).sum()
        expected = torch.autograd.grad(value, model.delta)[0]
    torch.testing.assert_close(both - alone, expected, rtol=1e-9, atol=1e-12)
    assert told["replay_loss"] == pytest.approx(float(value)) and "replay_loss" not in row
    assert told["loss"] == row["loss"] and told["ratio_mean"] == row["ratio_mean"]


def test_several_processes_are_refused():
    two = SimpleNamespace(size=2, per_prompt=1, lockstep=False, refuse=lambda *args: None)
    refuse_split(two, SHAPE, Objective(), SimpleNamespace(group_wise=False), Settings(), 4)
    with pytest.raises(ValueError, match="set settings.replay to 0"):
        refuse_split(two, SHAPE, Objective(), SimpleNamespace(group_wise=False), Settings(replay=0.5), 4)
