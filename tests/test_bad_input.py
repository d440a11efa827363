"""Bad input gets one clear sentence in the user's words, and loses nothing: no run, no file, no other node's model."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graph import Graph

from core.files import HERE


@pytest.fixture
def graph(pack, tmp_path):
    built = Graph(pack, tmp_path, "sd3")
    built.forget()
    return built


def refused(message, call, *args, **kwargs):
    with pytest.raises(ValueError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_names(graph):
    for bad in ("", "..", "a/b", "a\\b", "a:b"):
        refused("cannot be a run name", graph.policy, run_name=bad)
    policy = graph.policy()
    for bad in ("", "../evil", "C:\\evil", "a/b"):
        refused("cannot be a LoRA name", graph.call, "SaveLora", policy=policy, lora_name=bad)
    assert not list(graph.folder.rglob("*evil*"))


@pytest.mark.parametrize(
    "bad, why",
    [
        ("x" * 300, "300 bytes"),
        ("é" * 150, "300 bytes"),
        ("a\0b", "cannot be seen"),
        ("a\tb", "cannot be seen"),
        ("a\nb", "cannot be seen"),
        ("gpj.\u202eexe", "cannot be seen"),
        ("a\u200bb", "cannot be seen"),
        ("a\u2066b", "cannot be seen"),
        ("a\ufeffb", "cannot be seen"),
        ("a\u3164b", "cannot be seen"),
        ("a\ud800b", "cannot be seen"),
        ("CON", "device on Windows"),
        ("nul.txt", "device on Windows"),
        ("Com1 .x", "device on Windows"),
        ("lpt²", "device on Windows"),
        ("run.", "a dot"),
        (".run", "a dot"),
    ],
)
def test_names_that_some_system_cannot_have_or_nobody_can_see(graph, bad, why):
    refused(f"cannot be a run name: .*{why}", graph.policy, run_name=bad)
    refused(f"cannot be a LoRA name: .*{why}", graph.call, "SaveLora", policy=graph.policy(), lora_name=bad)


@pytest.mark.parametrize("good", ["my first run", "größer 2.0", "猫\u3000一", "🦊 run", "console", "com10", "x" * 200])
def test_names_that_every_system_can_have(pack, good):
    assert pack.nodes.schema.plain_name(f" {good} ", "run") == good


def test_a_folder_with_a_name_of_another_kind_does_not_break_the_nodes(graph, pack):
    graph.iteration(graph.policy())
    runs = graph.folder / "output/treerpo"
    (runs / "test").rename(runs / "old.")
    assert pack.nodes.runs.known_runs() == [] and pack.nodes.runs.known_checkpoints() == []


def test_what_never_was_is_not_said_to_be_gone(graph):
    refused("^There is no run 'never': choose", graph.policy, resume="never")
    refused("^There is no checkpoint 'never @ 3': choose", graph.policy, begin_from="never @ 3")
    for file in ("rewards/never.pt", "rewards/a\0b.pt", "rewards/" + "x" * 300):
        refused("^There is no file models/rewards/.*: choose", graph.call, "ImageReward", file=file)


def test_a_file_of_someone_else_is_not_replaced(graph):
    policy = graph.policy()
    (graph.folder / "loras").mkdir()
    precious = graph.folder / "loras/precious.safetensors"
    precious.write_bytes(b"somebody's work")
    assert saved_as(graph, policy, "precious") == "precious_2.safetensors"
    assert precious.read_bytes() == b"somebody's work"
    assert saved_as(graph, policy, "mine") == saved_as(graph, policy, "mine") == "mine.safetensors"  # our own
    other = graph.policy(run_name="other")
    assert saved_as(graph, other, "mine") == saved_as(graph, other, "mine") == "mine_2.safetensors"


def saved_as(graph, policy, name) -> str:
    return Path(graph.call("SaveLora", policy=policy, lora_name=name)[0]).name


def test_a_run_begun_anew_under_an_old_name_does_not_replace_the_old_ones_lora(graph):
    old = graph.policy()
    graph.iteration(old)
    file = graph.folder / "loras" / saved_as(graph, old, "mine")
    before = file.read_bytes()
    old.run.folder.rename(graph.folder / "moved away")
    graph.forget()
    new = graph.policy()
    graph.iteration(new)
    assert saved_as(graph, new, "mine") == "mine_2.safetensors" and file.read_bytes() == before
    graph.forget()
    assert saved_as(graph, graph.policy(), "mine") == "mine_2.safetensors"


def test_a_run_trained_further_elsewhere_is_read_anew(graph):
    """Another process has gone on; queueing here goes on from there, and nothing of it is overwritten."""
    policy = graph.policy()
    graph.iteration(policy)
    here, runs = policy.run, graph.pack.nodes.runs
    graph.forget()
    for _ in range(2):
        graph.iteration(graph.policy())  # elsewhere
    runs._RUNS[here.folder] = here
    assert here.iteration == 1
    with pytest.raises(ValueError, match="trained on elsewhere, to iteration 3, while this one was at 1: queue again"):
        graph.iteration(policy)  # a graph that is under way
    graph.iteration(graph.policy())
    assert here.iteration == 4 and [row["iteration"] for row in here.metrics] == [0, 1, 2, 3]


def test_a_run_that_went_two_ways_is_refused_and_both_are_kept(graph):
    policy = graph.policy()
    graph.iteration(policy)
    here, runs = policy.run, graph.pack.nodes.runs
    shutil.copytree(here.folder, graph.folder / "copy")
    for _ in range(2):
        graph.iteration(policy)
    shutil.rmtree(here.folder)
    shutil.copytree(graph.folder / "copy", here.folder)
    graph.forget()
    graph.iteration(graph.policy(), update=dict(learning_rate=2e-3))  # the copy goes on another way
    graph.iteration(graph.policy(), text="a green cross on a gray background")
    runs._RUNS[here.folder] = here
    refused("gone two ways after iteration 1: this one is at iteration 3, its folder at 3", graph.policy)
    assert graph.policy(run_name="test (kept at 3)").run.metrics == here.metrics
    assert graph.policy().run.metrics != here.metrics and graph.policy().run.iteration == 3


def test_another_lora_under_the_policy_is_another_base_model(graph):
    """Other patches on the MODEL's weights are told, by name; the same ones again are the same run."""
    import comfy.sd

    def under(strength):
        with torch.inference_mode():
            graph.model = comfy.sd.load_lora_for_models(plain, None, dict(lora), strength, 0)[0]

    policy, plain = graph.policy(run_name="lora"), graph.model
    graph.iteration(policy)
    lora = policy.run.lora()
    under(1.0)
    graph.iteration(graph.policy())
    under(1.0)
    graph.forget()
    assert graph.policy().run.iteration == 1
    for change in (lambda: under(0.5), lambda: setattr(graph, "model", plain)):
        change()
        refused(
            r"begun with other settings \(model_patches '\d+ weights, \w+' -> '(\d+ weights, \w+|none)'", graph.policy
        )
        graph.forget()
        refused("begun with other settings", graph.policy)


def test_saving_says_what_merging_into_fp8_costs(graph):
    node, policy = graph.nodes["TreeRPOSaveLora"], graph.policy()
    assert "fp8" not in node.execute([policy], ["plain"]).ui["text"][0]
    policy.policy.model.model.diffusion_model.to(torch.float8_e4m3fn)
    assert "Load LoRA (Bypass)" in node.execute([policy], ["quantised"]).ui["text"][0]


def test_a_killed_save_leaves_nothing_for_ever(graph):
    loras = graph.folder / "loras"
    loras.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (loras / f".mine.safetensors.{HERE}-{gone.pid}.tmp").write_bytes(b"half")
    saved_as(graph, graph.policy(), "another")
    assert [path.name for path in loras.iterdir()] == ["another.safetensors"]


def test_a_lora_name_that_cannot_be_is_told_when_it_is_queued(graph):
    node = graph.nodes["TreeRPOSaveLora"]
    assert node.validate_inputs(lora_name=["fine"]) is True and node.validate_inputs(lora_name=[None]) is True
    assert "cannot be a LoRA name" in node.validate_inputs(lora_name=["a/b"])


def test_sampling(graph):
    policy = graph.policy()
    positive, _ = graph.prompts()
    refused("does not fit into 3 sampling steps", graph.sample, policy, positive, steps=3)
    refused("outside 0..2", graph.sample, policy, positive, shape=graph.shape(window="fixed", first_step=3))
    refused("batch of 2: set batch_size to 1", graph.sample, policy, positive, latent_image=graph.latent(batch=2))
    with torch.inference_mode():
        wrong = {"samples": torch.ones(1, 4, 8, 8)}
        half = graph.sigmas()[:-2]
    refused("4 channels, but this model needs 16", graph.sample, policy, positive, latent_image=wrong)
    refused("SIGMAS end at", graph.sample, policy, positive, sigmas=half)
    refused("cfg is 3.0, which needs a negative prompt", graph.sample, policy, positive, cfg=3.0)
    context, options = positive[0]
    refused(
        "no 'pooled_output'",
        graph.sample,
        policy,
        [[context, {k: v for k, v in options.items() if k != "pooled_output"}]],
    )
    refused("64 wide, but the model needs 768", graph.sample, policy, [[context[..., :64], options]])
    refused("2 entries", graph.sample, policy, positive + positive)
    refused("no prompt|connect a single prompt", graph.sample, policy, [])
    assert policy.run.iteration == 0


def test_prompts_and_settings(graph):
    refused("prompt list is empty", graph.prompts, " \n \n")
    refused("not a list of numbers", graph.noise, shape="list", list="0.5, lots")
    refused("goes up to 1", graph.noise, shape="linear", beta=3.0)
    refused("not a colour", graph.call, "Measure", measure="colour", direction="more", colour="reddish")
    refused("pattern is empty", graph.policy, targets="pattern")
    refused("matches no Linear layer", graph.policy, targets="pattern", pattern="nothing like this")
    refused("not a regular expression", graph.policy, targets="pattern", pattern="(")


def test_rewards(graph, monkeypatch):
    policy = graph.policy()
    positive, prompts = graph.prompts()
    tree, leaves = graph.sample(policy, positive)
    images = graph.decode(leaves)
    refused("cannot be shared out evenly", graph.score, images[:3], prompts)
    refused(
        "scored 4 images, but the tree has 8 leaves",
        graph.call,
        "Advantages",
        tree=tree,
        rewards=graph.score(images[:4], prompts),
    )
    nan = graph.score(images, prompts)
    nan.values["foreground size"][:] = float("nan")
    refused("is not a number for any of the 8 images", graph.call, "Advantages", tree=tree, rewards=nan)
    lonely, latent = graph.sample(policy, positive, shape=graph.shape(branching=1, depth=1))
    refused(
        "group of one leaf", graph.call, "Advantages", tree=lonely, rewards=graph.score(graph.decode(latent), prompts)
    )
    assert policy.run.iteration == 0 and not (graph.folder / "output/treerpo/test").exists()


def test_other_settings_do_not_touch_a_run(graph):
    policy = graph.policy()
    graph.iteration(policy)
    files = {p: p.read_bytes() for p in (graph.folder / "output/treerpo/test").iterdir()}
    for forget in (False, True):
        if forget:
            graph.forget()
        refused("begun with other settings .rank 4 -> 8.", graph.policy, rank=8)
    assert files == {p: p.read_bytes() for p in files} and graph.policy().run.iteration == 1


def test_damaged_checkpoints(graph):
    graph.iteration(graph.policy())
    state = graph.folder / "output/treerpo/test/state.pt"
    whole = state.read_bytes()
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(graph.folder / "evil happened"), "w"))

    for damaged in (whole[:1000], b"<html>not found</html>", pickle.dumps(Evil()), b""):
        state.write_bytes(damaged)
        graph.forget()
        refused("damaged or not one of TreeRPO's", graph.policy)
        assert state.read_bytes() == damaged
    assert not (graph.folder / "evil happened").exists()
    state.write_bytes(whole)
    graph.forget()
    assert graph.policy().run.iteration == 1


def test_a_full_disk_keeps_the_older_files_and_the_update(graph, monkeypatch):
    policy = graph.policy()
    graph.iteration(policy)
    folder = graph.folder / "output/treerpo/test"
    files = {p: p.read_bytes() for p in folder.iterdir()}
    import os

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match="Could not write state.pt .* No space left on device. The previous version is untouched."
    ):
        graph.iteration(policy)
    monkeypatch.undo()
    assert files == {p: p.read_bytes() for p in folder.iterdir()}  # and no temporary file is left
    assert graph.iteration(graph.policy())["iteration"] == 2


def test_models_that_are_not_flow_matching(graph):
    import comfy.model_sampling

    class EpsModel:
        class model:
            pass

        def get_model_object(self, name):
            return comfy.model_sampling.ModelSamplingDiscrete()

    EpsModel.cached_patcher_init = None
    refused(
        "is not a flow-matching model",
        graph.call,
        "Policy",
        model=EpsModel(),
        run_name="x",
        rank=4,
        alpha=4.0,
        targets="attention",
    )
