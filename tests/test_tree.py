"""Growing trees: counts, seeds, structure, against closed forms and against plain sampling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyVelocity

from core.method import cost, noise, windows
from core.method.memory import MicroBatch
from core.method.noise import NoiseSchedule
from core.method.rollout import grow, shorten
from core.method.steps import KINDS, step
from core.method.tree import TreeShape

SHAPE = (2, 4, 4)


def sigmas(steps: int) -> torch.Tensor:
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return 3 * t / (1 + 2 * t)


def grown(
    shape: TreeShape,
    steps=8,
    start=1,
    prompts=(0, 1),
    schedule=NoiseSchedule(),
    micro_batch=0,
    seed=5,
    iteration=2,
    **kwargs,
):
    velocity = ToyVelocity(32)
    roots = noise.roots(SHAPE, seed, iteration, list(prompts), shape.trees).double()
    with torch.no_grad():
        forest = grow(
            velocity,
            roots,
            sigmas(steps),
            shape,
            schedule,
            start=start,
            prompts=list(prompts),
            seed=seed,
            iteration=iteration,
            micro_batch=MicroBatch(micro_batch),
            **kwargs,
        )
    return forest, velocity


@settings(deadline=None, max_examples=40)
@given(
    branching=st.integers(1, 4),
    depth=st.integers(1, 3),
    trees=st.integers(1, 3),
    steps=st.integers(5, 12),
    start=st.integers(0, 9),
    tail=st.sampled_from([0.3, 0.4, 1.0]),
    prompts=st.integers(1, 3),
    micro_batch=st.integers(0, 5),
)
def test_forwards_equal_the_closed_form(branching, depth, trees, steps, start, tail, prompts, micro_batch):
    start = min(start, windows.last_start(steps, depth))
    shape = TreeShape(branching, depth, trees, tail=tail)
    forest, velocity = grown(shape, steps, start, range(prompts), micro_batch=micro_batch)
    rollout, _ = cost.forwards(steps, start, depth, branching, trees, tail)
    assert velocity.forwards == sum(velocity.calls) == forest.forwards == prompts * rollout
    assert len(forest.leaves) == prompts * shape.leaves and [len(s) for s in forest.states] == [
        prompts * trees * branching**k for k in range(depth + 1)
    ]
    assert micro_batch == 0 or max(velocity.calls) <= micro_batch


def test_cost_of_the_worked_examples():
    """docs/method.md, section on cost."""
    assert cost.forwards(10, 0, 3, 3) == (202, 13) and cost.forwards(10, 0, 3, 3, shared=False) == (202, 39)
    assert cost.forwards(10, 0, 4, 2) == (111, 15) and cost.forwards(10, 0, 4, 2, tail=0.4)[0] == 63
    assert cost.forwards(10, 0, 3, 1, trees=27) == (270, 81)
    mean_start = sum(i * 0.5**i for i in range(6)) / sum(0.5**i for i in range(6))
    assert cost.expected_forwards(TreeShape(3, 3), 10)[0] == pytest.approx(202 - 26 * mean_start)


@pytest.mark.parametrize("siblings", noise.SIBLINGS)
@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_any_split_gives_the_same_tree(siblings, micro_batch):
    shape = TreeShape(3, 2, trees=2, siblings=siblings)
    whole, _ = grown(shape)
    parts, _ = grown(shape, micro_batch=micro_batch)
    torch.testing.assert_close(parts.leaves, whole.leaves, atol=1e-12, rtol=0)
    for a, b in zip(parts.log_probs, whole.log_probs):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_a_prompt_grows_the_same_tree_alone_and_in_company():
    shape = TreeShape(2, 2, trees=2)
    together, _ = grown(shape, prompts=(0, 1, 2))
    alone, _ = grown(shape, prompts=(1,))
    torch.testing.assert_close(together.leaves[8:16], alone.leaves, atol=1e-12, rtol=0)


def test_children_stand_beside_each_other_below_their_parent():
    forest, velocity = grown(TreeShape(3, 2), prompts=(0,))
    level = forest.levels[1]
    for parent in range(3):
        s, n = forest.sigma(1)
        with torch.no_grad():
            v = velocity(forest.states[1][parent : parent + 1], s, [0])
        x = forest.states[1][parent : parent + 1].repeat(3, 1, 1, 1)
        children = forest.states[2][3 * parent : 3 * parent + 3]
        scored = step(forest.kind, x, v.repeat(3, 1, 1, 1), s, n, level, float(forest.sigmas[1]), next_latent=children)
        torch.testing.assert_close(
            scored.log_prob, forest.log_probs[1][3 * parent : 3 * parent + 3], atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "ode"])
def test_branching_one_without_noise_is_the_euler_sampler(kind):
    forest, velocity = grown(TreeShape(1, 3), prompts=(0,), schedule=NoiseSchedule(kind, level=0.0))
    x, table = noise.roots(SHAPE, 5, 2, [0], 1).double(), sigmas(8).tolist()
    with torch.no_grad():
        for s, n in zip(table, table[1:]):
            x = x + (n - s) * velocity(x, s, [0])
    torch.testing.assert_close(forest.leaves, x, atol=1e-10, rtol=0)


def test_new_iteration_new_noise_same_iteration_same_noise():
    assert torch.equal(grown(TreeShape(2, 2))[0].leaves, grown(TreeShape(2, 2))[0].leaves)
    assert not torch.allclose(grown(TreeShape(2, 2))[0].leaves, grown(TreeShape(2, 2), iteration=3)[0].leaves)


def test_first_noise_is_comfyuis_own():
    expected = torch.randn((1, *SHAPE), generator=torch.manual_seed(123))
    assert torch.equal(noise.roots(SHAPE, 123, 0, [0, 1], 1)[:1], expected)
    assert not torch.equal(noise.roots(SHAPE, 123, 1, [0, 1], 1)[:1], expected)


@settings(deadline=None, max_examples=30)
@given(branching=st.integers(2, 6), node=st.integers(0, 100))
def test_sibling_noise(branching, node):
    path = (1, 2, 3, 4, 5, node)
    plain = noise.siblings("independent", branching, (16, 4, 4), *path)
    pairs = noise.siblings("antithetic", branching, (16, 4, 4), *path)
    assert torch.equal(pairs[1], -pairs[0]) and torch.equal(pairs[0], plain[0])
    spread = noise.siblings("orthogonal", branching, (16, 4, 4), *path).flatten(1)
    torch.testing.assert_close(spread @ spread.T, torch.diag(plain.flatten(1).norm(dim=1) ** 2), atol=1e-3, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    steps=st.integers(3, 40),
    width=st.integers(1, 6),
    ratio=st.floats(0.05, 1.0),
    iteration=st.integers(0, 500),
    mode=st.sampled_from(windows.MODES),
)
def test_windows_never_reach_the_last_two_steps(steps, width, ratio, iteration, mode):
    if steps < width + 2:
        with pytest.raises(ValueError, match="does not fit"):
            windows.start(mode, iteration, steps, width, ratio=ratio)
        return
    begin = windows.start(
        mode,
        iteration,
        steps,
        width,
        ratio=ratio,
        stride=2,
        interval=3,
        generator=torch.Generator().manual_seed(iteration),
    )
    assert 0 <= begin and begin + width <= steps - 2


def test_windows_follow_their_rule():
    p = windows.probabilities(10, 3, 0.5)
    assert len(p) == 6 and float(p.sum()) == pytest.approx(1) and float(p[1] / p[0]) == pytest.approx(0.5)
    draws = torch.tensor(
        [windows.start("random", i, 10, 3, generator=noise.generator(0, "window", i)) for i in range(4000)]
    )
    assert torch.bincount(draws, minlength=6) / 4000 == pytest.approx(p, abs=0.03)
    assert [windows.start("sliding", i, 8, 3, stride=2, interval=2) for i in range(6)] == [0, 0, 2, 2, 0, 0]
    with pytest.raises(ValueError, match="outside 0..5"):
        windows.start("fixed", 0, 10, 3, fixed=6)


def test_noise_levels():
    assert NoiseSchedule(level=0.5).levels(3) == [0.5] * 3
    assert NoiseSchedule(level=0.5, shape="linear", beta=0.6).levels(3) == pytest.approx([0.6, 0.7, 0.8])
    assert NoiseSchedule(level=0.5, shape="linear", beta=0.6, count_from=0).levels(3) == pytest.approx([0.5, 0.6, 0.7])
    assert NoiseSchedule(level=0.5, shape="linear", beta=-0.5).levels(2) == pytest.approx([0.375, 0.25])
    assert NoiseSchedule(level=0.4, shape="exponential", beta=1.0).levels(2) == pytest.approx([0.4 * 2**0.5, 0.8])
    assert NoiseSchedule(level=0.4, shape="cosine", beta=1.0).levels(2) == pytest.approx([0.6, 0.8])
    assert NoiseSchedule(shape="list", values=[0.3, 0.1]).levels(2) == [0.3, 0.1]
    with pytest.raises(ValueError, match="3 tree layers"):
        NoiseSchedule(shape="list", values=[0.3]).levels(3)
    with pytest.raises(ValueError, match="goes up to 1"):
        NoiseSchedule(level=0.7, shape="linear", beta=1.0).levels(3)


def test_shortened_tail():
    table = sigmas(7)
    short = shorten(table, 0.4)
    assert len(short) == 4 and short[0] == table[0] and short[-1] == 0 and bool((short[1:] < short[:-1]).all())
    assert shorten(table, 1.0) is table and len(shorten(table, 0.01)) == 2


@pytest.mark.parametrize(
    "bad, message", [([1.0, 0.5], "end at 0.5"), ([0.5, 0.7, 0.0], "must fall"), ([14.6, 1.0, 0.0], "must fall")]
)
def test_sigmas_of_other_models_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        grow(
            ToyVelocity(32),
            torch.zeros(1, *SHAPE),
            torch.tensor(bad),
            TreeShape(),
            NoiseSchedule(),
            start=0,
            prompts=[0],
        )
