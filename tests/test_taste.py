"""A taste learned from picks: the head's mathematics, what it says of itself, and the questions that are asked."""

import math

import pytest
import torch

from core.rewards.contract import Reward
from core.rewards.human import HumanReward, Undone, parse
from core.rewards.picks import Picks
from core.rewards.taste import (
    EVEN,
    Choice,
    Known,
    MyTaste,
    cross_validated,
    fit,
    load,
    padded,
    posterior,
    said_by,
)
from core.rewards.teaching import Teaching


class Colours:
    """Features of the tests: the mean colour, and some noise that says nothing."""

    name = "mean colours"

    def embed(self, images):
        mean = images.mean((1, 2))
        return torch.cat([mean, torch.sin(1e4 * mean @ torch.tensor([[1.0, 2, 3], [3, 1, 2], [2, 3, 1]]))], 1)


def choices_of(taste, count=60, shown=4, seed=0, careless=0.0, size=8):
    """Picks by utility `taste` [D] among random features; the extra reward is missing."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(shown, size, generator=draw)
        best = int((x @ taste).argmax())
        if torch.rand((), generator=draw) < careless:
            best = int(torch.randint(shown, (), generator=draw))
        order = [best, *(i for i in range(shown) if i != best)]
        found.append(Choice(torch.cat([x, torch.full((shown, 1), math.nan)], 1)[order]))
    return found


def flat(count):
    """Pictures [count, 24, 24, 3] of one colour each."""
    return torch.rand(count, 1, 1, 3, generator=torch.Generator().manual_seed(count)).expand(-1, 24, 24, -1).clone()


def test_the_posterior_is_the_maximum_and_the_curvature_of_the_models_own_likelihood():
    head = fit(choices_of(torch.arange(8.0), 30))
    placed, there = padded([head.place(choice.x) for choice in choices_of(torch.arange(8.0), 30)])
    prior = torch.zeros(placed.shape[-1], dtype=torch.float64)
    prior[-1] = 2.0

    def loss(weights):
        return -(placed @ weights).log_softmax(1)[:, 0].sum() + (weights - prior).square().sum() / (2 * head.width)

    slope = torch.autograd.functional.jacobian(loss, head.weights)
    bend = torch.autograd.functional.hessian(loss, head.weights)
    assert slope.abs().max() < 1e-6
    torch.testing.assert_close(torch.linalg.inv(head.covariance), bend, rtol=1e-6, atol=1e-8)


def test_padding_changes_nothing():
    many = choices_of(torch.arange(8.0), 12, shown=4) + choices_of(torch.arange(8.0), 12, shown=2, seed=1)
    head = fit(many, width=4.0)
    placed = [head.place(choice.x) for choice in many]
    alone = sum((placed[i] @ head.weights).log_softmax(0)[0] for i in range(len(placed)))
    together, there = padded(placed)
    likely = (together @ head.weights).masked_fill(~there, -math.inf).log_softmax(1)[:, 0].sum()
    torch.testing.assert_close(alone, likely)


def test_a_taste_is_found_and_its_agreement_is_honest():
    taste = torch.tensor([2.0, -1, 0, 0, 0, 1, 0, 0])
    head, new = fit(choices_of(taste, 60)), choices_of(taste, 400, seed=9)
    hits = [int(head.wins(choice.x).argmax()) == 0 for choice in new]
    assert head.sure and sum(hits) / 400 > 0.7
    assert abs(head.agreement - sum(hits) / 400) < 0.15  # cross-validation does not flatter
    x = torch.cat([torch.randn(200, 8), torch.full((200, 1), math.nan)], 1)
    ranks = [values.argsort().argsort().float() for values in (head.wins(x), x[:, :8] @ taste)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.85


def test_random_picks_are_not_taken_for_a_taste():
    heads = [fit(choices_of(torch.ones(8), 50, seed=seed, careless=1.0)) for seed in range(30)]
    assert sum(head.sure for head in heads) <= 4
    unsure = next(head for head in heads if not head.sure)
    assert "your picks do not agree with each other" in unsure.said()
    assert "more picks are needed" in fit(choices_of(torch.ones(8), 10, careless=1.0)).said()
    assert not fit(choices_of(torch.ones(8), 3)).sure


def test_what_is_unknown_counts_as_even():
    head = fit(choices_of(torch.tensor([3.0, 0, 0, 0, 0, 0, 0, 0]), 60))
    far = torch.zeros(1, 9)
    far[0, 0], far[0, 8] = 3.0, math.nan
    sure = float(head.wins(far))
    head.covariance = head.covariance * 1e6
    assert sure > 0.8 and abs(float(head.wins(far)) - 0.5) < 0.05


def test_beyond_the_favourites_there_is_nothing_to_gain():
    """Or the policy would follow a linear head to where no picture was ever shown."""
    taste = torch.tensor([3.0, 0, 0, 0, 0, 0, 0, 0])
    head = fit(choices_of(taste, 60))
    along = torch.zeros(40, 9)
    along[:, 0], along[:, 8] = torch.linspace(-6, 6, 40), math.nan
    found = head.wins(along)
    best = int(found.argmax())
    assert (found[: best + 1].diff() > 0).all() and 0.5 < float(along[best, 0]) < 3 and (found[best:].diff() <= 0).all()


def test_informative_questions_tell_more_than_random_ones():
    """Bits lie between 0 and log2 k, and picks on the chosen sets leave less uncertainty than picks on random ones."""
    taste, draw = torch.tensor([2.0, -1, 0, 0, 0, 1, 0, 0]), torch.Generator().manual_seed(0)
    head = fit(choices_of(taste, 12))
    x = torch.cat([torch.randn(16, 8, generator=draw), torch.full((16, 1), math.nan)], 1)
    x[1] = x[0]
    sets = torch.stack([torch.randperm(16, generator=draw)[:2] for _ in range(300)])
    sets[0] = torch.tensor([0, 1])
    told = head.informative(x, sets, draw)
    assert told[0].abs() < 1e-9 and (told > -1e-9).all() and (told < 1).all()

    def left(rows):
        """Mean log volume of the posterior after the pick among these, by how likely each pick is."""
        placed, there = padded([head.place(choice.x) for choice in choices_of(taste, 12)])
        volumes, p = [], (head.place(x[rows]) @ head.weights).softmax(0)
        for i in range(2):
            order = [i, 1 - i]
            more = torch.cat([placed, torch.nn.functional.pad(head.place(x[rows])[order], (0, 0, 0, 2))[None]])
            real = torch.cat([there, torch.tensor([[True, True, False, False]])])
            volumes.append(p[i] * torch.logdet(posterior(more, real, head.width)[1]))
        return float(sum(volumes))

    best, worst = sets[told.topk(20).indices], sets[told.topk(20, largest=False).indices]
    assert sum(map(left, best)) < sum(map(left, worst))


def test_answers_of_every_kind_are_choices():
    x = torch.arange(12.0).view(4, 3)
    row = lambda text: {"answer": text, "count": 4}  # noqa: E731
    assert [choice.x[0, 0] for choice in said_by([(x, row("2"))])] == [3]
    ranked = said_by([(x, row("2 > 1 / 4"))])
    assert [[int(v) // 3 for v in choice.x[:, 0]] for choice in ranked] == [[1, 0, 2, 3], [0, 2, 3], [2, 3]]
    tied = said_by([(x, row("1, 3"))])
    assert [[int(v) // 3 for v in choice.x[:, 0]] for choice in tied] == [[0, 1, 3], [2, 1, 3]]
    none = said_by([(x, row("none"))])
    assert none == [] and len(said_by([(x, row("none")), (x, row("2"))])) == 2
    assert parse("none", 4).wins().sum() == 0


def test_cross_validation_never_sees_what_it_predicts():
    """Labels that are noise are predicted as by chance, however many features there are."""
    noise = choices_of(torch.ones(200), 60, careless=1.0, size=200)
    head = fit(noise)
    placed, there = padded([head.place(choice.x) for choice in noise])
    assert cross_validated(placed, there, 64.0)[0] < 0.45


def asked(folder, answer, now=lambda: 0, **settings):
    """A Teaching whose person answers `answer(question)`; the questions are kept."""
    questions = []

    def ask(question):
        questions.append(question)
        return answer(question)

    person = HumanReward(ask, picks=Picks(folder), iteration=now)
    teaching = Teaching(person, Colours(), **settings)
    teaching.questions_asked = questions
    return teaching


def reddest(question):
    return str(1 + int(torch.stack(list(question.images))[..., 0].mean((1, 2)).argmax()))


def leaves(iteration, prompts=2, count=8):
    draw = torch.Generator().manual_seed(iteration)
    images = torch.rand(prompts * count, 1, 1, 3, generator=draw).expand(-1, 24, 24, -1).clone()
    return images, [f"prompt {i // count}" for i in range(prompts * count)]


def taught(folder, answer, iterations, start=0, **settings):
    clock = [start]
    teaching = asked(folder, answer, lambda: clock[0], **settings)
    scores = []
    for clock[0] in range(start, iterations):
        scores.append(teaching.score(*leaves(clock[0])))
    return teaching, scores


def test_teaching_asks_until_it_knows_then_less_often_and_its_scores_are_the_taste(tmp_path):
    teaching, scores = taught(tmp_path, reddest, 50, questions=20, every=3)
    assert (scores[0] == EVEN).all()
    images, prompts = leaves(99)
    found = teaching.score(images, [f"{i}" for i in range(len(images))])
    ranks = [values.argsort().argsort().float() for values in (found, images[:, 0, 0, 0])]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.8
    when = [row["iteration"] for row in teaching.answers()]
    assert len(when) == 20 and teaching.left() == 0 and when[:5] == [0, 1, 2, 3, 4]
    assert all(later - earlier == 3 for earlier, later in zip(when[-3:], when[-2:]))
    assert teaching.ends(50, 5) == when[-1] + 6


def test_a_teaching_that_was_stopped_asks_the_same_and_nothing_twice(tmp_path):
    through, _ = taught(tmp_path / "a", reddest, 12)
    for until in range(1, 13):  # stopped before iteration `until` was counted: its answer is in the book already
        taught(tmp_path / f"{until}", reddest, until)
        resumed, scores = taught(tmp_path / f"{until}", reddest, 12, start=until - 1)
        assert [q.id for q in resumed.questions_asked] == [
            q.id for q in through.questions_asked if q.iteration >= until
        ]
    assert [row["id"] for row in resumed.answers()] == [row["id"] for row in through.answers()]


def test_the_answer_before_can_be_taken_back(tmp_path):
    said = iter(["1", "undo", "2", "3"])
    teaching, _ = taught(tmp_path, lambda question: next(said), 2, every=1)
    first, second, again, third = teaching.questions_asked
    assert not first.undo and second.undo and not again.undo
    assert again.id == first.id and third.id == second.id
    assert [row["answer"] for row in teaching.answers()] == ["2", "3"]
    assert len(teaching.known.choices([teaching.person.picks])) == 2


def test_undo_is_no_answer_where_nothing_was_asked_before(tmp_path):
    teaching, _ = taught(tmp_path, lambda question: "undo", 1)
    assert teaching.answers() == []
    with pytest.raises(Undone):
        teaching.person.ask = lambda question: "undo"
        teaching.person.answer(list(flat(3)), "x", undo=True)


def test_skips_and_time_outs_are_no_answers(tmp_path):
    said = iter(["-", None, "1", "none"])
    teaching, scores = taught(tmp_path, lambda question: next(said), 4)
    assert len(teaching.answers()) == 2 and teaching.left() == 48
    assert all((values == EVEN).all() for values in scores)


def test_several_questions_an_iteration_are_about_different_prompts(tmp_path):
    teaching, _ = taught(tmp_path, reddest, 3, each=2)
    asked_of = [question.prompt for question in teaching.questions_asked]
    assert len(asked_of) == 6 and all({a, b} == {"prompt 0", "prompt 1"} for a, b in zip(asked_of[::2], asked_of[1::2]))


def test_a_picture_that_is_not_finite_has_no_score(tmp_path):
    teaching, _ = taught(tmp_path, reddest, 12)
    images, prompts = leaves(1)
    images[3] = math.nan
    assert teaching.score(images, prompts).isnan().nonzero().flatten().tolist() == [3]


def test_a_saved_taste_is_the_same_taste_and_refuses_other_features(tmp_path):
    teaching, _ = taught(tmp_path, reddest, 12)
    teaching.keep(tmp_path)
    head, images = load(tmp_path / "taste.safetensors", Colours()), flat(9)
    scored = [MyTaste(h, teaching.known).score(images, ["x"] * 9) for h in (teaching.head, head)]
    assert torch.equal(*scored) and head.said() == teaching.head.said()
    other = type("Other", (), {"name": "another CLIP"})()
    with pytest.raises(ValueError, match="features of mean colours, but another CLIP is connected"):
        load(tmp_path / "taste.safetensors", other)


def test_the_books_of_several_runs_are_one_taste(tmp_path):
    for name in "ab":
        taught(tmp_path / name, reddest, 4)
    known = Known(Colours())
    assert len(known.choices([Picks(tmp_path / name) for name in "ab"])) == 8


def test_pictures_are_read_back_from_the_sheets(tmp_path):
    teaching, _ = taught(tmp_path, reddest, 1)
    row, shown = teaching.answers()[0], teaching.questions_asked[0].images
    read = teaching.person.picks.images(row)
    assert (read - torch.stack(list(shown))).abs().mean() < 0.02
    (tmp_path / row["sheet"]["file"]).write_bytes(b"no picture")
    assert Known(Colours()).choices([Picks(tmp_path)]) == []


def test_another_reward_is_a_feature_that_counts_before_any_pick(tmp_path):
    also = type(
        "Green", (Reward,), {"name": "green", "score": lambda self, images, prompts: images[..., 1].mean((1, 2))}
    )()
    known = Known(Colours(), also)
    images = flat(40)
    x = known.look(images, ["x"] * 40)
    head = fit([Choice(x[:2])])
    utility = head.place(x)[:, -1]
    assert torch.corrcoef(torch.stack([utility.float(), images[:, 0, 0, 1]]))[0, 1] > 0.999
    assert float(head.weights[-1]) > 1
