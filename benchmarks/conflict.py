"""Why some tastes are learned by no method: two wishes that no picture of the model meets together.

For pairs of wishes, on the embedded SD3 or FLUX: how the two go together in the pictures of the untuned model (rank
correlation, and how many pictures are in the better half of both), whether their gradients point the same way (cosine
of the expected gradients, unbiased, over the same trees), and what training on both reaches, with their mean and with
their geometric mean as the reward. `filled` + `small ink` is the taste in question: ink is the coloured share of the
picture, which an outline has less of whatever its size; `small shape` asks for the size itself (the radius of the
best-fitting template); pastel + dotted is a pair that goes together.

    python3 run.py bench conflict [--model sd3] [--budget 3000] [--json FILE]
"""

import host
from common_runs import EVALUATED, Lab, methods
from learning import spearman

PAIRS = (("filled", "small ink"), ("filled", "small shape"), ("pastel", "dotted"))
HEADS = {"filled": "fill", "pastel": "palette", "dotted": "backdrop"}
METHOD, GRADIENTS, SAMPLES = "early_b4w2_regression", 16, 4  # SAMPLES: times EVALUATED pictures of the untuned model


class Wishes:
    """A reward [B] in 0..1 of one wish or two. How small a picture's ink or shape is counts against the untuned
    model's: .5 at its median, a logistic function of its standard deviations.
    """

    def __init__(self, lab: Lab, base):
        self.lab, self.critic, self.wishes, self.each = lab, lab.scorer.critic, (), "mean"
        self.scale = {}
        for name in ("small ink", "small shape"):
            found = self.raw(name, base)
            self.scale[name] = (found.median(), found.std())

    def raw(self, name: str, images):
        pixels = images.movedim(-1, 1).float()
        rules = self.lab.core.rewards.drawing.embedded("judge")
        return rules.colour_share(pixels).flatten(1).mean(1) if name == "small ink" else rules.judge(pixels)["radius"]

    def one(self, name: str, images):
        import torch

        if name in self.scale:
            middle, spread = self.scale[name]
            return torch.sigmoid((middle - self.raw(name, images)) / spread * 2)
        with torch.inference_mode(False), torch.no_grad():
            logits = self.critic(images.movedim(-1, 1).float().clone())[HEADS[name]]
        return logits.softmax(1)[:, self.critic.heads[HEADS[name]].index(name)]

    def score(self, images, prompts=None):
        import torch

        met = torch.stack([self.one(name, images) for name in self.wishes])
        return met.mean(0) if self.each == "mean" else met.clamp(min=1e-4).log().mean(0).exp()


def expected_cosine(a, b) -> float:
    """Cosine of E a and E b from paired gradients [n, parameters]; products of the same draw, whose noise is shared,
    are left out.
    """

    def product(x, y):
        n = len(x)
        return (x.sum(0) @ y.sum(0) - (x * y).sum()) / (n * (n - 1))

    return float(product(a, b) / (product(a, a) * product(b, b)).clamp(min=1e-30).sqrt())


def gradients(lab: Lab, wishes: Wishes, name: str):
    """[GRADIENTS, parameters] for one wish, from the same trees for each."""
    import torch

    wishes.wishes, rows = (name,), []
    with lab.open(7, scale=0.02) as policy:
        for _ in range(GRADIENTS):
            policy.learn(methods()[METHOD], gradient_only=True)
            rows.append(torch.cat([p.grad.flatten() for p in policy.velocity.parameters() if p.grad is not None]))
            for parameter in policy.velocity.parameters():
                parameter.grad = None
    return torch.stack(rows)


def trained(lab: Lab, wishes: Wishes, pair: tuple, each: str, budget: float) -> dict:
    """What each wish has come to on held-out prompts, and how well the pictures are drawn."""
    wishes.wishes, wishes.each = pair, each
    with lab.open(0) as policy:
        while policy.cost < budget:
            policy.learn(methods()[METHOD].but(learning_rate=1.2e-3))
        images, rows = policy.pictures()
    found = {name: float((wishes.one(name, images) > 0.5).double().mean()) for name in pair}
    return {**found, "quality": lab.look(images, rows)["quality"]}


def main() -> None:
    options = host.arguments(
        __doc__.split("\n")[0], model=("sd3", "flux or sd3"), budget=(3000.0, "cost units of one training")
    )
    import torch

    lab = Lab(host.load_pack(), options.model, "taste")
    base = []
    with lab.open(0) as policy:
        for part in range(SAMPLES):
            base.append(policy.pictures(12345 + part)[0])
    base = torch.cat(base)
    wishes = lab.scorer = Wishes(lab, base)
    results = {"model": options.model, "budget": options.budget, "pairs": {}, "device": host.device()}
    for pair in PAIRS:
        first, second = (wishes.one(name, base) for name in pair)
        both = ((first > 0.5) & (second > 0.5)).double().mean()
        row = results["pairs"][" + ".join(pair)] = {
            "rank_correlation": spearman(first, second),
            "share": [float((found > 0.5).double().mean()) for found in (first, second)],
            "both": float(both),
            "gradient_cosine": expected_cosine(*(gradients(lab, wishes, name) for name in pair)),
        }
        for each in ("mean", "geometric mean"):
            row[each] = trained(lab, wishes, pair, each, options.budget)
        host.save(results, options.json)
        print(" + ".join(pair), row, flush=True)
    print(f"({len(base)} pictures of the untuned model, {EVALUATED} after training)")


if __name__ == "__main__":
    main()
