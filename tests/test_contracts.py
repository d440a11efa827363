"""Whoever plays a part can play all of it: both hosts, their velocities, the toy and every reward, against core's
Protocols.
"""

import importlib
import inspect

import pytest
import torch
from toy import ToyVelocity

from core.model import Host, Velocity
from core.rewards.contract import Reward

PLAYERS = [
    (Velocity, "comfy", "ComfyVelocity"),
    (Velocity, "diffusers", "DiffusersVelocity"),
    (Host, "comfy_host", "ComfyHost"),
    (Host, "diffusers_models", "DiffusersHost"),
]
GIVEN = {"fingerprint", "graph_bytes", "refuse", "trial"}  # what a Protocol has an answer for itself
REWARDS = ["aesthetic.Aesthetic", "clip.ClipScorer", "drawing.Drawing", "drawing.Rules", "geneval.GenEval",
           "hpsv3.HPSv3", "human.HumanReward", "image_reward.ImageReward", "judge.Judge", "measure.Measure",
           "measure.Similarity", "ocr.Ocr", "server.ServerReward", "taste.MyTaste", "teaching.Teaching"]  # fmt: skip


def promised(protocol) -> dict:
    """The methods of a Protocol by name."""
    return {
        name: value
        for name, value in vars(protocol).items()
        if inspect.isfunction(value) and (name == "__call__" or name[0] != "_")
    }


def same_call(method, promise, more: bool) -> None:
    """Callable as promised: the same parameters in the same order; more: others may follow if they have a default."""
    wanted, found = (list(inspect.signature(inspect.unwrap(f)).parameters.values()) for f in (promise, method))
    assert [p.name for p in found[: len(wanted)]] == [p.name for p in wanted]
    assert all(p.default is not p.empty for p in found[len(wanted) :]) and (more or len(found) == len(wanted))


def plays(kind, protocol, more: bool = False) -> None:
    assert protocol.__name__ in [base.__name__ for base in kind.__mro__]
    for name, promise in promised(protocol).items():
        owner = next(base for base in kind.__mro__ if name in vars(base))
        assert name in GIVEN or owner.__name__ != protocol.__name__, f"{kind.__name__} has no {name} of its own"
        same_call(getattr(kind, name), promise, more)


@pytest.mark.parametrize(
    "protocol, module, name", PLAYERS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_both_hosts(pack, protocol, module, name):
    """attributes included: each is set in the class, as a property or in its constructor."""
    if "diffusers" in module:
        pytest.importorskip("diffusers")
    kind = getattr(importlib.import_module(f"{pack.__name__}.core.hosts.{module}"), name)
    plays(kind, protocol)
    source = inspect.getsource(kind)
    for attribute in protocol.__annotations__:
        assert hasattr(kind, attribute) or f"self.{attribute}" in source


def test_the_toy():
    plays(ToyVelocity, Velocity)
    velocity = ToyVelocity(4)
    assert all(hasattr(velocity, attribute) for attribute in Velocity.__annotations__)
    before = velocity.fingerprint()
    with torch.no_grad():
        velocity.delta += 1
    assert velocity.fingerprint() != before


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward(name):
    module, kind = name.split(".")
    plays(getattr(importlib.import_module(f"core.rewards.{module}"), kind), Reward, more=True)


def test_no_reward_is_left_out():
    for module in {name.split(".")[0] for name in REWARDS} | {"combine", "scorer", "picks"}:
        importlib.import_module(f"core.rewards.{module}")

    def below(kind):
        return {kind, *(found for sub in kind.__subclasses__() for found in below(sub))}

    named = {name.split(".")[1] for name in REWARDS} | {"Reward", "Scorer"}
    assert {kind.__name__ for kind in below(Reward) if kind.__module__.startswith("core.rewards")} == named


def test_a_player_that_forgets_something_is_found():
    class Forgets(ToyVelocity):
        def __call__(self, x, sigma):
            return x

    class Half(Reward):
        name = "half"

    for kind, protocol in ((Forgets, Velocity), (Half, Reward)):
        with pytest.raises(AssertionError):
            plays(kind, protocol)
