"""core/lora/interchange.py: LoRA files from ComfyUI's form to diffusers' and back, against the loaders of both."""

import json
import logging
from pathlib import Path

import pytest
import tiny
import torch
from graph import Graph
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from core import patterns
from core.lora.adapters import Adapters
from core.lora.file_forms import form_of
from core.lora.interchange import NETWORK, comfy_form, comfy_pairs, convert, diffusers_form, read, write
from core.lora.layer_names import comfy_name, is_swapped, part_rows, parts_of, swap_halves
from core.lora.networks import NETWORKS
from core.lora.peft_metadata import ADAPTER_METADATA, peft_alpha, peft_config


def to_comfy(state, header=None, network=None):
    return comfy_form(comfy_pairs(state, header, network))


def to_diffusers(state, header=None, network=None):
    return diffusers_form(comfy_pairs(state, header, network), network)


WIDTH = 8
# Rows of a layer in hidden sizes, where they are not one.
ROWS = {
    "img_attn.qkv": 3,
    "linear1": 7,
    "modulation.lin": 3,
    "img_mod.lin": 6,
    "txt_mlp.0": 4,
    "x_block.attn.qkv": 3,
    "x_block.attn2.qkv": 3,
    "context_block.attn.qkv": 3,
    "x_block.adaLN_modulation.1": 9,
    "context_block.adaLN_modulation.1": 2,
    "final_layer.adaLN_modulation.1": 2,
    "x_block.mlp.fc1": 4,
    "final_layer.linear": 2,
    "feed_forward.w1": 4,
    "attention.qkv": 3,
    "img_mlp.net.0.proj": 4,
    "mlp.up": 4,
}
OTHER_ROWS = {"flux2": {"linear1": 9, "txt_mlp.0": 6}, "lumina2": {"attention.qkv": 2}}  # k and v half as wide as q
LAYERS = {
    "flux": [
        "double_blocks.0.img_attn.qkv",
        "double_blocks.1.img_mod.lin",
        "double_blocks.0.txt_mlp.0",
        "single_blocks.1.linear1",
        "single_blocks.0.modulation.lin",
        "txt_in",
        "final_layer.adaLN_modulation.1",
        "final_layer.linear",
    ],
    "sd3": [
        "joint_blocks.0.x_block.attn.qkv",
        "joint_blocks.0.x_block.attn2.qkv",
        "joint_blocks.3.context_block.attn.qkv",
        "joint_blocks.0.x_block.adaLN_modulation.1",
        "joint_blocks.3.context_block.adaLN_modulation.1",
        "joint_blocks.1.x_block.mlp.fc1",
        "context_embedder",
        "final_layer.adaLN_modulation.1",
    ],
    "flux2": [
        "double_blocks.0.img_attn.qkv",
        "double_blocks.1.txt_mlp.0",
        "single_blocks.1.linear1",
        "double_stream_modulation_img.lin",
        "time_in.in_layer",
        "final_layer.adaLN_modulation.1",
    ],
    "z-image": ["layers.0.attention.qkv", "noise_refiner.1.attention.out", "layers.1.feed_forward.w1", "x_embedder"],
    "lumina2": ["layers.0.attention.qkv", "context_refiner.0.attention.qkv", "layers.1.feed_forward.w1"],
    "qwen-image": ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.0.proj", "img_in"],
    "hidream": ["double_stream_blocks.0.block.attn1.to_q_t", "single_stream_blocks.1.block.ff_i.experts.3.w2"],
    "auraflow": ["double_layers.0.attn.w2q", "single_layers.1.attn.w1q", "modF.1"],
    "krea2": ["blocks.0.attn.wq", "txtfusion.refiner_blocks.1.mlp.up", "first"],
}


def rows(module: str, network: str = "flux") -> int:
    table = {**ROWS, **OTHER_ROWS.get(network, {}), **({"modF.1": 2} if network == "auraflow" else {})}
    return WIDTH * next((n for name, n in table.items() if module.endswith(name)), 1)


def comfy_state(
    ranks: dict[str, int], scale: float, seed: int = 0, dtype=torch.float32, network: str = "flux"
) -> dict[str, torch.Tensor]:
    """A random LoRA in ComfyUI's form: {module: rank}, alpha = scale * rank."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module, rank in ranks.items():
        up = torch.randn(rows(module, network), rank, generator=generator)
        state[f"diffusion_model.{module}.lora_up.weight"] = up.to(dtype)
        state[f"diffusion_model.{module}.lora_down.weight"] = torch.randn(rank, WIDTH, generator=generator).to(dtype)
        state[f"diffusion_model.{module}.alpha"] = torch.tensor(scale * rank)
    return state


def deltas(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The change of every layer's weight, by the file's own names; computed in float64."""
    found = {}
    for key, down in state.items():
        for ending, other in ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")):
            if key.endswith(ending):
                stem = key.removesuffix(ending)
                alpha = float(state.get(f"{stem}.alpha", len(down)))
                found[stem] = state[stem + other].double().flatten(1) @ down.double().flatten(1) * alpha / len(down)
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)


@st.composite
def some_layers(draw):
    network = draw(st.sampled_from(sorted(LAYERS)))
    chosen = draw(st.lists(st.sampled_from(LAYERS[network]), min_size=1, unique=True))
    return network, {module: draw(st.integers(1, 5)) for module in chosen}


# round trips


@given(some_layers(), st.sampled_from([1.0, 2.0, 0.25, 1.5, 0.3]), st.integers(0, 99))
def test_comfyui_to_diffusers_and_back(layers, scale, seed):
    """Downs and ranks come back bit for bit, ups too where alpha = rank; else alpha / rank is in the ups, exactly so
    for a power of two.
    """
    network, ranks = layers
    state = comfy_state(ranks, scale, seed, network=network)
    there = to_diffusers(state, network=network)
    assert all(key.startswith("transformer.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in there)
    back = to_comfy(there, network=network)
    assert back.keys() == state.keys()
    for module, rank in ranks.items():
        stem = f"diffusion_model.{module}"
        assert (
            torch.equal(back[f"{stem}.lora_down.weight"], state[f"{stem}.lora_down.weight"])
            and float(back[f"{stem}.alpha"]) == rank
        )
        exact = dict(rtol=0, atol=0) if scale != 0.3 else dict(rtol=1e-6, atol=0)  # .3 * rank is rounded in the file
        torch.testing.assert_close(back[f"{stem}.lora_up.weight"], state[f"{stem}.lora_up.weight"] * scale, **exact)
    if scale == 1:
        same(back, state)
    if scale in (1, 2, 0.25):
        same(deltas(back), deltas(state))
    same(to_diffusers(back, network=network), there)


@st.composite
def peft_files(draw):
    """A PEFT file whose fused layers are adapted in part, each part with a rank of its own or the down of its
    neighbour.
    """
    network, ranks = draw(some_layers())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    state, shared = {}, draw(st.booleans())
    for module in ranks:
        parts, height = parts_of(module, network), rows(module, network)
        heights = part_rows(len(parts), height, WIDTH)
        down = torch.randn(draw(st.integers(1, 4)), WIDTH, generator=generator)
        some = draw(st.sets(st.integers(0, len(parts) - 1), min_size=1))
        # of Lumina 2's k and v one at least: else their width would be that of the published model
        for i in sorted(some | ({1} if network == "lumina2" and len(parts) == 3 else set())):
            if not shared:
                down = torch.randn(draw(st.integers(1, 4)), WIDTH, generator=generator)
            state[f"transformer.{parts[i]}.lora_A.weight"] = down.clone()
            state[f"transformer.{parts[i]}.lora_B.weight"] = torch.randn(heights[i], len(down), generator=generator)
    return network, state


@given(peft_files())
def test_diffusers_to_comfyui_and_back(file):
    """Every part comes back with the same delta, its rank included; a part without an adapter has none again."""
    network, state = file
    middle = to_comfy(state, network=network)
    back = to_diffusers(middle, network=network)
    close(deltas(back), deltas(state))
    for key, tensor in middle.items():
        if key.endswith(".lora_up.weight") and len(parts_of(module := key[16:-15], network)) > 1:
            given_rows = sum(
                len(t)
                for k, t in state.items()
                if k.endswith("lora_B.weight") and comfy_name(k[12:-14], network)[0] == module
            )
            height = rows(module, network)
            assert len(tensor) == height >= given_rows and (tensor == 0).all(1).sum() == height - given_rows, (
                "rows of absent parts are zero"
            )


def test_parts_with_the_same_down_become_one_pair_of_the_same_rank_and_others_blocks():
    state = to_diffusers(comfy_state({"double_blocks.0.img_attn.qkv": 2}, 1.0))
    assert to_comfy(state, network="flux")["diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight"].shape == (
        2,
        WIDTH,
    )
    state["transformer.transformer_blocks.0.attn.to_k.lora_A.weight"] += 1
    apart = to_comfy(state, network="flux")
    up = apart["diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight"]
    assert up.shape == (3 * WIDTH, 4) and float(apart["diffusion_model.double_blocks.0.img_attn.qkv.alpha"]) == 4
    assert not up[:WIDTH, 2:].any() and not up[WIDTH : 2 * WIDTH, :2].any() and not up[2 * WIDTH :, 2:].any(), (
        "q and v share a block, k has its own"
    )


def test_an_untrained_lora_keeps_all_its_parts():
    state = comfy_state({"double_blocks.0.img_attn.qkv": 2, "single_blocks.0.linear1": 3}, 1.0)
    state = {key: torch.zeros_like(tensor) if "lora_up" in key else tensor for key, tensor in state.items()}
    there = to_diffusers(state)
    assert len(there) == 2 * (3 + 4)
    same(to_comfy(there, network="flux"), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_where_it_is_exact_and_widened_where_it_is_not(dtype):
    ranks = {"double_blocks.0.img_attn.qkv": 2}
    for scale, kept in ((2.0, dtype), (0.3, torch.float32)):
        state = comfy_state(ranks, scale, dtype=dtype)
        there = to_diffusers(state)
        assert {tensor.dtype for key, tensor in there.items() if "lora_B" in key} == {kept}
        assert {tensor.dtype for key, tensor in there.items() if "lora_A" in key} == {dtype}
        close(deltas(to_comfy(there, network="flux")), deltas(state))


# SD3's swapped modulations


@pytest.mark.parametrize("blocks", [2, 24, 38])
def test_only_modulations_of_two_parts_are_swapped(blocks):
    """SD3's last context block and the final layer: told by their rows, whatever the number of blocks."""
    last, first = (
        f"joint_blocks.{blocks - 1}.context_block.adaLN_modulation.1",
        "joint_blocks.0.x_block.adaLN_modulation.1",
    )
    state = comfy_state({last: 2, first: 2, "final_layer.adaLN_modulation.1": 2}, 1.0)
    there = to_diffusers(state)
    for module, name in (
        (last, f"transformer_blocks.{blocks - 1}.norm1_context.linear"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ):
        up = state[f"diffusion_model.{module}.lora_up.weight"]
        assert torch.equal(there[f"transformer.{name}.lora_B.weight"], torch.cat([up[WIDTH:], up[:WIDTH]]))
    assert torch.equal(
        there["transformer.transformer_blocks.0.norm1.linear.lora_B.weight"],
        state[f"diffusion_model.{first}.lora_up.weight"],
    )
    same(to_comfy(there), state)  # norm1_context of two parts says that it is SD3


# other writers' files


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model.", "transformer.base_model.model."])
@pytest.mark.parametrize(
    "endings",
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora_down.weight", ".lora_up.weight"),
    ],
)
def test_prefixes_and_endings_of_diffusers_files(prefix, endings):
    state = to_diffusers(comfy_state({"double_blocks.0.img_attn.qkv": 2, "single_blocks.0.linear1": 3}, 1.0))
    other = {
        prefix
        + key.removeprefix("transformer.")
        .replace(".lora_A.weight", endings[0])
        .replace(".lora_B.weight", endings[1]): t
        for key, t in state.items()
    }
    assert form_of(other) == "diffusers"
    same(to_comfy(other), to_comfy(state))
    with_alpha = {**other, f"{prefix}single_transformer_blocks.0.attn.to_q.alpha": torch.tensor(1.5)}
    expected = deltas(state)
    expected["transformer.single_transformer_blocks.0.attn.to_q"] *= 0.5
    close(deltas(to_diffusers(with_alpha)), expected)


@given(some_layers(), st.sampled_from([1.0, 0.5]))
def test_onetrainers_names(layers, scale):
    """diffusers' modules with underscores, an alpha each."""
    network, ranks = layers
    theirs, peft = {}, to_diffusers(comfy_state(ranks, 1.0, network=network), network=network)
    for key, tensor in peft.items():
        module, _, ending = key.removeprefix("transformer.").rpartition(".lora_")
        stem = f"lora_transformer_{module.replace('.', '_')}"
        theirs[f"{stem}.lora_{'down' if ending.startswith('A') else 'up'}.weight"] = tensor
        theirs[f"{stem}.alpha"] = torch.tensor(scale * (len(tensor) if ending.startswith("A") else tensor.shape[1]))
    assert form_of(theirs) == "OneTrainer"
    found = deltas(to_comfy(theirs, network=network))
    close(found, {key: delta * scale for key, delta in deltas(to_comfy(peft, network=network)).items()})


XLABS = {  # XLabs' module: (ComfyUI's, which rows of it are trained)
    "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", 3),
    "double_blocks.0.processor.qkv_lora2": ("double_blocks.0.txt_attn.qkv", 3),
    "double_blocks.18.processor.proj_lora1": ("double_blocks.18.img_attn.proj", 1),
    "double_blocks.18.processor.proj_lora2": ("double_blocks.18.txt_attn.proj", 1),
    "single_blocks.4.processor.qkv_lora": ("single_blocks.4.linear1", 3),
    "single_blocks.4.processor.proj_lora": ("single_blocks.4.linear2", 1),
}


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_names(prefix):
    theirs, expected = {}, {}
    for i, (name, (module, parts)) in enumerate(XLABS.items()):
        up, down = torch.randn(parts * WIDTH, 2 + i), torch.randn(2 + i, WIDTH)
        theirs |= {f"{prefix}{name}.up.weight": up, f"{prefix}{name}.down.weight": down}
        delta = up.double() @ down.double()
        rest = torch.zeros(4 * WIDTH * module.endswith("linear1"), WIDTH, dtype=torch.float64)  # the MLP
        expected[f"diffusion_model.{module}"] = torch.cat([delta, rest])
    assert form_of(theirs) == "XLabs"
    close(deltas(to_comfy(theirs)), expected)
    same(to_diffusers(to_comfy(theirs)), to_diffusers(theirs))


def test_xlabs_names_are_what_comfyui_takes_them_for(comfy):
    """Its converter for USO, whose LoRAs have XLabs' names."""
    convert_uso_lora = getattr(pytest.importorskip("comfy.lora_convert"), "convert_uso_lora", None)
    if convert_uso_lora is None:
        pytest.skip("this ComfyUI does not know USO's LoRAs")
    for name, (module, _) in XLABS.items():
        (key,) = convert_uso_lora({f"{name}.up.weight": torch.ones(1)})
        assert key == f"diffusion_model.{module.replace('linear1', 'linear1_qkv')}.lora_up.weight"


def test_a_tensor_of_someone_else_does_not_fail_the_whole_file(tmp_path, caplog):
    state = comfy_state({"double_blocks.0.img_attn.qkv": 2, "single_blocks.0.linear1": 2}, 1.0)
    more = {"bundle_emb.fox.string_to_params.clip_l": torch.ones(2, 8), "step": torch.tensor(3)}
    same(to_comfy({**more, **state}), state)
    assert "2 tensors of this file are left out ('bundle_emb.fox.string_to_params.clip_l', ...)" in caplog.text
    save_file({**more, **state}, tmp_path / "in.safetensors")
    assert "(comfyui, 2 layers)" in (
        said := convert(tmp_path / "in.safetensors", tmp_path / "a.safetensors", "comfyui")
    )
    assert said.endswith("; 2 left out that are no LoRA ('bundle_emb.fox.string_to_params.clip_l', ...)")
    with pytest.raises(ValueError, match="holds no LoRA of a diffusion model"):
        comfy_pairs(more)


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.double_blocks.0.img_attn.qkv.diff_b",
        "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector",
        "lora_unet_double_blocks_0_img_attn_qkv.lokr_w1",
        "lora_transformer_transformer_blocks_0_attn_to_q.dora_scale",
        "double_blocks.0.processor.qkv_lora1.scale",
        "double_blocks.0.img_attn.norm.query_norm.set_weight",
    ],
)
def test_what_belongs_to_a_layer_is_never_left_out(key):
    state = comfy_state({"double_blocks.0.img_attn.qkv": 2}, 1.0)
    with pytest.raises(ValueError, match="is no part of a plain LoRA"):
        comfy_pairs({**state, key: torch.ones(1)})


def test_kohyas_names_and_peft_pairs_under_comfyuis_names():
    state = comfy_state({module: 2 for module in LAYERS["flux"]}, 2.0)
    kohya = {}
    for key, tensor in state.items():
        module, _, ending = (
            key.removeprefix("diffusion_model.").replace(".lora_", "|lora_").replace(".alpha", "|alpha").partition("|")
        )
        kohya[f"lora_unet_{module.replace('.', '_')}.{ending}"] = tensor
    assert form_of(kohya) == "kohya" and form_of(state) == "comfyui"
    same(to_comfy(kohya), state)
    same(to_diffusers(kohya), to_diffusers(state))
    peft = {
        key.replace("lora_up", "lora_B").replace("lora_down", "lora_A"): tensor
        for key, tensor in state.items()
        if not key.endswith("alpha")
    }
    close(deltas(to_comfy(peft)), {key: delta / 2 for key, delta in deltas(state).items()})  # no alpha: alpha = rank


def test_alphas_and_ranks_of_the_adapter_metadata():
    state = to_diffusers(
        comfy_state({"single_blocks.0.linear1": 4, "double_blocks.0.img_attn.qkv": 2, "final_layer.linear": 4}, 1.0)
    )
    config = {
        "r": 4,
        "lora_alpha": 6,
        "alpha_pattern": {"attn.to_k": 1.0, "^proj_out": 3.0},
        "rank_pattern": {"transformer_blocks.0": 2},
        "use_rslora": False,
    }
    for rslora in (False, True):
        header = {
            ADAPTER_METADATA: json.dumps(
                {f"transformer.{key}": value for key, value in {**config, "use_rslora": rslora}.items()}
            )
        }
        expected = deltas(state)
        for name, delta in expected.items():
            rank = len(state[f"{name}.lora_A.weight"])
            alpha = 1.0 if name.endswith("attn.to_k") else 3.0 if name == "transformer.proj_out" else 6.0
            delta *= alpha / (rank**0.5 if rslora else rank)
        close(deltas(to_diffusers(state, header)), expected)
    with pytest.raises(ValueError, match="cannot be read"):
        to_comfy(state, {ADAPTER_METADATA: "{"})


def test_text_encoders_are_left_out_aloud(caplog, tmp_path):
    state = to_diffusers(comfy_state({"single_blocks.0.linear1": 2}, 1.0))
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    with caplog.at_level(logging.WARNING):
        same(to_comfy({**state, key: torch.ones(2, 4)}), to_comfy(state))
    assert key in caplog.text
    save_file({**state, key: torch.ones(2, 4)}, tmp_path / "both.safetensors")
    assert "1 text encoder tensors left out" in convert(
        tmp_path / "both.safetensors", tmp_path / "out.safetensors", "comfyui"
    )
    with pytest.raises(ValueError, match="text encoders only"):
        to_comfy({key: torch.ones(2, 4)})


# which network it is


def test_names_and_sizes_tell_flux_from_sd3():
    def attention(width, block=0):
        return {
            f"transformer.transformer_blocks.{block}.attn.to_q.lora_A.weight": torch.ones(1, width),
            f"transformer.transformer_blocks.{block}.attn.to_q.lora_B.weight": torch.ones(width, 1),
        }

    assert "diffusion_model.double_blocks.18.img_attn.qkv.alpha" in to_comfy(attention(3072, 18))
    assert "diffusion_model.joint_blocks.23.x_block.attn.qkv.alpha" in to_comfy(attention(1536, 23))
    assert "diffusion_model.joint_blocks.37.x_block.attn.qkv.alpha" in to_comfy(attention(2432, 37))
    for state in (attention(3072, 19), comfy_hunyuan()):
        with pytest.raises(ValueError, match="of another model"):
            to_comfy(state)
    with pytest.raises(ValueError, match="say which it is"):
        to_comfy(attention(256))
    with_output = {
        **attention(3072),
        "transformer.proj_out.lora_A.weight": torch.ones(1, 3072),
        "transformer.proj_out.lora_B.weight": torch.ones(64, 1),
    }
    assert "diffusion_model.final_layer.linear.alpha" in to_comfy(with_output), "the size is that of the blocks"
    norm1 = "transformer.transformer_blocks.0.norm1.linear"
    nine = {f"{norm1}.lora_A.weight": torch.ones(1, 256), f"{norm1}.lora_B.weight": torch.ones(9 * 256, 1)}
    assert "diffusion_model.joint_blocks.0.x_block.attn.qkv.alpha" in to_comfy({**attention(256), **nine})
    assert "diffusion_model.joint_blocks.0.x_block.attn.qkv.alpha" in to_comfy(attention(256), network="sd3")
    assert "diffusion_model.double_blocks.0.img_attn.qkv.alpha" in to_comfy(attention(256), {NETWORK: "flux"})


def comfy_hunyuan():
    """HunyuanVideo has FLUX's names in ComfyUI, and one block more."""
    return {
        "diffusion_model.double_blocks.19.img_attn.proj.lora_up.weight": torch.ones(3072, 1),
        "diffusion_model.double_blocks.19.img_attn.proj.lora_down.weight": torch.ones(1, 3072),
    }


def test_the_only_name_that_both_worlds_share_is_told_by_its_prefix():
    for prefix, form in (("diffusion_model.", "comfyui"), ("transformer.", "diffusers")):
        state = {
            f"{prefix}context_embedder.lora_up.weight": torch.ones(4, 1),
            f"{prefix}context_embedder.lora_down.weight": torch.ones(1, 4),
        }
        assert form_of(state) == form


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda s: {**s, "diffusion_model.double_blocks.0.img_attn.qvk.lora_up.weight": torch.ones(1, 1)},
            "img_attn.qvk' is no layer of FLUX, SD3, .* as the rest",
        ),
        (
            lambda s: {"diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(1, 1)},
            "blocks.0.self_attn.q' is no layer of FLUX, SD3, .* as ComfyUI or diffusers",
        ),
        (
            lambda s: {"lora_unet_down_blocks_0.lora_up.weight": torch.ones(1, 1)},
            "lora_unet_down_blocks_0' is no layer",
        ),
        (lambda s: {**s, "diffusion_model.double_blocks.0.img_attn.qkv.dora_scale": torch.ones(1)}, "DoRA"),
        (
            lambda s: {"double_blocks.0.processor.qkv_lora1.up.weight": torch.ones(8, 1), **s},
            "img_attn.qkv' is no layer of FLUX, SD3, .* as the rest of this file .XLabs.",
        ),
        (
            lambda s: {
                "double_blocks.0.processor.qkv_lora1.up.weight": torch.ones(8, 1),
                "double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(1, 4),
            },
            "has 8 rows for q, k and v together",
        ),
        (
            lambda s: {"lora_transformer_blocks_0.lora_up.weight": torch.ones(1, 1)},
            "lora_transformer_blocks_0' is no layer of FLUX, SD3, .* as OneTrainer names them",
        ),
        (
            lambda s: {k: t for k, t in s.items() if "lora_up" not in k},
            "no up weight for the layer 'double_blocks.0.img_attn.qkv'",
        ),
        (
            lambda s: {k: t[:-1] if "lora_up" in k else t for k, t in s.items()},
            "img_attn.qkv' is for a layer of 8 to 23, which does not fit",
        ),
        (lambda s: {k: t[:, :-1] if "lora_up" in k else t for k, t in s.items()}, "do not fit together"),
        (lambda s: {k: t[:, 0] if "lora_up" in k else t for k, t in s.items()}, "do not fit together"),
        (
            lambda s: {
                **s,
                **{
                    k: t[:-1] if "lora_up" in k else t
                    for k, t in comfy_state({"double_blocks.0.txt_mlp.0": 1}, 1.0).items()
                },
            },
            "8 to 31.*damaged",
        ),
        (
            lambda s: {
                **s,
                **{
                    k: t[:24] if "lora_up" in k else t
                    for k, t in comfy_state({"single_blocks.0.linear1": 1}, 1.0).items()
                },
            },
            "8 to 24.*its 4 parts",
        ),
        (lambda s: {**s, **comfy_state({"joint_blocks.0.x_block.mlp.fc1": 1}, 1.0)}, "mixed"),
        (lambda s: {}, "holds no LoRA"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_sentence(change, words):
    state = change(comfy_state({"double_blocks.0.img_attn.qkv": 2}, 1.0))
    for translate in (to_comfy, to_diffusers):
        with pytest.raises(ValueError, match=words):
            translate(state)


def test_a_part_that_does_not_fit_its_neighbours_is_refused():
    state = to_diffusers(comfy_state({"single_blocks.0.linear1": 2}, 1.0))
    for key, tensor in (("to_k.lora_A", torch.ones(2, WIDTH + 1)), ("to_k.lora_B", torch.ones(WIDTH - 1, 2))):
        with pytest.raises(ValueError, match="attn.to_k' is for a layer of"):
            to_comfy({**state, f"transformer.single_transformer_blocks.0.attn.{key}.weight": tensor})


# files


def test_files_keep_their_metadata(tmp_path):
    state = comfy_state({"double_blocks.0.img_attn.qkv": 2, "single_blocks.0.linear1": 3}, 1.0)
    write(tmp_path / "a.safetensors", state, "diffusers", {"treerpo.run": "mine"})
    there, header = read(tmp_path / "a.safetensors")
    assert header["treerpo.run"] == "mine" and header["treerpo.network"] == "flux" and header["format"] == "pt"
    config = json.loads(header[ADAPTER_METADATA])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 3
    assert (
        config["transformer.rank_pattern"]
        == config["transformer.alpha_pattern"]
        == {f"^transformer_blocks.0.attn.to_{x}": 2 for x in "qkv"}
    )
    write(tmp_path / "b.safetensors", there, "comfyui", header)
    back, header = read(tmp_path / "b.safetensors")
    same(back, state)
    assert header["treerpo.run"] == "mine" and ADAPTER_METADATA not in header
    with pytest.raises(ValueError, match="choose one of comfyui, diffusers"):
        write(tmp_path / "c.safetensors", state, "kohya")


@pytest.mark.parametrize(
    "pattern, words",
    [(r"(\w+\.?)+!", "longer than 2 s"), ("(", "no expression that can be used"), ("(" * 9999, "can be used")],
)
def test_an_expression_in_a_file_cannot_stop_everything(monkeypatch, pattern, words):
    monkeypatch.setattr(patterns, "SECONDS", 2.0)
    with pytest.raises(ValueError, match=words):
        peft_alpha({"alpha_pattern": {pattern: 2.0}}, "single_transformer_blocks.10.attn.to_q" * 2, 4)
    assert peft_alpha({"alpha_pattern": {r"single_.*\.to_(q|k)": 2.0}}, "single_blocks.1.to_q", 4) == 2


@pytest.mark.parametrize(
    "metadata",
    [
        "[" * 100000,
        "[1]",
        '{"transformer.alpha_pattern": [1]}',
        '{"transformer.alpha_pattern": {"to_q": "much"}}',
        '{"transformer.lora_alpha": {}}',
    ],
)
def test_metadata_that_is_none_gets_a_sentence(metadata):
    with pytest.raises(ValueError, match="lora_adapter_metadata cannot be read .*strength is not known"):
        peft_config({ADAPTER_METADATA: metadata})


def test_convert_says_what_it_did_and_replaces_nothing(tmp_path):
    state = comfy_state({"joint_blocks.0.x_block.attn.qkv": 2, "context_embedder": 2}, 1.0)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(state, source)
    assert (
        convert(source, target, "diffusers")
        == f"in.safetensors (comfyui, 2 layers) -> {target} (diffusers, 4 layers, rank 2)"
    )
    before = target.read_bytes()
    with pytest.raises(ValueError, match="exists: choose another name"):
        convert(source, target, "diffusers")
    assert target.read_bytes() == before
    convert(target, tmp_path / "back.safetensors", "comfyui")  # the header remembers which network it is
    same(load_file(tmp_path / "back.safetensors"), state)
    (tmp_path / "half.safetensors").write_bytes(before[: len(before) // 2])
    for path, words in (
        (tmp_path / "half.safetensors", "no whole safetensors file"),
        (tmp_path / "none.safetensors", "There is no file"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(path, tmp_path / "new.safetensors", "diffusers")
    with pytest.raises(ValueError, match="must end in"):
        convert(source, tmp_path / "new.pt", "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back.safetensors",
        "half.safetensors",
        "in.safetensors",
        "out.safetensors",
    ]


# against ComfyUI's own tables


TABLES = {  # network: ComfyUI's function, its configuration, hidden size
    "flux": ("flux_to_diffusers", {"depth": 3, "depth_single_blocks": 3, "hidden_size": 64}),
    "flux2": ("flux_to_diffusers", {"depth": 3, "depth_single_blocks": 3, "hidden_size": 64}),
    "chroma": ("flux_to_diffusers", {"depth": 3, "depth_single_blocks": 3, "hidden_size": 64}),
    "sd3": ("mmdit_to_diffusers", {"depth": 3}),
    "z-image": ("z_image_to_diffusers", {"n_layers": 3, "n_refiner_layers": 3, "dim": 64}),
    "auraflow": ("auraflow_to_diffusers", {"n_double_layers": 3, "n_layers": 6}),
    "krea2": ("krea2_to_diffusers", {"layers": 3}),
}
UNKNOWN = {  # layers that ComfyUI's tables leave out: its loader reads them under its own names only
    "flux2": ("time_in.", "guidance_in.", "double_stream_modulation", "single_stream_modulation"),
    "chroma": ("distilled_guidance_layer.",),
    "krea2": ("prenorm", "postnorm", "norm", "txtmlp.0", "last.norm"),
    "z-image": ("context_refiner.0.adaLN", "context_refiner.1.adaLN", "context_refiner.2.adaLN"),
}


@pytest.mark.parametrize("network", TABLES)
def test_the_names_are_those_of_comfyuis_own_table(comfy, network):
    import comfy.utils

    function, config = TABLES[network]
    if not hasattr(comfy.utils, function):
        pytest.skip(f"this ComfyUI has no {function}")
    theirs, compared = getattr(comfy.utils, function)(config), 0
    numbered = (module.replace("#", str(i)) for module in NETWORKS[network].layers for i in range(3))
    width = 64 * (3 if network == "sd3" else 1)
    for module in dict.fromkeys(numbered):
        names = parts_of(module, network)
        for place, name in enumerate(names):
            assert comfy_name(name, network) == (module, place)
            if f"{name}.weight" not in theirs and any(part in module for part in UNKNOWN.get(network, ())):
                continue
            if "txtfusion" in module and f"{name}.weight" not in theirs and ".2." in module:
                continue  # two of them in ComfyUI
            entry, compared = theirs[f"{name}.weight"], compared + 1
            target, rows_, *swap = (entry, None) if isinstance(entry, str) else entry
            assert target.removesuffix(".weight").removesuffix(".scale") == module  # norms: by ComfyUI version
            size = 4 * width if place == 3 else width
            assert rows_ == (None if len(names) == 1 else (0, place * width, size))
            assert bool(swap) == is_swapped(module, network, 2 * width, width) or ".context_block." in module
            if swap:
                tensor = torch.arange(2.0 * width)[:, None]
                assert torch.equal(swap[0](tensor), swap_halves(tensor))
    assert compared > 20


# the same velocity in both worlds

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
VARIANTS = ["flux", "sd3", "sd3.5", "sd3.5 medium"]
TARGETS = ["all linear", "attention", "attention+mlp"]


def medium() -> dict[str, torch.Tensor]:
    """The tiny SD3.5 with a second attention in its first block, as 3.5-medium has."""
    sd, generator, h = tiny.sd3(qk_norm=True), torch.Generator().manual_seed(4), 128
    block = "joint_blocks.0.x_block"
    for name, height, gain in (("attn2.qkv", 3 * h, 1.0), ("attn2.proj", h, 1.0), ("adaLN_modulation.1", 9 * h, 0.5)):
        sd[f"{block}.{name}.weight"] = torch.randn(height, h, generator=generator) * gain / h**0.5
        sd[f"{block}.{name}.bias"] = torch.zeros(height)
    return {**sd, f"{block}.attn2.ln_q.weight": torch.ones(64), f"{block}.attn2.ln_k.weight": torch.ones(64)}


def weights(name: str) -> dict[str, torch.Tensor]:
    """float32: the pack's embedded FLUX and SD3, and random SD3.5s."""
    if name in ("flux", "sd3"):
        return {key: tensor.float() for key, tensor in load_file(EMBEDDED / f"{name}.safetensors").items()}
    return medium() if name == "sd3.5 medium" else tiny.sd3(qk_norm=True)


def skip_where_too_old(model: str) -> None:
    from comfyui_version import __version__

    if model == "flux" and tuple(int(part) for part in __version__.split(".")[:2]) < (0, 9):
        pytest.skip("this ComfyUI takes FLUX sizes as fixed: tiny FLUX files need 0.9 or newer")


class Both:
    """One model in ComfyUI and in a diffusers pipeline, and the same question to both."""

    def __init__(self, name: str):
        import comfy.sd
        import diffusers

        skip_where_too_old(name)

        from core.hosts.diffusers import load_transformer

        sd = weights(name)
        self.flux = name == "flux"
        self.width = sd["txt_in.weight" if self.flux else "context_embedder.weight"].shape[1]
        self.pooled = sd["vector_in.in_layer.weight" if self.flux else "y_embedder.mlp.0.weight"].shape[1]
        with torch.inference_mode():
            self.model = comfy.sd.load_diffusion_model_state_dict({key: tensor.clone() for key, tensor in sd.items()})
        self.transformer = load_transformer(sd)
        pipeline, encoders = (
            (diffusers.FluxPipeline, ("", "_2"))
            if self.flux
            else (diffusers.StableDiffusion3Pipeline, ("", "_2", "_3"))
        )
        absent = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in encoders}
        self.pipeline = pipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, transformer=self.transformer, **absent
        )

    def question(self):
        generator = torch.Generator().manual_seed(3)
        return (
            tiny.latents(2),
            torch.tensor([0.9, 0.4]),
            torch.randn(2, 7, self.width, generator=generator),
            torch.randn(2, self.pooled, generator=generator),
        )

    def comfy(self, lora: dict[str, torch.Tensor] | None = None, loader: str = "load_lora_for_models") -> torch.Tensor:
        """The velocity with a LoRA through ComfyUI's own loader."""
        import comfy.model_management
        import comfy.sd

        x, sigma, embeds, pooled = self.question()
        with torch.inference_mode():
            model = self.model if lora is None else getattr(comfy.sd, loader)(self.model, None, lora, 1.0, 0.0)[0]
            comfy.model_management.load_models_gpu([model])
            network = model.model.diffusion_model
            v = (
                network(x, sigma, embeds, pooled, torch.tensor([3.5]))
                if self.flux
                else network(x, sigma * 1000, context=embeds, y=pooled)
            )
            model.detach()
        return v.float().clone()

    def diffusers(self) -> torch.Tensor:
        from core.hosts.diffusers import DiffusersVelocity

        x, sigma, embeds, pooled = self.question()
        with torch.no_grad():
            return DiffusersVelocity(self.transformer, None, embeds, pooled)(x, sigma, [0, 1])


def randomised(adapters: Adapters) -> Adapters:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for lora in adapters.loras.values():
            lora.up.copy_(0.05 * torch.randn(lora.up.shape, generator=generator))
    return adapters


@pytest.fixture
def every_key_loads(caplog):
    """ComfyUI and diffusers only log what they do not know."""
    with caplog.at_level(logging.WARNING):
        yield
    said = [record.getMessage() for record in caplog.records]
    assert not [
        text
        for text in said
        if "not loaded" in text.lower() or "unexpected" in text or "missing" in text or "ERROR" in text
    ], said


@pytest.fixture
def peft():
    pytest.importorskip("diffusers", reason="the other side of the interchange")
    return pytest.importorskip("peft", reason="diffusers loads LoRAs with it")


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_our_lora_is_the_same_in_diffusers(comfy, peft, tmp_path, every_key_loads, name, targets):
    """Rank 4, alpha 8: through load_lora_weights the velocity is that of ComfyUI's loader, which reads the diffusers
    form as well.
    """
    both = Both(name)
    base = both.comfy()
    torch.testing.assert_close(both.diffusers(), base, rtol=1e-4, atol=1e-4)
    state = randomised(Adapters.create(both.model.model.diffusion_model, 4, 8.0, targets)).state_dict()
    expected = both.comfy(state)
    assert (expected - base).abs().max() > 1e-2
    written = write(tmp_path / "lora.safetensors", state, "diffusers")
    touched = {key for key in written if "norm_out" in key or "norm1_context" in key}
    assert bool(touched) == (targets == "all linear")
    both.pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    torch.testing.assert_close(both.diffusers(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.comfy(load_file(tmp_path / "lora.safetensors")), expected, rtol=1e-4, atol=1e-4)
    # in ComfyUI's form only: 0.33 leaves most of the diffusers form out here
    if hasattr(comfy.sd, "load_bypass_lora_for_models"):
        torch.testing.assert_close(both.comfy(state, "load_bypass_lora_for_models"), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.comfy(), base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("header", [True, False], ids=["with metadata", "without"])
def test_several_ranks_load_right(comfy, peft, tmp_path, every_key_loads, name, header):
    both = Both(name)
    adapters = Adapters.create(both.model.model.diffusion_model, 4, 4.0, "all linear")
    for i, (module, lora) in enumerate(adapters.loras.items()):
        generator = torch.Generator().manual_seed(i)
        rank = 1 + i % 4
        lora.up.data = 0.05 * torch.randn(len(lora.up), rank, generator=generator)
        lora.down.data, lora.alpha = lora.down.data[:rank].clone(), 3.0
    state = adapters.state_dict()
    written = write(tmp_path / "lora.safetensors", state, "diffusers")
    both.pipeline.load_lora_weights(tmp_path / "lora.safetensors" if header else written)
    expected = both.comfy(state)
    torch.testing.assert_close(both.diffusers(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        both.comfy(to_comfy(written, network="flux" if both.flux else "sd3")), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_peft_lora_is_the_same_in_comfyui(comfy, peft, tmp_path, every_key_loads, name, rslora):
    """Made by PEFT with patterns of ranks and alphas, saved by the pipeline's own save_lora_weights."""
    both = Both(name)
    base = both.diffusers()
    suffixes = (
        "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out net.0.proj net.2 norm1.linear "
        "norm1_context.linear norm.linear proj_mlp proj_out norm_out.linear context_embedder"
    ).split()
    torch.manual_seed(8)
    both.transformer.add_adapter(
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=suffixes,
            rank_pattern={"to_k": 2, "norm_out.linear": 3},
            alpha_pattern={"to_v": 1.5, "^proj_out": 2.5},
            use_rslora=rslora,
            init_lora_weights=False,
        )
    )
    with torch.no_grad():
        for key, parameter in both.transformer.named_parameters():
            if "lora_" in key:
                parameter.mul_(0.5)
    expected = both.diffusers()
    assert (expected - base).abs().max() > 1e-2
    both.pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(both.transformer),
        transformer_lora_adapter_metadata=both.transformer.peft_config["default"].to_dict(),
    )
    line = convert(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "comfy.safetensors", "comfyui")
    assert "(diffusers," in line
    torch.testing.assert_close(both.comfy(load_file(tmp_path / "comfy.safetensors")), expected, rtol=1e-4, atol=1e-4)
    as_it_is = both.comfy(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert (as_it_is - expected).abs().max() > 1e-2, (
        "ComfyUI reads no adapter metadata: the conversion is what makes the strength right"
    )


# the node


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_save_tree_lora_writes_either_form(pack, tmp_path, model):
    skip_where_too_old(model)
    graph = Graph(pack, tmp_path, model)
    graph.forget()
    policy = graph.policy(targets="all linear")
    randomised(policy.run.adapters)
    plain, peft_form = (
        graph.call("SaveLora", policy=policy, lora_name=name, **more)[0]
        for name, more in (("plain", {}), ("peft", {"format": "diffusers (PEFT)"}))
    )
    assert form_of(load_file(plain)) == "comfyui" and form_of(load_file(peft_form)) == "diffusers"
    same(load_file(plain), policy.run.adapters.state_dict())
    close(deltas(to_comfy(*read(peft_form))), deltas(load_file(plain)))
    with safe_open(peft_form, "pt") as file:
        assert file.metadata()["treerpo.run"] == "test" and ADAPTER_METADATA in file.metadata()
    graph.call("SaveLora", policy=policy, lora_name="peft", format="diffusers (PEFT)")  # our own may be replaced
    other = graph.call("SaveLora", policy=graph.policy(run_name="other"), lora_name="peft", format="diffusers (PEFT)")
    assert other[0].endswith("peft_2.safetensors")
