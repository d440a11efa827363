"""benchmarks/peers.py without the peers' code: the embedded SD3 as diffusers' pipeline, the meter, what is missing."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from conftest import ROOT

from embedded import shapes

pytest.importorskip("diffusers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def peers():
    """The benchmark's modules, importable as from its own folder."""
    sys.path.append(str(ROOT / "benchmarks"))
    import peer_code
    import peer_world

    yield peer_world, peer_code
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def world(peers):
    """Two captions with made-up features, for the text encoder takes longer than all of these tests."""
    draw = torch.Generator().manual_seed(0)
    texts = shapes.captions()[:2]
    made_up = {text: (torch.randn(12, 768, generator=draw), torch.randn(768, generator=draw)) for text in texts}
    world = peers[0].World(made_up)
    world.unit = 2.0
    return world


def test_the_pipeline_of_diffusers_draws_what_our_velocity_draws(peers, world):
    """Their pipeline's code and ours on the same noise: network, scheduler, text features and VAE are all the same."""
    module, _ = peers
    transformer, texts = world.fresh(), sorted(world.features)
    pipeline = module.EmbeddedPipeline.of(world, transformer)
    pipeline.set_progress_bar_config()
    noise = torch.randn(2, *module.SHAPE, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        prompt=texts,
        height=module.SIDE,
        width=module.SIDE,
        num_inference_steps=module.STEPS,
        guidance_scale=1.0,
        latents=noise.clone(),
        output_type="pt",
    ).images
    velocity, x, sigmas = world.velocity(transformer, texts), noise, world.sigmas.tolist()
    for s, n in zip(sigmas, sigmas[1:]):
        x = x + (n - s) * velocity(x, s, [0, 1])
    assert (world.decode(x).movedim(-1, 1) - theirs).abs().max() < 1e-6
    assert theirs.std() > 0.1


def test_a_fresh_lora_changes_nothing_and_trains_the_layers_that_ours_does(peers, world):
    module, _ = peers
    transformer, x = world.fresh(), torch.ones(1, *module.SHAPE)
    layers = set(module.lora_layers(transformer))
    before = world.velocity(transformer, sorted(world.features)[:1])(x, 0.5, [0])
    module.add_lora(transformer)
    assert torch.equal(world.velocity(transformer, sorted(world.features)[:1])(x, 0.5, [0]), before)
    trained = {name.partition(".lora_")[0] for name, p in transformer.named_parameters() if p.requires_grad}
    assert trained == layers and len(layers) > 40


def test_the_meter_counts_a_run_and_stops_it(peers, world):
    """Two iterations of a plain loop: 3 forwards and 1 back-propagated each, and the evaluations not counted."""
    module, _ = peers
    transformer = world.fresh()
    module.add_lora(transformer)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    velocity, x = world.velocity(transformer, sorted(world.features)[:1]), torch.ones(3, *module.SHAPE)
    looked = []
    world.evaluate, evaluate = (
        lambda network: looked.append(velocity(x, 0.9, [0] * 3)) or {"reward": 0.5},
        world.evaluate,
    )
    meter = module.Meter(world, transformer, budget=2 * (3 + world.unit) - 0.1, limit=1e9, marks=2)
    with meter, pytest.raises(module.Done):
        for _ in range(5):
            meter.check()
            velocity(x, 0.9, [0] * 3)
            meter.score(torch.zeros(2, 64, 64, 3), sorted(world.features))
            with velocity.grad():
                velocity(x[:1], 0.9, [0]).square().mean().backward()
            optimizer.step()
    world.evaluate = evaluate
    found = meter.result()
    assert found["forwards"] == [0, 4, 8] and found["backwards"] == [0, 1, 2]
    assert found["images"] == [0, 2, 4] and found["updates"] == [0, 1, 2] and len(looked) == 3
    assert found["cost"][-1] == pytest.approx(2 * (3 + world.unit))


def test_code_is_importable_inside_only_and_its_stubs_are_gone_after(peers, tmp_path):
    _, module = peers
    (tmp_path / "scripts").mkdir()
    (tmp_path / "flow_grpo").mkdir()
    (tmp_path / "flow_grpo" / "__init__.py").write_text("import wandb\nhere = __file__\n")
    (tmp_path / "scripts" / "train_sd3.py").write_text("import flow_grpo\nfrom absl import flags\n")
    with module.loaded("flow_grpo", tmp_path) as script:
        assert isinstance(script, ModuleType) and script.flow_grpo.here.startswith(str(tmp_path))
    assert not {"flow_grpo", "scripts.train_sd3", "wandb", "absl"} & set(sys.modules)
    with pytest.raises(ValueError, match=r"There is no train\.py in .*: give the folder of the peer's code"):
        with module.loaded("treegrpo", tmp_path):
            pass


def test_what_was_not_given_is_said_in_one_sentence():
    code = "import peers, sys; sys.argv = ['peers', '--nft', '.']; print(list(peers.given(peers.arguments())))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == "Left out, for want of the folder of their code: --treegrpo, --flow-grpo."
    assert second == "['nft']"
