"""What ComfyPolicy estimates of memory, against what networks of true width allocate: tensors with shapes and without
numbers, every allocation counted (benchmarks/allocations.py).
"""

import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def allocations(comfy):
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    import allocations

    return allocations


FLUX = dict(depth=1, depth_single_blocks=2)  # of 19 and 38, of true width


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_estimate_is_what_flux_allocates(allocations, dtype, checkpointing):
    found = allocations.measure("flux", dtype=dtype, checkpointing=checkpointing, batch=2, **FLUX)
    for phase, estimated in found["estimated"].items():
        # of three blocks, ends and modulations are a large part; of fp8's casts the double block's count in full
        assert 0.8 * found["counted"][phase] <= estimated <= 1.6 * found["counted"][phase], (phase, found)


def test_fp8_without_checkpointing_keeps_a_copy_of_the_weights(allocations):
    plain, fp8 = (allocations.measure("flux", dtype=dtype, checkpointing=False, **FLUX) for dtype in ("bf16", "fp8"))
    extra = {name: fp8[name]["graph"] - plain[name]["graph"] for name in plain}
    assert extra["counted"] > 5e8 and extra["estimated"] == pytest.approx(extra["counted"], rel=0.2)


def test_activations_grow_with_latents_and_texts(allocations):
    def learning(**more):
        return allocations.measure("flux", **FLUX, **more)["estimated"]["learning"]

    one = learning(size=256, tokens=256)  # as many tokens of text as of the image
    assert learning(size=256, tokens=512) == pytest.approx(1.5 * one)
    assert learning(size=256, tokens=256, batch=3) == pytest.approx(3 * one)
