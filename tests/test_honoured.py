"""What a KSampler heeds beside the network, in a MODEL, a LATENT or a CLIP, is heeded here too, or refused by name."""

import pytest
import tiny
import torch
from graph import Graph, network_forwards
from tiny import euler

C_H_W = (16, 8, 8)


@pytest.fixture(params=["flux", "sd3.5"])
def model(request, comfy):
    return tiny.load(request.param)


@pytest.fixture
def graph(pack, tmp_path):
    return Graph(pack, tmp_path)


def policy_of(model):
    from core.hosts.comfy import ComfyPolicy

    return ComfyPolicy.create(model, 3, 5.0, "attention+mlp")


def overridden(model, cfg, start=0.0, end=1.0):
    extras = pytest.importorskip("comfy_extras.nodes_custom_sampler")
    if not hasattr(extras, "CFGOverride"):
        pytest.skip("this ComfyUI has no CFGOverride")
    return extras.CFGOverride.execute(model, cfg, start, end).result[0]


def euler_here(model, positive, negative, cfg):
    """(latents of 4 Euler steps with the policy's velocity, its forwards, those of the network itself)."""
    import comfy.samplers

    sigmas = comfy.samplers.simple_scheduler(model.get_model_object("model_sampling"), 4)
    x = float(sigmas[0]) * comfy.sample.prepare_noise(torch.zeros(1, *C_H_W), 3)
    with policy_of(model).session(positive, negative, cfg, shape=C_H_W, sigmas=sigmas) as velocity:
        with network_forwards(model) as count:
            for sigma, following in zip(sigmas.tolist(), sigmas.tolist()[1:]):
                x = x + (following - sigma) * velocity(x, sigma, [0])
        return velocity.process_out(x), velocity.forwards, count.total


@pytest.mark.parametrize("end, forwards", [(1.0, 8), (0.5, None)])
def test_cfg_override_is_comfyuis(model, end, forwards):
    positive, negative = tiny.conditioning(1), tiny.conditioning(1, seed=8)
    changed = overridden(model, 4.0, 0.0, end)
    expected = euler(changed, positive, negative)
    assert (expected - euler(model, positive, negative)).abs().max() > 0.05, "the override must matter"
    found, counted, passed = euler_here(changed, positive, negative, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counted == passed and (passed == forwards if forwards else 4 < passed < 8)


def test_an_overridden_cfg_needs_a_negative(model):
    with pytest.raises(ValueError, match="sets cfg to 4.0, which needs a negative prompt"):
        euler_here(overridden(model, 4.0), tiny.conditioning(1), None, 1.0)


def test_a_wrapper_sees_the_schedule_and_has_a_gradient(model):
    seen = []

    def halve(executor, x, timestep, model_options, seed):
        seen.append(model_options["transformer_options"]["sample_sigmas"].tolist())
        return x - (x - executor(x, timestep, model_options, seed)) / 2

    wrapped = model.clone()
    wrapped.add_wrapper("predict_noise", halve)
    x, found = tiny.latents(1), {}
    for name, used in (("plain", model), ("halved", wrapped)):
        sigmas = torch.tensor([1.0, 0.5, 0.0])
        with policy_of(used).session(tiny.conditioning(1), shape=C_H_W, sigmas=sigmas) as velocity, velocity.grad():
            v = velocity(x, 0.5, [0])
            up = torch.autograd.grad(v.sum(), list(velocity.parameters()), allow_unused=True)
            found[name] = v.detach(), torch.cat([part.flatten() for part in up if part is not None])
    assert seen == [[1.0, 0.5, 0.0]]
    for plain, halved in zip(found["plain"], found["halved"]):
        assert plain.norm() > 0
        torch.testing.assert_close(halved, plain / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["outer_sample", "prepare_sampling", "sampler_sample"])
@pytest.mark.parametrize("key", [None, "easycache"])
def test_wrappers_of_a_whole_run_are_refused_by_name(model, kind, key):
    def in_the_way(executor, *args, **kwargs):
        return executor(*args, **kwargs)

    wrapped = model.clone()
    wrapped.add_wrapper_with_key(kind, key, in_the_way)
    name = key or "in_the_way"
    with pytest.raises(ValueError, match=f"'.*{name}' \\({kind}\\)") as caught:
        with policy_of(wrapped).session(tiny.conditioning(1), shape=C_H_W):
            raise AssertionError("the session must not start")
    assert "\n" not in str(caught.value)
    with policy_of(model).session(tiny.conditioning(1), shape=C_H_W) as velocity:
        assert velocity(tiny.latents(1), 0.5, [0]).isfinite().all()


# a LATENT


@pytest.mark.parametrize(
    "key, value",
    [("noise_mask", torch.zeros(1, 1, 64, 64)), ("batch_index", [3]), ("type", "audio"), ("of another pack", 1)],
)
def test_what_a_tree_cannot_heed_in_a_latent_is_named(graph, key, value):
    policy, (positive, _) = graph.policy(), graph.prompts("a red circle")
    with pytest.raises(ValueError, match=f"The latent has a '{key}', which cannot be honoured"):
        graph.sample(policy, positive, latent_image={**graph.latent(), key: value})
    with pytest.raises(ValueError, match=f"'{key}'"):
        graph.train(policy, 1, latent_image={**graph.latent(), key: value})


def test_what_changes_nothing_in_a_latent_is_let_through(graph):
    policy, (positive, _) = graph.policy(), graph.prompts("a red circle")
    latent = {**graph.latent(), "noise_mask": torch.ones(1, 1, 64, 64), "batch_index": [0]}
    same = [graph.sample(policy, positive, latent_image=one)[1]["samples"] for one in (latent, graph.latent())]
    assert torch.equal(*same)


def test_an_empty_latent_has_the_size_a_ksampler_gives_it(graph):
    import inspect

    import comfy.sample

    if "downscale_ratio_spacial" not in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters:
        pytest.skip("this ComfyUI knows no ratio")
    positive, _ = graph.prompts("a red circle")
    latent = {"samples": torch.zeros(1, 16, 4, 4), "downscale_ratio_spacial": 16}
    expected = graph.ksampler(graph.model, positive, steps=2, latent=latent).shape
    assert expected[2:] == (8, 8)
    assert graph.sample(graph.policy(), positive, latent_image=latent)[1]["samples"].shape[1:] == expected[1:]


# a CLIP


class Tokenizing:
    """Stands for a text encoder with T5: its texts are as long as the tokenizer's options say."""

    def __init__(self, shared, **options):
        self.cond_stage_model = self.patcher = shared
        self.layer_idx, self.use_clip_schedule, self.tokenizer_options = None, False, options

    def tokenize(self, text):
        return max(10, self.tokenizer_options.get("t5xxl_min_length", 256))

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.zeros(1, tokens, 8), {"pooled_output": torch.zeros(1, 8)}]]


class Shared:
    patches_uuid = 1


def test_an_encoding_is_that_of_the_clips_tokenizer_options(comfy):
    from core.hosts.comfy_host import encode

    shared = Shared()
    lengths = [
        encode(Tokenizing(shared, **options), "a cat")[0][0].shape[1]
        for options in ({}, {"t5xxl_min_length": 0}, {"t5xxl_min_length": 99}, {})
    ]
    assert lengths == [256, 10, 99, 256]
    clip = Tokenizing(shared)
    assert encode(clip, "a cat") is encode(clip, "a cat"), "and is remembered"
