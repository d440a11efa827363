"""Rewards on latents: how well a head that decodes nothing knows its teacher, and what it saves by the clock.

    python3 run.py bench latent [--model sd3|flux] [--iterations 40] [--arms teacher,score,picture,share]

The demo's training, once per arm with the same seed, in one process. teacher: every leaf is decoded and scored. In the
others a quarter of the leaves is, and what the head says of the rest is shifted by how far it was off on that quarter:

score: kernel ridge regression from latent and prompt to the teacher's score, on the newest 1,000 scored leaves
picture: a small decoder, random features of each latent's neighbourhood and ridge regression to its pixels, learned
    from the run's own pictures; the teacher looks at what it draws
share: no head; the rest has no score

Heads are fitted anew in every iteration, and used from the sixth. Agreement is Spearman's rank correlation with the
teacher within each prompt's leaves, on all leaves of the iteration before the head has seen any of them; looking costs
seconds that are not counted. Seconds are those of this process, so that other jobs do not count.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from host import ROOT, arguments, save

sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from core.rewards.contract import Reward  # noqa: E402
from core.runs.run import Run  # noqa: E402
from standalone.demo import Demo  # noqa: E402
from standalone.figures import in_turn  # noqa: E402

EVERY = 10  # iterations between two evaluations
FULL = 5  # first iterations, in which every leaf is scored
PART = 4  # one of so many leaves is scored after that
PICTURES = 48  # held-out ones, per evaluation
NEWEST, RIDGE = 1000, 0.1
HIDDEN, SIDE = 1024, 8  # random features; pixels of a latent's side


def ranks(values: torch.Tensor) -> torch.Tensor:
    """[..., n] -> their ranks, equal ones share the mean of theirs."""
    below, same = values[..., None, :] < values[..., None], values[..., None, :] == values[..., None]
    return below.sum(-1) + (same.sum(-1) - 1) / 2


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean rank correlation of the rows [groups, n] that have a spread."""
    one, other = (r - r.mean(-1, keepdim=True) for r in (ranks(one), ranks(other)))
    size = (one.square().sum(-1) * other.square().sum(-1)).sqrt()
    return float(((one * other).sum(-1) / size)[size > 0].mean())


class ScoreHead:
    def __init__(self, teacher, texts: list[str]):
        self.words = sorted({word for text in texts for word in text.split()})
        self.known: list[tuple] = []

    def asked(self, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(word in prompt.split()) for word in self.words] for prompt in prompts])

    def learn(self, latents, images, prompts, scores) -> None:
        self.known.append((latents.flatten(1), self.asked(prompts), scores))
        x, asked, scores = (torch.cat(part)[-NEWEST:] for part in zip(*self.known))
        self.middle, self.spread = x.mean(0), x.std(0) + 1e-6
        self.x, self.prompts, self.scores = (x - self.middle) / self.spread, asked, scores
        self.width = torch.cdist(self.x, self.x).square().median()
        normal = torch.special.ndtri((ranks(scores).float() + 0.5) / len(scores))  # scores as a normal variable
        kernel = self.kernel(self.x, asked) + RIDGE * torch.eye(len(x))
        self.weights = torch.linalg.solve(kernel, normal)

    def kernel(self, x, asked) -> torch.Tensor:
        alike = torch.exp(-torch.cdist(x, self.x).square() / self.width)
        return alike * (1 + torch.exp(-torch.cdist(asked, self.prompts, p=1) / 2))

    def predict(self, latents, prompts) -> torch.Tensor:
        x = (latents.flatten(1) - self.middle) / self.spread
        found = self.kernel(x, self.asked(prompts)) @ self.weights
        return torch.quantile(self.scores, torch.special.ndtr(found))  # back to the teacher's units


class PictureHead:
    def __init__(self, teacher, texts: list[str]):
        self.teacher, self.sums, self.count = teacher, None, 0

    def features(self, latents) -> torch.Tensor:
        x = F.unfold((latents - self.middle) / self.spread, 3, padding=1).transpose(1, 2)
        return torch.cat([x, torch.ones(*x.shape[:2], 1), torch.relu(x @ self.turn + self.offset)], 2)

    def learn(self, latents, images, prompts, scores) -> None:
        if self.sums is None:
            draw, size = torch.Generator().manual_seed(0), 9 * latents.shape[1]
            self.middle, self.spread = (f(latents, (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
            self.turn = 1.5 * torch.randn(size, HIDDEN, generator=draw) / size**0.5
            self.offset = torch.randn(HIDDEN, generator=draw) / 2
            self.sums = [torch.zeros(size + 1 + HIDDEN, n) for n in (size + 1 + HIDDEN, 3 * SIDE**2)]
        x = self.features(latents).flatten(0, 1)
        pixels = F.unfold(images.movedim(-1, 1), SIDE, stride=SIDE).transpose(1, 2).flatten(0, 1)
        self.sums[0] += x.T @ x
        self.sums[1] += x.T @ pixels
        self.count += len(latents)
        ridge = RIDGE * self.count**0.5 * torch.eye(len(self.sums[0]))
        self.weights = torch.cholesky_solve(self.sums[1], torch.linalg.cholesky(self.sums[0] + ridge))

    def predict(self, latents, prompts) -> torch.Tensor:
        blocks = (self.features(latents) @ self.weights).transpose(1, 2)
        drawn = F.fold(blocks, [side * SIDE for side in latents.shape[-2:]], SIDE, stride=SIDE)
        return self.teacher.score(drawn.clamp(0, 1).movedim(1, -1), prompts)


HEADS = {"teacher": None, "score": ScoreHead, "picture": PictureHead, "share": None}


class Arm(Reward):
    """The reward of one arm; it decodes what it needs itself, and `host.decode` only hands it the latents."""

    name = "reward"

    def __init__(self, kind: str, demo: Demo):
        self.kind, self.teacher, self.decode = kind, demo.reward, demo.host.decode
        texts = demo.prompts.train
        self.head = HEADS[kind](self.teacher, texts) if HEADS[kind] else None
        self.iteration, self.unpaid, self.agreement = 0, 0.0, []
        self.draw = torch.Generator().manual_seed(0)
        demo.host.decode = self.take

    def take(self, velocity, leaves) -> torch.Tensor:
        self.velocity, self.leaves = velocity, leaves.cpu()
        return torch.zeros(len(leaves), *(side * SIDE for side in leaves.shape[-2:]), 3)

    def truth(self, rows, prompts) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.decode(self.velocity, self.leaves[rows])
        return images, self.teacher.score(images, [prompts[i] for i in rows])

    def score(self, images, prompts) -> torch.Tensor:
        self.iteration += 1
        every = torch.arange(len(prompts))
        if self.kind == "teacher":
            return self.truth(every, prompts)[1]
        young = self.iteration <= FULL
        rows = every if young else every[::PART] + torch.randint(0, PART, (len(every) // PART,), generator=self.draw)
        if self.head is None:
            return torch.full((len(prompts),), torch.nan).index_put((rows,), self.truth(rows, prompts)[1])
        images, known = self.truth(rows, prompts)
        found = self.head.predict(self.leaves, prompts) if self.iteration > 1 else None
        if found is not None:
            self.audit(found, every, prompts)
        self.head.learn(self.leaves[rows], images, [prompts[i] for i in rows], known)
        return known if young else (found + (known - found[rows]).mean()).index_put((rows,), known)

    def audit(self, found, every, prompts) -> None:
        began, per_prompt = time.process_time(), prompts.count(prompts[0])
        true = self.truth(every, prompts)[1]
        self.agreement.append(spearman(found.view(-1, per_prompt), true.view(-1, per_prompt)))
        self.unpaid += time.process_time() - began


def train(kind: str, options) -> list[dict]:
    demo = Demo(options.model, options.seed)
    decode, texts = demo.host.decode, in_turn(demo.prompts.held_out, PICTURES)
    teacher = demo.reward
    arm = demo.reward = Arm(kind, demo)
    looks, seconds = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), demo.adapters, {})
        trainer = demo.trainer(run)
        trainer.settings.save_every = trainer.settings.keep_every = 10**6
        for mark in range(EVERY, options.iterations + 1, EVERY):
            began, arm.unpaid = time.process_time(), 0.0
            trainer.train(mark)
            seconds += time.process_time() - began - arm.unpaid
            demo.host.decode = decode
            with run.ema.applied():
                held_out = float(teacher.score(demo.draw(texts, 7, 10), texts).mean())
            demo.host.decode = arm.take
            agreement = statistics.mean(arm.agreement[-EVERY:]) if arm.agreement else None
            looks.append({"iteration": mark, "seconds": seconds, "held_out": held_out, "agreement": agreement})
            said = "" if agreement is None else f"   agreement {agreement:.2f}"
            print(f"{kind:>8} {mark:4d}: {seconds:6.1f} s, held-out reward {held_out:.3f}{said}", flush=True)
    return looks


def reached(looks: list[dict], reward: float) -> float:
    """Seconds after which an arm had this held-out reward, straight lines between its looks; inf = never."""
    before = {"seconds": 0.0, "held_out": 0.0}
    for look in looks:
        if look["held_out"] >= reward:
            share = max(reward - before["held_out"], 0) / max(look["held_out"] - before["held_out"], 1e-9)
            return before["seconds"] + share * (look["seconds"] - before["seconds"])
        before = look
    return float("inf")


def main() -> None:
    options = arguments(
        __doc__,
        model=("sd3", "flux or sd3"),
        iterations=(40, "per arm"),
        arms=("teacher,score,picture,share", "the first is what the others are measured by"),
        seed=(1, "of the training"),
    )
    torch.set_num_threads(1)
    arms = options.arms.split(",")
    found = {}
    for kind in arms:
        found[kind] = train(kind, options)
        save({"model": options.model, "seed": options.seed, "arms": found}, options.json)
        if kind != arms[0]:
            last, first = found[kind][-1], found[arms[0]]
            each = first[-1]["seconds"] / last["seconds"]
            equal = reached(first, last["held_out"]) / last["seconds"]
            said = f"{equal:.2f}" if equal < float("inf") else f"more than {each:.2f}"
            print(f"{kind}: an iteration {each:.2f} times as fast as {arms[0]}'s, to its last reward {said} times")


if __name__ == "__main__":
    main()
