"""Schedules that begin a rounding error below 1, and latents that no model makes."""

import math

import pytest
import torch
from graph import Graph
from test_mixed_prompts import C_H_W, SHAPE, host, kind_of_host  # noqa: F401  fixtures
from test_tree import grown

from core.method import noise
from core.method.advantage import Scores, edge_advantages
from core.method.iteration import broken_latents, score
from core.method.noise import NoiseSchedule
from core.method.objective import Objective
from core.method.rollout import grow
from core.method.steps import KINDS
from core.method.tree import ABSURD, sound
from core.method.update import policy_gradient

ROUNDED = 0.99999994


def sigmas(first):
    return torch.tensor([first, 0.93, 0.5, 0.2, 0.0])


def test_fluxs_schedule_begins_below_1(comfy):
    """Else the tests of this file show nothing."""
    import comfy.model_sampling
    import comfy.samplers

    class Sampling(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
        pass

    sampling = Sampling()
    pixels = 1088 * 1088
    slope = (1.15 - 0.5) / (4096 - 256)
    sampling.set_parameters(shift=pixels / 256 * slope + 0.5 - slope * 256)
    assert float(comfy.samplers.calculate_sigmas(sampling, "simple", 10)[0]) == pytest.approx(ROUNDED, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_from_a_rounded_sigma_is_the_tree_from_1(host, kind):  # noqa: F811
    made, found = host(), []
    for first in (ROUNDED, 1.0):
        with made.session([0, 1]) as velocity:
            roots = noise.roots(C_H_W, 5, 3, [0, 1], 1)
            schedule = NoiseSchedule(kind, 0.7, rho_min=0.5)
            forest = grow(velocity, roots, sigmas(first), SHAPE, schedule, start=0, prompts=[0, 1])
            leaf = torch.linspace(-1, 1, len(forest.leaves))
            advantages = edge_advantages("treegrpo", forest.log_probs, leaf, 2, 2, "mean-logprob", 1024)
            metrics = policy_gradient(velocity, forest, advantages, Objective())
        assert metrics["ratio_mean"] == 1 and not broken_latents(forest).any()
        found.append(forest)
    rounded, whole = found
    for one, other in zip([*rounded.states, rounded.leaves], [*whole.states, whole.leaves]):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert float(rounded.states[1].std()) < 10


@pytest.mark.parametrize("value, is_sound", [(1.0, True), (ABSURD, True), (1.1 * ABSURD, False), (1e30, False)])
def test_what_a_sound_latent_is(value, is_sound):
    latents = torch.ones(3, 1, 2, 2)
    latents[1] *= value
    assert sound(latents).tolist() == [True, is_sound, True]
    for number in (math.nan, math.inf):
        latents[1, 0, 0, 0] = number
        assert sound(latents).tolist() == [True, False, True]


@pytest.mark.parametrize("where", ["leaves", "states"])
def test_an_absurd_latent_takes_its_prompt_out(where):
    forest = grown(SHAPE)[0]
    prompts = len(forest.prompts)
    assert not broken_latents(forest).any()
    layer = forest.leaves if where == "leaves" else forest.states[-1]
    layer[-1] *= 1e5
    assert layer.isfinite().all() and broken_latents(forest).tolist() == [False] * (prompts - 1) + [True]
    found = score(Scores({"size": torch.ones(len(forest.leaves))}, {"size": 1.0}), forest).values["size"]
    assert found.isnan().sum() == (1 if where == "leaves" else 0)


def test_a_run_of_absurd_latents_learns_nothing(pack, tmp_path):
    """By hand: the group is skipped and counted, and the policy stays as it was."""
    graph = Graph(pack, tmp_path)
    policy = graph.policy()
    before = {key: value.clone() for key, value in policy.run.adapters.state_dict().items()}
    network = graph.model.model.diffusion_model
    handle = network.register_forward_hook(lambda module, args, output: output * 1e5)
    try:
        row = graph.iteration(policy)
    finally:
        handle.remove()
    assert row["skipped_groups"] == 2
    assert all(torch.equal(value, before[key]) for key, value in policy.run.adapters.state_dict().items())
