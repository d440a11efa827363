"""core/hosts/architectures.py against ComfyUI's own networks: what a row names is there and is that."""

import re
from pathlib import Path

import families
import pytest
import tiny
import torch
from families import FAMILIES

from core.hosts.architectures import ARCHITECTURES, Architecture, architecture_of

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, comfy):
    return families.load(family)


def test_every_family_has_its_row(family, model):
    assert architecture_of(model).name == (family.row or family.name)


def test_every_row_has_a_family():
    told = {family.row or family.name for family in FAMILIES}
    assert {row.name for row in ARCHITECTURES} == told


def test_the_texts_go_where_the_row_says(family, model):
    row, layers = architecture_of(model), dict(model.model.diffusion_model.named_modules())
    if row.text:
        assert layers[row.text].in_features == family.context
    if family.pooled and row.pooled:
        assert layers[row.pooled].in_features == family.pooled


def test_a_text_of_another_width_is_refused_before_anything_is_loaded(family, model):
    from core.hosts.comfy import ComfyPolicy
    from core.hosts.comfy_host import empty_latent

    if not architecture_of(model).text or architecture_of(model).untrainable:
        pytest.skip("the network itself says so")
    [[context, options]] = families.conditioning(family)
    shape = empty_latent(model, 64)["samples"].shape[1:]
    with pytest.raises(ValueError, match=f"{family.context + 3} wide, but the model needs {family.context}: encode"):
        with ComfyPolicy.create(model, 1, 1.0, "attention").session(
            [[torch.nn.functional.pad(context, (0, 3)), options]], shape=shape
        ):
            raise AssertionError("the session must not start")


def test_the_presets_choose_what_they_say(model):
    """In every block of every stack, and nothing that modulates or embeds, which learns badly."""
    from core.hosts.comfy import ComfyPolicy

    attention, both, every = (
        set(ComfyPolicy.layers(model, target)) for target in ("attention", "attention+mlp", "all linear")
    )
    network, row = model.model.diffusion_model, architecture_of(model)
    linear = {name for name, layer in network.named_modules() if hasattr(layer, "in_features")}
    left_out = {name for name in linear if row.left_out and re.search(row.left_out, name)}
    assert attention < both < every == linear - left_out and bool(left_out) == bool(row.left_out)
    assert not [name for name in both if re.search(r"mod(ulation)?[CX.]|adaln|embed(?!der\.blocks)|norm", name.lower())]
    for stack, blocks in network.named_children():
        for number in range(len(blocks)) if isinstance(blocks, torch.nn.ModuleList) and stack in STACKS else ():
            inside = {name for name in linear if name.startswith(f"{stack}.{number}.")}
            assert inside & attention and (inside & (both - attention) or "single_blocks" in stack), (stack, number)


STACKS = (
    "blocks double_blocks single_blocks joint_blocks layers double_layers single_layers transformer_blocks "
    "noise_refiner double_stream_blocks single_stream_blocks double_stream_layers single_stream_layers "
    "visual_transformer_blocks patch_blocks pixel_blocks"
).split()


def test_a_model_without_a_row_gets_what_is_usual():
    row = architecture_of(tiny.not_flow())
    assert row.name == "BaseModel" and row.presets()["attention"] and row.habit() == (4.0, 20)


def test_what_a_files_name_tells():
    row = Architecture("any", "Any", distilled="turbo", few=4, cfg=5.0, steps=30)
    assert row.habit() == row.habit(Path("base.safetensors")) == row.habit(Path("turbo/base.safetensors")) == (5.0, 30)
    assert row.habit(Path("base_Turbo.safetensors")) == (1.0, 4)


def test_noise_of_another_scale_is_refused():
    """The steps of a tree are for noise N(0, 1): another scale would silently train something else."""
    from core.hosts.comfy import ComfyPolicy

    model = families.load(families.named("Z-Image"))
    sampling = model.get_model_object("model_sampling")
    if not hasattr(sampling, "set_noise_scale"):
        pytest.skip("this ComfyUI knows no other scale")
    ComfyPolicy.create(model, 1, 1.0, "attention")
    sampling.set_noise_scale(8.0)
    with pytest.raises(ValueError, match="drawn from noise of scale 8, and only such of scale 1 can be trained"):
        ComfyPolicy.create(model, 1, 1.0, "attention")
