"""The by-hand graph in real ComfyUI, on the embedded FLUX and SD3: the invariants of the method."""

import json
import sys

import pytest
import torch
from graph import TRAIN, Graph, network_forwards

KINDS = ["flow_sde", "dance_sde", "cps", "exact"]


@pytest.fixture(params=["flux", "sd3"])
def graph(request, pack, tmp_path):
    if request.param == "flux" and older_than(0, 9):
        pytest.skip("this ComfyUI takes FLUX sizes as fixed: tiny FLUX files need 0.9 or newer")
    built = Graph(pack, tmp_path, request.param)
    built.forget()
    return built


def older_than(*version):
    from comfyui_version import __version__

    return tuple(int(part) for part in __version__.split(".")[:2]) < version


def session(graph, policy, tree):
    return policy.policy.session(tree.positive, tree.negative, tree.cfg, shape=tree.forest.leaves.shape[1:])


def log_ratios(graph, policy, tree):
    """Largest |log ratio| of any edge when the tree is scored again."""
    update = graph.pack.core.method.update
    worst = 0.0
    with session(graph, policy, tree) as velocity:
        for layer, states in enumerate(tree.forest.states[:-1]):
            with velocity.grad():
                v = velocity(states, tree.forest.sigma(layer)[0], tree.forest.rows(layer))
                new = update.score_edges(tree.forest, layer, slice(0, len(states)), v).log_prob
            worst = max(worst, float((new - tree.forest.log_probs[layer]).detach().abs().max()))
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_is_one_before_any_update(graph, kind):
    policy = graph.policy()
    positive, _ = graph.prompts()
    for first_step in (0, 2):
        tree, _ = graph.sample(
            policy,
            positive,
            noise=graph.noise(kind=kind, level=0.5),
            shape=graph.shape(window="fixed", first_step=first_step),
        )
        assert log_ratios(graph, policy, tree) < 1e-6
    graph.iteration(policy)  # and again with adapters that have learned
    tree, _ = graph.sample(policy, positive, noise=graph.noise(kind=kind, level=0.5))
    assert log_ratios(graph, policy, tree) < 1e-6


def test_ratio_is_one_with_guidance(graph):
    policy = graph.policy()
    positive, _ = graph.prompts()
    negative, _ = graph.prompts("a white background")
    tree, _ = graph.sample(policy, positive, negative=negative, cfg=3.0)
    assert log_ratios(graph, policy, tree) < 1e-6


def gradient(graph, policy, tree, advantages, **options):
    core = graph.pack.core
    for parameter in policy.policy.adapters.parameters():
        parameter.grad = None
    with session(graph, policy, tree) as velocity:
        core.method.update.policy_gradient(
            velocity, tree.forest, advantages, core.method.objective.Objective(10.0, 10.0), **options
        )
    return torch.cat(
        [
            p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
            for p in policy.policy.adapters.parameters()
        ]
    )


def edge_loss(graph, policy, tree, advantages, per_edge=True):
    """The GRPO loss by its definition, every edge forwarded on its own; with gradient."""
    core, forest, losses = graph.pack.core, tree.forest, []
    with session(graph, policy, tree) as velocity, velocity.grad():
        for layer, advantage in enumerate(advantages):
            s, n = forest.sigma(layer)
            for edge in range(len(advantage)):
                parent = edge // forest.branching
                x = forest.states[layer][parent : parent + 1]
                v = velocity(x, s, forest.rows(layer)[parent : parent + 1])
                new = core.method.steps.step(
                    forest.kind,
                    x.double(),
                    v.double(),
                    s,
                    n,
                    forest.levels[layer],
                    float(forest.sigmas[1]),
                    next_latent=forest.states[layer + 1][edge : edge + 1],
                    rho_min=forest.rho_min,
                ).log_prob
                losses.append(-torch.exp(new - forest.log_probs[layer][edge : edge + 1].double()) * advantage[edge])
        loss = torch.cat(losses).mean()
        parameters = policy.policy.adapters.parameters()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.item(), torch.cat(
            [g.flatten() if g is not None else torch.zeros(p.numel()) for g, p in zip(found, parameters)]
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_update_gradient_equals_the_per_edge_gradient_and_finite_differences(graph, checkpointing):
    policy = graph.policy(checkpointing=checkpointing)
    graph.iteration(policy)  # off the all-zero start, where only half of the adapters have a gradient
    positive, _ = graph.prompts()
    tree, _ = graph.sample(policy, positive)
    draw = torch.Generator().manual_seed(0)
    advantages = [torch.randn(p.shape, generator=draw) for p in tree.forest.log_probs]
    shared = gradient(graph, policy, tree, advantages)
    _, by_edge = edge_loss(graph, policy, tree, advantages)
    assert float((shared - by_edge).norm() / by_edge.norm()) < 1e-4
    direction = [torch.sign(p) * 0 + torch.randn(p.shape, generator=draw) for p in policy.policy.adapters.parameters()]
    flat = torch.cat([d.flatten() for d in direction])
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(policy.policy.adapters.parameters(), direction):
                p.add_(sign * 1e-3 * d)
            values.append(edge_loss(graph, policy, tree, advantages)[0])
            for p, d in zip(policy.policy.adapters.parameters(), direction):
                p.sub_(sign * 1e-3 * d)
    assert (shared * flat).sum().item() == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.02)


def test_branching_one_without_noise_is_comfyuis_euler(graph):
    policy = graph.policy()
    positive, _ = graph.prompts("a red circle on a white background")
    _, leaves = graph.sample(policy, positive, shape=graph.shape(branching=1), noise=graph.noise(level=0.0), seed=42)
    expected = graph.ksampler(graph.model, positive, seed=42)
    torch.testing.assert_close(leaves["samples"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_any_split_gives_the_same_tree_and_the_same_update(graph, micro_batch):
    rows, adapters = [], []
    for name, size in (("whole", 0), ("split", micro_batch)):
        policy = graph.policy(name)
        rows.append(graph.iteration(policy, sampling={"micro_batch": size}))
        adapters.append(torch.cat([p.detach().flatten().clone() for p in policy.run.adapters.parameters()]))
    assert rows[0]["reward"] == pytest.approx(rows[1]["reward"], abs=1e-4)
    assert rows[0]["forwards"] == rows[1]["forwards"]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-3)
    # AdamW's first step is lr * sign(gradient): only values whose gradient is a rounding error may differ.
    assert float(((adapters[0] - adapters[1]).abs() > 1e-4).float().mean()) < 0.01


def state_bits(policy):
    return torch.cat([p.detach().flatten() for p in policy.run.adapters.parameters()]).clone()


def test_resuming_is_the_same_as_never_having_stopped(graph):
    through = graph.policy("through")
    rows = [graph.iteration(through) for _ in range(4)]
    for _ in range(2):
        graph.iteration(graph.policy("resumed"))
    graph.forget()
    for _ in range(2):
        resumed = graph.policy("resumed")
        graph.iteration(resumed)
    assert torch.equal(state_bits(through), state_bits(resumed)) and resumed.run.iteration == 4
    untimed = [[{k: v for k, v in row.items() if "seconds" not in k} for row in r] for r in (rows, resumed.run.metrics)]
    assert untimed[0] == untimed[1]
    on_disk = [
        json.loads(line) for line in (graph.folder / "output/treerpo/resumed/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["iteration"] for row in on_disk] == [0, 1, 2, 3] and on_disk == resumed.run.metrics


def test_single_steps_keep_the_best_state_and_say_when_it_gets_worse(graph, monkeypatch):
    update = sys.modules[f"{graph.pack.__name__}.nodes.update"]
    real, rewards = update.course, [0.0, 0.1, 2.0, 2.1, -9.0, -9.1, -9.2]
    monkeypatch.setattr(update, "course", lambda known: real(rewards[: len(known)], window=2))
    monkeypatch.setattr(update, "KEEP_EVERY", 1)
    policy = graph.policy("kept")
    for _ in rewards:
        graph.iteration(policy)
    best = graph.pack.core.runs.checkpoint.describe(graph.folder / "output/treerpo/kept/best")
    assert best.iteration == 4 and policy.run.iteration == 7
    assert "has fallen from 2.05 to -9.15 in the last 3 iterations" in update.keep_best(policy.run)


def traces(graph):
    network = graph.model.model.diffusion_model
    return (
        [
            (name, "forward" in vars(m), len(m._forward_pre_hooks), len(m._forward_hooks))
            for name, m in network.named_modules()
        ],
        graph.model.injections,
        graph.model.is_injected,
    )


@pytest.mark.parametrize("ending", ["return", "error", "interrupt while sampling", "interrupt while learning"])
def test_the_users_model_is_untouched(graph, comfy, monkeypatch, ending):
    import comfy.model_management as management

    positive, _ = graph.prompts("a red circle on a white background")
    before, clean = graph.ksampler(graph.model, positive), traces(graph)
    policy = graph.policy(checkpointing=True)
    if ending == "return":
        graph.iteration(policy)
    elif ending == "error":

        def broken(*_):
            raise RuntimeError("reward machine broke")

        monkeypatch.setattr(graph.pack.core.rewards.measure.Measure, "score", broken)
        with pytest.raises(RuntimeError, match="reward machine broke"):
            graph.iteration(policy)
    else:
        caller, calls = {"interrupt while sampling": "report", "interrupt while learning": "learn"}[ending], []

        def interrupt():
            if sys._getframe(1).f_code.co_name == caller:
                calls.append(caller)
                if len(calls) == 3:
                    raise management.InterruptProcessingException()

        monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", interrupt)
        with pytest.raises(management.InterruptProcessingException):
            graph.iteration(policy, sampling={"micro_batch": 2})
    monkeypatch.undo()
    assert policy.run.iteration == (1 if ending == "return" else 0)
    assert torch.equal(graph.ksampler(graph.model, positive), before)
    assert traces(graph) == clean and not getattr(management, "in_training", False)
    graph.iteration(graph.policy(checkpointing=True))  # and the run goes on


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize(
    "settings",
    [dict(branching=2, depth=2, trees=2), dict(branching=3, depth=1, trees=1), dict(branching=1, depth=2, trees=3)],
)
def test_counted_forwards_equal_the_closed_form(graph, settings, cfg):
    policy, shape = graph.policy(), graph.shape(window="fixed", first_step=1, **settings)
    positive, prompts = graph.prompts()
    negative, _ = graph.prompts("a white background")
    expected = graph.pack.core.method.cost.forwards(6, 1, settings["depth"], settings["branching"], settings["trees"])
    passes = 2 * (1 if cfg == 1 else 2)  # two prompts
    with network_forwards(graph.model) as counted:
        row = graph.iteration(policy, sampling=dict(shape=shape, cfg=cfg, negative=negative))
    assert (
        counted.total == row["forwards"] == passes * sum(expected) and row["rollout_forwards"] == passes * expected[0]
    )


def core_node(node, *inputs):
    """Run one of ComfyUI's own nodes, in today's form or in that of 0.3.64."""
    if hasattr(node, "execute"):
        return node.execute(*inputs).result
    return getattr(node(), node.FUNCTION)(*inputs)


def test_saved_lora_gives_the_live_policys_images(graph):
    import comfy.sd
    import comfy.utils

    import nodes

    policy = graph.policy()
    for _ in range(3):
        graph.iteration(policy)
    positive, _ = graph.prompts("a red circle on a white background")
    _, live = graph.sample(
        policy, positive, shape=graph.shape(branching=1), noise=graph.noise(level=0.0), seed=9, new_noise=False
    )
    path = graph.call("SaveLora", policy=policy, lora_name="tuned")[0]
    with torch.inference_mode():
        (tuned,) = nodes.LoraLoaderModelOnly().load_lora_model_only(graph.model, "tuned.safetensors", 1.0)
    patched = len(tuned.patches)
    assert patched == len(policy.run.adapters.names)
    base = graph.ksampler(graph.model, positive, seed=9)
    torch.testing.assert_close(graph.ksampler(tuned, positive, seed=9), live["samples"], atol=1e-4, rtol=1e-4)
    assert float((base - live["samples"]).abs().max()) > 1e-3
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (
        metadata["treerpo.iterations"] == "3"
        and json.loads(metadata["treerpo.config"])["rank"] == 4
        and "treerpo.prompts_blake2b" in metadata
    )
    with torch.inference_mode():  # core's nodes take the LORA_MODEL as it is
        from comfy_extras import nodes_train

        lora = graph.call("ToLora", policy=policy)[0]
        (direct,) = core_node(nodes_train.LoraModelLoader, graph.model, lora, 1.0)
        core_node(nodes_train.SaveLoRA, lora, "loras/by_core", 3)
    torch.testing.assert_close(graph.ksampler(direct, positive, seed=9), live["samples"], atol=1e-4, rtol=1e-4)
    (saved,) = (graph.folder / "output/loras").glob("*.safetensors")
    assert set(comfy.utils.load_torch_file(str(saved))) == set(lora)


def test_every_prompt_gets_its_own_images(graph):
    """Leaves come prompt by prompt, each as if its prompt had been sampled alone."""
    policy = graph.policy()
    both, _ = graph.prompts(TRAIN)
    shape, quiet = graph.shape(branching=1), graph.noise(level=0.0)
    _, leaves = graph.sample(policy, both, shape=shape, noise=quiet)
    noise = graph.pack.core.method.noise.roots((16, 8, 8), 1, 0, [0, 1], 1)
    for row, text in enumerate(TRAIN.splitlines()):
        alone, _ = graph.prompts(text)
        import comfy.sample

        with torch.inference_mode():
            expected = comfy.sample.sample(
                graph.model, noise[row : row + 1], 6, 1.0, "euler", "simple", alone, alone, graph.latent()["samples"]
            )
        torch.testing.assert_close(leaves["samples"][row : row + 1], expected, atol=1e-4, rtol=1e-4)


def test_prompts_move_on_with_the_iterations(graph):
    text = "\n".join(f"prompt {i}" for i in range(5))
    policy = graph.policy()
    assert graph.prompts(text, per_iteration=2, policy=policy)[1] == "prompt 0\nprompt 1"
    policy.run.iteration = 2
    assert graph.prompts(text, per_iteration=2, policy=policy)[1] == "prompt 4\nprompt 0"
    assert graph.prompts(text)[1] == text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_retained_graphs_give_the_same_update_without_its_forwards(graph, checkpointing):
    states, rows = [], []
    for name, keep in (("recomputed", False), ("retained", True)):
        policy = graph.policy(name, checkpointing=checkpointing)
        graph.iteration(policy)
        rows.append(graph.iteration(policy, sampling=dict(retain_graphs=keep)))
        states.append(state_bits(policy))
    assert rows[0]["update_forwards"] == 2 * 3 and rows[1]["update_forwards"] == 0
    torch.testing.assert_close(states[0], states[1], atol=1e-6, rtol=0)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-5)


def test_retained_graphs_of_weights_that_have_changed_are_not_used(graph):
    policy = graph.policy()
    positive, prompts = graph.prompts()
    tree, leaves = graph.sample(policy, positive, retain_graphs=True)
    credit = graph.call("Advantages", tree=tree, rewards=graph.score(graph.decode(leaves), prompts))[0]
    assert tree.forest.graphs
    graph.iteration(policy)  # another update comes between
    graph.call("Update", policy=policy, tree=tree, advantages=credit, learning_rate=1e-3, clip_low=1.0, clip_high=1.0)
    assert policy.run.metrics[-1]["update_forwards"] == 2 * 3 and not tree.forest.graphs


@pytest.mark.parametrize("target", ["best-path", "best-leaf", "images"])
def test_layertuning_update(graph, target):
    policy = graph.policy()
    positive, prompts = graph.prompts()
    with torch.inference_mode():
        own = {"samples": torch.ones(1, 16, 8, 8)}
    tree, leaves = graph.sample(policy, positive)
    credit = graph.call("Advantages", tree=tree, rewards=graph.score(graph.decode(leaves), prompts))[0]
    settings = {"lambda": 0.5, "target": target, "images": own if target == "images" else None}
    graph.call("LayerTuning", policy=policy, tree=tree, advantages=credit, learning_rate=1e-3, **settings)
    row = policy.run.metrics[-1]
    assert row["sft_loss"] > 0 and row["grad_norm"] > 0 and row["update_forwards"] == 2 * 3
    policy.run.metrics[-1]["reward_best"] = (
        2.0  # better than any image can be: nothing is good enough to be imitated now
    )
    graph.call("LayerTuning", policy=policy, tree=tree, advantages=credit, learning_rate=1e-3, **settings)
    assert policy.run.metrics[-1]["sft_loss"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        dict(sensitivity=2.0),
        dict(ratio="guard", step_weight="guard", clip_low=0.1, clip_high=0.1),
        dict(step_weight="tau"),
        dict(kl=0.5),
        dict(inner_updates=2),
        dict(weight_decay=0.1),
    ],
)
def test_every_option_of_the_update_node(graph, settings):
    policy = graph.policy()
    graph.iteration(policy)
    row = graph.iteration(policy, update=settings)
    assert row["grad_norm"] > 0 and row["skipped"] == 0
    passes = 2 * 3 * settings.get("inner_updates", 1) * (2 if "kl" in settings else 1)
    assert row["update_forwards"] == passes and (row["kl"] > 0) == ("kl" in settings)


@pytest.mark.parametrize(
    "settings",
    [
        dict(anchor=0.0),
        dict(anchor=0.3, eta=0.5, leaf_weights="node"),
        dict(step_weight="layer", inner_updates=2),
    ],
)
def test_every_option_of_the_regression_node_and_the_trainer_learns_the_same(graph, settings):
    inner = settings.get("inner_updates", 1)
    policy = graph.policy(run_name="nodes")
    with network_forwards(graph.model) as count:
        row = graph.iteration(policy, node="Regression", update=settings)
    assert row["grad_norm"] > 0 and row["skipped"] == 0 and row["ratio_first"] == pytest.approx(1, abs=1e-4)
    assert row["update_forwards"] == 2 * 3 * inner * (1 if settings.get("anchor") == 0 else 2)
    assert row["forwards"] == count.total
    theirs, goal = graph.policy(run_name="trainer"), {k: v for k, v in settings.items() if k != "inner_updates"}
    objective = graph.call("Objective", method="Tree Regression", kl=0.0, **goal)[0]
    graph.train(theirs, 1, objective=objective, inner_updates=inner)
    for mine, other in zip(policy.run.adapters.parameters(), theirs.run.adapters.parameters()):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="DiffusionNFT", per_image=2, inner_updates=2),
        dict(method="AWM", states="both", kl=0.1),
        dict(method="Softmax-TB", inner_updates=2),
        dict(method="RAM"),
    ],
    ids=lambda settings: settings["method"],
)
def test_an_objective_at_the_update_node_learns_what_the_trainer_learns(graph, settings):
    goal = {"kl": 0.0, **settings}
    inner = goal.pop("inner_updates", 1)
    objective = graph.call("Objective", **goal)[0]
    policy = graph.policy(run_name="nodes")
    with network_forwards(graph.model) as count:
        row = graph.iteration(policy, update=dict(objective=objective, inner_updates=inner))
    assert row["grad_norm"] > 0 and row["skipped"] == 0 and row["ratio_first"] == pytest.approx(1, abs=1e-4)
    shape, cost = graph.shape(), graph.pack.core.method.cost
    assert row["update_forwards"] == 2 * cost.learning_forwards(shape, objective[0], inner)
    assert row["forwards"] == count.total
    theirs = graph.policy(run_name="trainer")
    graph.train(theirs, 1, objective=objective, inner_updates=inner)
    for mine, other in zip(policy.run.adapters.parameters(), theirs.run.adapters.parameters()):
        assert torch.equal(mine, other)


def test_what_re_noised_images_cannot_use_is_refused(graph):
    objective = graph.call("Objective", method="DiffusionNFT", kl=0.0)[0]
    with pytest.raises(ValueError, match="turn retain_graphs off"):
        graph.train(graph.policy(), 1, objective=objective, retain_graphs=True)
    own = graph.call("Objective", method="LayerTuning-RL", kl=0.0, target="images")[0]
    with pytest.raises(ValueError, match="use LayerTuning-RL Update"):
        graph.call("Update", policy=None, tree=None, advantages=None, learning_rate=1e-3, objective=own)


def test_combined_rewards_are_compared_each_on_its_own_scale(graph):
    policy = graph.policy()
    positive, prompts = graph.prompts()
    tree, leaves = graph.sample(policy, positive)
    images = graph.decode(leaves)
    size, light = (
        graph.call("Measure", measure=kind, direction="more")[0] for kind in ("foreground size", "brightness")
    )
    inner = graph.combine([size, light], "0.5, 0.25")
    nested = graph.combine([inner, size], "2 1")
    rewards = graph.call("Score", reward_model=nested, images=images, prompts=prompts)[0]
    assert rewards.weights == {"foreground size": 1.0, "brightness": 0.5, "foreground size 2": 1.0}
    credit = graph.call("Advantages", tree=tree, rewards=rewards, clip=100.0)[0]

    def z(values):
        group = values.view(2, -1)
        return ((group - group.mean(1, keepdim=True)) / group.std(1, correction=0, keepdim=True)).flatten()

    expected = 2 * z(rewards.values["foreground size"]) + 0.5 * z(rewards.values["brightness"])
    torch.testing.assert_close(credit.layers[-1], expected, atol=1e-4, rtol=1e-4)
    graph.call("Update", policy=policy, tree=tree, advantages=credit, learning_rate=1e-3)
    row = policy.run.metrics[-1]
    assert row["reward"] == pytest.approx(
        2 * row["rewards/foreground size/mean"] + 0.5 * row["rewards/brightness/mean"], rel=1e-5
    )


@pytest.mark.parametrize("model", ["flux", "sd3"])
@pytest.mark.parametrize("by", ["nodes", "Trainer"])
def test_an_interrupt_between_two_inner_updates_leaves_the_lora_as_it_was(pack, tmp_path, monkeypatch, model, by):
    import comfy.model_management as management

    graph = Graph(pack, tmp_path, model)
    policy = graph.policy()
    graph.iteration(policy)
    before, rows = policy.run.adapters.state_dict(), len(policy.run.metrics)
    before = {name: tensor.clone() for name, tensor in before.items()}
    AdamW, steps = type(policy.run.optimizer), []
    step = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self, *args, **kwargs: (steps.append(1), step(self, *args, **kwargs))[1])

    def interrupted():
        if steps:
            raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(management.InterruptProcessingException):
        if by == "nodes":
            graph.iteration(policy, update=dict(inner_updates=2))
        else:
            graph.train(policy, 5, inner_updates=2)
    assert len(steps) == 1
    after = policy.run.adapters.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and len(policy.run.metrics) == rows
