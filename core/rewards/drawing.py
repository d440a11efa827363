"""Rewards for drawings of the embedded models: a taste in styles that no caption names, and following the prompt (a
small network, to be trained on), and a judge by rules (to be watched, never trained on).
"""

import importlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Reward, Trial
from .files import find, open_weights
from .self_test import noisy, scrambled

SIZE = 64  # pixels at which the network looks, whatever the picture's
CRITIC, JUDGE = "embedded/critic", "embedded/judge"
SHIPPED = Path(__file__).resolve().parents[2] / f"{CRITIC}.safetensors"
ANY = "any"  # no wish
RULES = ("quality", "prompt", "both")
EACH = ("mean", "all")
DRAWN = ("drawn", "well")  # the head and value that every picture is wished to have
ENOUGH = 0.9  # a probability from which on more is not better


class Critic(nn.Module):
    """images [B, 3, H, W] in 0..1 -> {head: logits [B, values]}; heads: {"shape": ["circle", ...], ...}."""

    def __init__(self, heads: dict[str, list[str]], width: int = 24):
        super().__init__()
        self.heads = heads
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, 2), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(2 * width, 3 * width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(3 * width, 3 * width, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(3 * width * 16, sum(map(len, heads.values()))),
        )  # fmt: skip

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        sizes = [len(values) for values in self.heads.values()]
        return dict(zip(self.heads, self.net(at_size(images.float()) - 0.5).split(sizes, 1)))


class DrawingFeatures:
    """What the critic's last layer looks at, as features for a taste (core.rewards.taste.Features)."""

    name = "the tiny models' critic"

    def __init__(self, critic: Critic | None = None):
        self.critic = critic or load_critic(SHIPPED)

    def embed(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] in 0..1 -> [B, D] on the CPU."""
        pixels, _ = looked_at(images)
        with torch.inference_mode(False), torch.no_grad():
            return self.critic.net[:-1](at_size(pixels.clone()) - 0.5)


def load_critic(file: Path) -> Critic:
    """In fp32 on the CPU, frozen. The heads are in the file's metadata."""
    from safetensors import safe_open

    weights = open_weights(file)
    with safe_open(str(file), "pt") as opened:
        heads = json.loads((opened.metadata() or {}).get("heads", "{}"))
    if DRAWN[0] not in heads or "net.0.weight" not in weights:
        raise ValueError(f"{file.name} is not a critic of drawings: it names no heads.")
    critic = Critic(heads, weights["net.0.weight"].shape[0])
    critic.load_state_dict({key: value.float() for key, value in weights.items()})
    return critic.eval().requires_grad_(False)


class Drawing(Reward):
    """Mean over what is wanted of min(P, 0.9) / 0.9, times the same of "drawn well", in 0..1; P is the critic's
    probability.

    wish: {head: value}, such as {"palette": "pastel", "face": "smiling"}; all of them wanted in every picture, but for
    those whose value is "any".
    follow: also wanted is whatever the prompt names: the value of any head outside of `wish` that is a word of it.
    each: "mean" gives points for every wish that is met; "all" their geometric mean, near 0 until every one is.
    """

    def __init__(self, critic: Critic, wish: dict[str, str] | None = None, follow: bool = True, each: str = "mean"):
        wish = {head: value for head, value in (wish or {}).items() if value != ANY}
        for head, value in wish.items():
            if value not in critic.heads.get(head, ()):
                known = "; ".join(f"{name}: {', '.join(values)}" for name, values in critic.heads.items())
                raise ValueError(f"The critic knows no '{value}' for '{head}'. It knows {known}.")
        if each not in EACH:
            raise ValueError(f"Unknown '{each}': choose one of {', '.join(EACH)}.")
        if not wish and not follow:
            raise ValueError("Nothing is wished for: choose a style, or follow the prompt.")
        self.critic, self.wish, self.follow, self.each = critic, wish, follow, each
        self.name = "taste and prompt" if wish and follow else "taste" if wish else "follows"

    def trial(self) -> Trial:
        return drawings(self.wish, prompts=self.follow)

    def wanted(self, prompt: str) -> dict[str, str]:
        """{head: value} for a prompt."""
        words = embedded("shapes").words(prompt)
        heads = self.critic.heads.items() if self.follow else ()
        return {**{head: value for head, values in heads for value in values if value in words}, **self.wish}

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1 -> [B] on the CPU; NaN for a picture that holds NaN, or whose prompt names nothing where
        nothing else is wished for.
        """
        pixels, known = looked_at(images)
        with torch.inference_mode(False), torch.no_grad():
            found = {
                head: logits.softmax(1).clamp(max=ENOUGH) / ENOUGH
                for head, logits in self.critic(pixels.clone()).items()
            }
        heads, (head, value) = self.critic.heads, DRAWN
        well = found[head][:, heads[head].index(value)]
        scores = torch.full((len(pixels),), torch.nan)
        for row, prompt in enumerate(prompts):
            wanted = self.wanted(prompt)
            if not wanted or not known[row]:
                continue
            met = torch.stack([found[head][row, heads[head].index(value)] for head, value in wanted.items()])
            scores[row] = well[row] * (met.mean() if self.each == "mean" else met.clamp(min=1e-4).log().mean().exp())
        return scores


def drawings(wish: dict[str, str], prompts: bool = True, quality: bool = True) -> Trial:
    """Two ideal drawings in the wished styles; quality: each damaged; prompts: each under the other's prompt."""
    shapes = embedded("shapes")
    asked = [
        {"colour": colour, "shape": shape, "background": background} | wish
        for colour, shape, background in (("red", "circle", "white"), ("blue", "square", "black"))
    ]
    texts = ["a {colour} {shape} on a {background} background".format(**one) for one in asked]
    styles = torch.tensor([[int(wish.get(name) == second) for name, (_, second) in shapes.STYLES.items()]] * 2)
    numbers = torch.tensor([shapes.captions().index(text) for text in texts])
    clean = shapes.render(numbers, styles, torch.zeros(2, 2), torch.full((2,), 0.3 * SIZE)).movedim(1, -1)
    pairs = [(0, 2), (1, 3)] * quality + [(0, 4), (1, 5)] * (prompts and texts[0] != texts[1])
    return Trial(torch.cat([clean, scrambled(noisy(clean), 8), clean]), [*texts, *texts, *texts[::-1]], pairs)


class Rules(Reward):
    """The judge by rules (embedded/judge.py) as a reward, in 0..1; it shares nothing with the network.

    of: "quality" is how well the picture is drawn, whatever it shows; "prompt" is 1 where it shows the asked
    shape, colour and background, else 0; "both" is their product.
    """

    def __init__(self, of: str = "quality"):
        if of not in RULES:
            raise ValueError(f"Unknown '{of}': choose one of {', '.join(RULES)}.")
        self.of, self.name, self.origin = of, f"judge: {of}", ("drawing", JUDGE, {"of": of})

    def trial(self) -> Trial:
        return drawings({}, prompts=self.of != "quality", quality=self.of != "prompt")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1 -> [B] on the CPU; NaN for a picture that holds NaN, or whose prompt asks for nothing
        where that counts.
        """
        judge, asked_by = embedded("judge").judge, embedded("shapes").asked
        pixels, known = looked_at(images)
        with torch.inference_mode(False), torch.no_grad():
            found = judge(pixels.clone())
        scores = found["quality"] if self.of != "prompt" else torch.ones(len(pixels))
        if self.of != "quality":
            for row, prompt in enumerate(prompts):
                asked = asked_by(prompt)
                met = float(all(int(found[what][row]) == number for what, number in asked.items()))
                scores[row] *= met if asked else torch.nan
        return torch.where(known, scores, torch.nan)


def looked_at(images: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, W, 3] -> (what the critic and the judge look at [B, 3, SIZE, SIZE] on the CPU, which are whole [B])."""
    pixels = images[..., :3].movedim(-1, 1).float().cpu()
    return at_size(pixels.nan_to_num(0.0)), torch.isfinite(pixels).flatten(1).all(1)


def at_size(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 3, SIZE, SIZE]."""
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)


def embedded(name: str):
    """A module of the folder embedded/, inside ComfyUI and without it."""
    return importlib.import_module(f"{__package__.removesuffix('core.rewards')}embedded.{name}")


def load(path: str | Path = CRITIC, **options) -> Reward:
    """path: embedded/critic (options: wish, follow, each), a file like it that embedded/train.py made, or
    embedded/judge (option: of). Both run on the CPU: they are small.
    """
    text = str(path) or CRITIC
    if text == JUDGE:
        return Rules(**options)
    file = SHIPPED if text == CRITIC else Path(text)
    reward = Drawing(load_critic(find(file)), **options)
    reward.origin = ("drawing", text, {"wish": reward.wish, "follow": reward.follow, "each": reward.each})
    return reward
