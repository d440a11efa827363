"""A real ComfyUI server, driven over HTTP as `run.py demo` and any headless user drives it."""

import json
import os
import signal
import sys
import time

import pytest
import torch
from conftest import COMFYUI, MISSING, ROOT
from golden import inputs, models
from graph import TRAIN, timeless
from safetensors.torch import load_file

import headless
import run

GRAPHS = ROOT / "workflows" / "api"


@pytest.fixture(scope="module")
def comfyui():
    if COMFYUI is None:
        pytest.skip(MISSING)
    return COMFYUI


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    with run.Server(comfyui, sys.executable, base=tmp_path_factory.mktemp("base")) as running:
        yield running


def first_steps(name, change={}, model="flux"):
    graph = run.load_graph(GRAPHS / "first_steps.json")
    wanted = {
        ("Model", "model"): model,
        ("Policy", "run_name"): name,
        ("Save", "lora_name"): name,
        ("Prompts", "text"): TRAIN,
        ("Shape", "branching"): 2,
        ("Shape", "depth"): 2,
        ("Shape", "tail"): 1.0,
        ("Shape", "ratio"): 0.5,
        ("Sigmas", "steps"): 6,
        ("Update", "learning_rate"): 1e-3,
    }
    for (node, field), value in {**wanted, **change}.items():
        run.set_input(graph, node, field, value)
    return graph


def metrics(server, name):
    return [
        json.loads(line) for line in (server.base / "output/treerpo" / name / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_three_queue_runs_are_a_run_of_three_iterations(server, model, pack, tmp_path):
    from graph import Graph

    client, name = run.Client(server.url), f"three {model}"
    for count in (1, 2, 3):
        client.run(first_steps(name, model=model))
        assert len(metrics(server, name)) == count
    here = Graph(pack, tmp_path, model)
    here.forget()
    policy = here.policy(rank=8, alpha=16.0, targets="all linear")
    graph = first_steps(name)
    reward = here.call("TinyReward", **graph[run.find_node(graph, "Reward")]["inputs"])[0]
    settings = dict(learning_rate=1e-3, anchor=0.05, step_weight="layer")
    for _ in range(3):
        here.iteration(policy, node="Regression", update=settings, reward=reward)
    assert [row["reward"] for row in metrics(server, name)] == pytest.approx(
        [row["reward"] for row in policy.run.metrics], abs=2e-3
    )
    assert [row["window_start"] for row in metrics(server, name)] == [row["window_start"] for row in policy.run.metrics]
    assert (server.base / f"models/loras/{name}.safetensors").is_file()
    assert {p.name for p in (server.base / "output/treerpo" / name).iterdir()} >= {
        "state.pt",
        "adapter.safetensors",
        "config.json",
        "metrics.jsonl",
        "reward_curve.png",
        "tree.png",
    }


def taught(client, picks: int, to_the_end: bool) -> list[str]:
    """Teach My Taste, answered `picks` times; the ids it asked about, once the last answer is said to be taken."""
    graph, asked = run.load_graph(GRAPHS / "teach_my_taste.json"), []
    settings = {"lora_name": "taught", "questions": 3, "settle": 0, "prompts": TRAIN.splitlines()[0]}
    for field, value in settings.items():
        run.set_input(graph, "Teach", field, value)
    prompt, until = client.queue(graph), time.monotonic() + 180
    while len(asked) < picks and time.monotonic() < until:
        new = [one["id"] for one in client.get("/treerpo/pick")["questions"] if one["id"] not in asked]
        for name in new:
            client.request("/treerpo/pick", {"id": name, "answer": "2"})
        asked += new
        time.sleep(0 if new else 0.02)
    if to_the_end:
        client.wait(prompt)
    return asked


def test_a_killed_server_loses_nothing_and_no_pick(comfyui, tmp_path):
    asked = []
    for picks, kill in ((2, True), (1, False)):
        with run.Server(comfyui, sys.executable, base=tmp_path / "killed") as server:
            run.Client(server.url).run(first_steps("again"))
            asked += taught(run.Client(server.url), picks, to_the_end=not kill)
            if kill:
                os.kill(server.process.pid, signal.SIGKILL)  # the second pick was just said to be taken
                server.process.wait()
    with run.Server(comfyui, sys.executable, base=tmp_path / "through") as through:
        for _ in range(2):
            run.Client(through.url).run(first_steps("again"))
        assert asked == taught(run.Client(through.url), 3, to_the_end=True), (
            "the third question is the first one after the kill"
        )
    lines = (server.base / "output/treerpo/taught/picks.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == asked
    assert timeless(metrics(server, "again")) == timeless(metrics(through, "again"))
    first, second = (load_file(s.base / "output/treerpo/again/adapter.safetensors") for s in (server, through))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({("Prompts", "text"): "  "}, "The prompt list is empty"),
        ({("Policy", "run_name"): "a/b"}, "cannot be a run name"),
        ({("Shape", "branching"): 1, ("Shape", "depth"): 1}, "A group of one leaf has no advantage"),
        ({("Sigmas", "steps"): 3}, "does not fit into 3 sampling steps"),
    ],
)
def test_errors_reach_the_user_in_one_sentence(server, change, sentence):
    with pytest.raises(run.ExecutionError) as caught:
        run.Client(server.url).run(first_steps("errors", change))
    assert sentence in caught.value.exception_message


def test_a_lora_name_that_cannot_be_is_told_before_anything_runs(server):
    with pytest.raises(headless.PromptRejected, match="cannot be a LoRA name"):
        run.Client(server.url).run(first_steps("errors", {("Save", "lora_name"): "../evil"}))
    assert not list(server.base.rglob("*evil*"))


def test_compare_graph_runs(server):
    client = run.Client(server.url)
    client.run(first_steps("for compare"))
    graph = run.load_graph(GRAPHS / "compare.json")
    run.set_input(graph, "LoRA", "lora_name", "for compare.safetensors")
    outputs = client.run(graph)
    assert all(len(outputs[run.find_node(graph, title)]["images"]) == 1 for title in ("Before", "After"))


def test_a_folder_is_ranked_headless_by_real_reward_models(server, tmp_path):
    """The shipped graph as it is; only the weights behind its official file names are tiny."""
    pytest.importorskip("open_clip")
    rewards, pictures = server.base / "models" / "rewards", server.base / "input"
    models.write("hps_v2", rewards)
    models.write("image_reward", rewards / "ImageReward")
    pictures.mkdir(exist_ok=True)
    names = [name.replace(" ", "_") for name in inputs.images()]
    for name, picture in zip(names, inputs.images().values()):
        picture.convert("RGB").save(pictures / f"{name}.png")
    (pictures / f"{name}.txt").write_text("a prompt of its own")
    graph = run.load_graph(GRAPHS / "rank_images.json")
    run.set_input(graph, "Folder", "prompt", inputs.PROMPTS[0])
    client = run.Client(server.url)
    outputs = client.run(graph)
    text = "".join(outputs[run.find_node(graph, "Score")]["text"])
    assert (
        all(f"{reward}: mean" in text for reward in ("HPSv2.1", "ImageReward", "sharpness")) and f"{name}.png" in text
    )
    golden = json.loads((ROOT / "tests/golden/golden.json").read_text())
    rows = {
        line.split()[1]: float(line.split()[0])
        for line in text.split("ImageReward: ")[1].splitlines()[1 : 1 + len(names)]
    }
    for number, other in enumerate(names):
        if other != name:
            assert rows[f"{other}.png"] == pytest.approx(golden["image_reward"]["scores"][number][0], abs=1e-4)
    best = outputs[run.find_node(graph, "Best")]["images"]
    assert len(best) == 4 + 1, "four of the common prompt, one of the picture with its own"
    assert client.download(outputs[run.find_node(graph, "Ranking")]["images"][0], tmp_path).stat().st_size > 1000


def test_best_of_n_graph_runs(server):
    graph = run.load_graph(GRAPHS / "best_of_n.json")
    outputs = run.Client(server.url).run(graph)
    assert len(outputs[run.find_node(graph, "Best")]["images"]) == 4


def test_every_api_graph_fits_the_nodes(server):
    """Each shipped API graph names existing nodes, gives every required input, and links outputs to inputs of their
    type.
    """
    info = run.Client(server.url).object_info()
    for path in GRAPHS.glob("*.json"):
        graph = json.loads(path.read_text())
        for node in graph.values():
            known = info[node["class_type"]]["input"]
            fields = {**known.get("required", {}), **known.get("optional", {})}
            # "rewards.reward0" is one of the growing inputs "rewards"
            named = {field.split(".")[0] for field in node["inputs"]}
            assert named <= set(fields), (path.name, node["_meta"]["title"])
            assert set(known.get("required", {})) <= named, (path.name, node["_meta"]["title"])
            for field, value in node["inputs"].items():
                if isinstance(value, list):
                    given = info[graph[value[0]]["class_type"]]["output"][value[1]]
                    if "." in field:
                        assert given in str(fields[field.split(".")[0]]), (path.name, node["_meta"]["title"], field)
                        continue
                    assert fields[field][0] in (given, "*"), (path.name, node["_meta"]["title"], field)


def trainer(name, change={}):
    graph = run.load_graph(GRAPHS / "trainer.json")
    wanted = {
        ("Policy", "run_name"): name,
        ("Save", "lora_name"): name,
        ("Shape", "branching"): 2,
        ("Shape", "tail"): 1.0,
        ("Shape", "window"): "random",
        ("Sigmas", "steps"): 6,
        ("Trainer", "learning_rate"): 1e-3,
    }
    for (node, field), value in {**wanted, **change}.items():
        run.set_input(graph, node, field, value)
    return graph


def test_the_stop_button_keeps_the_run_and_the_next_queue_run_goes_on(server):
    """Stopped over HTTP while the Trainer works; the model is clean, the state is there, and the end is that of an
    undisturbed run.
    """
    client = run.Client(server.url)
    client.run(trainer("undisturbed", {("Trainer", "iterations"): 16}))
    rows = server.base / "output/treerpo/stopped/metrics.jsonl"
    for count in (2, 4):  # iterations after which it is stopped
        prompt = client.queue(trainer("stopped", {("Trainer", "iterations"): 16}))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (rows.exists() and len(rows.read_text().splitlines()) >= count):
            time.sleep(0.02)
        client.interrupt(prompt)
        with pytest.raises(run.Problem, match="interrupted at node 'Trainer'"):
            client.wait(prompt)
        assert count <= len(metrics(server, "stopped")) < 16 and rows.with_name("state.pt").exists()
    client.run(trainer("stopped", {("Trainer", "iterations"): 16}))
    assert timeless(metrics(server, "stopped")) == timeless(metrics(server, "undisturbed"))
    first, second = (
        load_file(server.base / f"output/treerpo/{name}/adapter.safetensors") for name in ("stopped", "undisturbed")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_trainer_graph_shows_and_leaves_what_it_promises(server):
    client, seen = run.Client(server.url), []
    outputs = client.run(
        trainer("shown", {("Trainer", "iterations"): 5, ("Trainer", "evaluate_every"): 5}),
        lambda title, value, maximum: seen.append((title, value, maximum)),
    )
    graph = trainer("shown")
    assert "5 iterations done." in "".join(outputs[run.find_node(graph, "Trainer")]["text"])
    assert len(outputs[run.find_node(graph, "Dashboard")]["images"]) == 1
    assert [value for title, value, maximum in seen if title == "Trainer" and maximum == 500][-1] == 500
    folder = server.base / "output/treerpo/shown"
    assert {path.name for path in folder.iterdir()} >= {
        "state.pt",
        "adapter.safetensors",
        "config.json",
        "metrics.jsonl",
        "dashboard.png",
        "samples",
        "best",
    }
    assert (server.base / "models/loras/shown.safetensors").is_file()
    rows = metrics(server, "shown")
    assert "eval/reward" in rows[4] and "eval/judge" in rows[4] and "eval/reward" not in rows[3]


def test_missing_held_out_prompts_are_told_before_any_model_is_loaded(server):
    """The Trainer's heavy inputs are lazy: what is wrong with its settings comes first."""
    graph = trainer("unheld", {("Trainer", "evaluate_every"): 5, ("Prompts", "held_out"): 0.0})
    client = run.Client(server.url)
    client.free()
    prompt = client.queue(graph)
    with pytest.raises(run.ExecutionError, match="Evaluation needs held-out prompts"):
        client.wait(prompt)
    (error,) = [
        message
        for kind, message in client.get(f"/history/{prompt}")[prompt]["status"]["messages"]
        if kind == "execution_error"
    ]
    kinds = {graph[node]["class_type"] for node in error["executed"]}
    assert "TreeRPOPromptList" in kinds and not kinds & {"TreeRPOTinyModel", "TreeRPOPolicy", "BasicScheduler"}


def test_start_here_leaves_a_lora_and_pictures_before_and_after(server):
    client, graph = run.Client(server.url), run.load_graph(GRAPHS / "start_here.json")
    for field, value in (("lora_name", "started"), ("iterations", 1), ("prompts", TRAIN)):
        run.set_input(graph, "Train", field, value)
    for count in (1, 2):
        outputs = client.run(graph)
        assert len(metrics(server, "started")) == count, "each Run learns on"
        assert f"{count} iteration" in "".join(outputs[run.find_node(graph, "Train")]["text"])
    sheets = [outputs[run.find_node(graph, when)]["images"] for when in ("Before", "After")]
    assert [len(images) for images in sheets] == [1, 1]
    assert (server.base / "models/loras/started.safetensors").is_file()
