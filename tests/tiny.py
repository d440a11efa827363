"""Random FLUX, SD3 and SD3.5 networks of 1-2 million parameters, as state dicts that ComfyUI's own loaders accept.

Weights are N(0, 1/fan_in), modulations half of that, biases 0, norms 1: velocities of about unit size that depend on
everything they should.
"""

import torch

CONTEXT, POOLED = 64, 48  # widths of the text features
ARCHITECTURES = ("flux", "sd3", "sd3.5")


class _Weights(dict):
    """Collects Linear layers by name."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def linear(self, name: str, out: int, *fan_in: int, gain: float = 1.0, bias: bool = True) -> None:
        size = torch.Size(fan_in).numel()
        self[f"{name}.weight"] = torch.randn(out, *fan_in, generator=self.generator) * gain / size**0.5
        if bias:
            self[f"{name}.bias"] = torch.zeros(out)


def flux(seed: int = 0, double: int = 2, single: int = 2, h: int = 128) -> dict[str, torch.Tensor]:
    sd = _Weights(seed)
    sd.linear("img_in", h, 64)
    sd.linear("txt_in", h, CONTEXT)
    for name, width in (("time_in", 256), ("vector_in", POOLED), ("guidance_in", 256)):
        sd.linear(f"{name}.in_layer", h, width)
        sd.linear(f"{name}.out_layer", h, h)
    for i in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            sd.linear(f"{block}_mod.lin", 6 * h, h, gain=0.5)
            sd.linear(f"{block}_attn.qkv", 3 * h, h)
            sd.linear(f"{block}_attn.proj", h, h)
            sd[f"{block}_attn.norm.query_norm.scale"] = torch.ones(128)
            sd[f"{block}_attn.norm.key_norm.scale"] = torch.ones(128)
            sd.linear(f"{block}_mlp.0", 4 * h, h)
            sd.linear(f"{block}_mlp.2", h, 4 * h)
    for i in range(single):
        block = f"single_blocks.{i}"
        sd.linear(f"{block}.modulation.lin", 3 * h, h, gain=0.5)
        sd.linear(f"{block}.linear1", 7 * h, h)
        sd.linear(f"{block}.linear2", h, 5 * h)
        sd[f"{block}.norm.query_norm.scale"] = torch.ones(128)
        sd[f"{block}.norm.key_norm.scale"] = torch.ones(128)
    sd.linear("final_layer.adaLN_modulation.1", 2 * h, h, gain=0.5)
    sd.linear("final_layer.linear", 64, h)
    return dict(sd)


def sd3(seed: int = 0, d: int = 2, qk_norm: bool = False) -> dict[str, torch.Tensor]:
    """d sets width (64 d), heads and blocks. qk_norm: SD3.5."""
    sd, h = _Weights(seed), 64 * d
    sd.linear("x_embedder.proj", h, 16, 2, 2)
    if not qk_norm:
        sd["pos_embed"] = torch.randn(1, 12 * 12, h, generator=sd.generator) * 0.1
    sd.linear("context_embedder", h, CONTEXT)
    for name, width in (("t_embedder", 256), ("y_embedder", POOLED)):
        sd.linear(f"{name}.mlp.0", h, width)
        sd.linear(f"{name}.mlp.2", h, h)
    for i in range(d):
        for side in ("x_block", "context_block"):
            block, last = f"joint_blocks.{i}.{side}", side == "context_block" and i == d - 1
            sd.linear(f"{block}.attn.qkv", 3 * h, h)
            if qk_norm:
                sd[f"{block}.attn.ln_q.weight"] = torch.ones(64)
                sd[f"{block}.attn.ln_k.weight"] = torch.ones(64)
            sd.linear(f"{block}.adaLN_modulation.1", (2 if last else 6) * h, h, gain=0.5)
            if not last:
                sd.linear(f"{block}.attn.proj", h, h)
                sd.linear(f"{block}.mlp.fc1", 4 * h, h)
                sd.linear(f"{block}.mlp.fc2", h, 4 * h)
    sd.linear("final_layer.adaLN_modulation.1", 2 * h, h, gain=0.5)
    sd.linear("final_layer.linear", 64, h)
    return dict(sd)


def state_dict(architecture: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return flux(seed) if architecture == "flux" else sd3(seed, qk_norm=architecture == "sd3.5")


def load(architecture: str, seed: int = 0, dtype=torch.float32):
    """A MODEL of random weights."""
    return load_weights(state_dict(architecture, seed), dtype)


def load_weights(weights: dict[str, torch.Tensor], dtype):
    """A MODEL through ComfyUI's loader, made in inference mode as in ComfyUI's executor."""
    import comfy.sd

    with torch.inference_mode():
        sd = {key: tensor.to(dtype) for key, tensor in weights.items()}
        # left to itself, ComfyUI makes float32 of them on a CPU
        model = comfy.sd.load_diffusion_model_state_dict(sd, model_options={"dtype": dtype})
    assert {parameter.dtype for parameter in model.model.diffusion_model.parameters()} == {dtype}
    return model


def conditioning(
    prompts: int = 1, tokens: int = 7, seed: int = 1, context: int = CONTEXT, pooled: int | None = POOLED
) -> list:
    """Random CONDITIONING of one entry with a row per prompt, made in inference mode as in ComfyUI's executor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        options = {} if pooled is None else {"pooled_output": torch.randn(prompts, pooled, generator=generator)}
        return [[torch.randn(prompts, tokens, context, generator=generator), options]]


def one_prompt(conditioning: list, row: int) -> list:
    """The conditioning of one prompt of several, as a user with one prompt has it."""
    [[context, options]] = conditioning
    return [[context[row : row + 1].clone(), {key: value[row : row + 1].clone() for key, value in options.items()}]]


def latents(batch: int = 1, size: int = 8, seed: int = 2) -> torch.Tensor:
    return torch.randn(batch, 16, size, size, generator=torch.Generator().manual_seed(seed))


def not_flow():
    """A MODEL that predicts noise, as SD1.5 does: its network does not matter, it is refused first."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15({"disable_unet_model_creation": True, "image_model": None})
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS, device=torch.device("cpu"))
    model.diffusion_model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def euler(model, positive, negative, cfg=1.0, steps=4, seed=3, batch=1):
    """ComfyUI's own KSampler (euler, simple) from an empty latent, in inference mode as in its executor."""
    import comfy.sample

    with torch.inference_mode():
        latent = torch.zeros(batch, 16, 8, 8)
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "simple", positive, negative, latent, seed=seed, disable_pbar=True
        )
