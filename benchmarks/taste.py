"""Teaching by picking: simulated users with hidden tastes, and how often their LoRA's pictures win over the base's.

    python3 run.py bench taste [--model flux|sd3] [--users 20] [--careless 0.1] [--method teach] [--picks 50]

A user likes each of the world's five styles by a weight of its own (normal, mean 0, standard deviation 1), follows the
prompt (1) and dislikes what is drawn badly (3 times the judge's quality below 0.9); a careless answer is any picture. A
picture wins when its utility is above that of the base model's picture from the same noise, on prompts that were never
trained on; equal ones count half. Judged by rules (embedded/judge.py) that share nothing with the head.

teach: the node's way. random: the same, but the pictures of a question are drawn at random. vote: no tree and no head:
every pick is one step of Tree Regression on 4 pictures of one prompt from independent noise. nobody: answers at random.
Users go on in the file that is there (--json, else benchmarks/results/taste_<model>.json).
"""

import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from host import ROOT, arguments, save

sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from core.rewards import load  # noqa: E402
from core.rewards.drawing import DrawingFeatures  # noqa: E402
from core.rewards.human import HumanReward  # noqa: E402
from core.rewards.picks import Picks  # noqa: E402
from core.rewards.teaching import Teaching  # noqa: E402
from core.runs.run import Run  # noqa: E402
from embedded import shapes  # noqa: E402
from embedded.judge import expected_quality, judge  # noqa: E402
from standalone.demo import Demo  # noqa: E402
from standalone.figures import in_turn  # noqa: E402

PICTURES = 64  # held-out ones, before and after
MARKS = (10, 20, 30, 50, 100)  # picks after which it is looked
SETTLE = 30
CLEAR = 0.01  # of utility; less is a tie


class User:
    """A hidden taste. careless: share of answers that are any picture."""

    def __init__(self, seed: int, careless: float):
        self.chance = random.Random(seed)
        self.weights = torch.tensor([self.chance.gauss(0, 1) for _ in shapes.STYLES])
        self.careless = careless

    def utility(self, images, prompts) -> torch.Tensor:
        """[B, 64, 64, 3] -> [B]."""
        found = judge(images)
        styles = torch.stack([found[name].float() for name in shapes.STYLES], 1) @ self.weights
        asked = [shapes.asked(prompt).items() for prompt in prompts]
        follows = [float(all(int(found[what][i]) == n for what, n in one)) for i, one in enumerate(asked)]
        return styles + torch.tensor(follows) + 3 * (found["quality"] - 0.9).clamp(max=0)

    def answer(self, question) -> str:
        images = torch.stack(list(question.images))
        if self.chance.random() < self.careless:
            return str(1 + self.chance.randrange(len(images)))
        return str(1 + int(self.utility(images, [question.prompt] * len(images)).argmax()))


class Session:
    """One user, one model, one way of asking."""

    def __init__(self, model: str, method: str, seed: int, careless: float, picks: int, folder: Path):
        self.demo, self.user = Demo(model, seed), User(1000 + seed, 1.0 if method == "nobody" else careless)
        training, shape = self.demo.settings["Trainer"], self.demo.settings["Shape"]
        person = HumanReward(self.user.answer, picks=Picks(folder), iteration=lambda: self.run.iteration)
        self.asked, self.teaching = person.picks, None
        if method == "vote":
            shape |= {"branching": 1, "depth": 1, "trees": 4, "window": "fixed", "first_step": 0, "tail": 1.0}
            training["per_iteration"], self.demo.reward = 1, person
        else:
            self.teaching = Teaching(person, DrawingFeatures(), load("drawing", follow=True), questions=picks)
            if method == "random":
                self.teaching.informative = lambda seen, sets, generator: torch.rand(len(sets), generator=generator)
            self.demo.reward = self.teaching
        self.run = Run(folder, self.demo.adapters, {})
        self.trainer = self.demo.trainer(self.run)
        self.trainer.settings.save_every = self.trainer.settings.keep_every = 10**6
        self.trainer.settings.evaluate_every, self.trainer.settings.most_skips = 0, 10**6
        cfg = self.demo.comparison["Sample after"]
        self.texts = in_turn(self.demo.prompts.held_out, PICTURES)
        self.draw = lambda: self.demo.draw(self.texts, cfg["seed"], cfg["steps"])
        self.before = self.draw()

    def answers(self) -> int:
        return sum(row["by"] == "person" for row in self.asked.rows())

    def look(self) -> dict:
        with self.run.ema.applied():
            now = self.draw()
        first, last = (self.user.utility(images, self.texts) for images in (self.before, now))
        drawn, shown = judge(self.before), judge(now)
        quality = [found["quality"] for found in (drawn, shown)]
        gain = last - first
        return {
            "wins": float(((gain > CLEAR).float() + 0.5 * (gain.abs() <= CLEAR).float()).mean()),
            "utility": [float(first.mean()), float(last.mean())],
            "quality": [float(one.mean()) for one in quality],
            "quality_of_its_styles": float((quality[1] - expected_quality(drawn, shown)).mean()),
            "changed": float((now - self.before).abs().mean()),
        }


def teach(options, seed: int) -> dict:
    """All looks at one user's session."""
    with tempfile.TemporaryDirectory() as folder:
        session = Session(options.model, options.method, seed, options.careless, options.picks, Path(folder))
        began, row, waits = time.perf_counter(), {"seed": seed, "looks": {}}, []
        for mark in sorted({*(mark for mark in MARKS if mark < options.picks), options.picks}):
            while session.answers() < mark:
                asked, start = session.answers(), time.perf_counter()
                session.trainer.train(session.run.iteration + 1)
                if session.answers() > asked:
                    waits.append(time.perf_counter() - start)
                elif waits:
                    waits[-1] += time.perf_counter() - start
            row["looks"][f"{mark}"] = session.look()
        if session.teaching is not None:
            row["agreement"], row["said"] = session.teaching.learned().head.agreement, session.teaching.told()
            session.trainer.train(session.run.iteration + SETTLE)
            row["looks"][f"{mark} + {SETTLE} iterations"] = session.look()
        row |= {"iterations": session.run.iteration, "seconds": time.perf_counter() - began}
        row["median_wait"] = statistics.median(waits)
    return row


def table(rows: list[dict]) -> None:
    for name in rows[0]["looks"]:
        looks = [row["looks"][name] for row in rows if name in row["looks"]]
        wins = [look["wins"] for look in looks]
        error = 1.96 * statistics.stdev(wins) / math.sqrt(len(wins)) if len(wins) > 1 else math.nan
        change, own = (
            f"{statistics.mean(values):+.3f} ± {1.96 * statistics.pstdev(values) / math.sqrt(len(values)):.3f}"
            for values in (
                [look["quality"][1] - look["quality"][0] for look in looks],
                [look["quality_of_its_styles"] for look in looks],
            )
        )
        print(
            f"{name:>22} picks: wins {statistics.mean(wins):.3f} ± {error:.3f}   quality {change}, "
            f"beside the base's in the same styles {own}   {len(looks)} users"
        )
    print(f"median seconds from one question to the next: {statistics.median(row['median_wait'] for row in rows):.2f}")


def main() -> None:
    options = arguments(
        __doc__,
        model=("sd3", "flux or sd3"),
        method=("teach", "teach, random, vote or nobody"),
        users=(20, "simulated users"),
        first=(0, "seed of the first one"),
        careless=(0.0, "share of answers that are any picture"),
        picks=(50, "per user"),
        threads=(0, "of torch, 0 = its own choice"),
    )
    if options.threads:
        torch.set_num_threads(options.threads)
    path = options.json or ROOT / f"benchmarks/results/taste_{options.model}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    name = f"{options.method}, {options.careless:g} careless, {options.picks} picks"
    rows = known.setdefault(name, [])
    for seed in range(options.first, options.first + options.users):
        if all(row["seed"] != seed for row in rows):
            rows.append(teach(options, seed))
            save(known, path)
    print(name)
    table(rows)


if __name__ == "__main__":
    main()
