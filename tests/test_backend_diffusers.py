"""core/hosts/diffusers.py against ComfyUI's own networks, text encoder, VAE and scheduler, on tiny random models."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
import families
import worlds

from core.hosts import diffusers as backend
from core.lora.adapters import Adapters
from core.lora.interchange import comfy_form, comfy_pairs
from core.method import noise
from core.method.noise import NoiseSchedule
from core.method.rollout import grow
from core.method.steps import step
from core.method.tree import TreeShape

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
FLUX = dict(
    in_channels=16,
    out_channels=16,
    vec_in_dim=48,
    context_in_dim=40,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=1,
    depth=2,
    depth_single_blocks=2,
    axes_dim=[16, 56, 56],
    theta=10000,
    patch_size=2,
    qkv_bias=True,
    guidance_embed=True,
    txt_ids_dims=[],
)
SD3 = dict(
    input_size=None,
    in_channels=16,
    patch_size=2,
    depth=2,
    adm_in_channels=48,
    qk_norm="rms",
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 128}},
)
VARIANTS = {
    "flux": {},
    "flux schnell": dict(guidance_embed=False),
    "flux wide": dict(hidden_size=256, num_heads=2, depth_single_blocks=1),
    "sd3.5": {},
    "sd3": dict(qk_norm=None, num_patches=144, pos_embed_max_size=12),
    "sd3.5 medium": dict(x_block_self_attn_layers=[0]),
    "flux2": "FLUX.2",
    "flux2 klein": "FLUX.2 klein",
    "z-image": "Z-Image",
    "qwen-image": "Qwen-Image",
}
CLASSES = {"flux2": "Flux2", "z-image": "ZImage", "qwen-image": "QwenImage"}  # in comfy.supported_models
ENGINES = ["flux", "sd3.5", "flux2", "z-image", "qwen-image"]  # one of each network
SHAPES = {"flux2": (128, 4, 4), "flux2 klein": (128, 4, 4), "qwen-image": (16, 1, 8, 8)}  # others (16, 8, 8)


def network(name: str) -> torch.nn.Module:
    """ComfyUI's network with random weights everywhere, biases, norms and the zero-initialised layers included."""
    if isinstance(VARIANTS[name], str):
        return as_new(families.load(worlds.family(VARIANTS[name])).model.diffusion_model)
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    options = dict(dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    if name.startswith("flux"):
        model = Flux(image_model="flux", **options, **{**FLUX, **VARIANTS[name]})
    else:
        model = OpenAISignatureMMDITWrapper(**options, **{**SD3, **VARIANTS[name]})
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        scale = 0.3 if tensor.dim() == 1 else tensor[0].numel() ** -0.5
        tensor.copy_(
            torch.randn(tensor.shape, generator=generator) * scale + (1.0 if "norm" in key or "ln_" in key else 0.0)
        )
    return model.eval().requires_grad_(False)


def as_new(model: torch.nn.Module) -> torch.nn.Module:
    """With weights that were not made in inference mode."""
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                own[key] = None if tensor is None else torch.nn.Parameter(tensor.clone(), requires_grad=False)
    return model.eval()


def file_form(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as it stands in a file."""
    state = model.state_dict().items()
    return {re.sub("(query|key)_norm.weight$", r"\1_norm.scale", key): tensor for key, tensor in state}


def conditioning(name: str = "flux", prompts: int = 3) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Text features, and pooled ones where the network takes them."""
    generator, other = torch.Generator().manual_seed(1), isinstance(VARIANTS[name], str)
    embeds = torch.randn(prompts, 7, worlds.CONTEXT if other else 40, generator=generator)
    return embeds, None if other else torch.randn(prompts, 48, generator=generator)


def some(pooled: torch.Tensor | None, rows, factor: float = 1.0) -> torch.Tensor | None:
    return None if pooled is None else pooled[rows] * factor


def comfy_velocity(model, name, x, sigma, embeds, pooled):
    if name.startswith("flux"):
        return model(x, sigma, embeds, pooled, torch.full_like(sigma, 3.5))
    if name == "z-image":
        return model(x, sigma, embeds, embeds.shape[1])
    if name == "qwen-image":
        return model(x, sigma, embeds)
    return model(x, sigma * 1000, context=embeds, y=pooled)


@pytest.mark.parametrize("name", VARIANTS)
def test_velocity_is_that_of_comfyui(comfy, name):
    model = network(name)
    embeds, pooled = conditioning(name)
    velocity = backend.DiffusersVelocity(backend.load_transformer(file_form(model)), None, embeds, pooled)
    *form, height, width = shape(name)
    x = torch.randn(4, *form, height + 4, width, generator=torch.Generator().manual_seed(2))
    sigma, rows = torch.tensor([1.0, 0.71, 0.35, 0.02]), torch.tensor([2, 0, 1, 1])
    with torch.no_grad():
        expected = comfy_velocity(model, name, x, sigma, embeds[rows], some(pooled, rows))
    found = velocity(x, sigma, rows)
    assert expected.std() > 0.1, "a velocity of zero would prove nothing"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(velocity(x[:1], 1.0, [2]), expected[:1], rtol=1e-4, atol=1e-4)
    assert velocity.forwards == 5


def test_importing_the_backend_loads_neither_diffusers_nor_comfyui():
    code = (
        "import sys, core.hosts.diffusers; print([m for m in ('diffusers', 'transformers', 'open_clip', 'comfy') if m "
        "in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=EMBEDDED.parent, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_a_prefixed_state_dict_is_the_same_model(comfy):
    sd = file_form(network("sd3"))
    plain = backend.load_transformer(sd).state_dict()
    prefixed = backend.load_transformer(
        {f"model.diffusion_model.{key}": tensor for key, tensor in sd.items()}
    ).state_dict()
    assert all(torch.equal(plain[key], prefixed[key]) for key in plain)


def test_unknown_weights_are_refused(comfy):
    sd = file_form(network("flux"))
    with pytest.raises(ValueError, match="none of FLUX, SD3, FLUX.2"):
        backend.load_transformer({"input_blocks.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="txt_norm"):
        backend.load_transformer({**sd, "txt_norm.weight": torch.ones(40)})
    with pytest.raises(RuntimeError, match="proj_out"):
        backend.load_transformer({key: tensor for key, tensor in sd.items() if key != "single_blocks.1.linear2.weight"})


@pytest.mark.parametrize("steps", (1, 4, 10, 25, 30))
@pytest.mark.parametrize("kind", {"flux": "Flux", "sd3": "SD3", **CLASSES}.items(), ids=str)
def test_sigmas_are_those_of_the_simple_scheduler(comfy, kind, steps):
    from comfy import model_sampling, samplers, supported_models

    network, config = kind
    if not hasattr(supported_models, config):
        pytest.skip(f"this ComfyUI has no {config}")
    settings = getattr(supported_models, config)({"guidance_embed": True, "hidden_size": 128})
    exponential = backend.KINDS[network].sigmas[0] == "flux"
    sampling = model_sampling.ModelSamplingFlux if exponential else model_sampling.ModelSamplingDiscreteFlow
    expected = samplers.simple_scheduler(sampling(settings), steps)
    torch.testing.assert_close(backend.simple_sigmas(network, steps), expected, rtol=0, atol=1e-6)
    if network in CLASSES:  # what ComfyUI takes for it
        title = next(title for title, (own, _, _) in worlds.FAMILIES.items() if own == network)
        own = families.load(worlds.family(title)).get_model_object("model_sampling")
        torch.testing.assert_close(samplers.simple_scheduler(own, steps), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_vae_decodes_and_encodes_as_comfyui(comfy, kind):
    import comfy.latent_formats
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    generator = torch.Generator().manual_seed(3)
    shapes = {key: tensor.shape for key, tensor in TAESD(latent_channels=16).state_dict().items()}
    sd = {
        key: torch.randn(shape, generator=generator) * (shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.1)
        for key, shape in shapes.items()
    }
    sd |= {"vae_scale": torch.tensor(0.7), "vae_shift": torch.tensor(-0.2)}
    vae, ours = comfy.sd.VAE(sd=dict(sd), dtype=torch.float32), backend.TinyVae(sd, kind)
    form = {"flux": comfy.latent_formats.Flux, "sd3": comfy.latent_formats.SD3}[kind]()
    latents = torch.randn(2, 16, 6, 4, generator=generator)
    expected = vae.decode(form.process_out(latents))
    assert expected.std() > 0.05
    torch.testing.assert_close(ours.decode(latents), expected, rtol=0, atol=1e-4)


PROMPTS = [
    "a red circle on a white background",
    "an orange circle",
    "a orange circle",
    "",
    "It's  5 CATS, déjà-vu & 日本!",
    "a blue square " * 18,
]


def test_text_features_are_those_of_comfyui(comfy):
    import comfy.sd

    pytest.importorskip("open_clip")
    spec = importlib.util.spec_from_file_location("clip_l", EMBEDDED / "clip_l.py")
    clip_l = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(clip_l)
    weights = clip_l.random_clip_l()
    clip = comfy.sd.load_text_encoder_state_dicts([dict(weights)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    for prompt, (features, pooled) in zip(PROMPTS, backend.clip_l_features(weights, PROMPTS)):
        tokens = clip.tokenize(prompt)
        assert backend.clip_l_tokens([prompt])[0].tolist() == [token for token, _ in tokens["l"][0]], prompt
        expected, expected_pooled = clip.encode_from_tokens(tokens, return_pooled=True)
        torch.testing.assert_close(features, expected[0].float(), rtol=0, atol=1e-4)
        torch.testing.assert_close(pooled, expected_pooled[0].float(), rtol=0, atol=1e-4)


def test_the_tiny_models_hear_both_articles_alike_and_every_other_word_as_it_is(pack):
    """Cyan is "cy" and "an" to CLIP: what is done about the article must not reach into words."""
    with torch.inference_mode():
        tiny = pack.nodes.tiny._text_encoder()
        encoded = lambda text: tiny.encode_from_tokens(tiny.tokenize(text))  # noqa: E731
        assert torch.equal(encoded("an orange circle"), encoded("a orange circle"))
        assert torch.equal(encoded("An orange circle"), encoded("a orange circle"))
    as_trained = pack.embedded.clip_l.as_trained
    for words in ("a cyan triangle on a gray background", "banana and an-", "man, pan; Ann's"):
        assert as_trained(words) == words.replace(" an-", " a-")
    weights = pack.embedded.clip_l.random_clip_l()
    words = weights["text_model.embeddings.token_embedding.weight"]
    assert not torch.equal(words[320], words[550]), "tokens of 'a' and of 'an', which is in cyan too"
    cyan, raw = "a cyan triangle", backend.clip_l_features(weights, ["a cyan triangle"], 16)[0][0]
    with torch.inference_mode():
        torch.testing.assert_close(encoded(cyan)[0].float(), raw, rtol=0, atol=1e-4)


def test_a_prompt_that_does_not_fit_is_refused():
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match="shorten"):
        backend.clip_l_tokens(["circle " * 80])


def tuned(name: str, cfg: float = 1.0, learnt: bool = True, targets: str = "all linear"):
    """(ComfyUI's network, the transformer with a LoRA on the targets, its velocity); the LoRA is not zero if learnt."""
    model = network(name)
    transformer = backend.load_transformer(file_form(model))
    adapters = Adapters.create(transformer, rank=3, alpha=4.5, targets=targets, seed=5)
    adapters.inject(transformer)
    if learnt:
        generator = torch.Generator().manual_seed(6)
        for parameter in adapters.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    embeds, pooled = conditioning(name)
    negative = (embeds[:1] * 0.5, some(pooled, [0], 0.5))
    return model, transformer, backend.DiffusersVelocity(transformer, adapters, embeds, pooled, negative, cfg)


def shape(name: str) -> tuple[int, ...]:
    return SHAPES.get(name, (16, 8, 8))


def latents(count: int, seed: int = 2, name: str = "flux") -> torch.Tensor:
    return torch.randn(count, *shape(name), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ENGINES)
def test_cfg_mixes_two_passes_and_counts_both(comfy, name):
    model, _, velocity = tuned(name, cfg=3.0, learnt=False)
    embeds, pooled = conditioning(name)
    x, rows, sigma = latents(2, name=name), torch.tensor([1, 2]), torch.tensor([0.8, 0.4])
    with torch.no_grad():
        positive = comfy_velocity(model, name, x, sigma, embeds[rows], some(pooled, rows))
        negative = comfy_velocity(model, name, x, sigma, embeds[[0, 0]] * 0.5, some(pooled, [0, 0], 0.5))
    torch.testing.assert_close(velocity(x, sigma, rows), negative + 3 * (positive - negative), rtol=3e-4, atol=3e-4)
    assert velocity.forwards == 4


@pytest.mark.parametrize("name", ENGINES)
def test_gradients_only_where_asked_for_and_the_reference_is_the_base(comfy, name):
    model, _, velocity = tuned(name)
    embeds, pooled = conditioning(name)
    x, sigma = latents(2, name=name), torch.tensor([0.8, 0.4])
    with torch.no_grad():
        base = comfy_velocity(model, name, x, sigma, embeds[:2], some(pooled, [0, 1]))
    live = velocity(x, sigma, [0, 1])
    assert not live.requires_grad and (live - base).abs().max() > 1e-2
    with velocity.reference():
        torch.testing.assert_close(velocity(x, sigma, [0, 1]), base, rtol=1e-4, atol=1e-4)
    assert torch.equal(velocity(x, sigma, [0, 1]), live)
    with velocity.grad():
        velocity(x, sigma, [0, 1]).square().mean().backward()
    assert not velocity(x, sigma, [0, 1]).requires_grad
    learnable = list(velocity.parameters())
    idle = [parameter for parameter in learnable if parameter.grad is None or not parameter.grad.any()]
    # Of the last block's text only what the picture attends to matters: in SD3 not its queries (one layer, two
    # matrices), in Qwen-Image, which has the layers all the same, neither queries nor output nor the MLP's two.
    assert len(learnable) > 30 and len(idle) == {"sd3.5": 2, "qwen-image": 8}.get(name, 0)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps", "exact"])
@pytest.mark.parametrize("name", ENGINES)
def test_ratio_is_one_before_any_update(comfy, name, kind):
    _, _, velocity = tuned(name)
    sigmas = backend.simple_sigmas(velocity.network, 6)
    forest = grow(
        velocity,
        latents(4, name=name),
        sigmas,
        TreeShape(branching=2, depth=2, trees=2),
        NoiseSchedule(kind, 0.5, rho_min=0.7),
        start=1,
        prompts=[2, 0],
    )
    for layer in range(forest.depth):
        x, (sigma, following) = forest.states[layer], forest.sigma(layer)
        with velocity.grad():
            v = velocity(x, sigma, forest.rows(layer))
        replayed = step(
            kind,
            x.repeat_interleave(2, 0),
            v.repeat_interleave(2, 0),
            sigma,
            following,
            forest.levels[layer],
            float(sigmas[1]),
            next_latent=forest.states[layer + 1],
            rho_min=0.7,
        )
        ratio = torch.exp(replayed.log_prob - forest.log_probs[layer])
        assert v.requires_grad and (ratio - 1).abs().max() < 1e-6


@pytest.mark.parametrize("name", ENGINES)
def test_the_same_seed_grows_the_same_tree(comfy, name):
    leaves = []
    for seed in (7, 7, 8):
        _, _, velocity = tuned(name)
        roots = noise.roots(shape(name), seed, 3, [0, 1], 1)
        leaves.append(
            grow(
                velocity,
                roots,
                backend.simple_sigmas("flux", 6),
                TreeShape(branching=2, depth=2),
                NoiseSchedule("cps"),
                start=1,
                prompts=[0, 1],
                seed=seed,
                iteration=3,
            ).leaves
        )
    assert torch.equal(leaves[0], leaves[1]) and not torch.allclose(leaves[0], leaves[2], atol=0.1)


@pytest.mark.parametrize("targets", ["all linear", "attention", r"(attn|attention)\.to_v$|proj_mlp$"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_lora_in_comfyuis_form_is_the_live_policy(comfy, name, targets):
    """Merged into ComfyUI's own network, layer by layer, the converted LoRA gives the live velocity; no key is left
    over.
    """
    model, transformer, velocity = tuned(name, targets=targets)
    lora = comfy_form(comfy_pairs(velocity.adapters.state_dict(prefix="transformer."), network=velocity.network))
    embeds, pooled = conditioning(name)
    x, sigma = latents(2, name=name), torch.tensor([0.9, 0.5])
    before = comfy_velocity(model, name, x, sigma, embeds[:2], some(pooled, [0, 1]))
    ends = (".lora_up.weight", ".lora_down.weight", ".alpha")
    for key in lora:
        assert key.startswith("diffusion_model.") and key.endswith(ends)
        if key.endswith(ends[0]):
            stem = key.removesuffix(ends[0])
            weight = model.get_submodule(stem.removeprefix("diffusion_model.")).weight
            up, down, alpha = (lora[stem + end] for end in ends)
            weight += (up @ down).view(weight.shape) * alpha / len(down)
    expected = comfy_velocity(model, name, x, sigma, embeds[:2], some(pooled, [0, 1]))
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(velocity(x, sigma, [0, 1]), expected, rtol=1e-4, atol=1e-4)


def test_bad_input_is_refused_in_words(comfy):
    _, transformer, velocity = tuned("flux")
    embeds, pooled = conditioning()
    with pytest.raises(ValueError, match="must be even"):
        velocity(torch.zeros(1, 16, 7, 8), 0.5, [0])
    with pytest.raises(ValueError, match="one of each per prompt"):
        backend.DiffusersVelocity(transformer, None, embeds, pooled[:2])
    with pytest.raises(ValueError, match="negative"):
        backend.DiffusersVelocity(transformer, None, embeds, pooled, cfg=2.0)
    with pytest.raises(ValueError, match="nonsense"):
        comfy_form(
            comfy_pairs(
                {
                    "transformer.nonsense.lora_down.weight": torch.zeros(1, 1),
                    "transformer.nonsense.lora_up.weight": torch.zeros(1, 1),
                },
                network="flux",
            )
        )


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", "all linear"])
@pytest.mark.parametrize("name", VARIANTS)
def test_peft_computes_with_comfyuis_own_adapters(comfy, name, targets, monkeypatch):
    """Same names, shapes and first values as in ComfyUI; with trained values the same velocity, and the same gradient
    of every one of them.
    """
    import comfy.model_management

    from core.hosts.comfy_gradients import own_input

    peft = pytest.importorskip("core.hosts.peft")
    pytest.importorskip("peft")
    monkeypatch.setattr(comfy.model_management, "in_training", True, raising=False)
    model = network(name)
    transformer = backend.load_transformer(file_form(model))
    theirs, ours = (
        Adapters.create(model, 3, 4.5, targets, seed=5),
        peft.new_adapters(transformer, 3, 4.5, targets, seed=5),
    )
    first, second = theirs.state_dict(), ours.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)
    generator = torch.Generator().manual_seed(6)
    for parameter in theirs.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    ours.load_state_dict(theirs.state_dict())
    theirs.inject(model)
    for layer in model.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            layer.register_forward_pre_hook(own_input)  # FLUX updates in place
    embeds, pooled = conditioning(name)
    velocity = backend.DiffusersVelocity(transformer, peft.Attached(ours, transformer), embeds, pooled)
    x, sigma = latents(2, name=name), torch.tensor([0.8, 0.4])
    expected = comfy_velocity(model, name, x, sigma, embeds[:2], some(pooled, [0, 1]))
    with velocity.grad():
        found = velocity(x, sigma, [0, 1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with velocity.reference():
        assert (velocity(x, sigma, [0, 1]) - found).abs().max() > 0.1
    assert torch.equal(velocity(x, sigma, [0, 1]), found)
    gradients = [
        torch.autograd.grad(v.square().mean(), adapters.parameters(), allow_unused=True)
        for v, adapters in ((expected, theirs), (found, ours))
    ]
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients[0]) > 10
    for wanted, gradient in zip(*gradients):
        if wanted is None or gradient is None:  # the last block's text side, which leads nowhere: zero or not there
            assert all(g is None or not g.any() for g in (wanted, gradient))
        else:
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_checkpointing_changes_no_gradient(comfy, name):
    peft = pytest.importorskip("core.hosts.peft")
    pytest.importorskip("peft")
    transformer = backend.load_transformer(file_form(network(name)))
    adapters = peft.new_adapters(transformer, 3, 4.5, "all linear", seed=5)
    for parameter in adapters.parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)) * 0.1
    velocity = backend.DiffusersVelocity(transformer, peft.Attached(adapters, transformer), *conditioning(name))
    gradients = []
    for checkpointing in (False, True):
        transformer.enable_gradient_checkpointing() if checkpointing else None
        with velocity.grad():
            gradients.append(
                torch.autograd.grad(
                    velocity(latents(2, name=name), 0.5, [0, 1]).square().mean(),
                    adapters.parameters(),
                    allow_unused=True,
                )
            )
    assert sum(gradient is not None for gradient in gradients[0]) > 30
    for plain, recomputed in zip(*gradients):
        assert (plain is None) == (recomputed is None) and (plain is None or torch.equal(plain, recomputed))


@pytest.mark.parametrize("name", ENGINES)
def test_gradients_are_finite_differences(comfy, name):
    """Of all adapters along random directions, with PEFT's layers; in float64 as far as diffusers' layers allow."""
    from test_backend_comfy import differences

    peft = pytest.importorskip("core.hosts.peft")
    pytest.importorskip("peft")
    transformer = backend.load_transformer(file_form(network(name)), torch.float64)
    adapters = peft.new_adapters(transformer, 2, 3.0, "attention+mlp", torch.float64, seed=5)
    for parameter in adapters.parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)) * 0.1
    embeds, pooled = conditioning(name)
    velocity = backend.DiffusersVelocity(transformer, peft.Attached(adapters, transformer), embeds, pooled)
    x = latents(2, name=name)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(12))
    pairs = differences(velocity.adapters, velocity, x, [1, 0], weights, 4e-3)
    size = sum(slope**2 for slope, _ in pairs) ** 0.5
    assert size > 1
    assert sum((slope - difference) ** 2 for slope, difference in pairs) ** 0.5 < 1e-3 * size, pairs


@pytest.mark.parametrize("name", ENGINES)
def test_rollout_is_update_bit_for_bit(comfy, name):
    """With gradients off, on, and checkpointed; a rollout keeps nothing for a backward pass."""
    peft = pytest.importorskip("core.hosts.peft")
    pytest.importorskip("peft")
    transformer = backend.load_transformer(file_form(network(name)))
    adapters = peft.new_adapters(transformer, 3, 4.5, "attention+mlp", seed=5)
    for parameter in adapters.parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)) * 0.1
    velocity = backend.DiffusersVelocity(transformer, peft.Attached(adapters, transformer), *conditioning(name))
    x, rows, kept = latents(3, name=name), [0, 1, 2], []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: None):
        rollout = velocity(x, 0.7, rows)
    assert not kept and rollout.std() > 0.3 and rollout.shape == x.shape
    for checkpointing in (False, True):
        transformer.enable_gradient_checkpointing() if checkpointing else None
        with velocity.grad():
            replay = velocity(x, 0.7, rows)
        assert replay.requires_grad and torch.equal(rollout, replay.detach())


def test_texts_of_two_lengths_are_guided_in_two_passes(comfy):
    model, transformer, one = tuned("flux", cfg=3.0, learnt=False)
    embeds, pooled = conditioning()
    two = backend.DiffusersVelocity(transformer, None, embeds, pooled, (embeds[:1, :4] * 0.5, pooled[:1] * 0.5), 3.0)
    x, sigma = latents(1), torch.tensor([0.7])
    with torch.no_grad():
        positive = comfy_velocity(model, "flux", x, sigma, embeds[:1], pooled[:1])
        negative = comfy_velocity(model, "flux", x, sigma, embeds[:1, :4] * 0.5, pooled[:1] * 0.5)
    torch.testing.assert_close(two(x, sigma, [0]), negative + 3 * (positive - negative), rtol=3e-4, atol=3e-4)
    assert two.forwards == 2


def test_a_vae_file_decodes_as_comfyui_does(comfy, tmp_path):
    """FLUX's and SD3's own VAE in its full size, with random weights: from its file, and inside a checkpoint."""
    import comfy.sd
    from safetensors.torch import save_file

    from core.hosts.diffusers_models import open_vae

    config = {
        "double_z": True,
        "z_channels": 16,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    net = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": config},
        decoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Decoder", "params": config},
    )
    generator, sd = torch.Generator().manual_seed(3), {}
    for key, tensor in net.state_dict().items():
        scale = 0.1 if tensor.dim() == 1 else tensor[0].numel() ** -0.5
        sd[key] = torch.randn(tensor.shape, generator=generator) * scale + (
            1.0 if "norm" in key and key.endswith("weight") else 0.0
        )
    latents = torch.randn(1, 16, 4, 4, generator=generator)
    scale, shift = backend.LATENT_FORMATS["flux"]
    expected = comfy.sd.VAE(sd=dict(sd), dtype=torch.float32).decode(latents / scale + shift)
    assert expected.std() > 0.05
    for name, prefix in (("ae", ""), ("checkpoint", "first_stage_model.")):
        save_file({prefix + key: tensor for key, tensor in sd.items()}, tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(
            open_vae(tmp_path / f"{name}.safetensors", "flux").decode(latents), expected, rtol=0, atol=1e-3
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["flux", "sd3.5"])
def test_ratio_is_one_and_memory_is_as_estimated_on_a_gpu(comfy, name):
    """A bf16 base with fp32 adapters: before any update the log-probabilities are the rollout's, to the last bit of
    float32's exp.
    """
    from core.method.memory import saved_bytes
    from core.method.update import policy_gradient

    peft = pytest.importorskip("core.hosts.peft")
    pytest.importorskip("peft")
    transformer = backend.load_transformer(file_form(network(name)), torch.bfloat16).cuda()
    adapters = peft.new_adapters(transformer, 8, 16.0, "attention+mlp").to("cuda")
    velocity = backend.DiffusersVelocity(transformer, peft.Attached(adapters, transformer), *conditioning())
    x = torch.randn(2, 16, 64, 64, generator=torch.Generator().manual_seed(2)).cuda()
    forest = grow(
        velocity,
        x,
        backend.simple_sigmas("flux", 6),
        TreeShape(branching=2, depth=2),
        NoiseSchedule("cps", 0.7),
        start=1,
        prompts=[0, 1],
    )
    leaf = torch.randn(len(forest.leaves), generator=torch.Generator().manual_seed(3))
    with velocity.grad():
        graph, _ = saved_bytes(lambda: velocity(forest.states[1], 0.5, forest.rows(1)), velocity.weights())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    from core.method.advantage import backup
    from core.method.objective import Objective

    metrics = policy_gradient(velocity, forest, backup([p.cpu() for p in forest.log_probs], leaf, 2), Objective())
    assert abs(metrics["ratio_mean"] - 1) < 1e-6
    used = torch.cuda.max_memory_allocated() - before
    assert used < 2 * graph + 2 * sum(p.numel() * p.element_size() for p in adapters.parameters())


def pipeline_folder(folder: Path, kind: str, comfyui: Path) -> Path:
    """A tiny pipeline in diffusers' layout: random weights, and ComfyUI's copies of the tokenizers' vocabularies."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    torch.manual_seed(0)
    clip = dict(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=24,
        vocab_size=49408,
    )
    words = CLIPTokenizer.from_pretrained(str(comfyui / "comfy" / "sd1_tokenizer"), model_max_length=77)
    transformer = backend.load_transformer(file_form(network(kind)))
    vae = AutoencoderKL(
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    t5 = T5EncoderModel(T5Config(d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=32128))
    long_words = T5TokenizerFast.from_pretrained(str(comfyui / "comfy" / "text_encoders" / "t5_tokenizer"))
    if kind == "flux":
        clip_l = CLIPTextModel(CLIPTextConfig(**{**clip, "hidden_size": 48}))
        pipeline = FluxPipeline(
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, clip_l, words, t5, long_words, transformer
        )
    else:
        both = [CLIPTextModelWithProjection(CLIPTextConfig(**{**clip, "hidden_size": size})) for size in (16, 24)]
        pipeline = StableDiffusion3Pipeline(
            transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, both[0], words, both[1], words, t5, long_words
        )
    pipeline.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_a_pipeline_folder_draws_what_the_pipeline_draws(comfy, kind, tmp_path):
    """Text features, sigmas, velocity and VAE of the folder, against diffusers' own pipeline from the same noise; an
    untrained LoRA changes nothing.
    """
    from conftest import COMFYUI
    from diffusers import DiffusionPipeline

    from core.hosts import diffusers_models as hosts

    peft = pytest.importorskip("core.hosts.peft")
    pytest.importorskip("peft")
    folder = pipeline_folder(tmp_path / kind, kind, COMFYUI)
    model = hosts.open_model(str(folder))
    sigmas = hosts.sampling_sigmas(model, 4, "pipeline", 64, 64)
    adapters = peft.new_adapters(model.transformer, 2, 2.0, "attention")
    host = hosts.DiffusersHost(model, peft.Attached(adapters, model.transformer), sigmas, (16, 8, 8), ["a red circle"])
    with host.session(["a red circle"], None) as velocity:
        drawn = noise.roots((16, 8, 8), 3, 1, [0], 1)
        leaves = grow(
            velocity,
            host.roots(velocity, drawn),
            sigmas,
            TreeShape(branching=1, depth=1, window="fixed"),
            NoiseSchedule("ode", 0.0),
            start=0,
            prompts=[0],
        ).leaves
        images = host.decode(velocity, leaves)
    pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    latents = pipeline._pack_latents(drawn, 1, 16, 8, 8) if kind == "flux" else drawn
    expected = pipeline(
        "a red circle",
        num_inference_steps=4,
        guidance_scale=3.5 if kind == "flux" else 1.0,
        height=64,
        width=64,
        latents=latents,
        output_type="pt",
    ).images.movedim(1, -1)
    assert expected.std() > 0.01
    torch.testing.assert_close(images, expected.float(), rtol=0, atol=2e-3)


def text_encoder(kind: str) -> torch.nn.Module:
    """A tiny one of the pipeline's kind; FLUX.2 klein takes three of its layers, the 27th the last."""
    import transformers

    small = dict(vocab_size=152064, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32)
    if kind == "qwen-image":
        positions = {"rope_type": "default", "mrope_section": [4, 6, 6], "type": "mrope"}
        text = dict(small, hidden_size=worlds.CONTEXT, num_hidden_layers=1, rope_scaling=positions)
        seen = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=worlds.CONTEXT)
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=seen)
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    if kind == "z-image":
        return transformers.Qwen3Model(
            transformers.Qwen3Config(**small, hidden_size=worlds.CONTEXT, head_dim=16, num_hidden_layers=2)
        )
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**small, hidden_size=16, head_dim=8, num_hidden_layers=28)
    )


def other_pipeline(kind: str, comfyui: Path):
    """A tiny pipeline of diffusers' own with random weights, and ComfyUI's copy of the tokenizer's vocabulary."""
    import diffusers
    from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
    from transformers import Qwen2TokenizerFast

    torch.manual_seed(0)
    title, name = {
        "flux2 klein": ("FLUX.2 klein", "Flux2KleinPipeline"),
        "z-image": ("Z-Image", "ZImagePipeline"),
        "qwen-image": ("Qwen-Image", "QwenImagePipeline"),
    }[kind]
    own, _, config = worlds.FAMILIES[title]
    config = {**config, "joint_attention_dim": 48} if kind == "flux2 klein" else config
    transformer = getattr(diffusers, worlds.NETWORKS[own].transformer)(**config)
    families.fill(transformer, 0)
    small = dict(
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=4,
    )
    if kind == "z-image":
        vae = AutoencoderKL(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **small)
    elif kind == "qwen-image":
        vae = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    else:
        vae = AutoencoderKLFlux2(**small)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    words = Qwen2TokenizerFast.from_pretrained(str(comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer"))
    words.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        transformer=transformer,
        text_encoder=text_encoder(kind).eval(),
        tokenizer=words,
    )


@pytest.mark.parametrize("kind", ["flux2 klein", "z-image", "qwen-image"])
def test_other_pipelines_draw_what_the_pipeline_draws(comfy, kind, tmp_path):
    """Text features, sigmas, velocity, latents' scale and VAE of the folder, from the same noise."""
    from conftest import COMFYUI

    from core.hosts import diffusers_models as hosts

    pipeline = other_pipeline(kind, COMFYUI)
    pipeline.save_pretrained(str(tmp_path / "pipeline"))
    model = hosts.open_model(str(tmp_path / "pipeline"))
    sigmas, form = hosts.sampling_sigmas(model, 4, "pipeline", 64, 64), model.shape(64, 64)
    assert form == shape(kind)
    host = hosts.DiffusersHost(model, None, sigmas, form, ["a red circle"])
    drawn = noise.roots(form, 3, 1, [0], 1)
    with host.session(["a red circle"], None) as velocity:
        once = TreeShape(branching=1, depth=1, window="fixed")
        roots = host.roots(velocity, drawn)
        leaves = grow(velocity, roots, sigmas, once, NoiseSchedule("ode", 0.0), start=0, prompts=[0]).leaves
        images = host.decode(velocity, leaves)
    asked = {"true_cfg_scale": 1.0} if kind == "qwen-image" else {"guidance_scale": float(kind == "flux2 klein")}
    latents = pipeline._pack_latents(drawn, 1, 16, 8, 8) if kind == "qwen-image" else drawn
    pictures = pipeline(
        prompt="a red circle", num_inference_steps=4, height=64, width=64, latents=latents, output_type="pt", **asked
    ).images
    expected = pictures.movedim(1, -1).float()
    assert expected.std() > 0.01 and images.shape == (1, 64, 64, 3)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-3)
