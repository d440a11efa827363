"""The world in which benchmarks/peers.py lets every method train: the embedded SD3 as a pipeline of diffusers, its
prompts and its reward, and a meter that counts, times and stops a training run, whoever's code it is.

Importable without any peer's code (tests/test_peers.py).
"""

import contextlib
import functools
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from iteration import network_passes
from torch import nn

from core.hosts.diffusers import DiffusersVelocity
from core.hosts.diffusers_models import embedded_vae, open_model
from core.hosts.peft import new_adapters, shares
from core.method import noise
from core.rewards import load
from core.rewards.drawing import embedded
from embedded import shapes

STEPS, SIDE, SHAPE = 10, 64, (16, 8, 8)
TOKENS = 12  # text tokens kept: captions have 9, and the embedded models were mostly trained on 12
RANK, ALPHA, TARGETS = 8, 16, "all linear"
EVALUATED = 48
WISH = {"palette": "pastel", "backdrop": "dotted", "face": "smiling"}  # the demo's


class Done(Exception):
    """A training run has spent its budget; raised out of a peer's endless loop."""


class World:
    """The embedded SD3, its captions and the demo's reward; `fresh()` gives an untouched network to train."""

    def __init__(self, features: dict | None = None):
        """features: embeddings [L, D] and pooled [Pd] of some captions, in place of the text encoder's of all."""
        texts = shapes.captions()
        shape, colour, _ = shapes.labels(torch.arange(len(texts)))
        held_out = (shape + colour) % 4 == 0  # 24 of the 96: two colours of every shape, on all backgrounds
        self.features = features or encoded(texts)
        pairs = [(text, bool(out)) for text, out in zip(texts, held_out, strict=True) if text in self.features]
        self.training = [text for text, out in pairs if not out]
        self.held_out = [text for text, out in pairs if out]
        self.vae = embedded_vae("sd3", shapes.decodes_in(torch.device("cpu")))
        self.reward = load("drawing", wish=WISH, follow=True, each="all")
        self.figures = embedded("judge").figures
        self.sigmas = sampling_scheduler().sigmas.float()

    def fresh(self) -> nn.Module:
        """The untrained network, a copy of its own."""
        return open_model("embedded/sd3").transformer

    def velocity(self, transformer: nn.Module, prompts: list[str], adapters=None) -> DiffusersVelocity:
        embeds, pooled = zip(*(self.features[text] for text in prompts))
        return DiffusersVelocity(transformer, adapters, embeds, pooled, shape=SHAPE)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 16, 8, 8] as the network sees them -> images [B, 64, 64, 3] in 0..1."""
        return torch.cat([self.vae.decode(part) for part in latents.split(4)])  # by fours: the fastest on a CPU

    @torch.no_grad()
    def evaluate(self, transformer: nn.Module) -> dict[str, float]:
        """Mean reward of EVALUATED pictures of held-out captions, ODE samples of the same noise, and what the judge by
        rules sees in them. Draws nothing from torch's own generator.
        """
        texts = [self.held_out[i % len(self.held_out)] for i in range(EVALUATED)]
        velocity, rows = self.velocity(transformer, texts), list(range(EVALUATED))
        x, table = noise.roots(SHAPE, 12345, 0, rows, 1), self.sigmas.tolist()
        for s, n in zip(table, table[1:]):
            x = x + (n - s) * velocity(x, s, rows)
        images = self.decode(x)
        return {"reward": float(self.reward.score(images, texts).mean()), **self.figures(images, texts, WISH)}

    @functools.cached_property
    def unit(self) -> float:
        """Cost of a forward with its backward, in forwards; the fastest of many, for other work only adds."""
        batch, repeats = 24, 12
        transformer = self.fresh()
        add_lora(transformer)
        velocity = self.velocity(transformer, self.training[:1])
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        x, rows, forward, both = torch.ones(batch, *SHAPE), [0] * batch, [], []

        def learn():
            with velocity.grad():
                torch.autograd.grad(velocity(x, 0.9, rows).square().sum(), parameters, allow_unused=True)

        for _ in range(repeats):
            forward.append(seconds(lambda: velocity(x, 0.9, rows)))
            both.append(seconds(learn))
        return min(both) / min(forward)


def encoded(texts: list[str]) -> dict:
    """What a model is given of each caption: embeddings [TOKENS, D] and pooled [Pd]."""
    found = open_model("embedded/sd3").encode(texts)
    return {text: (embeds[:TOKENS], pooled) for text, (embeds, pooled) in zip(texts, found, strict=True)}


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sampling_scheduler(steps: int = STEPS) -> FlowMatchEulerDiscreteScheduler:
    """SD3's own, set to so many steps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler


def lora_layers(transformer: nn.Module) -> list[str]:
    """diffusers' names of the layers that our LoRA trains (TARGETS)."""
    layers = dict(transformer.named_modules())
    adapters = new_adapters(transformer, RANK, ALPHA, TARGETS)
    return [name for module in adapters.loras for name in shares(module, layers, "sd3")]


def lora_config(transformer: nn.Module):
    """PEFT's configuration of a LoRA as large as ours, on the same layers, begun as the peers begin theirs."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=lora_layers(transformer))


def add_lora(transformer: nn.Module) -> nn.Module:
    """PEFT's model around the network, whose layers are replaced in place: only the LoRA is trained."""
    from peft import get_peft_model

    return get_peft_model(transformer, lora_config(transformer))


class Text(nn.Module):
    """Stands where a text encoder does; the features are worked out once for all captions."""


class Tokenizer:
    """Captions as their numbers, so that they can be told apart and read back."""

    model_max_length = 77

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __call__(self, prompts: list[str], **_) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([[self.texts.index(prompt)] for prompt in prompts]))

    def batch_decode(self, ids, **_) -> list[str]:
        return [self.texts[int(row[0])] for row in ids]


class Vae(nn.Module):
    """The embedded VAE under the interface of diffusers' AutoencoderKL; latents are already as it wants them."""

    dtype, config = torch.float32, SimpleNamespace(block_out_channels=(1,) * 4, scaling_factor=1.0, shift_factor=0.0)

    def __init__(self, world: World):
        super().__init__()
        self.world = world

    def decode(self, latents: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (self.world.decode(latents).movedim(-1, 1) * 2 - 1,)


class EmbeddedPipeline(StableDiffusion3Pipeline):
    """diffusers' SD3 pipeline around the embedded SD3: all of it but the text encoders is diffusers' own."""

    device = _execution_device = torch.device("cpu")

    @classmethod
    def of(cls, world: World, transformer: nn.Module) -> "EmbeddedPipeline":
        tokenizers = {name: Tokenizer(list(world.features)) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")}
        encoders = {name: Text() for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
        pipeline = cls(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), Vae(world), **tokenizers, **encoders)
        pipeline.features = world.features
        return pipeline

    def set_progress_bar_config(self, **_):
        super().set_progress_bar_config(disable=True)

    def encode_prompt(self, prompt=None, *_, prompt_embeds=None, pooled_prompt_embeds=None, **others):
        """Embeddings that are given, else those of the captions; no negative ones, for the guidance is 1."""
        if prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds = embeddings(
                self.features, [prompt] if isinstance(prompt, str) else prompt
            )
        return prompt_embeds, others.get("negative_prompt_embeds"), pooled_prompt_embeds, None


def embeddings(features: dict, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L, D] and pooled [B, Pd] of captions."""
    embeds, pooled = zip(*(features[prompt] for prompt in prompts))
    return torch.stack(embeds), torch.stack(pooled)


@dataclass
class Meter:
    """One training run, whoever's code it is: counts latents through the network at the network itself, optimizer steps
    in torch and images at the reward, times sampling and learning, evaluates on the way, and stops it.

    Use as a context around the run; its loop calls `check` between two iterations, which raises Done at the end. What
    evaluations take is neither timed nor counted.
    """

    world: World
    transformer: nn.Module
    budget: float  # cost units, in forwards: a latent that is also back-propagated costs world.unit
    limit: float  # seconds
    marks: int = 6  # evaluations on the way, per budget and per limit
    rows: list[dict] = field(default_factory=list)
    images: int = 0
    updates: int = 0
    rewards: list[float] = field(default_factory=list)  # mean reward of each batch that was scored
    spent: float = 0.0
    sampling: float = 0.0

    def __enter__(self) -> "Meter":
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.stack = contextlib.ExitStack()
        self.passes = self.stack.enter_context(network_passes(self.transformer))
        handle = register_optimizer_step_post_hook(lambda *_: setattr(self, "updates", self.updates + 1))
        self.stack.callback(handle.remove)
        self.began = self.scored = time.perf_counter()
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    @property
    def cost(self) -> float:
        return self.passes.forwards + (self.world.unit - 1) * self.passes.backwards

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Rewards [B] of images [B, H, W, 3] in 0..1."""
        found = self.world.reward.score(images, prompts)
        self.images, self.scored = self.images + len(images), time.perf_counter()
        self.rewards.append(float(found.mean()))
        return found

    def check(self, *_) -> None:
        """Between two iterations: the clock stands, an evaluation is made where one is due, and Done ends the run."""
        now = time.perf_counter()
        if self.rows:  # what came before the first is loading
            self.spent += now - self.began
            self.sampling += max(0.0, self.scored - self.began)
        over = self.cost >= self.budget or self.spent >= self.limit
        last = self.rows[-1] if self.rows else {"cost": -self.budget, "seconds": -self.limit}
        moved = max((self.cost - last["cost"]) / self.budget, (self.spent - last["seconds"]) / self.limit)
        if over or moved >= 1 / self.marks:
            passes, updates = (self.passes.forwards, self.passes.backwards), self.updates
            found = self.world.evaluate(self.transformer)
            self.passes.forwards, self.passes.backwards = passes
            self.rows.append(
                {
                    "cost": self.cost,
                    "seconds": self.spent,
                    "forwards": passes[0],
                    "backwards": passes[1],
                    "images": self.images,
                    "updates": updates,
                    **found,
                }
            )
        if over:
            raise Done
        self.began = self.scored = time.perf_counter()

    def result(self) -> dict:
        """Columns of the evaluations, and what an image and an update took: sampling, decoding and scoring is the
        image's, the rest the update's.
        """
        return {
            **{key: [row[key] for row in self.rows] for key in self.rows[0]},
            "seconds_per_image": self.sampling / self.images,
            "seconds_per_update": (self.spent - self.sampling) / self.updates,
        }
