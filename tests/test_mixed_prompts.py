"""Prompts whose texts are not equally long, in one batch: every prompt's tree is the one it has alone."""

import contextlib

import pytest
import tiny
import torch
from graph import network_forwards

from core.method import noise
from core.method.advantage import edge_advantages
from core.method.cost import forwards
from core.method.memory import MicroBatch
from core.method.noise import NoiseSchedule
from core.method.objective import Objective
from core.method.rollout import grow
from core.method.steps import KINDS
from core.method.tree import TreeShape
from core.method.update import policy_gradient

C_H_W = (16, 8, 8)
LENGTHS = (7, 12, 7, 5)  # of the texts
SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
SHAPE = TreeShape(branching=2, depth=2, window="fixed")
SHARED = 3  # prompts of this many lengths make as many calls


class InComfyUI:
    """A tiny policy; `session(prompts)` has the prompts of these numbers."""

    def __init__(self, architecture, cfg):
        from core.hosts.comfy import ComfyPolicy

        self.texts = [tiny.conditioning(1, tokens=length, seed=number) for number, length in enumerate(LENGTHS)]
        self.negative, self.cfg = tiny.conditioning(1, seed=9), cfg
        self.policy = ComfyPolicy.create(tiny.load(architecture), 3, 5.0, "attention+mlp")
        self.network, self.adapters = self.policy.model.model.diffusion_model, self.policy.adapters

    def session(self, prompts):
        from core.hosts.comfy_host import batch

        positive = batch([self.texts[number] for number in prompts])
        return self.policy.session(positive, self.negative, self.cfg, shape=C_H_W)


class InDiffusers:
    def __init__(self, architecture, cfg):
        from core.hosts import diffusers
        from core.lora.adapters import Adapters

        self.texts = []
        for number, length in enumerate([*LENGTHS, 7]):
            [[context, options]] = tiny.conditioning(1, tokens=length, seed=number)
            self.texts.append((context[0].clone(), options["pooled_output"][0].clone()))
        self.network, self.cfg = diffusers.load_transformer(tiny.state_dict(architecture)), cfg
        self.adapters = Adapters.create(self.network, 3, 5.0, "attention+mlp")
        self.adapters.inject(self.network)

    @contextlib.contextmanager
    def session(self, prompts):
        from core.hosts.diffusers import DiffusersVelocity

        *texts, (embeds, pooled) = [self.texts[number] for number in [*prompts, -1]]
        with torch.no_grad():
            yield DiffusersVelocity(
                self.network, self.adapters, *zip(*texts), (embeds[None], pooled[None]), self.cfg, shape=C_H_W
            )


@pytest.fixture(params=["comfy", "diffusers"])
def kind_of_host(request):
    if request.param == "comfy":
        request.getfixturevalue("comfy")
        return InComfyUI
    pytest.importorskip("diffusers")
    return InDiffusers


@pytest.fixture(params=["flux", "sd3.5"])
def host(request, kind_of_host):
    """Makes a host of a CFG, with a LoRA that changes the velocity."""

    def make(cfg=1.0):
        made, generator = kind_of_host(request.param, cfg), torch.Generator().manual_seed(7)
        with torch.no_grad():
            for lora in made.adapters.loras.values():
                lora.up.copy_(0.05 * torch.randn(lora.up.shape, generator=generator))
        return made

    return make


@contextlib.contextmanager
def calls_of(network):
    """The number of latents of each call of the network."""
    sizes = []

    def note(module, args, kwargs):
        sizes.append(len(args[0] if args else kwargs["hidden_states"]))

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def tree(velocity, kind, prompts, numbers, micro_batch=None):
    roots = noise.roots(C_H_W, 5, 3, numbers, 1).to(velocity.device)
    schedule = NoiseSchedule(kind, 0.7, rho_min=0.1)
    batch = MicroBatch(micro_batch) if micro_batch else None
    return grow(velocity, roots, SIGMAS, SHAPE, schedule, start=0, prompts=prompts, numbers=numbers, micro_batch=batch)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_velocity_is_that_of_each_prompt_alone(host, cfg):
    made, x, rows = host(cfg), tiny.latents(6), [3, 0, 1, 2, 0, 1]
    sigma = torch.tensor([0.9, 0.8, 0.7, 0.5, 0.3, 0.1])
    with made.session([0, 1, 2, 3]) as velocity, calls_of(made.network) as sizes:
        found = velocity(x, sigma, torch.tensor(rows))
        assert velocity.forwards == sum(sizes) == len(x) * (1 if cfg == 1 else 2)
        assert len(sizes) == (SHARED if cfg == 1 else SHARED + 2), "only equally long texts share a call"
    for place, row in enumerate(rows):
        with made.session([row]) as velocity:
            alone = velocity(x[place : place + 1], float(sigma[place]), [0])
        torch.testing.assert_close(found[place : place + 1], alone, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_is_that_of_its_prompt_alone(host, kind):
    """And counts what the closed form says, with a first ratio of exactly 1, on any micro-batch split."""
    made = host()
    with made.session([0, 1, 2, 3]) as velocity:
        forest = tree(velocity, kind, [0, 1, 2, 3], [0, 1, 2, 3])
        assert velocity.forwards == forest.forwards == 4 * forwards(len(SIGMAS) - 1, 0, 2, 2, 1, 1.0)[0]
        split = tree(velocity, kind, [0, 1, 2, 3], [0, 1, 2, 3], micro_batch=3)
        leaf = torch.linspace(-1, 1, len(forest.leaves))
        advantages = edge_advantages("treegrpo", forest.log_probs, leaf, 2, 4, "mean-logprob", 1024)
        metrics = policy_gradient(velocity, forest, advantages, Objective())
    torch.testing.assert_close(split.leaves, forest.leaves, rtol=1e-4, atol=2e-4)
    assert metrics["ratio_mean"] == 1 and metrics["edges_trained"] == 4 * 6
    per_prompt = forest.leaves.unflatten(0, (4, -1))
    for number in range(4):
        with made.session([number]) as velocity:
            alone = tree(velocity, kind, [0], [number])
        torch.testing.assert_close(per_prompt[number], alone.leaves, rtol=1e-4, atol=2e-4)


def test_the_gradient_is_the_sum_of_those_of_the_prompts_alone(host):
    made, x, rows = host(), tiny.latents(4), [0, 1, 2, 3]

    def gradient(session, latents, rows):
        with session as velocity, velocity.grad():
            loss = velocity(latents, 0.6, rows).square().sum()
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(velocity.parameters()))])

    together = gradient(made.session(rows), x, rows)
    alone = sum(gradient(made.session([row]), x[row : row + 1], [0]) for row in rows)
    assert together.norm() > 1
    assert (together - alone).norm() < 1e-4 * together.norm()


def test_sharded_processes_call_the_network_equally_often():
    """Whatever prompts each has: otherwise they would wait for each other for ever."""
    pytest.importorskip("diffusers")
    made, x, calls = InDiffusers("flux", 3.0), tiny.latents(2), []
    with made.session([0, 1, 2, 3]) as velocity:
        plain = velocity(x, 0.7, [1, 1])
        made.network.unshard = None  # what FSDP2 adds
        for rows in ([0, 2], [1, 1], [3, 1]):
            counted = velocity.forwards
            with calls_of(made.network) as sizes, velocity.grad():
                found = velocity(x, 0.7, rows)
            calls.append(len(sizes))
            assert velocity.forwards == counted + 4
            if rows == [1, 1]:
                assert torch.equal(found.detach(), plain)
    assert len(set(calls)) == 1


# ComfyUI's conditioning


def entry(tokens=7, seed=0, **options):
    [[context, rest]] = tiny.conditioning(1, tokens=tokens, seed=seed)
    return [[context, {**rest, **options}]]


def test_equal_prompts_stay_one_plain_entry(comfy):
    from core.hosts.comfy_host import batch

    [[context, options]] = batch([entry(seed=0), entry(seed=1)])
    assert context.shape[0] == 2 and set(options) == {"pooled_output"} and options["pooled_output"].shape[0] == 2


def test_every_option_stays_with_its_prompt(comfy):
    """FLUX's guidance is one of them."""
    from core.hosts.comfy import ComfyPolicy
    from core.hosts.comfy_host import batch

    policy, x = ComfyPolicy.create(tiny.load("flux"), 3, 5.0, "attention+mlp"), tiny.latents(3)
    texts = [entry(seed=0, guidance=2.0), entry(seed=1, guidance=6.0), entry(seed=2, guidance=2.0)]
    with policy.session(batch(texts), shape=C_H_W) as velocity:
        found = velocity(x, 0.7, [0, 1, 2])
    for number, text in enumerate(texts):
        with policy.session(text, shape=C_H_W) as velocity:
            alone = velocity(x[number : number + 1], 0.7, [0])
        torch.testing.assert_close(found[number : number + 1], alone, rtol=1e-4, atol=5e-5)
    with policy.session(entry(seed=1, guidance=2.0), shape=C_H_W) as velocity:
        assert (velocity(x[1:2], 0.7, [0]) - found[1:2]).abs().max() > 1e-3, "the guidance must matter"


@pytest.mark.parametrize(
    "one, other, together",
    [
        ({}, {}, True),
        ({"mask": torch.ones(1, 7)}, {"mask": torch.ones(1, 7)}, True),
        ({"mask": torch.ones(1, 7)}, {"mask": torch.zeros(1, 7)}, False),
        ({"mask": torch.ones(1, 7)}, {}, False),
        ({"latents": [torch.ones(2), {"a": 1}]}, {"latents": [torch.ones(2), {"a": 1}]}, True),
        ({"latents": [torch.ones(2), {"a": 1}]}, {"latents": [torch.ones(2), {"a": 2}]}, False),
        ({"pooled_output": None}, {}, False),
        ({"hooks": object()}, {"hooks": object()}, False),
    ],
)
def test_which_prompts_share_a_call(comfy, one, other, together):
    from core.hosts.comfy_host import batch

    found = batch([entry(seed=0, **one), entry(seed=1, **other)])
    assert len(found) == (1 if together else 2)


def test_a_negative_for_each_prompt(comfy):
    from core.hosts.comfy import ComfyPolicy
    from core.hosts.comfy_host import batch

    policy, x = ComfyPolicy.create(tiny.load("sd3"), 3, 5.0, "attention+mlp"), tiny.latents(3)
    positive = [entry(7, 0), entry(9, 1), entry(7, 2)]
    negative = [entry(5, 3), entry(5, 4), entry(8, 5)]
    with policy.session(batch(positive), batch(negative), 3.0, shape=C_H_W) as velocity:
        found = velocity(x[[2, 0, 1]], 0.7, [2, 0, 1])[[1, 2, 0]]
    for number in range(3):
        with policy.session(positive[number], negative[number], 3.0, shape=C_H_W) as velocity:
            alone = velocity(x[number : number + 1], 0.7, [0])
        torch.testing.assert_close(found[number : number + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", ["one lost", "twice", "with a prompt of the user's", "a row lost"])
def test_a_batch_that_was_taken_apart_is_refused(comfy, broken):
    from core.hosts.comfy_host import batch
    from core.hosts.comfy_refusals import places_of

    made = batch([entry(7, 0), entry(9, 1), entry(7, 2)])
    assert places_of("positive", made) == [(0, 0), (1, 0), (0, 1)]
    changed = {
        "one lost": made[:1],
        "twice": made + made,
        "with a prompt of the user's": made + entry(7, 3),
        "a row lost": [[made[0][0][:1], made[0][1]], made[1]],
    }[broken]
    with pytest.raises(ValueError, match="ComfyUI would average them"):
        places_of("positive", changed)


def test_scheduled_text_encoders_are_refused(comfy):
    from core.hosts.comfy_host import batch

    with pytest.raises(ValueError, match="2 entries for one prompt"):
        batch([entry() + entry()])


# in the graph and the Trainer, with a text of more tokens than CLIP's 77

SHORT, LONG = "a red circle on a white background", "a blue square on a black background " * 14


def test_an_image_beside_a_long_prompt_is_the_image_alone(graph):
    policy = graph.policy()
    pictures = []
    for text in (f"{SHORT}\n{LONG}", SHORT):
        positive, prompts = graph.prompts(text)
        tree, leaves = graph.sample(policy, positive)
        pictures.append(graph.decode(leaves).chunk(len(prompts.splitlines()))[0])
    assert len(graph.prompts(f"{SHORT}\n{LONG}")[0]) == 2, "the texts must not be equally long"
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-3)


def test_a_run_with_prompts_of_two_lengths(graph):
    """By hand: the first ratio is 1, and all passes through the network are counted."""
    policy = graph.policy()
    with network_forwards(graph.model) as count:
        row = graph.iteration(policy, text=f"{SHORT}\n{LONG}\n{SHORT} again")
    assert row["ratio_first"] == 1 and row["grad_norm"] > 0
    assert row["forwards"] == count.total


def test_a_ksampler_is_not_stopped_by_the_batch(graph):
    """It averages the entries, as it does with any."""
    assert graph.ksampler(graph.model, graph.prompts(f"{SHORT}\n{LONG}")[0], steps=2).isfinite().all()


def test_the_trainers_evaluation_is_that_of_each_prompt_alone(graph):
    host_of = graph.pack.core.hosts.comfy_host.ComfyHost
    trainers, prompts = graph.pack.core.runs.trainer, graph.pack.core.runs.prompts
    reward = graph.call("Measure", measure="foreground size", direction="more")[0]
    images = []
    with torch.inference_mode(False), torch.no_grad():
        for held_out in ([SHORT, LONG], [SHORT]):
            policy = graph.policy(f"{len(held_out)}")
            host = host_of(policy.policy, graph.clip, graph.vae, graph.sigmas(), graph.latent(), 1.0, None, False)
            settings = trainers.Settings(evaluate_every=1)
            listed = prompts.PromptList(train=["a red circle"], held_out=held_out)
            trainer = trainers.Trainer(
                policy.run, host, listed, graph.shape(), graph.noise(), Objective(), reward, settings
            )
            images.append(trainer.evaluate().images[0])
    torch.testing.assert_close(*images, rtol=0, atol=1e-3)
