"""Models whose latents have a time, [B, C, 1, H, W], as Qwen-Image's: by hand, in the Trainer and in Simple Trainer,
with the kind of VAE that belongs to them. Real ComfyUI, tiny random networks.
"""

import dataclasses

import families
import pytest
import torch
from graph import Graph, network_forwards, timeless

TEXT = 768  # of the embedded text encoder
QWEN = families.named("Qwen-Image")


@pytest.fixture
def graph(pack, tmp_path):
    """The nodes on a tiny Qwen-Image with a tiny VAE of its kind."""
    made = Graph(pack, tmp_path, "sd3")
    unet = {**QWEN.unet, "joint_attention_dim": TEXT}
    made.model = families.load(dataclasses.replace(QWEN, unet=unet))
    made.vae = video_vae()
    return made


def video_vae():
    """Qwen-Image's kind of VAE, Wan 2.1's, as narrow as can be: it decodes to [B, frames, H, W, 3]."""
    import comfy.sd
    from comfy.ldm.wan.vae import WanVAE

    with torch.inference_mode():
        net = WanVAE(dim=4, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
        families.fill(net, 0)
        try:
            return comfy.sd.VAE(sd=net.state_dict(), dtype=torch.float32)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            pytest.skip("this ComfyUI takes the size of such a VAE as fixed")


def test_by_hand_from_an_empty_latent_without_time_to_an_update(graph):
    policy = graph.policy()
    positive, prompts = graph.prompts(policy=policy)
    with network_forwards(graph.model) as counted:
        tree, leaves = graph.sample(policy, positive)
    assert leaves["samples"].shape == (8, 16, 1, 8, 8) and counted.total == tree.forest.forwards
    images = graph.decode(leaves).flatten(0, -4)  # as VAE Decode does
    assert images.shape == (8, 64, 64, 3)
    credit = graph.call("Advantages", tree=tree, rewards=graph.score(images, prompts))[0]
    graph.call("Update", policy=policy, tree=tree, advantages=credit, learning_rate=1e-3, clip_low=1e-2, clip_high=1e-2)
    row = policy.run.metrics[-1]
    assert row["grad_norm"] > 0 and row["ratio_mean"] == pytest.approx(1, abs=1e-6)


def test_branching_one_without_noise_is_comfyuis_sampler(graph):
    policy, positive = graph.policy(), graph.prompts("a red circle")[0]
    _, leaves = graph.sample(
        policy, positive, shape=graph.shape(branching=1, window="fixed"), noise=graph.noise(level=0.0)
    )
    expected = graph.ksampler(graph.model, positive)
    assert leaves["samples"].shape == expected.shape and expected.std() > 0.3
    torch.testing.assert_close(leaves["samples"], expected, rtol=1e-4, atol=1e-4)


def test_own_images_may_come_without_time(graph):
    policy = graph.policy()
    positive, prompts = graph.prompts(policy=policy)
    tree, leaves = graph.sample(policy, positive)
    credit = graph.call("Advantages", tree=tree, rewards=graph.score(graph.decode(leaves).flatten(0, -4), prompts))[0]
    wanted = {"samples": leaves["samples"][:1, :, 0]}
    settings = {"lambda": 0.1, "target": "images", "learning_rate": 1e-3}
    graph.call("LayerTuning", policy=policy, tree=tree, advantages=credit, images=wanted, **settings)
    assert policy.run.metrics[-1]["grad_norm"] > 0


def test_a_resumed_run_is_one_never_interrupted(graph):
    graph.train(graph.policy("whole"), 2)
    graph.train(graph.policy("halves"), 1)
    graph.forget()
    graph.train(graph.policy("halves"), 2)
    whole, halves = (graph.policy(name).run for name in ("whole", "halves"))
    assert timeless(whole.metrics) == timeless(halves.metrics) and len(whole.metrics) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.adapters.parameters(), halves.adapters.parameters()))


def test_the_preview_of_what_is_being_drawn(graph, monkeypatch):
    import comfy.utils
    import latent_preview

    shown = []
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda self, done, total, picture: shown.append(picture)
    )
    graph.sample(graph.policy(), graph.prompts("a red circle")[0])
    assert shown and all(picture[1].size == (8, 8) for picture in shown)


def test_simple_trainer_makes_a_latent_of_the_models_own(graph):
    reward = graph.call("Measure", measure="foreground size", direction="more")[0]
    _, path, picture, status = graph.call(
        "Simple",
        model=graph.model,
        clip=graph.clip,
        vae=graph.vae,
        reward_model=reward,
        prompts="a red circle\na blue square",
        lora_name="style",
        preset="normal",
        iterations=1,
        size=40,  # 5 latents of 8 pixels are no whole tokens of 2
    )
    assert status.startswith("1 iteration done") and picture.std() > 0


def test_an_empty_latent_is_of_whole_tokens(graph):
    hosts = graph.pack.core.hosts.comfy_host
    assert hosts.empty_latent(graph.model, 40)["samples"].shape == (1, 16, 1, 4, 4)
    for family, pixels, shape in (("FLUX.2", 70, (1, 128, 4, 4)), ("Hunyuan Image 2.1", 20, (1, 64, 1, 1))):
        model = families.load(families.named(family))
        assert hosts.empty_latent(model, pixels)["samples"].shape == shape


def test_a_video_is_refused_before_anything_is_encoded(graph, monkeypatch):
    policy = graph.policy()
    positive = graph.prompts("a red circle")[0]
    monkeypatch.setattr(graph.pack.core.hosts.comfy_host, "encode", None)
    video = {"samples": torch.zeros(1, 16, 3, 8, 8)}
    for run in (
        lambda: graph.sample(policy, positive, latent_image=video),
        lambda: graph.train(policy, 1, latent_image=video),
        lambda: graph.call("Preflight", policy=policy, latent_image=video),
    ):
        with pytest.raises(ValueError, match="a video of 3 latent frames, and only images can be trained on") as caught:
            run()
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not policy.run.metrics


def test_preflight_counts_the_vae_that_there_is(graph):
    policy, embedded = graph.policy(), graph.call("TinyModel", model="sd3")[2]
    for vae in (graph.vae, embedded):
        report = graph.call("Preflight", policy=policy, latent_image=graph.latent(), vae=vae)[0]
        assert "decoding: about" in report
