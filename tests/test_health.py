"""The watch over a run: it must see what goes wrong, keep silent where nothing does, and survive a restart."""

import json
import math
import random
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.method.iteration import lowest_correlation, reward_metrics
from core.pictures.distance import diversity, drift
from core.runs.health import Evaluation, Skips, Watch, compare, course, limit
from embedded.shapes import draw


def shapes(indices, seed=0, size=64):
    """Drawn shapes [B, size, size, 3], all in one style; the place and size of each is random."""
    plain = torch.zeros(len(indices), 5, dtype=torch.long)
    return draw(torch.tensor(indices), torch.Generator().manual_seed(seed), size, styles=plain).movedim(1, -1)


def run(judge_at, reward_at, count=8, images=16, seed=0, noise=0.01, **settings_of_watch):
    """A watch that has seen evaluations every 10 iterations; judge_at and reward_at: mean score by the evaluation's
    number.
    """
    rng = random.Random(seed)
    watch, level = Watch(**settings_of_watch), [rng.gauss(0, 0.1) for _ in range(images)]
    for n in range(count):
        watch.evaluate(
            Evaluation(
                10 * n,
                [reward_at(n) + own + rng.gauss(0, noise) for own in level],
                [judge_at(n) + own + rng.gauss(0, noise) for own in level],
            )
        )
    return watch


def test_diversity_of_alike_and_of_different_images():
    same = shapes([5]).repeat(6, 1, 1, 1)
    assert diversity(same, 2) == 0
    assert 0 < diversity(shapes([5] * 8), 1) < diversity(shapes(range(0, 96, 12)), 1)  # one caption against eight
    black_white = torch.stack([torch.zeros(40, 30, 3), torch.ones(40, 30, 3)])
    assert diversity(black_white, 1) == pytest.approx(1)
    # the mean of two groups
    assert diversity(torch.cat([black_white, black_white[:1], black_white[:1]]), 2) == pytest.approx(0.5)


def test_diversity_is_within_the_groups_only_and_in_any_order_of_a_group():
    images = shapes([3, 3, 3, 80, 80, 80], seed=1)
    assert diversity(images, 2) < 0.5 * diversity(images, 1)
    assert diversity(images[[2, 0, 1, 5, 4, 3]], 2) == pytest.approx(diversity(images, 2), rel=1e-5)


def test_diversity_hardly_depends_on_the_size_of_the_pictures():
    small, large = (shapes([0, 30, 60, 90], size=size) for size in (64, 256))
    assert diversity(large, 1) == pytest.approx(diversity(small, 1), rel=0.05)


def test_distances_where_an_image_is_broken_or_alone():
    images = shapes([0, 30, 60])
    broken = torch.cat([images, torch.full_like(images[:1], math.nan)])
    assert diversity(broken, 1) == pytest.approx(diversity(images, 1))
    assert math.isnan(diversity(images, 3))
    assert drift(broken, torch.cat([images, images[:1]])) == 0


def test_drift_grows_with_the_change_and_forgets_fine_noise():
    base = shapes([0, 30, 60, 90])
    a, b = drift(base * 0.9, base), drift(base * 0.5, base)
    assert drift(base, base) == 0 < a < b
    assert a == pytest.approx(0.2 * b, rel=1e-4)
    large = torch.full((2, 512, 512, 3), 0.5)
    assert drift(large + 0.1 * torch.randn(large.shape, generator=torch.Generator().manual_seed(0)), large) < 0.01


def test_distances_refuse_what_does_not_fit():
    images = shapes([0, 1, 2])
    with pytest.raises(ValueError, match="3 images cannot be shared out among 2 prompts"):
        diversity(images, 2)
    with pytest.raises(ValueError, match="cannot be shared out"):
        diversity(images[:0], 1)
    with pytest.raises(ValueError, match="the same prompts, seeds and size"):
        drift(images, images[:2])


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), st.floats(-5, 5), st.floats(0.1, 10))
def test_comparing_is_paired(scores, shift, scale):
    rng = random.Random(0)
    now = [s + rng.gauss(shift, 1) for s in scores]
    errors, images = compare(scores, now)
    assert images == len(scores)
    assert compare(now, scores)[0] == pytest.approx(-errors)
    assert compare([s * scale + 3 for s in scores], [s * scale + 3 for s in now])[0] == pytest.approx(errors, rel=1e-5)


def test_comparing_known_values():
    assert compare([0, 0, 0, 0], [1, 2, 3, 4])[0] == pytest.approx(2.5 / (math.sqrt(5 / 3) / 2))
    assert compare([0, 0, math.nan], [1, 3, 9])[1] == 2
    assert compare([1, 2], [1, 2]) == (0, 2) and compare([1.0], [2.0]) == (0, 1) and compare([], []) == (0, 0)
    assert compare([1.0, 2.0], [0.5, 1.5])[0] == -math.inf


def test_the_limit_is_students():
    """t quantiles of the one-sided chance of 2 standard errors; for one degree of freedom that is a Cauchy's, in closed
    form: cot(pi p).
    """
    for images, candidates, exact in [(4, 30, 11.2228), (8, 1, 2.4288), (16, 1, 2.1812), (16, 10, 3.3320)]:
        assert limit(2, images, candidates) == pytest.approx(exact, abs=1e-4)
    assert limit(2, 10**9, 1) == pytest.approx(2)
    chance = NormalDist().cdf(-2) / 5
    assert limit(2, 2, 5) == pytest.approx(1 / math.tan(math.pi * chance))


def test_a_reward_that_is_exploited_is_seen_and_the_way_back_named():
    watch = run(lambda n: 0.27 - 0.015 * max(n - 4, 0), lambda n: 0.4 + 0.03 * n)
    verdict = watch.verdict()
    assert watch.rollback in (30, 40) and verdict.endswith(f"Roll back to iteration {watch.rollback}?")
    assert (
        "exploiting the reward" in verdict
        and "while the judge fell from" in verdict
        and "over 16 images" in verdict
        and "\n" not in verdict
    )


def test_the_fall_has_to_last():
    judge = [0.27, 0.28, 0.2, 0.2]
    assert run(lambda n: judge[n], lambda n: n, count=3).verdict() is None
    assert run(lambda n: judge[n], lambda n: n, count=3, patience=1).verdict() is not None
    assert run(lambda n: judge[n], lambda n: n, count=4).verdict() is not None
    judge = [0.27, 0.28, 0.2, 0.281, 0.2]
    assert run(lambda n: judge[n], lambda n: n, count=5).verdict() is None


def test_good_training_is_left_alone():
    assert run(lambda n: 0.27 + 0.01 * n, lambda n: 0.4 + 0.03 * n, count=30).verdict() is None
    assert run(lambda n: 0.27, lambda n: 0.4, count=1).verdict() is None
    assert Watch().verdict() is None and Watch().rollback is None


def test_chance_alone_is_rarely_called_a_fall():
    alarms = sum(
        any(
            run(lambda n: 0.27, lambda n: 0.1 * n, count=count, seed=seed, noise=0.05).verdict()
            for count in (6, 9, 12, 15)
        )
        for seed in range(60)
    )
    assert alarms <= 3  # with a limit of plainly two standard errors: 9


def test_a_pairing_sees_what_means_hide():
    """Images differ by .1 among themselves; a fall of .01 on each is seen although the means' own errors are .025."""
    assert run(lambda n: 0.27 - 0.01 * (n > 2), lambda n: n, noise=0.003).verdict() is not None


def test_a_judge_that_falls_without_a_gain_and_a_reward_that_falls():
    harm = run(lambda n: 0.27 - 0.02 * n, lambda n: 0.4)
    assert "training does harm" in harm.verdict() and harm.rollback == 0
    unstable = run(lambda n: 0.27, lambda n: 0.4 + 0.05 * min(n, 3) - 0.1 * max(n - 5, 0), count=9)
    assert "held-out prompts fell from" in unstable.verdict()


def test_the_way_back_keeps_what_was_learned_before_the_judge_fell():
    """A judge's best is in part luck: the base model's picture of no wish is no place to go back to."""
    judge = [0.301, 0.3, 0.3, 0.3, 0.25, 0.2]
    assert run(lambda n: judge[n], lambda n: 0.1 * n, count=6).rollback == 30
    assert run(lambda n: 0.3 - 0.02 * n, lambda n: 0.1 * n, count=6).rollback == 0, "it fell from the first"
    slowly = run(lambda n: 0.3 - 0.004 * n, lambda n: 0.1 * n, count=9)
    assert slowly.verdict() and 0 < slowly.rollback <= 40, "early, but not where nothing was learned"
    few = run(lambda n: judge[n], lambda n: 0.1 * n, count=6, images=3, noise=0.0)
    assert few.rollback == 0, "three images tell nothing of luck"
    dip = [0.3, 0.302, 0.296, 0.296, 0.296]
    assert run(lambda n: dip[n], lambda n: 0.1 * n, count=5).rollback == 40, "chance alone takes nothing back"
    resumed = Watch()
    resumed.evaluate(Evaluation(50, [0.5] * 8, [0.3] * 8))
    assert resumed.rollback == 50


def test_without_a_judge_the_reward_decides_where_to_go_back():
    watch = Watch()
    for n, level in enumerate([0.4, 0.5, 0.6, 0.3, 0.2]):
        watch.evaluate(Evaluation(n, [level + 0.01 * (i % 3) * n for i in range(6)]))
    assert "held-out prompts fell" in watch.verdict() and watch.rollback == 2


def test_when_nothing_is_left_to_learn():
    risen = lambda n: 0.2 * min(n, 3)  # noqa: E731
    watch = run(lambda n: 0.5, risen, count=13, noise=0)
    assert watch.verdict() is None
    watch = run(lambda n: 0.5, risen, count=14, noise=0)
    assert "of iteration 30 in 10 evaluations: nothing is left to learn" in watch.verdict()
    assert "nothing has been learned" in run(lambda n: 0.5, lambda n: 0.0, count=11, noise=0).verdict()
    assert run(lambda n: 0.5, risen, count=14, noise=0, settled=0).verdict() is None
    assert run(lambda n: 0.5, lambda n: 0.01 * n, count=40, noise=0).verdict() is None


def rewards(level, count, seed=0, noise=0.1):
    draw = random.Random(seed)
    return [level(n) + draw.gauss(0, noise) for n in range(count)]


def test_single_steps_tell_the_best_state_a_plateau_and_a_fall():
    rising = [course(rewards(lambda n: n / 100, 100)[:n]) for n in range(1, 101)]
    assert all(said is None for _, said in rising) and not any(newest for newest, _ in rising[:19])
    assert sum(newest for newest, _ in rising[19:]) > 40
    settled = rewards(lambda n: min(n, 40) / 100, 140)
    assert course(settled[:80])[1] is None and "has not risen in the last 40" in course(settled)[1]
    newest, said = course(rewards(lambda n: 0.8 - max(n - 60, 0) / 100, 110))
    assert not newest and "has fallen from 0.8" in said and "'best'" in said


def test_single_steps_that_stay_as_they_are_are_not_called_a_fall():
    found = [course(rewards(lambda n: 0.5, 200, seed)[:n])[1] or "" for seed in range(20) for n in range(40, 201, 20)]
    assert sum("fallen" in said for said in found) <= 3
    assert "has not risen" in course([0.5] * 100)[1] and course([math.nan] * 100) == (False, None)


def test_too_few_images_are_no_evidence():
    assert run(lambda n: 0.27 - 0.05 * n, lambda n: n, images=3).verdict() is None
    assert run(lambda n: 0.27 - 0.05 * n, lambda n: n, images=5).verdict() is not None


def test_scores_that_are_not_numbers_are_left_out():
    watch = Watch()
    for n in range(5):
        watch.evaluate(
            Evaluation(
                n,
                [math.nan] * 8,
                [0.5 - 0.1 * n + 0.01 * (i * n % 3) for i in range(7)] + [math.inf if n % 2 else math.nan],
            )
        )
    assert "over 7 images" in watch.verdict()
    silent = Watch()
    for n in range(5):
        silent.evaluate(Evaluation(n, [math.nan] * 8, [math.nan] * 8))
    assert silent.verdict() is None


def test_collapsed_diversity():
    watch = Watch()
    for n, value in enumerate([0.2, 0.18, 0.15, 0.09, 0.05]):
        assert watch.verdict() is None
        watch.evaluate(Evaluation(n * 10, [n / 10] * 8, diversity=value))
    assert "become alike" in watch.verdict() and "0.05" in watch.verdict() and watch.rollback == 20
    assert Watch(**{**vars(watch), "least_diversity": 0}).verdict() is None
    own_base = Watch()
    for n in range(2):
        own_base.evaluate(Evaluation(n, [0.0] * 8, diversity=0.1, base_diversity=0.3))
    assert "Begin again" in own_base.verdict() and own_base.rollback is None


def test_a_reward_that_says_nothing():
    watch = Watch(flat=5)
    for share in [1.0] * 4 + [0.9] + [1.0] * 4:
        watch.see({"frac_reward_zero_std": share})
        assert watch.verdict() is None
    watch.see({"frac_reward_zero_std": 1.0})
    assert "in 5 iterations in a row" in watch.verdict()
    watch.see({})
    assert watch.verdict() is None


def test_the_limit_of_the_kl():
    watch, free = Watch(kl_limit=0.01, kl_window=3), Watch()
    for kl in [0.5, 0.001, math.nan, 0.001, 0.001]:
        watch.see({"kl": kl}), free.see({"kl": 9.0})
        assert watch.verdict() is None or watch.kl[0] == 0.5
    for kl in [0.02] * 3:
        watch.see({"kl": kl})
    assert "far from the base model" in watch.verdict() and free.verdict() is None


def test_rolling_back_forgets_what_came_after():
    watch = run(lambda n: 0.27 - 0.05 * max(n - 3, 0), lambda n: n)
    assert watch.verdict() and len(watch.evaluations) == 8
    watch.evaluate(Evaluation(40, [0.0] * 16, [0.28] * 16))
    assert [e.iteration for e in watch.evaluations] == [0, 10, 20, 30, 40] and watch.verdict() is None


def test_other_prompts_begin_the_comparison_anew():
    watch = run(lambda n: 0.27, lambda n: n)
    assert watch.evaluate(Evaluation(80, [0.0] * 4, [-9.0] * 4)) is False and len(watch.evaluations) == 1
    assert watch.evaluate(Evaluation(90, [0.0] * 4, [-9.0] * 4)) is True
    with pytest.raises(ValueError, match="score every held-out image once"):
        watch.evaluate(Evaluation(100, [0.0] * 4, [0.0] * 3))


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.floats(allow_nan=True), min_size=6, max_size=6), st.floats(0, 1) | st.just(math.nan)),
        max_size=6,
    ),
    st.lists(st.floats(0, 1), max_size=8),
    st.integers(1, 7),
)
def test_a_restart_changes_nothing(scores, kl, cut):
    whole, first = Watch(kl_limit=0.1), Watch(kl_limit=0.1)
    for watch in (whole, first):
        for n, (judge, measured) in enumerate(scores[:cut]):
            watch.evaluate(Evaluation(n, judge[::-1], judge, diversity=measured))
        for value in kl[:cut]:
            watch.see({"kl": value, "frac_reward_zero_std": 1.0})
    saved = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    second = Watch.from_dict({**saved, "from_a_newer_version": 1})
    assert second.to_dict() == saved
    for watch in (whole, second):
        for n, (judge, measured) in enumerate(scores[cut:]):
            watch.evaluate(Evaluation(cut + n, judge[::-1], judge, diversity=measured))
        for value in kl[cut:]:
            watch.see({"kl": value, "frac_reward_zero_std": 1.0})
    assert (second.verdict(), second.rollback, second.to_dict()) == (whole.verdict(), whole.rollback, whole.to_dict())


def test_a_watch_that_cannot_work_is_refused():
    for wrong in ({"errors": 0}, {"errors": math.nan}, {"patience": 0}, {"kl_window": 0}):
        with pytest.raises(ValueError, match="The watch is set to"):
            Watch(**wrong)


def test_skips_count_what_comes_in_a_row():
    skips = Skips()
    for bad in (True, True, False, True, True, True):
        assert not skips.too_many(3)
        skips.note(bad)
    assert skips.too_many(3) and not skips.too_many(4) and not skips.too_many(0)
    assert "in 3 iterations in a row (5 of 6 in all)" in skips.sentence()
    assert Skips(**json.loads(json.dumps(skips.to_dict()))) == skips


def test_rewards_that_pull_against_each_other_are_named_where_nothing_more_is_learned():
    draw_, watch = torch.Generator().manual_seed(0), run(lambda n: 0.5, lambda n: 0.2 * min(n, 3), count=14, noise=0)
    ink = torch.rand(24, generator=draw_)
    for against, opposed in ((-0.5 * ink + torch.arange(24) // 8, -1.0), (3 * ink, 1.0)):
        scores = {"filled": ink, "small": against, "third": torch.rand(24, generator=draw_).where(ink > 9, torch.nan)}
        assert lowest_correlation(scores, 3) == pytest.approx(opposed, abs=1e-6)
    assert "against each other" not in watch.verdict()
    for _ in range(30):
        watch.see(reward_metrics({"filled": ink, "small": -ink}, ink, 3))
    assert "against each other (correlation -0.96" in watch.verdict() and watch.finished
    assert Watch.from_dict(json.loads(json.dumps(watch.to_dict()))) == watch
    assert "rewards/opposed" not in reward_metrics({"filled": ink}, ink, 3)
    assert math.isnan(lowest_correlation({"a": torch.ones(8), "b": torch.rand(8)}, 2))


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_lowest_correlation_is_that_of_the_scores_without_their_prompts_means(seed):
    scores = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    centred = (scores - scores.mean(2, keepdim=True)).flatten(1)
    table = torch.corrcoef(centred)
    found = lowest_correlation({str(i): one.flatten() for i, one in enumerate(scores)}, 4)
    assert found == pytest.approx(float(min(table[0, 1], table[0, 2], table[1, 2])))
