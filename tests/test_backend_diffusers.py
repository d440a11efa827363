"""core/backends/diffusers.py against ComfyUI's own networks, text encoder, VAE and scheduler, on tiny random models."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from core import noise
from core.backends import diffusers as backend
from core.lora import Adapters
from core.noise import NoiseSchedule
from core.rollout import grow
from core.steps import step
from core.tree import TreeShape

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
FLUX = dict(in_channels=16, out_channels=16, vec_in_dim=48, context_in_dim=40, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=2,
            depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[])
SD3 = dict(input_size=None, in_channels=16, patch_size=2, depth=2, adm_in_channels=48, qk_norm="rms",
           context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 128}})
VARIANTS = {
    "flux": {}, "flux schnell": dict(guidance_embed=False), "flux wide": dict(hidden_size=256, num_heads=2, depth_single_blocks=1),
    "sd3.5": {}, "sd3": dict(qk_norm=None, num_patches=144, pos_embed_max_size=12), "sd3.5 medium": dict(x_block_self_attn_layers=[0]),
}


def network(name: str) -> torch.nn.Module:
    """ComfyUI's network with random weights everywhere, biases, norms and the zero-initialised layers included."""
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
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + (1.0 if "norm" in key or "ln_" in key else 0.0))
    return model.eval().requires_grad_(False)


def file_form(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as it stands in a FLUX or SD3 file."""
    return {key.replace("_norm.weight", "_norm.scale"): tensor for key, tensor in model.state_dict().items()}


def conditioning(prompts: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(prompts, 7, 40, generator=generator), torch.randn(prompts, 48, generator=generator)


def comfy_velocity(model, name, x, sigma, embeds, pooled):
    if name.startswith("flux"):
        return model(x, sigma, embeds, pooled, torch.full_like(sigma, 3.5))
    return model(x, sigma * 1000, context=embeds, y=pooled)


@pytest.mark.parametrize("name", VARIANTS)
def test_velocity_is_that_of_comfyui(comfy, name):
    model = network(name)
    embeds, pooled = conditioning()
    velocity = backend.DiffusersVelocity(backend.load_transformer(file_form(model)), None, embeds, pooled)
    x = torch.randn(4, 16, 12, 8, generator=torch.Generator().manual_seed(2))
    sigma, rows = torch.tensor([1.0, 0.71, 0.35, 0.02]), torch.tensor([2, 0, 1, 1])
    with torch.no_grad():
        expected = comfy_velocity(model, name, x, sigma, embeds[rows], pooled[rows])
    found = velocity(x, sigma, rows)
    assert expected.std() > 0.1, "a velocity of zero would prove nothing"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(velocity(x[:1], 1.0, [2]), expected[:1], rtol=1e-4, atol=1e-4)
    assert velocity.forwards == 5


def test_importing_the_backend_loads_neither_diffusers_nor_comfyui():
    code = "import sys, core.backends.diffusers; print([m for m in ('diffusers', 'transformers', 'open_clip', 'comfy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=EMBEDDED.parent, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_prefixed_state_dict_is_the_same_model(comfy):
    sd = file_form(network("sd3"))
    plain = backend.load_transformer(sd).state_dict()
    prefixed = backend.load_transformer({f"model.diffusion_model.{key}": tensor for key, tensor in sd.items()}).state_dict()
    assert all(torch.equal(plain[key], prefixed[key]) for key in plain)


def test_unknown_weights_are_refused(comfy):
    sd = file_form(network("flux"))
    with pytest.raises(ValueError, match="neither FLUX nor SD3"):
        backend.load_transformer({"input_blocks.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="txt_norm"):
        backend.load_transformer({**sd, "txt_norm.weight": torch.ones(40)})
    with pytest.raises(RuntimeError, match="proj_out"):
        backend.load_transformer({key: tensor for key, tensor in sd.items() if key != "single_blocks.1.linear2.weight"})


@pytest.mark.parametrize("kind, steps", [(kind, steps) for kind in ("flux", "sd3") for steps in (1, 4, 10, 25, 30)])
def test_sigmas_are_those_of_the_simple_scheduler(comfy, kind, steps):
    from comfy import model_sampling, samplers, supported_models

    settings = {"flux": supported_models.Flux, "sd3": supported_models.SD3}[kind]({"guidance_embed": True})
    sampling = {"flux": model_sampling.ModelSamplingFlux, "sd3": model_sampling.ModelSamplingDiscreteFlow}[kind](settings)
    torch.testing.assert_close(backend.simple_sigmas(kind, steps), samplers.simple_scheduler(sampling, steps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_vae_decodes_and_encodes_as_comfyui(comfy, kind):
    import comfy.latent_formats
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    generator = torch.Generator().manual_seed(3)
    shapes = {key: tensor.shape for key, tensor in TAESD(latent_channels=16).state_dict().items()}
    sd = {key: torch.randn(shape, generator=generator) * (shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.1) for key, shape in shapes.items()}
    sd |= {"vae_scale": torch.tensor(0.7), "vae_shift": torch.tensor(-0.2)}
    vae, ours = comfy.sd.VAE(sd=dict(sd), dtype=torch.float32), backend.TinyVae(sd, kind)
    form = {"flux": comfy.latent_formats.Flux, "sd3": comfy.latent_formats.SD3}[kind]()
    latents = torch.randn(2, 16, 6, 4, generator=generator)
    expected = vae.decode(form.process_out(latents))
    assert expected.std() > 0.05
    torch.testing.assert_close(ours.decode(latents), expected, rtol=0, atol=1e-4)
    images = torch.rand(2, 48, 32, 3, generator=generator)
    torch.testing.assert_close(ours.encode(images), form.process_in(vae.encode(images)), rtol=0, atol=1e-4)


PROMPTS = ["a red circle on a white background", "", "It's  5 CATS, déjà-vu & 日本!", "a blue square " * 18]


def test_text_features_are_those_of_comfyui(comfy):
    import comfy.sd

    pytest.importorskip("open_clip")
    spec = importlib.util.spec_from_file_location("clip_l", EMBEDDED / "clip_l.py")
    clip_l = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(clip_l)
    weights = clip_l.random_clip_l()
    clip = comfy.sd.load_text_encoder_state_dicts([dict(weights)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    features, pooled = backend.clip_l_features(weights, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        tokens = clip.tokenize(prompt)
        assert backend.clip_l_tokens([prompt])[0].tolist() == [token for token, _ in tokens["l"][0]], prompt
        expected, expected_pooled = clip.encode_from_tokens(tokens, return_pooled=True)
        torch.testing.assert_close(features[row], expected[0].float(), rtol=0, atol=1e-4)
        torch.testing.assert_close(pooled[row], expected_pooled[0].float(), rtol=0, atol=1e-4)


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
    embeds, pooled = conditioning()
    negative = (embeds[:1] * 0.5, pooled[:1] * 0.5)
    return model, transformer, backend.DiffusersVelocity(transformer, adapters, embeds, pooled, negative, cfg)


def latents(count: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["flux", "sd3.5"])
def test_cfg_mixes_two_passes_and_counts_both(comfy, name):
    model, _, velocity = tuned(name, cfg=3.0, learnt=False)
    embeds, pooled = conditioning()
    x, rows, sigma = latents(2), torch.tensor([1, 2]), torch.tensor([0.8, 0.4])
    with torch.no_grad():
        positive = comfy_velocity(model, name, x, sigma, embeds[rows], pooled[rows])
        negative = comfy_velocity(model, name, x, sigma, embeds[[0, 0]] * 0.5, pooled[[0, 0]] * 0.5)
    torch.testing.assert_close(velocity(x, sigma, rows), negative + 3 * (positive - negative), rtol=3e-4, atol=3e-4)
    assert velocity.forwards == 4


@pytest.mark.parametrize("name", ["flux", "sd3.5"])
def test_gradients_only_where_asked_for_and_the_reference_is_the_base(comfy, name):
    model, _, velocity = tuned(name)
    embeds, pooled = conditioning()
    x, sigma = latents(2), torch.tensor([0.8, 0.4])
    with torch.no_grad():
        base = comfy_velocity(model, name, x, sigma, embeds[:2], pooled[:2])
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
    # SD3's last block drops its text tokens after attention, so their queries cannot matter: one layer, two matrices.
    assert len(learnable) > 30 and len(idle) == (0 if name == "flux" else 2)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps", "exact"])
@pytest.mark.parametrize("name", ["flux", "sd3.5"])
def test_ratio_is_one_before_any_update(comfy, name, kind):
    _, _, velocity = tuned(name)
    sigmas = backend.simple_sigmas("flux" if name == "flux" else "sd3", 6)
    forest = grow(velocity, latents(4), sigmas, TreeShape(branching=2, depth=2, trees=2), NoiseSchedule(kind, 0.5, rho_min=0.7), start=1, prompts=[2, 0])
    for layer in range(forest.depth):
        x, (sigma, following) = forest.states[layer], forest.sigma(layer)
        with velocity.grad():
            v = velocity(x, sigma, forest.rows(layer))
        replayed = step(kind, x.repeat_interleave(2, 0), v.repeat_interleave(2, 0), sigma, following, forest.levels[layer], float(sigmas[1]),
                        next_latent=forest.states[layer + 1], rho_min=0.7)
        ratio = torch.exp(replayed.log_prob - forest.log_probs[layer])
        assert v.requires_grad and (ratio - 1).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["flux", "sd3.5"])
def test_the_same_seed_grows_the_same_tree(comfy, name):
    leaves = []
    for seed in (7, 7, 8):
        _, _, velocity = tuned(name)
        roots = noise.roots((16, 8, 8), seed, 3, [0, 1], 1)
        leaves.append(grow(velocity, roots, backend.simple_sigmas("flux", 6), TreeShape(branching=2, depth=2), NoiseSchedule("cps"), start=1, prompts=[0, 1],
                           seed=seed, iteration=3).leaves)
    assert torch.equal(leaves[0], leaves[1]) and not torch.allclose(leaves[0], leaves[2], atol=0.1)


@pytest.mark.parametrize("targets", ["all linear", "attention", r"attn\.to_v$|proj_mlp$"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_lora_in_comfyuis_form_is_the_live_policy(comfy, name, targets):
    """Merged into ComfyUI's own network, layer by layer, the converted LoRA gives the live velocity; no key is left over."""
    model, transformer, velocity = tuned(name, targets=targets)
    lora = backend.comfy_lora(velocity.adapters.state_dict(), transformer)
    embeds, pooled = conditioning()
    x, sigma = latents(2), torch.tensor([0.9, 0.5])
    before = comfy_velocity(model, name, x, sigma, embeds[:2], pooled[:2])
    ends = (".lora_up.weight", ".lora_down.weight", ".alpha")
    for key in lora:
        assert key.startswith("diffusion_model.") and key.endswith(ends)
        if key.endswith(ends[0]):
            stem = key.removesuffix(ends[0])
            weight = model.get_submodule(stem.removeprefix("diffusion_model.")).weight
            up, down, alpha = (lora[stem + end] for end in ends)
            weight += (up @ down).view(weight.shape) * alpha / len(down)
    expected = comfy_velocity(model, name, x, sigma, embeds[:2], pooled[:2])
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
        backend.comfy_lora({"nonsense.lora_down.weight": torch.zeros(1, 1), "nonsense.lora_up.weight": torch.zeros(1, 1)}, transformer)
