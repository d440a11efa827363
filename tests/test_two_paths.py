"""A graph of nodes and the Trainer are two ways to the same iteration, in real ComfyUI, on FLUX and SD3."""

import pytest
import torch
from graph import TRAIN, UPDATE, Graph, timeless

from core.rewards.contract import Reward
from core.rewards.measure import Measure

STEPS = 3
SMALL = {"flux": r"double_blocks\.0\.img_attn\.qkv", "sd3": r"joint_blocks\.0\.x_block\.attn\.qkv"}


@pytest.fixture(params=["flux", "sd3"])
def graph(request, small_graph):
    return small_graph(request.param)


@pytest.fixture
def small_graph(pack, tmp_path):
    from test_graph import older_than

    def build(model):
        if model == "flux" and older_than(0, 9):
            pytest.skip("this ComfyUI takes FLUX sizes as fixed: tiny FLUX files need 0.9 or newer")
        built = Graph(pack, tmp_path, model)
        built.forget()
        built.small = dict(rank=1, alpha=2.0, targets="pattern", pattern=SMALL[model])
        return built

    return build


def by_nodes(graph, policy, reward=None, text=TRAIN):
    positive, prompts = graph.prompts(text, policy=policy)
    tree, leaves = graph.sample(policy, positive, steps=STEPS, shape=graph.shape(depth=1))
    reward = reward or Measure("foreground size")
    scored = graph.call("Score", reward_model=reward, images=graph.decode(leaves), prompts=prompts)[0]
    credit = graph.call("Advantages", tree=tree, rewards=scored)[0]
    graph.call("Update", policy=policy, tree=tree, advantages=credit, **UPDATE)


def by_trainer(graph, policy, reward=None, text=TRAIN):
    objective = graph.call(
        "Objective", method="GRPO", kl=0.0, clip_low=UPDATE["clip_low"], clip_high=UPDATE["clip_high"]
    )
    reward = reward or Measure("foreground size")
    small = dict(sigmas=graph.sigmas(STEPS), shape=graph.shape(depth=1))
    until = policy.run.iteration + 1
    graph.train(policy, until, text=text, reward=reward, objective=objective[0], on_alarm="off", **small)


PATHS = {"nodes": by_nodes, "Trainer": by_trainer}
N, T = PATHS
SEQUENCES = [(N, N, N), (N, T, N), (T, N, T), (T, T, N)]  # each path first and last, after each, and after a restart


def adapters(policy):
    return {name: tensor.clone() for name, tensor in policy.run.adapters.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def shared(row):
    """What both paths measure; the Trainer also measures diversity."""
    return {key: value for key, value in timeless([row])[0].items() if key != "diversity"}


def test_any_sequence_of_the_two_paths_is_the_same_run(graph):
    """Bit for bit, restarts of ComfyUI between them included."""
    ends = {}
    for order in SEQUENCES:
        for number, path in enumerate(order):
            policy = graph.policy(" ".join(order), **graph.small)
            PATHS[path](graph, policy)
            if number == 1:
                graph.forget()
        ends[order] = policy
    first, *others = ends.values()
    assert all(row["grad_norm"] > 0 for row in first.run.metrics)
    for other in others:
        same(adapters(first), adapters(other))
        assert [shared(row) for row in other.run.metrics] == [shared(row) for row in first.run.metrics]


class OnlyTheFirst(Reward):
    """Foreground size, and no score at all for the second prompt."""

    name = "only the first"

    def score(self, images, prompts):
        known = torch.tensor(["red" in prompt for prompt in prompts])
        return torch.where(known, Measure("foreground size").score(images, prompts), torch.nan)


def broken_latents(graph, policy, monkeypatch):
    """The network gives NaN for the second prompt."""
    positive, _ = graph.prompts()
    with policy.policy.session(positive, shape=(16, 8, 8)) as velocity:
        kind = type(velocity)
    call = kind.__call__

    def broken(self, x, sigma, rows):
        second = (torch.as_tensor(rows, device=x.device) == 1).view(-1, 1, 1, 1)
        return torch.where(second, torch.nan, call(self, x, sigma, rows))

    monkeypatch.setattr(kind, "__call__", broken)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("what", ["score", "latent"])
def test_a_prompt_that_cannot_be_learned_from_is_left_out(graph, what, path, monkeypatch):
    """One of two prompts without numbers: the iteration is the other one's."""
    alone = graph.policy("alone", **graph.small)
    by_nodes(graph, alone, text=TRAIN.splitlines()[0])
    policy = graph.policy("both", **graph.small)
    before = adapters(policy)
    if what == "latent":
        broken_latents(graph, policy, monkeypatch)
    PATHS[path](graph, policy, OnlyTheFirst() if what == "score" else None)
    row = policy.run.metrics[-1]
    assert row["skipped"] == 0 and row["grad_norm"] > 0
    assert row["grad_norm"] == pytest.approx(alone.run.metrics[-1]["grad_norm"], rel=1e-3)
    for name, tensor in adapters(policy).items():
        torch.testing.assert_close(tensor, alone.run.adapters.state_dict()[name], rtol=0, atol=1e-5)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in adapters(policy).items())
