"""The Trainer node in real ComfyUI, in this process: it is the by-hand graph in a loop, and its runs survive."""

import json
import math

import pytest
import torch
from graph import timeless

from core.rewards.contract import Reward


def same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_trainer_is_the_by_hand_graph_in_a_loop(graph):
    policy = graph.policy("by hand")
    for _ in range(3):
        graph.iteration(policy)
    trained = graph.policy("trainer")
    graph.train(trained, 3)
    keys = (
        "reward",
        "reward_std",
        "rewards/foreground size/mean",
        "window_start",
        "forwards",
        "update_forwards",
        "loss",
        "grad_norm",
        "ratio_first",
    )
    for by_hand, row in zip(policy.run.metrics, trained.run.metrics, strict=True):
        assert [row[key] for key in keys] == pytest.approx([by_hand[key] for key in keys], rel=1e-5, abs=1e-7)
    for key, value in policy.run.adapters.state_dict().items():
        torch.testing.assert_close(trained.run.adapters.state_dict()[key], value, atol=1e-6, rtol=1e-5)


def test_outputs(flux):
    policy, lora, loss, history, picture, status = flux.train(flux.policy(), 2)
    assert [json.loads(line)["iteration"] for line in history.splitlines()] == [0, 1]
    assert len(loss["loss"]) == 2 and picture.shape[-1] == 3 and picture.std() > 0
    assert status == f"2 iterations done.\nNext: {flux.pack.nodes.live.COMPARE} Raise iterations to learn on."
    same(lora, policy.run.adapters.state_dict())
    again = flux.train(policy, 2)
    assert again[-1] == "2 iterations done.\nNext: Raise iterations to learn on." and len(again[3].splitlines()) == 2, (
        "a run that is done is not trained further"
    )
    *_, history, _, status = flux.train(policy, 3)
    assert len(history.splitlines()) == 3 and status.startswith("3 iterations done. This Run went on at iteration 3.")


def test_two_runs_with_one_seed_are_identical_apart_from_times(flux):
    rows = []
    for name in ("one", "two"):
        policy = flux.policy(name)
        flux.train(policy, 3, per_iteration=1, shuffle=True)
        rows.append(timeless(policy.run.metrics))
    assert rows[0] == rows[1]
    flux.train(third := flux.policy("three"), 3, per_iteration=1, shuffle=True, seed=2)
    assert timeless(third.run.metrics) != rows[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(save_every=2, ema=0.5),
        dict(inner_updates=2, evaluate_every=2, keep_every=2),
        dict(objective="DiffusionNFT", inner_updates=2, shaping="slas"),
        dict(replay=0.5, replay_pictures=3),
    ],
)
def test_stopped_and_resumed_equals_never_stopped(flux, settings):
    if "objective" in settings:
        settings = {**settings, "objective": flux.call("Objective", method=settings["objective"], kl=0.0)[0]}
    through = flux.policy("through")
    flux.train(through, 5, held_out=1 if "evaluate_every" in settings else 0, **settings)
    for until in (1, 2, 3, 5):
        if until != 3:  # once in the same session, else as after a restart
            flux.forget()
        flux.train(flux.policy("stopped"), until, held_out=1 if "evaluate_every" in settings else 0, **settings)
    flux.forget()
    stopped = flux.policy("stopped")
    assert timeless(stopped.run.metrics) == timeless(through.run.metrics)
    same(stopped.run.adapters.state_dict(), through.run.adapters.state_dict())
    lines = (stopped.run.folder / "metrics.jsonl").read_text().splitlines()
    assert timeless(map(json.loads, lines)) == timeless(through.run.metrics)


class StopHere(BaseException):
    pass


@pytest.mark.parametrize(
    "settings",
    [{}, dict(inner_updates=3), dict(evaluate_every=1, held_out=1)],
    ids=["plain", "inner updates", "evaluation"],
)
def test_an_interrupt_anywhere_leaves_the_policy_of_the_last_iteration(flux, monkeypatch, settings):
    """ComfyUI's stop button is asked between all pieces of work: stop at each of them once, go on, and end where an
    undisturbed run ends.
    """
    import comfy.model_management

    flux.train(through := flux.policy("through"), 2, **settings)
    asked = count = 0

    def stop():
        nonlocal count
        count += 1
        if count == asked:
            raise StopHere

    clean = flux.ksampler(flux.model, flux.prompts("a red circle on a white background")[0])
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    stopped = 0
    for asked in range(1, 200, 23):
        flux.forget()
        policy, count = flux.policy(f"stopped {asked}"), 0
        try:
            flux.train(policy, 2, **settings)
        except StopHere:
            stopped += 1
            done = policy.run.iteration
            assert (policy.run.folder / "state.pt").exists() == (done > 0)
            assert torch.equal(flux.ksampler(flux.model, flux.prompts("a red circle on a white background")[0]), clean)
            count = asked
            flux.train(policy, 2, **settings)
        else:
            break
        same(policy.run.adapters.state_dict(), through.run.adapters.state_dict())
        assert timeless(policy.run.metrics) == timeless(through.run.metrics)
    assert stopped > 2


@pytest.mark.parametrize("error", ["Stopped", "Ended by an error"])
def test_a_run_that_is_stopped_says_so_and_no_longer_how_much_is_left(flux, monkeypatch, error):
    import comfy.model_management

    kind = comfy.model_management.InterruptProcessingException if error == "Stopped" else OSError
    said, policy = [], flux.policy()

    class Ends(Reward):
        name, calls = "ends", 0

        def score(self, images, prompts):
            self.calls += 1
            if self.calls == 3:
                raise kind("now")
            return images.mean((1, 2, 3))

    monkeypatch.setattr(flux.pack.nodes.live, "send_text", lambda text, node_id: said.append(text))
    with pytest.raises(kind):
        flux.train(policy, 20, reward=Ends(), keep_every=1, keep_last=1)
    then = f".\nNext: Run goes on. {flux.pack.nodes.live.COMPARE}" if error == "Stopped" else "; Run goes on."
    assert said[-1] == f"{error} at 2 of 20, saved{then}" and "left" in said[-2]
    assert [path.name for path in (policy.run.folder / "samples").iterdir()] == ["000002.png"]  # as many as checkpoints
    assert [path.name for path in (policy.run.folder / "checkpoints").iterdir()] == ["000002"]
    assert not (policy.run.folder / "training.lock").exists()


class Broken(Reward):
    """Foreground size, but not a number for some calls or images."""

    name = "broken"

    def __init__(self, bad):
        self.bad, self.calls = bad, 0

    def score(self, images, prompts):
        values = images.mean((1, 2, 3)) + torch.arange(len(images)) * 0.01
        self.calls += 1
        return self.bad(values.clone(), self.calls)


def nan_first_group(values, call):
    values[:4] = math.nan
    return values


def test_a_group_without_numbers_is_skipped_and_counted(flux):
    policy = flux.policy()
    flux.train(policy, 2, reward=Broken(nan_first_group))
    row = policy.run.metrics[-1]
    assert (
        row["skipped_groups"] == 1
        and row["grad_norm"] > 0
        and math.isfinite(row["reward"])
        and row["update_forwards"] == 3
    )


def test_a_run_that_learns_nothing_stops_with_the_reason_and_is_saved(flux):
    policy = flux.policy()
    before = policy.run.adapters.state_dict()
    with pytest.raises(RuntimeError, match="Nothing could be learned in 3 iterations in a row"):
        flux.train(policy, 9, reward=Broken(lambda values, call: values * math.nan), most_skips=3)
    assert policy.run.iteration == 3 and (policy.run.folder / "state.pt").exists()
    same(policy.run.adapters.state_dict(), before)
    single = flux.policy("single")
    flux.train(single, 5, reward=Broken(lambda values, call: values * (math.nan if call % 2 else 1)), most_skips=2)
    assert single.run.iteration == 5 and [row["skipped_groups"] for row in single.run.metrics] == [2, 0, 2, 0, 2]


def test_a_model_that_gives_nan_trains_nothing(flux, monkeypatch):
    network = flux.model.model.diffusion_model
    handle = network.register_forward_hook(lambda module, args, output: output * math.nan)
    policy = flux.policy()
    before = policy.run.adapters.state_dict()
    try:
        with pytest.raises(RuntimeError, match="not finite numbers"):
            flux.train(policy, 9, most_skips=2)
    finally:
        handle.remove()
    same(policy.run.adapters.state_dict(), before)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(flux, monkeypatch):
    policy = flux.policy()
    for parameter in policy.run.adapters.parameters():
        parameter.register_hook(lambda gradient: gradient * math.inf)
    before = policy.run.adapters.state_dict()
    with pytest.raises(RuntimeError, match="Nothing could be learned in 2 iterations"):
        flux.train(policy, 9, most_skips=2)
    assert [row["skipped"] for row in policy.run.metrics] == [1, 1]
    same(policy.run.adapters.state_dict(), before)


class Judge(Reward):
    """Likes an image the less, the larger its foreground: it must fall when size is trained."""

    name = "judge"

    def __init__(self, reward):
        self.reward = reward

    def score(self, images, prompts):
        return 1 - self.reward.score(images, prompts)


def test_the_run_pauses_when_the_judge_falls_while_the_reward_rises(flux, monkeypatch):
    said = []
    monkeypatch.setattr(flux.pack.nodes.live, "send_text", lambda text, node_id: said.append(text))
    size = flux.call("Measure", measure="foreground size", direction="more")[0]
    text = "\n".join(
        f"a {colour} {shape} on a white background"
        for colour in ("red", "blue", "green")
        for shape in ("circle", "square", "cross")
    )
    judge = Judge(size)
    judge.name = "<b>the judge's own name</b>"
    settings = dict(
        text=text,
        held_out=6,
        judge=judge,
        evaluate_every=2,
        per_iteration=2,
        learning_rate=3e-3,
        keep_every=2,
        keep_last=9,
    )
    policy = flux.policy()
    status = flux.train(policy, 40, **settings)[-1]
    assert status.startswith("Paused after iteration") and "judge" in status and "Roll back to iteration" in status
    to = int(status.partition("Roll back to iteration ")[2].partition("?")[0])
    assert 0 < to < policy.run.iteration and f"click iteration {to} (by hand: begin_from" in status
    assert status.endswith("and a new name). Run goes on all the same.")
    back, best = flux.pack.nodes.runs.way_back, flux.pack.nodes.runs.describe(policy.run.folder / "best").iteration
    kept = {checkpoint.iteration for checkpoint in policy.run.checkpoints()}
    for at in range(policy.run.iteration + 1):
        known = max((n for n in kept | {best} if n <= at), default=None)
        names = {"best"} if known == best else set()
        names |= {str(known)} if known in kept else set()
        assert back(policy.run.folder, at) is None if known is None else back(policy.run.folder, at)[1] in names, at
    assert "the judge fell" in said[-1] and "own name" not in "".join(said), "the text under the node may be HTML"
    paused = policy.run.iteration
    assert paused < 40 and (policy.run.folder / "best" / "state.pt").exists()
    assert [row["iteration"] + 1 for row in policy.run.metrics if "eval/judge" in row] == list(range(2, paused + 1, 2))
    flux.forget()
    again = flux.policy()
    assert flux.train(again, paused + 2, **settings)[-1].startswith(
        f"{paused + 2} iterations done. This Run went on"
    ), "going on after a pause is the user's decision"
    warned = flux.policy("warned")
    assert flux.train(warned, paused + 1, on_alarm="off", **settings)[-1].startswith(f"{paused + 1} iterations done.")


def test_a_kill_between_saving_and_keeping_leaves_no_older_best(flux, monkeypatch):
    """And what is kept is not saved twice."""
    policy, saved = flux.policy(), []
    kind = type(policy.run)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "_keep", lambda *_: (_ for _ in ()).throw(StopHere))
        save = kind._save
        patch.setattr(
            kind, "_save", lambda self, *args, **more: saved.append(self.iteration) or save(self, *args, **more)
        )
        with pytest.raises(StopHere):
            flux.train(policy, 2, held_out=1, evaluate_every=1, keep_every=1, on_alarm="off")
    assert saved == [1] and not (policy.run.folder / "best").exists()
    flux.forget()
    run = flux.policy().run
    assert run.iteration == 1
    assert (run.folder / "best/state.pt").exists() and (run.folder / "checkpoints/000001").exists()


def test_the_average_is_what_is_evaluated_and_saved(flux):
    policy = flux.policy()
    lora = flux.train(policy, 4, ema=0.9)[1]
    own = policy.run.adapters.state_dict()
    assert any(not torch.equal(own[key], lora[key]) for key in own)
    from safetensors.torch import load_file

    same(load_file(policy.run.folder / "adapter.safetensors"), lora)
    flux.forget()
    same(flux.call("ToLora", policy=flux.policy())[0], lora)  # also after a restart, before any training


def test_a_new_run_begins_from_a_checkpoint_and_the_old_one_stays(flux):
    old = flux.policy("old")
    flux.train(old, 4, keep_every=2, keep_last=5)
    before = (old.run.folder / "state.pt").read_bytes()
    assert flux.pack.nodes.runs.known_checkpoints() == ["old @ newest", "old @ 4", "old @ 2"]
    new = flux.policy("new", begin_from="old @ 2")
    assert new.run.iteration == 2 and len(new.run.metrics) == 2
    flux.train(new, 4, keep_every=2, keep_last=5)
    same(new.run.adapters.state_dict(), old.run.adapters.state_dict())
    assert (old.run.folder / "state.pt").read_bytes() == before
    flux.forget()
    assert flux.policy("new", begin_from="old @ 2").run.iteration == 4, "only a new run begins anywhere"
    assert flux.policy("whatever", resume="old").run.folder.name == "old"


def test_the_learning_rate_falls_to_the_end_and_is_higher_again_where_iterations_are_raised(flux):
    policy = flux.policy()
    flux.train(policy, 4, decay="cosine")
    flux.train(policy, 6, decay="cosine")
    flux.train(policy, 7)
    shares = [row["learning_rate"] / 1e-3 for row in policy.run.metrics]
    assert shares == pytest.approx([1, 0.8536, 0.5, 0.1464, 0.25, 0.0670, 1], abs=1e-4)


def test_replay_imitates_what_was_remembered_of_a_prompt_before(flux):
    policy = flux.policy()
    flux.train(policy, 3, replay=0.5, replay_pictures=3)
    rows, kept = policy.run.metrics, policy.run.remembered
    assert {len(pictures) for pictures in kept.values()} == {3}  # two of the first iteration, one of the second
    assert "replay_loss" not in rows[0] and rows[1]["replay_loss"] > 0
    passes = [row["update_forwards"] - rows[0]["update_forwards"] for row in rows]
    assert passes == [0, 2 * len(kept), 3 * len(kept)]
    flux.train(policy, 4)
    assert "replay_loss" not in policy.run.metrics[3]


def test_changed_settings_are_told(flux):
    policy = flux.policy()
    flux.train(policy, 1)
    status = flux.train(policy, 2, learning_rate=5e-4)[-1]
    assert "learning_rate 0.001 -> 0.0005" in status


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(evaluate_every=2), "Evaluation needs held-out prompts"),
        (dict(optimizer="adamw8bit"), "needs the package bitsandbytes"),
        (dict(decay="linear"), "Unknown decay 'linear' of the learning rate"),
        (dict(replay=0.5, replay_pictures=0), "at least 1 picture per prompt to remember"),
        (dict(text="  \n"), "no prompt in it"),
        (dict(file="../secret.txt"), "not inside ComfyUI's input folder"),
        (dict(file="absent.txt"), "There is no prompt file"),
    ],
)
def test_wrong_settings_are_one_sentence_and_lose_nothing(flux, change, sentence):
    policy = flux.policy()
    flux.train(policy, 1)
    before = (policy.run.folder / "state.pt").read_bytes()
    with pytest.raises(ValueError, match=sentence):
        flux.train(policy, 2, **change)
    assert (policy.run.folder / "state.pt").read_bytes() == before


def test_prompts_from_a_file(flux, tmp_path):
    import folder_paths

    folder_paths.set_input_directory(str(tmp_path))
    (tmp_path / "list.jsonl").write_text('{"prompt": "a red circle"}\n{"text": "a blue square"}\n')
    prompts, summary, texts = flux.call("PromptList", text="", file="list.jsonl")
    assert (
        prompts.train == ["a red circle", "a blue square"]
        and summary.startswith("2 prompts")
        and texts == "a red circle\na blue square"
    )


def test_preflight_counts_what_the_model_needs(flux):
    policy = flux.policy(rank=4)
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    text, micro_batch, free_others = flux.call("Preflight", policy=policy, latent_image=latent, vae=flux.vae)
    assert "It should fit" in text and all(
        name in text for name in ("sampling", "learning", "decoding", "Estimated, not measured")
    )
    assert (micro_batch, free_others) == (0, False)
    base, whole = policy.policy.memory((16, 64, 64), 1), policy.policy.memory((16, 64, 64), 27)
    assert (
        base["weights"] == flux.model.model_size()
        and base["adapters"] == 16 * policy.run.adapters.count()
        and whole["sampling"] > base["sampling"]
    )


def foreseen(flux, cfg=1.0, micro_batch=0, checkpointing=False, branching=3):
    """(nodes/preflight.py, a run of it at 512x512)."""
    look, policy = flux.pack.nodes.preflight, flux.policy(f"ahead {checkpointing}", rank=4, checkpointing=checkpointing)
    plan = look.Plan(micro_batch, checkpointing)
    shape = flux.shape(branching=branching, depth=3)
    return look, look.Foreseen(policy.policy, (16, 64, 64), shape, 1, cfg, None, None, False, plan)


def test_preflight_advises_the_largest_micro_batch_that_fits(flux):
    look, run = foreseen(flux)
    room = look.KEPT_FREE + run.phase("learning", look.Plan(5, False)) + 1
    assert "set micro_batch to 5." in look.report(run, room, "gpu")
    with_cfg = look.report(foreseen(flux, cfg=4.5)[1], room, "gpu")
    assert "set micro_batch to 2." in with_cfg, with_cfg
    assert "no setting makes it" in look.report(run, look.KEPT_FREE + 1e6, "gpu")
    assert "It should fit" in look.report(foreseen(flux, micro_batch=5)[1], room, "gpu")


def test_what_is_advised_fits_and_the_faster_change_comes_first(flux, monkeypatch):
    # ComfyUI's own rule is for networks of usual width, and would hide what a tiny one needs
    monkeypatch.setattr(flux.model.model, "memory_required", lambda shape: 0)
    look, run = foreseen(flux)
    Plan = look.Plan
    order = [
        Plan(0, False),
        Plan(1, False),
        Plan(1, True),
        Plan(1, True, fp8=True),
        Plan(1, True, "adamw8bit", fp8=True),
        Plan(1, True, "adamw8bit", fp8=True, offloaded=run.policy.model.model_size() / 8),
    ]
    needs = [max(run.phase(name, plan) for name in run.widest) for plan in order]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)
    for plan, need in zip(order, needs):
        found = run.fitting(look.KEPT_FREE + need)
        assert max(run.phase(name, found) for name in run.widest) <= need + 1
        same = ("checkpointing", "optimizer", "fp8")
        assert [getattr(found, name) for name in same] == [getattr(plan, name) for name in same]
    assert run.fitting(look.KEPT_FREE) is None


def test_out_of_memory_halves_the_micro_batch_says_so_and_goes_on(flux, monkeypatch):
    flux.train(whole := flux.policy("whole"), 2)
    network, said = flux.model.model.diffusion_model, []
    monkeypatch.setattr(flux.pack.nodes.live, "send_text", lambda text, node_id: said.append(text))

    def limited(module, args):
        if len(args[0]) > 3:
            raise torch.cuda.OutOfMemoryError("no room")

    handle = network.register_forward_pre_hook(limited)
    try:
        flux.train(small := flux.policy("small"), 2)
    finally:
        handle.remove()
    assert "The memory ran out: going on with 2 latents at a time." in said[1] and "memory ran out" not in said[2]
    first, one, other = (
        torch.cat([weight.detach().flatten() for weight in policy.run.adapters.parameters()])
        for policy in (flux.policy("untrained"), whole, small)
    )
    assert (one - other).norm() < 0.01 * (one - first).norm()  # Adam makes single weights of the float noise


@pytest.mark.parametrize("when", ["first save", "later"])
def test_a_full_disk_loses_nothing(flux, monkeypatch, when):
    """What is there stays whole; once there is room again, the run goes on as if nothing had been."""
    import errno
    import os

    flux.train(through := flux.policy("through"), 3)
    policy = flux.policy("full")
    if when == "later":
        flux.train(policy, 1)
    before = {path.name: path.read_bytes() for path in policy.run.folder.glob("*.pt")}
    real = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        flux.train(policy, 3)
    assert {path.name: path.read_bytes() for path in policy.run.folder.glob("*.pt")} == before
    monkeypatch.setattr(os, "fsync", real)
    flux.train(policy, 3)
    same(policy.run.adapters.state_dict(), through.run.adapters.state_dict())


def test_a_damaged_run_offers_an_older_checkpoint(flux):
    flux.train(flux.policy("hurt"), 3, keep_every=1, keep_last=3)
    state = flux.policy("hurt").run.folder / "state.pt"
    state.unlink()
    state.write_bytes(b"PK\x03\x04 cut short")
    flux.forget()
    with pytest.raises(
        ValueError,
        match="the checkpoint of iteration 3 is whole: switch on recover to go back to it, or choose 'hurt @ 3' under "
        "begin_from and a new run name",
    ):
        flux.policy("hurt")
    assert flux.policy("new", begin_from="hurt @ 3").run.iteration == 3
    assert state.exists(), "nothing is deleted"


def test_eight_bit_adam_is_used_where_it_is_installed_and_begins_its_moments_anew(flux, monkeypatch):
    import sys
    import types

    class AdamW8bit(torch.optim.AdamW):
        made = 0

        def __init__(self, *args, **kwargs):
            type(self).made += 1
            super().__init__(*args, **kwargs)

    monkeypatch.setitem(
        sys.modules, "bitsandbytes", types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=AdamW8bit))
    )
    flux.train(policy := flux.policy(), 1)
    flux.train(policy, 2, optimizer="adamw8bit")
    assert AdamW8bit.made == 1 and type(policy.run.optimizer) is AdamW8bit
    flux.forget()
    again = flux.policy()
    flux.train(again, 3, optimizer="adamw8bit")
    assert all(state["step"] == 2 for state in again.run.optimizer.state.values()), (
        "its own moments are taken up, those of the other kind were not"
    )


def test_the_live_picture_costs_little(flux):
    """Once before and once per iteration. Counted, not timed: benchmarks/endurance.py has its share of the time."""
    calls = []
    live = flux.pack.nodes.live.Live
    picture = live.picture
    flux.pack.nodes.live.Live.picture = lambda self, *theme: calls.append(1) or picture(self, *theme)
    try:
        flux.train(flux.policy(), 3, keep_every=100)
    finally:
        live.picture = picture
    assert len(calls) <= 1 + 3 + 2


def test_it_works_as_it_is_dropped_in(flux):
    """Only what must be connected is, and every widget is at its default but the number of iterations."""
    schema = flux.nodes["TreeRPOTrainer"].define_schema()
    defaults = {field.id: field.default for field in schema.inputs if getattr(field, "default", None) is not None}
    prompts = flux.call("PromptList", text="a red circle on a white background")[0]
    wires = dict(
        policy=flux.policy(),
        clip=flux.clip,
        vae=flux.vae,
        prompts=prompts,
        sigmas=flux.sigmas(10),
        latent_image=flux.latent(),
        reward_model=flux.call("Measure", measure="brightness", direction="more")[0],
    )
    assert flux.call("Trainer", **{**defaults, **wires, "iterations": 1})[-1].startswith("1 iteration done.\n")
    row = wires["policy"].run.metrics[0]
    assert row["edges"] == 3 + 9 + 27 and row["diversity"] > 0 and row["grad_norm"] > 0


def test_tensorboard_gets_every_metric_and_is_asked_for_only_when_wanted(flux, monkeypatch):
    written = {}

    class Writer:
        def add_scalar(self, name, value, step):
            written.setdefault(name, []).append(step)

        def close(self):
            written["closed"] = True

    monkeypatch.setattr(flux.pack.nodes.live, "_tensorboard", lambda folder: Writer())
    flux.train(flux.policy(), 2)
    assert not written
    flux.train(flux.policy(), 4, tensorboard=True)
    assert written["reward"] == written["grad_norm"] == [2, 3] and written["closed"]
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        flux.pack.nodes.live._tensorboard(flux.folder)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_retained_graphs_save_forwards_and_change_nothing(flux, checkpointing):
    flux.train(plain := flux.policy("plain", checkpointing=checkpointing), 2)
    flux.train(kept := flux.policy("kept", checkpointing=checkpointing), 2, retain_graphs=True)
    assert [row["update_forwards"] for row in plain.run.metrics] == [6, 6] and [
        row["update_forwards"] for row in kept.run.metrics
    ] == [0, 0]
    for key, value in plain.run.adapters.state_dict().items():
        torch.testing.assert_close(kept.run.adapters.state_dict()[key], value, atol=1e-5, rtol=1e-3)


def test_only_the_policy_stays_loaded_where_that_is_asked_for(flux):
    import comfy.model_management as management

    seen = []
    network = flux.model.model.diffusion_model
    handle = network.register_forward_pre_hook(lambda module, args: seen.append(len(management.current_loaded_models)))
    try:
        flux.train(flux.policy(), 2)
        shared = max(seen)
        seen.clear()
        flux.train(flux.policy("alone"), 2, free_others=True)
    finally:
        handle.remove()
    assert shared > 1 and set(seen) == {1}


def test_before_the_first_iteration_there_is_a_picture_and_a_line_and_a_second_run_says_where_it_goes_on(
    flux, monkeypatch
):
    import comfy.utils

    happened = []

    class Told(Reward):
        name = "told"

        def score(self, images, prompts):
            happened.append("scored")
            return images.mean((1, 2, 3))

    def hook(value, total, preview, **more):
        happened.append(preview and preview[1])

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(flux.pack.nodes.live, "send_text", lambda text, node_id: happened.append(text))
    policy = flux.policy()
    flux.train(policy, 1, reward=Told())
    assert happened[0] == "Begins with iteration 1 of 1. Stop whenever you like: Run goes on."
    first = happened[1]
    assert first.size == (900, 520) and len(first.getcolors(1 << 20)) > 10, "texts, not an empty sheet"
    assert happened.index("scored") > 1 and happened[-1].startswith(
        "1 iteration done.\nNext: Open the template compare"
    )
    happened.clear()
    flux.train(policy, 2, reward=Told())
    assert happened[0].startswith("Goes on at iteration 2 of 2.") and happened[1].size == (900, 520)
    assert "This Run went on at iteration 2." in happened[-1]
    happened.clear()
    flux.train(policy, 2, reward=Told())
    assert happened == ["2 iterations done.\nNext: Raise iterations to learn on."], "nothing is left to do"


def test_what_is_shown_is_dark_and_what_is_kept_is_light(flux):
    from PIL import Image

    theme = flux.pack.core.pictures.theme
    *_, picture, _ = flux.train(policy := flux.policy(), 1)
    assert [round(255 * float(c)) for c in picture[0, 0, 0]] == list(theme.DARK.paper)
    with Image.open(policy.run.folder / "dashboard.png") as file:
        assert file.getpixel((0, 0)) == theme.LIGHT.paper


def test_a_run_with_nothing_left_to_learn_ends_and_names_its_best(flux):
    watch, policy = flux.pack.core.runs.health.Watch, flux.policy()
    text = "\n".join(f"a {colour} circle on a white background" for colour in ("red", "blue", "green", "yellow"))

    class Peaks(Reward):
        name, held_out = "peaks", [0.1, 0.9, 0.5, 0.4]  # the base model, then after each iteration

        def score(self, images, prompts):
            if len(prompts) == 2:
                return torch.full((2,), self.held_out.pop(0))
            return images.mean((1, 2, 3)) + torch.arange(len(images)) * 0.01

    policy.run.extra["watch"] = watch(settled=2).to_dict()
    status = flux.train(policy, 9, reward=Peaks(), text=text, held_out=2, evaluate_every=1)[-1]
    assert status.startswith("Finished early after iteration 3.") and "nothing is left to learn" in status
    assert status.endswith(
        "To go on from 1, press Go back to a picture and click iteration 1 (by hand: begin_from … @ best, and a new "
        "name). Run goes on all the same."
    )
    shown = {one["iteration"]: one["back"] for one in flux.pack.nodes.go_back.pictures("test")["pictures"]}
    assert shown[1] == 1, "the picture that is named is there, and leads there"
    assert flux.pack.nodes.live.COMPARE in status
    assert flux.policy("back", begin_from="test @ best").run.iteration == 1
