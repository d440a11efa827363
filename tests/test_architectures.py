"""core/hosts/architectures.py against ComfyUI's own networks: what a row names is there and is that."""

import json
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


TEMPLATES = {  # of those that ComfyUI ships: family, the model file's name
    "flux_dev_full_text_to_image": ("FLUX.1-dev", "flux1-dev"),
    "flux_kontext_dev_basic": ("FLUX.1 Kontext", "flux1-dev-kontext_fp8_scaled"),
    "flux_fill_inpaint_example": ("FLUX.1 Fill", "flux1-fill-dev"),
    "flux_schnell": ("FLUX.1-schnell", "flux1-schnell-fp8"),
    "image_ovis_text_to_image": ("Ovis-Image", ""),
    "image_longcat_text_to_image": ("LongCat-Image", ""),
    "image_flux2_klein_image_edit_9b_base": ("FLUX.2 klein", "flux-2-klein-base-9b-fp8"),
    "image_flux2_klein_image_edit_9b_distilled": ("FLUX.2 klein", "flux-2-klein-9b-fp8"),
    "image_z_image": ("Z-Image", "z_image_bf16"),
    "image_z_image_turbo": ("Z-Image", "z_image_turbo_bf16"),
    "image_netayume_lumina_t2i": ("Lumina 2", ""),
    "image_qwen_image": ("Qwen-Image", ""),
    "image_krea2_turbo_t2i": ("Krea 2", "krea2_turbo"),
    "image_anima_base_v1": ("Anima", ""),
    "image_chroma_text_to_image": ("Chroma", ""),
    "image_chroma1_radiance_text_to_image": ("Chroma Radiance", ""),
    "image_pixeldit_t2i": ("PixelDiT", ""),
    "hidream_i1_full": ("HiDream-I1", "hidream_i1_full_fp8"),
    "hidream_i1_fast": ("HiDream-I1", "hidream_i1_fast_fp8"),
    "image_omnigen2_t2i": ("OmniGen 2", ""),
    "image_boogu_image_0_1_edit": ("Boogu", ""),
    "image_boogu_image_0_1_turbo_t2i": ("Boogu", "boogu_turbo"),
    "image_ernie_image": ("ERNIE-Image", ""),
    "image_ernie_image_turbo": ("ERNIE-Image", "ernie_turbo"),
    "image_mage_flow_t2i_int8": ("MageFlow", ""),
    "image_mage_flow_turbo_t2i_int8": ("MageFlow", "mage_flow_turbo"),
    "image_joyai_image_edit": ("JoyImage", ""),
    "image_lens_t2i": ("Lens", ""),
    "image_lens_turbo_t2i": ("Lens", "lens_turbo"),
    "text_to_video_wan": ("Wan, one frame", ""),
}
GUIDED = {"KSampler": 3, "CFGGuider": 0, "DualCFGGuider": 0, "SamplerCustom": 3}  # which of a node's widgets is its cfg
STEPS = {"KSampler": 2, "BasicScheduler": 1, "BetaSamplingScheduler": 0, "Flux2Scheduler": 0}


@pytest.mark.parametrize("template", TEMPLATES)
def test_cfg_and_steps_are_those_of_the_templates_that_comfyui_ships(template):
    package = pytest.importorskip("comfyui_workflow_templates_json")
    file = Path(package.__file__).parent / "templates" / f"{template}.json"
    if not file.is_file():
        pytest.skip("this ComfyUI has another set of templates")
    graph = json.loads(file.read_text("utf-8"))
    nodes = [
        *graph["nodes"],
        *(node for part in graph.get("definitions", {}).get("subgraphs", []) for node in part["nodes"]),
    ]
    cfg, steps = (
        {node["widgets_values"][kinds[node["type"]]] for node in nodes if node["type"] in kinds}
        | {node["widgets_values"][0] for node in nodes if node["type"] in ("PrimitiveFloat", "PrimitiveInt")}
        for kinds in (GUIDED, STEPS)
    )
    name, model = TEMPLATES[template]
    family = families.named(name)
    row = next(row for row in ARCHITECTURES if row.name == (family.row or name))
    drawn = row.habit(Path(f"{model}.safetensors"))
    assert drawn[0] in cfg and drawn[1] in steps, (drawn, cfg, steps)


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
