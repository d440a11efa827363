"""LoRA files of the families that both ComfyUI and diffusers have, beside FLUX.1 and SD3 (test_interchange.py)."""

import inspect
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft", reason="diffusers loads LoRAs with it")
import worlds

from core.hosts.peft import skeleton
from core.lora.adapters import choose_layers
from core.lora.file_forms import form_of
from core.lora.interchange import convert, read, write
from core.lora.layer_names import comfy_name, network_class, parts_of
from core.patterns import search

PIPELINES = {
    "FLUX.2": "Flux2Pipeline",
    "FLUX.2 klein": "Flux2KleinPipeline",
    "Qwen-Image": "QwenImagePipeline",
    "Z-Image": "ZImagePipeline",
    "Chroma": "ChromaPipeline",
    "Lumina 2": "Lumina2Pipeline",
    "HiDream-I1": "HiDreamImagePipeline",
    "AuraFlow": "AuraFlowPipeline",
    "Krea 2": "Krea2Pipeline",
    "ERNIE-Image": "ErnieImagePipeline",
}
# What ComfyUI's loader leaves out of a file in diffusers' form, as a pattern of diffusers' names; in its own form it
# reads all of it.
UNREAD = {
    "FLUX.2": r"^time_guidance_embed|_modulation",
    "FLUX.2 klein": r"^time_guidance_embed|_modulation",
    "Chroma": r"^distilled_guidance_layer",
    "Lumina 2": r"\.attn\.|feed_forward|norm1|^time_caption|^x_embedder|^norm_out",
}
ENGINE = ("flux2", "qwen-image", "z-image")  # that the diffusers engine runs, beside FLUX and SD3


@pytest.fixture(params=worlds.FAMILIES)
def both(request, comfy):
    return worlds.Both(request.param)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pipeline(both: worlds.Both):
    """diffusers' own pipeline with nothing but this transformer in it."""
    import diffusers

    kind = getattr(diffusers, PIPELINES[both.name])
    parts = inspect.signature(kind.__init__).parameters.values()
    absent = {part.name: None for part in parts if part.default is part.empty and part.name != "self"}
    return kind(**{**absent, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "transformer": both.transformer})


def loaded(both: worlds.Both, state: dict, loader: str = "load_lora_for_models"):
    """ComfyUI's model with a LoRA through its own loader."""
    import comfy.sd
    from test_backend_comfy import new_policy

    with torch.inference_mode():
        model = getattr(comfy.sd, loader)(both.subject.model, None, dict(state), 1.0, 0)[0]
    return new_policy(model, trained=False)


def complaints(caplog) -> list[str]:
    """ComfyUI and diffusers only log what they do not know."""
    words = ("not loaded", "unexpected", "missing", "error")
    said = [text for text in caplog.messages if "with the prefix='text_encoder'" not in text]  # FLUX's and Chroma's
    return [text for text in said if any(word in text.lower() for word in words)]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_trained_lora_is_the_same_in_diffusers(both, tmp_path, caplog):
    """Rank 3, alpha 5, of all Linear layers that training may change: through the pipeline's own load_lora_weights."""
    from test_backend_comfy import new_policy

    caplog.set_level(logging.WARNING)
    policy = new_policy(both.subject.model, targets="all linear")
    live, base = both.comfy(policy), both.comfy(new_policy(both.subject.model, trained=False))
    assert (live - base).abs().max() > 0.05
    close(both.diffusers(), base)
    state, path = policy.adapters.state_dict(), tmp_path / "lora.safetensors"
    written = write(path, state, "diffusers", network=both.network)
    assert form_of(state) == "comfyui" and form_of(written) == "diffusers"
    pipeline(both).load_lora_weights(path)
    close(both.diffusers(), live)
    assert convert(path, tmp_path / "back.safetensors", "comfyui").startswith("lora.safetensors (diffusers,")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    close(both.comfy(loaded(both, back)), live)
    assert not complaints(caplog)
    # ComfyUI's loader on diffusers' form: all but what UNREAD says, and that for certain
    names = sorted({key.removeprefix("transformer.").partition(".lora_")[0] for key in written})
    unread = [name for name in names if both.name in UNREAD and search(UNREAD[both.name], [name])[1][0].count]
    read_here = loaded(both, written)
    assert len([text for text in complaints(caplog) if "not loaded" in text.lower()]) == 2 * len(unread)
    if not unread:
        close(both.comfy(read_here), live)


def test_a_peft_lora_is_the_same_in_comfyui(both, tmp_path, caplog):
    """Made by PEFT with ranks and alphas of its own for some layers, saved by the pipeline's own save_lora_weights."""
    from test_backend_comfy import new_policy

    linear = [name for name, layer in both.transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
    presets = new_policy(both.subject.model, targets="all linear").adapters.names  # those that training may change
    targets = [name for name in linear if comfy_name(name, both.network)[0] in presets]
    torch.manual_seed(8)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        rank_pattern={targets[0]: 2},
        alpha_pattern={targets[-1]: 1.5},
        init_lora_weights=False,
    )
    both.transformer.add_adapter(config)
    with torch.no_grad():
        for key, parameter in both.transformer.named_parameters():
            if "lora_" in key:
                parameter.mul_(0.3)
    expected = both.diffusers()
    pipeline(both).save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(both.transformer),
        transformer_lora_adapter_metadata=both.transformer.peft_config["default"].to_dict(),
    )
    convert(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "comfy.safetensors", "comfyui", both.network)
    caplog.set_level(logging.WARNING)
    policy = loaded(both, load_file(tmp_path / "comfy.safetensors"))
    assert not complaints(caplog)
    close(both.comfy(policy), expected)
    base = both.comfy(new_policy(both.subject.model, trained=False))
    assert (expected - base).abs().max() > 0.05


def test_the_table_has_every_layer_in_comfyuis_order(both):
    """All of the policy's layers have a name; in the diffusers engine an adapter has the same first values."""
    network = both.subject.model.model.diffusion_model
    known = {name for name, layer in both.transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert network_class(both.transformer) == both.network
    modules = list(choose_layers(network, "all linear"))
    assert set().union(*(parts_of(module, both.network) for module in modules)) == known
    if both.network in ENGINE:
        assert list(choose_layers(skeleton(both.transformer), "all linear")) == modules


def test_a_file_remembers_its_network(tmp_path):
    """Layers that Z-Image and Lumina 2 both have: what was said once need not be said again."""
    names = ("layers.0.feed_forward.w1", "layers.0.feed_forward.w2")
    state = {}
    for name in names:
        state[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(8, 2)
        state[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(2, 8)
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=r"in Z-Image \('z-image'\), Lumina 2 \('lumina2'\), .*say which it is"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers")
    for network, name in (("z-image", "w1"), ("lumina2", "linear_1")):
        path = tmp_path / f"{network}.safetensors"
        write(path, state, "comfyui", network=network)
        assert read(path)[1]["treerpo.network"] == network
        convert(path, tmp_path / f"{network}-peft.safetensors", "diffusers")
        there = load_file(tmp_path / f"{network}-peft.safetensors")
        assert f"transformer.layers.0.feed_forward.{name}.lora_A.weight" in there
