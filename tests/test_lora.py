"""core/lora/adapters.py on plain torch networks."""

import pytest
import torch
from torch import nn

from core import patterns
from core.lora.adapters import TARGETS, Adapters, LoRA, choose_layers

FLUX_NAMES = [
    "img_in",
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_attn.proj",
    "double_blocks.0.img_mlp.0",
    "double_blocks.0.img_mod.lin",
    "single_blocks.3.linear1",
    "single_blocks.3.linear2",
    "single_blocks.3.modulation.lin",
    "final_layer.linear",
]
SD3_NAMES = [
    "context_embedder",
    "joint_blocks.0.x_block.attn.qkv",
    "joint_blocks.0.context_block.attn.proj",
    "joint_blocks.0.x_block.attn2.qkv",
    "joint_blocks.0.x_block.mlp.fc1",
    "joint_blocks.0.x_block.adaLN_modulation.1",
    "final_layer.linear",
]
DIFFUSERS_NAMES = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn2.to_v",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff_context.net.2",
    "transformer_blocks.0.norm1.linear",
    "single_transformer_blocks.1.attn.to_k",
    "single_transformer_blocks.1.proj_mlp",
    "single_transformer_blocks.1.proj_out",
    "single_transformer_blocks.1.norm.linear",
    "proj_out",
]
ATTENTION = {
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_attn.proj",
    "single_blocks.3.linear1",
    "single_blocks.3.linear2",
    "joint_blocks.0.x_block.attn.qkv",
    "joint_blocks.0.context_block.attn.proj",
    "joint_blocks.0.x_block.attn2.qkv",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn2.to_v",
    "single_transformer_blocks.1.attn.to_k",
    "single_transformer_blocks.1.proj_mlp",
    "single_transformer_blocks.1.proj_out",
}
MLP = {
    "double_blocks.0.img_mlp.0",
    "joint_blocks.0.x_block.mlp.fc1",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff_context.net.2",
}


def named(names: list[str]) -> nn.Module:
    """A network whose Linear layers have these names."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, nn.Linear(4, 6))
        place.add_module("norm", nn.LayerNorm(4))
    return root


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).requires_grad_(False)


def trained(root: nn.Module, **settings) -> Adapters:
    """Adapters whose values are all random, as after training."""
    adapters = Adapters.create(root, **{"rank": 2, "alpha": 3.0, "targets": "all linear", **settings})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapters


def test_the_delta_is_alpha_over_rank_times_up_down():
    lora = LoRA(4, 3, rank=2, alpha=5.0, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 7, 4)
    assert torch.equal(lora(x), torch.zeros(2, 7, 3)), "zero until trained"
    nn.init.normal_(lora.up)
    expected = (x.double() @ lora.down.T @ lora.up.T * 5 / 2).float()
    torch.testing.assert_close(lora(x), expected, rtol=1e-6, atol=1e-6)
    assert lora(x.bfloat16()).dtype == torch.bfloat16
    assert [name for name, _ in lora.named_parameters()] == ["down", "up"], "alpha must not be trainable"


@pytest.mark.parametrize("names", [FLUX_NAMES, SD3_NAMES, DIFFUSERS_NAMES], ids=["flux", "sd3", "diffusers"])
def test_presets(names):
    root = named(names)
    chosen = {preset: set(Adapters.create(root, 1, 1.0, preset).names) for preset in TARGETS}
    assert chosen["attention"] == ATTENTION & set(names)
    assert chosen["attention+mlp"] == (ATTENTION | MLP) & set(names)
    assert chosen["all linear"] == set(names)


def test_a_pattern_of_ones_own():
    root = named(FLUX_NAMES)
    assert Adapters.create(root, 1, 1.0, r"img_attn\.qkv$").names == ["double_blocks.0.img_attn.qkv"]
    for pattern, words in ((r"img_attn\.qvk$", "matches no Linear layer"), ("(", "not a regular expression")):
        with pytest.raises(ValueError, match=words) as caught:
            Adapters.create(root, 1, 1.0, pattern)
        assert "double_blocks.0.img_attn.qkv" in str(caught.value) or "img_in" in str(caught.value), (
            "it lists names that exist"
        )


def test_sizes_come_from_features_not_from_the_packed_weight():
    layer = nn.Linear(8, 6)
    layer.weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.uint8), requires_grad=False)
    lora = Adapters.create(nn.Sequential(layer), 2, 2.0, "all linear").loras["0"]
    assert lora.down.shape == (2, 8) and lora.up.shape == (6, 2)


def test_injected_the_network_computes_the_merged_weights():
    root, x = network(), torch.randn(9, 4)
    plain = root(x)
    adapters = trained(root)
    merged = network()
    with torch.no_grad():
        for name, lora in adapters.loras.items():
            merged.get_submodule(name).weight += lora.scale * lora.up @ lora.down
    adapters.inject(root)
    torch.testing.assert_close(root(x), merged(x))
    with adapters.disabled():
        assert torch.equal(root(x), plain)
    assert not torch.equal(root(x), plain)
    adapters.eject()
    assert torch.equal(root(x), plain)


def test_injecting_and_ejecting_twice_is_as_once():
    root, x = network(), torch.randn(9, 4)
    plain, adapters = root(x), trained(root)
    adapters.inject(root)
    once = root(x)
    adapters.inject(root)
    assert torch.equal(root(x), once)
    adapters.eject()
    adapters.eject()
    assert torch.equal(root(x), plain)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in root.modules())


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("ours_off_first", [True, False])
def test_other_peoples_forward_swaps_survive_in_any_order(ours_first, ours_off_first):
    root, x = network(), torch.randn(9, 4)
    adapters, layer = trained(root), root[0]
    original, plain = layer.forward, root(x)

    def swap():
        layer.forward = lambda t: original(t) * 2

    def unswap():
        del layer.forward

    for action in (lambda: adapters.inject(root), swap) if ours_first else (swap, lambda: adapters.inject(root)):
        action()
    both = layer(x)
    torch.testing.assert_close(both, 2 * original(x) + adapters.loras["0"](x))
    for action in (adapters.eject, unswap) if ours_off_first else (unswap, adapters.eject):
        action()
    assert "forward" not in vars(layer) and torch.equal(root(x), plain)


def test_disabled_ends_with_an_exception_too():
    adapters = trained(network())
    with pytest.raises(KeyError), adapters.disabled():
        raise KeyError
    assert adapters.enabled


def test_adapters_of_another_model_are_refused():
    with pytest.raises(ValueError, match="no layer '0'.*belong to another model"):
        trained(network()).inject(named(FLUX_NAMES))


def test_the_seed_decides_the_start():
    first, same, other = (
        Adapters.create(network(), 2, 2.0, "all linear", seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["diffusion_model.0.lora_down.weight"], other["diffusion_model.0.lora_down.weight"])


def test_made_in_inference_mode_they_can_still_be_trained():
    root = network()
    with torch.inference_mode():
        adapters = Adapters.create(root, 2, 2.0, "all linear")
    adapters.inject(root)
    root(torch.randn(9, 4)).sum().backward()
    assert all(p.grad is not None for p in adapters.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_moving_keeps_the_parameter_objects():
    adapters = trained(network())
    before = adapters.parameters()
    with torch.inference_mode():
        adapters.to("cuda")
    assert all(a is b and a.is_cuda and not a.is_inference() for a, b in zip(before, adapters.parameters()))


def test_state_dict_round_trip():
    root = network()
    adapters = trained(root, dtype=torch.bfloat16)
    sd = adapters.state_dict()
    assert set(sd) == {
        f"diffusion_model.{name}.{part}"
        for name in ("0", "2")
        for part in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    assert sd["diffusion_model.0.lora_up.weight"].shape == (5, 2) and float(sd["diffusion_model.2.alpha"]) == 3.0
    assert len({t.untyped_storage().data_ptr() for t in sd.values()}) == len(sd), "safetensors refuses shared memory"
    assert (
        adapters.count() == 2 * (4 + 5) + 2 * (5 + 3) == sum(t.numel() for key, t in sd.items() if "alpha" not in key)
    )
    fresh = Adapters.create(root, 2, 7.0, "all linear", torch.bfloat16, seed=9)
    with torch.inference_mode():
        fresh.load_state_dict(sd)
    again = fresh.state_dict()
    assert all(torch.equal(sd[key], again[key]) for key in sd)
    sd["diffusion_model.0.lora_up.weight"].zero_()
    assert bool(fresh.loras["0"].up.any()) and bool(adapters.loras["0"].up.any()), "copies, not views"


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda sd: sd.pop("diffusion_model.2.lora_up.weight"), r"1 missing \(diffusion_model.2.lora_up.weight\)"),
        (
            lambda sd: sd.update({"diffusion_model.9.alpha": torch.tensor(1.0)}),
            r"1 unknown \(diffusion_model.9.alpha\)",
        ),
        (
            lambda sd: sd.update({"diffusion_model.2.lora_up.weight": torch.zeros(3, 4)}),
            r"1 of another size \(diffusion_model.2.lora_up.weight \[3, 4\] instead of \[3, 2\]\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(spoil, words):
    adapters = trained(network())
    before = adapters.state_dict()
    wrong = {key: torch.zeros_like(tensor) for key, tensor in before.items()}
    spoil(wrong)
    with pytest.raises(ValueError, match=words):
        adapters.load_state_dict(wrong)
    assert all(torch.equal(before[key], tensor) for key, tensor in adapters.state_dict().items())


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!$", r"^(\w|\w\w|[a-z_.0-9])+!"])
def test_a_pattern_that_would_take_for_ever_ends(pattern, monkeypatch):
    """Python's re lets nothing else run meanwhile: the whole server would stand still."""
    monkeypatch.setattr(patterns, "SECONDS", 2.0)
    with pytest.raises(ValueError, match="longer than 2 s.*layers here are, for example: double_blocks.0.img_attn"):
        choose_layers(named(["double_blocks.0.img_attn.a_long_name_of_a_layer_with_many_letters"]), pattern)


@pytest.mark.parametrize("pattern", ["(", "(" * 9999, "a{99999999999999999999}", "a{" + "9" * 9999 + "}", "[a-"])
def test_a_pattern_that_is_none_gets_a_sentence(pattern):
    with pytest.raises(ValueError, match="not a regular expression that can be used") as caught:
        choose_layers(named(["img_in"]), pattern)
    assert len(str(caught.value)) < 400


def test_a_pattern_is_searched_in_every_name():
    names = ["double_blocks.0.img_attn.qkv", "double_blocks.1.img_attn.qkv", "single_blocks.0.linear1"]
    assert list(choose_layers(named(names), r"double_blocks\.[01]\.|linear")) == names
    assert list(choose_layers(named(names), r"1$|blocks\.1")) == names[1:]


def test_of_a_half_precision_network_its_input_is_kept_and_no_copy_of_it():
    """The gradient is as of the plain formula, bit for bit; the input in float32 is not among what is kept."""
    generator = torch.Generator().manual_seed(0)
    lora = LoRA(64, 48, rank=4, alpha=6.0, dtype=torch.float32, generator=generator)
    lora.up.data.normal_(generator=generator)
    given = torch.randn(2, 9, 64, generator=generator).bfloat16()
    seen = []

    def ran(work):
        x = given.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            y = work(x)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, lora.down, lora.up))

    found = ran(lora)
    assert not [t for t in seen if t.numel() == given.numel() and t.dtype == torch.float32]
    linear = nn.functional.linear
    expected = ran(lambda x: linear(linear(x.float(), lora.down) * lora.scale, lora.up).to(x.dtype))
    assert [t for t in seen if t.numel() == given.numel() and t.dtype == torch.float32], "the plain formula keeps it"
    assert all(torch.equal(mine, plain) for mine, plain in zip(found, expected))
    with torch.no_grad():
        assert torch.equal(lora(given), found[0])


def test_the_same_sum_with_and_without_gradients_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    lora = LoRA(64, 48, rank=4, alpha=6.0, dtype=torch.float32, generator=generator)
    lora.up.data.normal_(generator=generator)
    x, output = (torch.randn(5, n, generator=generator).bfloat16() for n in (64, 48))
    kept = lora.added_to(output.clone(), x)
    with torch.no_grad():
        assert torch.equal(lora.added_to(output.clone(), x), kept) and not torch.equal(kept, output)
