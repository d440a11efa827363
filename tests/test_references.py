"""Prompts of an edit: each has its reference image, in the prompt list, the model, the Trainer and the rewards."""

import json
import math

import pytest
import torch
from graph import timeless
from hypothesis import given, settings
from hypothesis import strategies as st

from core.references import EditPrompt, reference_of, with_references
from core.rewards.contract import Reward
from core.runs.prompts import PromptList, PromptText, collect, share, split

SAME = "make it blue"


def picture(seed: int, height: int = 64, width: int = 64) -> torch.Tensor:
    """[1, H, W, 3], smooth."""
    noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear").movedim(1, -1)


def edits(count: int) -> list[EditPrompt]:
    return with_references([SAME], [picture(seed) for seed in range(count)])


# the prompt itself


def test_the_same_words_about_other_pictures_are_other_prompts():
    one, same, other = EditPrompt(SAME, picture(0)[0]), EditPrompt(SAME, picture(0)[0]), EditPrompt(SAME, picture(1)[0])
    assert one == same and hash(one) == hash(same) and not one != same
    assert one != other and one != SAME and SAME != one and {one: 1}.get(other) is None and len({one, same, other}) == 2
    assert json.dumps(one) == json.dumps(SAME) and f"{one}" == SAME
    assert reference_of(SAME) is None and torch.equal(reference_of(one), picture(0)[0])
    assert one.about("") == EditPrompt("", picture(0)[0])
    with pytest.raises(ValueError, match=r"shape \[4, 4\]"):
        EditPrompt(SAME, torch.rand(4, 4))


@given(st.integers(1, 4), st.integers(1, 4))
def test_each_prompt_gets_its_picture_or_the_numbers_are_refused(texts, images):
    prompts, batches = [f"p{i}" for i in range(texts)], [picture(seed, 4, 4) for seed in range(images)]
    if texts != images and 1 not in (texts, images):
        with pytest.raises(ValueError, match=f"{texts} prompts for {images} reference images"):
            with_references(prompts, batches)
        return
    expected = [EditPrompt(prompts[i % texts], batches[i % images][0]) for i in range(max(texts, images))]
    assert with_references(prompts, [torch.cat(batches)]) == with_references(prompts, batches) == expected


@settings(max_examples=20)
@given(st.permutations(range(6)), st.sampled_from([0.4, 2]))
def test_a_list_keeps_every_picture_and_holds_out_the_same_ones_in_any_order(order, held_out):
    listed = collect([SAME], references=[picture(seed, 4, 4) for seed in (*order, order[0])])
    assert len(listed) == 6 and listed.duplicates == 1
    found, plain = split(listed, held_out, 3), split(PromptList(edits_of(range(6))), held_out, 3)
    assert set(found.held_out) == set(plain.held_out) and set(found.train) == set(plain.train)
    assert len(found.train) + len(found.held_out) == 6


def edits_of(numbers):
    return with_references([SAME], [picture(seed, 4, 4) for seed in numbers])


def test_score_images_gets_each_prompt_with_its_picture():
    made = edits(2)
    shared = share([PromptText("\n".join(made), made)], [4])
    assert shared == [made[0], made[0], made[1], made[1]] and made[0] != made[1]


# in the model


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([64**2, 512**2, 1024**2]), st.sampled_from([8, 16]))
def test_a_picture_is_scaled_to_whole_tokens_and_about_as_many_pixels(height, width, pixels, multiple):
    comfy_references = pytest.importorskip("core.hosts.comfy_references")
    found = comfy_references.fitted(height, width, pixels, multiple)
    ratio = math.sqrt(pixels / (height * width))
    assert all(side % multiple == 0 and side >= multiple for side in found)
    assert all(abs(side - old * ratio) <= multiple / 2 or side == multiple for side, old in zip(found, (height, width)))
    scaled = (height * multiple, width * multiple)
    assert comfy_references.fitted(height, width, math.prod(scaled), multiple) == scaled


@pytest.fixture(scope="module", autouse=True)
def comfyui(comfy):
    """Here rather than by name, so that `core.hosts.comfy...` can be imported."""


class Seeing:
    """A text encoder and a VAE in one, whose answers tell what they were given."""

    class Module(torch.nn.Module):
        pass

    def __init__(self):
        self.cond_stage_model, self.first_stage_model = self.Module(), self.Module()
        self.patcher, self.layer_idx, self.use_clip_schedule = type("P", (), {"patches_uuid": 1})(), None, False
        self.calls = 0

    def tokenize(self, text, **more):
        return text, more

    def encode_from_tokens_scheduled(self, tokens):
        self.calls += 1
        text, more = tokens
        seen = [image.mean((0, 1, 2)) for image in more.get("images", [])] + [torch.zeros(3)]
        words = torch.tensor([float(sum(map(ord, text))), float(len(more.get("llama_template") or ""))])
        return [[torch.cat([words, *seen])[None, None], {}]]

    def encode(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)


def qwen(file: str):
    import families

    model = families.load(families.named("Qwen-Image"))
    model.cached_patcher_init = (None, (f"{file}.safetensors",))
    return model


@pytest.mark.parametrize(
    "file, node, name",
    [
        ("qwen_image_edit", "TextEncodeQwenImageEdit", "image"),
        ("qwen_image_edit_2509", "TextEncodeQwenImageEditPlus", "image1"),
        ("qwen_image_edit_2511", "TextEncodeQwenImageEditPlus", "image1"),
    ],
)
def test_qwen_image_edit_is_asked_as_comfyuis_own_node_does(file, node, name):
    """Text encoder and reference latents, at the million pixels that the node has."""
    from comfy_extras import nodes_qwen

    from core.hosts.comfy_host import conditioned

    prompt, encoder = EditPrompt(SAME, picture(0, 1280, 1600)[0]), Seeing()
    wanted = getattr(nodes_qwen, node).execute(encoder, SAME, encoder, **{name: prompt.reference[None]}).args[0]
    start = torch.zeros(1, 16, 1, 128, 128)
    model, calls = qwen(file), encoder.calls
    [[context, options]] = conditioned(model, encoder, encoder, prompt, start)
    assert torch.equal(context, wanted[0][0])
    [latent], [reference] = options["reference_latents"], wanted[0][1]["reference_latents"]
    torch.testing.assert_close(latent.mean((2, 3)), reference.mean((2, 3)), rtol=0, atol=1e-3)
    assert latent.shape[-2:] == torch.Size([114, 144]) and abs(reference.shape[-1] - 144) <= 2
    assert ("reference_latents_method" in options) == ("2511" in file)
    conditioned(model, encoder, encoder, EditPrompt(SAME, picture(0, 1280, 1600)[0]), start)
    assert encoder.calls == calls + 1, "remembered"
    other = conditioned(model, encoder, encoder, EditPrompt(SAME, picture(1)[0]), start)
    assert not torch.equal(other[0][0], context), "the text encoder sees the picture"


class Drawn(Seeing):
    """A text encoder and a VAE whose answers suit a tiny random network."""

    def __init__(self, family, shape):
        super().__init__()
        self.family, self.shape = family, shape

    def encode_from_tokens_scheduled(self, tokens):
        import families

        seen = super().encode_from_tokens_scheduled(tokens)[0][0]
        [[context, options]] = families.conditioning(self.family, 7, int(1000 * seen.sum()))
        return [[context, {key: value for key, value in options.items() if key != "reference_latents"}]]

    def encode(self, pixels):
        channels, time = self.shape[0], self.shape[1:-2]
        mixed = torch.nn.functional.conv2d(
            pixels.movedim(-1, 1) - 0.5, torch.randn(channels, 3, 1, 1, generator=torch.Generator().manual_seed(5))
        )
        pooled = torch.nn.functional.avg_pool2d(mixed, 64 // self.shape[-1])
        return pooled.unsqueeze(2) if time else pooled


@pytest.mark.parametrize("name", ["FLUX.1 Kontext", "FLUX.2", "Qwen-Image-Edit"])
def test_every_family_gets_what_comfyuis_nodes_give(name):
    """Two prompts of the same words about other pictures, in one session: each as ComfyUI's conditioning alone."""
    import families
    from comfy_extras import nodes_edit_model, nodes_qwen
    from test_backend_comfy import new_policy, velocity_of

    from core.hosts.comfy_host import ComfyHost, downscale, empty_latent
    from core.method.memory import MicroBatch

    family = families.named(name)
    model = families.load(family)
    latent = empty_latent(model, 64)
    shape = latent["samples"].shape[1:]
    maker, policy = Drawn(family, shape), new_policy(model)
    host = ComfyHost(policy, maker, maker, torch.tensor([1.0, 0.5, 0.0]), latent, 1.0, None, False)
    side = shape[-1] * downscale(model)
    made = with_references([SAME], [picture(seed, side, side) for seed in range(2)])
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        with host.session(made, MicroBatch(0)) as velocity:
            found = velocity(x, 0.7, [0, 1])
        for row, prompt in enumerate(made):
            if name == "Qwen-Image-Edit":
                text = nodes_qwen.TextEncodeQwenImageEdit.execute(maker, SAME, None, prompt.reference[None]).args[0]
            else:
                text = maker.encode_from_tokens_scheduled((SAME, {}))
            reference = {"samples": maker.encode(prompt.reference[None])}
            wanted = nodes_edit_model.ReferenceLatent.execute(text, reference).args[0]
            alone = velocity_of(policy, x[row : row + 1], 0.7, [0], wanted)
            torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-4)
        assert (found[0] - velocity_of(policy, x[:1], 0.7, [0], text)[0]).abs().max() > 0.01


def comfyuis_own(graph, text: str, pixels: torch.Tensor) -> list:
    """What VAE Encode and Reference Latent give."""
    from comfy_extras.nodes_edit_model import ReferenceLatent

    with torch.inference_mode():
        positive = graph.clip.encode_from_tokens_scheduled(graph.clip.tokenize(text))
        return ReferenceLatent.execute(positive, {"samples": graph.vae.encode(pixels)}).args[0]


def trainer_of(graph, prompts: list, held_out: list, cfg: float = 1.0, negative=None):
    """A Trainer of the pack on the tiny model."""
    core = graph.pack.core
    host = core.hosts.comfy_host.ComfyHost(
        graph.policy().policy, graph.clip, graph.vae, graph.sigmas(), graph.latent(), cfg, negative, False
    )
    reward = graph.call("Measure", measure="foreground size", direction="more")[0]
    return core.runs.trainer.Trainer(
        graph.policy().run,
        host,
        core.runs.prompts.PromptList(prompts, held_out),
        graph.shape(),
        graph.noise(),
        core.method.objective.Objective(),
        reward,
        core.runs.trainer.Settings(evaluate_every=1),
    )


def packs(graph, prompts: list) -> list:
    """The prompts in the pack's own class, for the pack is loaded under another name."""
    return [graph.pack.core.references.EditPrompt(prompt, prompt.reference) for prompt in prompts]


@pytest.mark.parametrize("cfg, negative", [(1.0, None), (3.0, None), (3.0, "a square")])
def test_an_evaluation_is_comfyuis_own_ksampler_with_reference_latent(flux, cfg, negative):
    """By euler, on the same noise; with CFG the negative has the picture too."""
    import comfy.sample

    made = packs(flux, edits(2))
    with torch.inference_mode(False), torch.no_grad():
        given = None if negative is None else flux.clip.encode_from_tokens_scheduled(flux.clip.tokenize(negative))
        trainer = trainer_of(flux, made[:1], made, cfg, given)
        drawn = []
        roots = trainer.host.roots
        trainer.host.roots = lambda velocity, noise: drawn.append(noise) or roots(velocity, noise)
        found = trainer.evaluate().images
    for number, prompt in enumerate(made):
        sides = [comfyuis_own(flux, text, prompt.reference[None]) for text in (str(prompt), negative or "")]
        with torch.inference_mode():
            latent = comfy.sample.sample(
                flux.model, drawn[0][number : number + 1].clone(), 6, cfg, "euler", "simple", *sides,
                flux.latent()["samples"], disable_pbar=True,
            )  # fmt: skip
            expected = flux.vae.decode(latent)
        torch.testing.assert_close(found[number : number + 1], expected.clone(), rtol=0, atol=2e-3)
    with torch.inference_mode(False), torch.no_grad():
        plain = trainer_of(
            flux, [SAME], [SAME], cfg, given or flux.clip.encode_from_tokens_scheduled(flux.clip.tokenize(""))
        )
        assert (plain.evaluate().images - found[:1]).abs().max() > 0.02, "the picture must matter"


def test_pictures_of_unequal_sizes_are_each_as_alone(flux):
    sizes = [(64, 64), (128, 32), (300, 200)]
    made = packs(flux, [EditPrompt(SAME, picture(seed, *size)[0]) for seed, size in enumerate(sizes)])
    with torch.inference_mode(False), torch.no_grad():
        together = trainer_of(flux, made[:1], made).evaluate().images
        shapes = [tuple(latent.shape) for latent in latents_of(flux, made)]
        trainer = trainer_of(flux, made[:1], made)
        from core.method import noise

        drawn = noise.roots((16, 8, 8), 5, 0, [0, 1, 2], 1)
        trees = []
        for rows in ([0, 1, 2], [0], [1], [2]):
            chosen = [made[row] for row in rows]
            with trainer.host.session(chosen, trainer.micro_batch) as velocity:
                trees.append(velocity(drawn[rows], 0.7, list(range(len(rows)))))
    assert shapes == [(1, 16, 8, 8), (1, 16, 16, 4), (1, 16, 10, 6)] and together.isfinite().all()
    torch.testing.assert_close(trees[0], torch.cat(trees[1:]), rtol=1e-4, atol=1e-4)


def latents_of(graph, prompts):
    host = graph.pack.core.hosts.comfy_host
    start = graph.latent()["samples"].clone()
    return [
        host.conditioned(graph.model, graph.clip, graph.vae, prompt, start)[0][1]["reference_latents"][0]
        for prompt in prompts
    ]


# in the Trainer, and by hand


class Seen(Reward):
    """Likes what is near the source of the edit, and remembers which source it saw with which image."""

    name = "seen"

    def __init__(self):
        self.sources = []

    def score(self, images, prompts):
        sources = torch.stack([prompt.reference for prompt in prompts])
        self.sources += [prompt.digest for prompt in prompts]
        return -(images - sources).square().mean((1, 2, 3))


def train(graph, name, iterations, reward=None, pictures=None, **settings):
    prompts = graph.call(
        "PromptList",
        text=SAME,
        held_out=settings.pop("held_out", 0),
        references=pictures or [picture(i) for i in range(4)],
    )[0]
    fixed = dict(
        clip=graph.clip, vae=graph.vae, prompts=prompts, sigmas=graph.sigmas(), latent_image=graph.latent(),
        reward_model=reward or Seen(), iterations=iterations, per_iteration=2, learning_rate=1e-3, seed=1,
        shape=graph.shape(), noise=graph.noise(), shuffle=False,
    )  # fmt: skip
    policy = graph.policy(name)
    graph.call("Trainer", **{**fixed, **settings, "policy": policy})
    return policy


def test_the_trainer_is_the_by_hand_graph_in_a_loop(flux):
    trained = train(flux, "trainer", 2)
    policy = flux.policy("by hand")
    for _ in range(2):
        positive, prompts = flux.call(
            "Prompts", clip=flux.clip, text=SAME, per_iteration=2, policy=policy, vae=flux.vae,
            latent_image=flux.latent(), references=[picture(i) for i in range(4)],
        )  # fmt: skip
        tree, leaves = flux.sample(policy, positive)
        rewards = flux.score(flux.decode(leaves), prompts, Seen())
        credit = flux.call("Advantages", tree=tree, rewards=rewards)[0]
        flux.call(
            "Update", policy=policy, tree=tree, advantages=credit, learning_rate=1e-3, clip_low=1e-2, clip_high=1e-2
        )
    for mine, other in zip(policy.run.metrics, trained.run.metrics, strict=True):
        keys = ("reward", "reward_std", "rewards/seen/mean", "loss", "grad_norm", "ratio_first", "forwards")
        assert [mine[key] for key in keys if key in mine] == pytest.approx(
            [other[key] for key in keys if key in mine], rel=1e-4, abs=1e-7
        )
        assert other["ratio_first"] == 1 and other["grad_norm"] > 0
    for key, value in policy.run.adapters.state_dict().items():
        torch.testing.assert_close(trained.run.adapters.state_dict()[key], value, atol=1e-6, rtol=1e-5)


def test_stopped_and_resumed_equals_never_stopped(flux):
    """With pictures of two sizes, an evaluation, and a reward that sees them."""
    sizes = dict(pictures=[picture(i, 64, 64 + 32 * (i % 2)) for i in range(4)], held_out=2, evaluate_every=1)
    near = flux.call("Measure", measure="foreground size", direction="more")[0]
    through = train(flux, "through", 2, near, **sizes)
    for until in (1, 2):
        flux.forget()
        stopped = train(flux, "stopped", until, near, **sizes)
    assert timeless(stopped.run.metrics) == timeless(through.run.metrics)
    for key, value in through.run.adapters.state_dict().items():
        assert torch.equal(stopped.run.adapters.state_dict()[key], value)
    assert "eval/reward" in through.run.metrics[-1] and list((through.run.folder / "samples").iterdir())
    assert not (through.run.folder / "run.yaml").exists(), "the trainer without ComfyUI would drop the pictures"


def test_a_reward_sees_the_source_of_each_image(flux):
    reward = Seen()
    run = train(flux, "seen", 2, reward, held_out=1, evaluate_every=2).run
    every = [prompt.digest for prompt in edits(4)]
    asked = [reward.sources[i : i + 4] for i in range(0, 8, 4)]  # four leaves of each of the first iteration's prompts
    assert all(len(set(group)) == 1 for group in asked) and asked[0][0] != asked[1][0]
    assert set(reward.sources) == set(every), "the held-out one too"
    assert run.metrics[-1]["eval/reward"] < 0


def test_a_model_that_takes_no_pictures_says_so_before_it_samples(pack, tmp_path):
    from graph import Graph

    graph, reward = Graph(pack, tmp_path, "sd3"), Seen()
    with pytest.raises(ValueError, match="SD3 model takes no reference images: connect one that edits"):
        train(graph, "sd3", 1, reward)
    assert not reward.sources
    with pytest.raises(ValueError, match="References need policy, vae and latent_image"):
        graph.call("Prompts", clip=graph.clip, text=SAME, per_iteration=0, references=[picture(0)])


@pytest.mark.parametrize("rows, options", [(2, {}), (1, {"reference_latents": ["own"]})])
def test_the_users_own_negative(flux, rows, options):
    """One of several prompts cannot get the pictures; one that has some keeps them."""
    made = packs(flux, edits(1))
    context = torch.zeros(rows, 7, 768)
    host = trainer_of(flux, made, made, 3.0, [[context, options]]).host
    if rows > 1:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            pytest.raises(ValueError, match="negative of a single prompt"),
        ):
            host.encode(made)
    else:
        assert host._negative_of(made[0]) is host.negative


# rewards


def test_image_similarity_to_the_source():
    from core.rewards.measure import Similarity

    def flat(images):
        return images.flatten(1) - 0.5

    made = with_references([SAME, "two"], [picture(0, 8, 8), picture(1, 8, 8)])
    images, rows = torch.cat([picture(1, 8, 8), picture(0, 8, 8), picture(1, 8, 8)]), [0, 0, 1]
    to_source = Similarity(picture(2, 8, 8), flat, "source")
    expected = [
        float(Similarity(made[row].reference[None], flat).score(image[None], [""])) for row, image in zip(rows, images)
    ]
    assert to_source.score(images, [made[row] for row in rows]).tolist() == pytest.approx(expected)
    assert expected[0] < 0.9 and expected[1:] == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="but a prompt has none"):
        to_source.refuse([made[0], SAME])
    assert len(to_source.score(images[:0], [])) == 0


def test_a_server_is_sent_the_source():
    import base64
    import io

    from PIL import Image

    from core.rewards.server import EDITED, ServerReward

    def shown(file):
        return Image.open(io.BytesIO(base64.b64decode(file.partition("base64,")[2] or file))).size

    made, images = EditPrompt(SAME, picture(0, 8, 12)[0]), torch.rand(2, 4, 4, 3)
    scores = ServerReward("http://127.0.0.1:1/score")
    question = json.loads(json.dumps(scores._question(images, [made, "plain"])))
    assert question["prompts"] == [SAME, "plain"] and question["references"][1] is None
    assert shown(question["references"][0]) == (12, 8) and len(question["images"]) == 2
    assert "references" not in scores._question(images, ["one", "plain"])
    judge = ServerReward("http://127.0.0.1:1/v1", "chat")
    *files, text = judge._question(images[:1], [made])["messages"][0]["content"]
    assert [shown(file["image_url"]["url"]) for file in files] == [(12, 8), (4, 4)]
    assert text["text"].startswith(EDITED) and SAME in text["text"]
    assert len(judge._question(images[:1], [SAME])["messages"][0]["content"]) == 2
