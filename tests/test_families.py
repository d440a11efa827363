"""Every flow model for images that ComfyUI loads, as a tiny random network in real ComfyUI: what must hold for all.

The table in docs/base_models.md is what these checks found: python tests/compat/base_models.py writes it.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path

import families
import pytest
import torch
from families import FAMILIES, OTHERS, Family
from test_backend_comfy import differences, marks, new_policy, velocity_of

from core.hosts.architectures import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("comfy")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Subject:
    """A family's network, the same for all checks, and what they feed it."""

    family: Family

    @cached_property
    def model(self):
        return families.load(self.family)

    @property
    def shape(self) -> tuple[int, ...]:
        from core.hosts.comfy_host import downscale, empty_latent

        return tuple(empty_latent(self.model, self.family.size * downscale(self.model))["samples"].shape[1:])

    def latents(self, count: int) -> torch.Tensor:
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(2))

    def prompts(self, lengths=(7, 9, 7)) -> list:
        """CONDITIONING of prompts of these lengths, as Tree Prompts makes it."""
        from core.hosts.comfy_host import batch

        return batch([self.prompt(number, length) for number, length in enumerate(lengths)])

    def prompt(self, number: int, length: int) -> list:
        return families.conditioning(self.family, length, 20 + number)

    def trees(self, velocity, numbers: list[int], branching: int = 2, noise: float = 0.7):
        """A tree of one layer for each prompt. numbers: the prompts', which seed their noise; 0 has a KSampler's."""
        from core.method.noise import NoiseSchedule, roots
        from core.method.rollout import grow
        from core.method.tree import TreeShape

        shape, schedule = TreeShape(branching=branching, depth=1, trees=1), NoiseSchedule("cps", noise)
        drawn = float(self.sigmas[0]) * roots(self.shape, 3, 0, numbers, 1)
        rows = list(range(len(numbers)))
        return grow(velocity, drawn, self.sigmas, shape, schedule, start=0, prompts=rows, numbers=numbers, seed=3)

    @property
    def sigmas(self) -> torch.Tensor:
        import comfy.samplers

        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", 3).float()

    def euler(self, positive, negative, cfg=1.0) -> torch.Tensor:
        """ComfyUI's own KSampler, in inference mode as in its executor."""
        import comfy.sample

        with torch.inference_mode():
            latent = torch.zeros(1, *self.shape)
            drawn = comfy.sample.prepare_noise(latent, 3)
            settings = (3, cfg, "euler", "simple", positive, negative, latent)
            return comfy.sample.sample(self.model, drawn, *settings, seed=3, disable_pbar=True)


def gradients_are_finite_differences(subject: Subject) -> None:
    """Of all adapters, in float64, with and without checkpointing."""
    policy = new_policy(families.load(subject.family, torch.float64), dtype=torch.float64)
    x, rows = subject.latents(2), [1, 0]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    found = {}
    with policy.session(subject.prompts((7, 9)), shape=subject.shape) as velocity:
        pairs = differences(policy, velocity, x, rows, weights, 2e-3)
        for policy.checkpointing in (False, True):
            with velocity.grad():
                loss = (velocity(x, 0.6, rows).double() * weights).sum()
                parameters = policy.adapters.parameters()
                found[policy.checkpointing] = torch.autograd.grad(
                    loss, parameters, allow_unused=True, materialize_grads=True
                )
    assert max(abs(slope) for slope, _ in pairs) > 1
    size = sum(slope**2 for slope, _ in pairs) ** 0.5
    assert sum((slope - difference) ** 2 for slope, difference in pairs) ** 0.5 < 1e-3 * size, pairs
    plain, checkpointed = (torch.cat([g.flatten() for g in found[way]]) for way in (False, True))
    assert (plain - checkpointed).norm() <= 1e-6 * plain.norm()


def rollout_is_update(subject: Subject) -> None:
    """Bit for bit, with and without checkpointing, in float32 and in bfloat16."""
    x, rows = subject.latents(3), [0, 1, 2]
    for model in (subject.model, families.load(subject.family, torch.bfloat16)):
        policy = new_policy(model)
        with policy.session(subject.prompts(), shape=subject.shape) as velocity:
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: None):
                rollout = velocity(x, 0.7, rows)
            assert not kept, "a rollout keeps nothing for a backward pass, which costs most of the memory"
            assert rollout.std() > 0.3
            for policy.checkpointing in (False, True):
                with velocity.grad():
                    replay = velocity(x, 0.7, rows)
                assert replay.requires_grad and torch.equal(rollout, replay.detach())


def first_ratio_is_one(subject: Subject) -> None:
    """Of every edge of a tree, before any update; and there is something to learn."""
    from core.method.objective import Objective
    from core.method.update import policy_gradient

    policy = new_policy(subject.model)
    with policy.session(subject.prompts((7, 9)), shape=subject.shape) as velocity:
        forest = subject.trees(velocity, [0, 1])
        advantages = [torch.tensor([1.0, -1.0, 0.5, -0.5])]
        for policy.checkpointing in (False, True):
            metrics = policy_gradient(velocity, forest, advantages, Objective(1e-6, 1e-6))
            assert metrics["ratio_mean"] == 1 and metrics["clip_frac"] == 0 and metrics["edges_trained"] == 4
        assert sum(float(p.grad.norm()) for p in velocity.parameters() if p.grad is not None) > 0


def a_bare_branch_is_comfyuis_euler(subject: Subject) -> None:
    """Branching 1 without noise, without CFG and with."""
    positive, negative = subject.prompt(0, 7), subject.prompt(5, 5)
    for cfg in (1.0, 3.0):
        expected = subject.euler(positive, negative, cfg)
        session = new_policy(subject.model, trained=False).session(positive, negative, cfg, shape=subject.shape)
        with session as velocity:
            leaves = velocity.process_out(subject.trees(velocity, [0], branching=1, noise=0.0).leaves)
        assert expected.shape == leaves.shape and expected.std() > 0.3
        torch.testing.assert_close(leaves, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def a_saved_lora_is_the_policy(subject: Subject) -> None:
    """Through ComfyUI's own loaders, every key of it: merged, and as Simple Trainer's tuned model has it."""
    import comfy.sd
    import comfy.utils
    from safetensors.torch import save_file

    policy, x, rows = new_policy(subject.model, targets="all linear"), subject.latents(2), [0, 1]
    positive = subject.prompts((7, 9))
    live = velocity_of(policy, x, 0.7, rows, positive)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        save_file(policy.adapters.state_dict(), f"{folder}/lora.safetensors")
        lora = comfy.utils.load_torch_file(f"{folder}/lora.safetensors", safe_load=True)
        loaded = [
            getattr(comfy.sd, name)(subject.model, None, dict(lora), 1.0, 0)[0]
            for name in ("load_lora_for_models", "load_bypass_lora_for_models")
            if hasattr(comfy.sd, name)
        ]
    assert len(loaded[0].patches) == len(policy.adapters.names)
    for model in loaded:
        found = velocity_of(new_policy(model, trained=False), x, 0.7, rows, positive)
        torch.testing.assert_close(found, live, rtol=1e-4, atol=1e-4)
    base = velocity_of(new_policy(subject.model, trained=False), x, 0.7, rows, positive)
    assert (live - base).abs().max() > 0.05


def the_model_is_left_as_it_was(subject: Subject) -> None:
    """After training, after an error in it, and after an interrupt."""
    import comfy.model_management as management

    positive = subject.prompt(0, 7)
    before, clean = subject.euler(positive, positive), marks(subject.model)
    for way_out in (None, ArithmeticError, management.InterruptProcessingException):
        policy = new_policy(subject.model, checkpointing=True)
        try:
            with policy.session(subject.prompts((7, 9)), shape=subject.shape) as velocity, velocity.grad():
                velocity(subject.latents(2), 0.7, [0, 1]).sum().backward()
                assert marks(subject.model) != clean
                if way_out is not None:
                    raise way_out()
        except (ArithmeticError, management.InterruptProcessingException):
            pass
        assert marks(subject.model) == clean and not subject.model.is_injected
        assert subject.model.model.current_patcher is None and not getattr(management, "in_training", False)
        assert torch.equal(subject.euler(positive, positive), before)


def prompts_do_not_mix(subject: Subject) -> None:
    """Of unequal lengths and with references of their own, in one batch: each as alone."""
    policy, x, lengths = new_policy(subject.model), subject.latents(3), (7, 9, 7)
    together = velocity_of(policy, x, 0.7, [0, 1, 2], subject.prompts(lengths))
    for number, length in enumerate(lengths):
        alone = velocity_of(policy, x[number : number + 1], 0.7, [0], subject.prompt(number, length))
        torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-4, atol=1e-4)
    other = velocity_of(policy, x[:1], 0.7, [0], subject.prompt(1, 7))
    assert (together[:1] - other).abs().max() > 5e-3, "the prompt must matter"


CHECKS = {
    "gradient = finite differences": gradients_are_finite_differences,
    "rollout = update": rollout_is_update,
    "first ratio 1": first_ratio_is_one,
    "euler": a_bare_branch_is_comfyuis_euler,
    "LoRA file": a_saved_lora_is_the_policy,
    "MODEL as before": the_model_is_left_as_it_was,
    "prompts apart": prompts_do_not_mix,
}


def refused(family: Family) -> str:
    """Why it cannot be trained; "" where it can."""
    row = family.row or family.name
    return next(architecture.untrainable for architecture in ARCHITECTURES if architecture.name == row)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[family for family in FAMILIES if not refused(family)], ids=attrgetter("name"))
def subject(request, comfy):
    return Subject(request.param)


@pytest.mark.parametrize("check", CHECKS)
def test_family(subject, check):
    CHECKS[check](subject)


@pytest.mark.parametrize("family", [family for family in FAMILIES if refused(family)], ids=attrgetter("name"))
def test_what_is_refused_would_fail(family, monkeypatch):
    """In a sentence, instead of in the middle of the first update."""
    import core.hosts.architectures as architectures

    model = families.load(family)
    with pytest.raises(ValueError, match=f"^{family.name} cannot be trained here: .*[^.]\\.$"):
        new_policy(model)
    rows = tuple(dataclasses.replace(row, untrainable="") for row in ARCHITECTURES)
    monkeypatch.setattr(architectures, "ARCHITECTURES", rows)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first_ratio_is_one(Subject(family))


def test_the_table_is_of_these_families_and_checks():
    text = (ROOT / "docs/base_models.md").read_text("utf-8")
    heads, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert heads[-len(CHECKS) - 2 :] == [*CHECKS, "LoRA in diffusers", "diffusers engine"]
    assert [row[0] for row in rows[1:]] == [family.name for family in FAMILIES]
    for row in rows[1:]:
        why = refused(families.named(row[0]))
        held = [f"refused: {why}", *["–"] * (len(CHECKS) - 1)] if why else ["yes"] * len(CHECKS)
        assert row[-len(CHECKS) - 2 : -2] == held, "python tests/compat/base_models.py writes the table anew"


def test_every_model_of_comfyui_is_in_the_table_or_said_to_be_left_out(comfy):
    import comfy.supported_models

    environments = pytest.importorskip("environments")
    version = pytest.importorskip("comfyui_version").__version__
    if version != environments.TESTED_COMFYUI:
        pytest.skip(f"ComfyUI {version} has other models than {environments.TESTED_COMFYUI}")
    told = [family.config for family in FAMILIES] + [name for names in OTHERS.values() for name in names.split()]
    assert {kind.__name__ for kind in comfy.supported_models.models} == set(told)


REFERRING = [family for family in FAMILIES if family.references]


@pytest.mark.parametrize("family", REFERRING, ids=attrgetter("name"))
def test_references_are_each_prompts_own_in_rollout_and_update(family, comfy):
    """Two prompts of the same words with other references, and one without: tree and gradient are each one's alone."""
    from core.hosts.comfy_host import batch
    from core.method.objective import Objective
    from core.method.update import policy_gradient

    subject = Subject(family)
    policy = new_policy(subject.model)
    [[context, first]], [[_, second]] = subject.prompt(0, 7), subject.prompt(1, 7)
    bare = {key: value for key, value in first.items() if key != "reference_latents"}
    prompts = [[[context, {**first, "reference_latents": own["reference_latents"]}]] for own in (first, second)]
    prompts.append([[context, bare]])
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, 1.0])

    def learned(rows: list[int]):
        """Leaves and gradient of these prompts' trees, with the noise that they have in a batch of all."""
        wanted = batch([prompts[row] for row in rows])
        with policy.session(wanted, shape=subject.shape) as velocity:
            forest = subject.trees(velocity, rows)
            edges = [advantages[[edge for row in rows for edge in (2 * row, 2 * row + 1)]]]
            metrics = policy_gradient(velocity, forest, edges, Objective(1e-2, 1e-2))
            gradient = torch.cat([p.grad.flatten() for p in velocity.parameters() if p.grad is not None])
            for parameter in velocity.parameters():
                parameter.grad = None
        assert metrics["ratio_mean"] == 1
        return forest.leaves, gradient * metrics["edges_trained"]

    leaves, gradient = learned([0, 1, 2])
    alone = [learned([row]) for row in range(3)]
    torch.testing.assert_close(leaves, torch.cat([own for own, _ in alone]), rtol=1e-4, atol=1e-4)
    assert (gradient - sum(own for _, own in alone)).norm() < 1e-4 * gradient.norm()
    seen, *others = (velocity_of(policy, subject.latents(1), 0.7, [0], own) for own in prompts)
    assert all((seen - other).abs().max() > 0.01 for other in others), "the reference must matter"


@pytest.mark.parametrize("family", REFERRING, ids=attrgetter("name"))
def test_references_are_in_the_memory_estimate(family, comfy, monkeypatch):
    """They go through the network beside every latent."""
    import comfy.model_management as management

    asked, subject = [], Subject(family)
    load = management.load_models_gpu
    monkeypatch.setattr(
        management, "load_models_gpu", lambda *args, **kw: [asked.append(kw["memory_required"]), load(*args, **kw)]
    )
    policy, [[context, options]] = new_policy(subject.model), subject.prompt(0, 7)
    bare = {key: value for key, value in options.items() if key != "reference_latents"}
    for own in (bare, options):
        velocity_of(policy, subject.latents(1), 0.7, [0], [[context, own]])
    size = sum(shape[-2] * shape[-1] for shape in family.references) / (family.size**2)
    adapters = policy.memory(subject.shape, 1)["adapters"]
    assert asked[1] - adapters == pytest.approx((1 + size) * (asked[0] - adapters)) and size >= 1
