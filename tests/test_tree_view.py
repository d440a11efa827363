"""Tree View: its outputs are the chosen leaf's, what it sends to the browser is the tree, and web/treerpo.js stays
small and on public ground.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graph import Graph
from PIL import Image

WEB = Path(__file__).resolve().parent.parent / "web"


@pytest.fixture(scope="module")
def graph(pack, tmp_path_factory):
    import folder_paths
    from comfyui_version import __version__

    folder = tmp_path_factory.mktemp("tree_view")
    before = folder_paths.get_temp_directory()
    folder_paths.set_temp_directory(str(folder / "temp"))
    # older ones take FLUX sizes as fixed
    built = Graph(pack, folder, "flux" if tuple(map(int, __version__.split(".")[:2])) >= (0, 9) else "sd3")
    built.forget()
    yield built
    folder_paths.set_temp_directory(before)


@pytest.fixture(scope="module")
def made(graph):
    """A tree of two prompts with 2 x 2 x 2 leaves each, scored; everything Tree View can be connected to."""
    positive, prompts = graph.prompts()
    tree, leaves = graph.sample(graph.policy(), positive, shape=graph.shape(trees=2))
    rewards = graph.score(graph.decode(leaves), prompts)
    advantages = graph.call("Advantages", tree=tree, rewards=rewards)[0]
    return {"tree": tree, "rewards": rewards, "advantages": advantages, "leaves": leaves}


def shown(graph, monkeypatch, **inputs):
    """The outputs, and the tree for the browser as it arrives there: through JSON."""
    kept = []
    node_output = graph.pack.nodes.tree_view.io.NodeOutput
    monkeypatch.setattr(
        graph.pack.nodes.tree_view.io, "NodeOutput", lambda *values, ui: kept.append(ui) or node_output(*values, ui=ui)
    )
    outputs = graph.call("TreeView", **inputs)
    assert kept[0]["images"]
    return outputs, json.loads(json.dumps(kept[0]["treerpo_tree"][0], allow_nan=False))


@pytest.mark.parametrize("leaf", [0, 1, 11, 16])
def test_outputs_are_the_chosen_leaf(graph, made, leaf):
    rewards = made["rewards"]
    score = rewards.values["foreground size"]
    row = leaf - 1 if leaf else int(score.argmax())
    picture, image, latent, total, path = graph.call("TreeView", leaf=leaf, **made)
    assert picture.shape[0] == 1 and picture.shape[3] == 3
    assert torch.equal(image, rewards.images[row][None]) and torch.equal(
        latent["samples"], made["leaves"]["samples"][row : row + 1]
    )
    torch.testing.assert_close(graph.decode(latent), image, atol=1e-5, rtol=1e-5)
    assert total == float(score[row])
    assert path.startswith(f"leaf {row + 1} of 16: prompt {row // 8 + 1} of 2") and rewards.prompts[row] in path


def test_path_leads_to_the_leaf(graph, made):
    """The tree and the children that the text names, in the order of the forest; advantages of its own edges."""
    forest, layers = made["tree"].forest, made["advantages"].layers
    for leaf in range(1, 17):
        path = graph.call("TreeView", leaf=leaf, **made)[4]
        row = 2 * (leaf - 1 >= 8) + int(re.search(r"tree (\d) of 2", path)[1]) - 1
        steps = re.findall(
            r"step (\d+): child (\d) of 2, noise level ([\d.]+), sigma ([\d.]+) to ([\d.]+), advantage ([-+][\d.]+)",
            path,
        )
        assert len(steps) == 2
        for layer, (step, child, level, sigma, after, advantage) in enumerate(steps):
            row = 2 * row + int(child) - 1
            assert int(step) == forest.start + layer + 1 and float(level) == pytest.approx(forest.levels[layer])
            assert (float(sigma), float(after)) == pytest.approx(forest.sigma(layer), abs=1e-3)
            assert float(advantage) == pytest.approx(float(layers[layer][row]), abs=0.006)
        assert row == leaf - 1


def test_the_browser_gets_the_whole_tree(graph, made, monkeypatch):
    import folder_paths

    _, tree = shown(graph, monkeypatch, leaf=3, **made)
    forest = made["tree"].forest
    assert (
        tree["branching"],
        tree["depth"],
        tree["trees"],
        tree["start"],
        tree["steps"],
        tree["chosen"],
        tree["size"],
    ) == (2, 2, 2, forest.start, 6, 3, [64, 64])
    assert tree["sigmas"] == pytest.approx(forest.sigmas.tolist()) and tree["levels"] == forest.levels
    assert [[len(layer) for layer in prompt["edges"]] for prompt in tree["prompts"]] == [[4, 8], [4, 8]]
    for k, layer in enumerate(made["advantages"].layers):
        assert [value for prompt in tree["prompts"] for value in prompt["edges"][k]] == pytest.approx(layer.tolist())
    leaves = [leaf for prompt in tree["prompts"] for leaf in prompt["leaves"]]
    assert [leaf["total"] for leaf in leaves] == pytest.approx(made["rewards"].values["foreground size"].tolist())
    assert [leaf["advantage"] for leaf in leaves] == pytest.approx(made["advantages"].layers[-1].tolist())
    for leaf, image in zip(leaves, made["rewards"].images):
        file = Path(folder_paths.get_temp_directory()) / leaf["image"]["subfolder"] / leaf["image"]["filename"]
        saved = graph.pack.core.pictures.plot.to_tensor(Image.open(file))[0]
        assert leaf["image"]["type"] == "temp" and float((saved - image).abs().max()) <= 0.5 / 255 + 1e-6
    _, again = shown(graph, monkeypatch, leaf=3, **made)
    names = {
        leaf["image"]["filename"] for one in (tree, again) for prompt in one["prompts"] for leaf in prompt["leaves"]
    }
    assert len(names) == 32, "the browser would show the images of the run before"


def test_works_without_advantages_leaves_and_scores(graph, made, monkeypatch):
    rewards = made["rewards"]
    missing = rewards.values["foreground size"].clone()
    missing[:8] = math.nan
    without = type(rewards)({"size": missing}, {"size": 1.0}, False, rewards.prompts, rewards.images)
    outputs, tree = shown(graph, monkeypatch, tree=made["tree"], rewards=without, leaf=1)
    assert math.isnan(outputs[3]) and "no score" in outputs[4] and "advantage" not in outputs[4]
    assert "connect Tree Sampler's output 'leaves'" in outputs[2].message
    assert (
        [leaf["total"] for leaf in tree["prompts"][0]["leaves"]]
        == [None] * 8
        == [leaf["advantage"] for leaf in tree["prompts"][1]["leaves"]]
    )
    assert all(value is None for prompt in tree["prompts"] for layer in prompt["edges"] for value in layer)
    best, _ = shown(graph, monkeypatch, tree=made["tree"], rewards=without, leaf=0)
    assert best[3] == float(missing[8:].max())


def test_bad_input_is_one_sentence(graph, made):
    rewards = made["rewards"]
    fewer = type(rewards)({"size": torch.zeros(4)}, {"size": 1.0}, False, rewards.prompts[:4], rewards.images[:4])
    other = replace(made["advantages"], layers=[torch.zeros(2), torch.zeros(4)])
    for change, sentence in [
        ({"leaf": 17}, "There is no leaf 17: this tree has the leaves 1 to 16"),
        ({"rewards": fewer}, "for 4 images, but the tree has 16 leaves"),
        ({"advantages": other}, "advantages are of another tree"),
        ({"leaves": {"samples": torch.zeros(3, 16, 8, 8)}}, "are 3, but the tree has 16"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            graph.call("TreeView", **{"leaf": 0, **made, **change})


def test_old_images_go(graph, made, monkeypatch):
    """Training with Tree View in the graph must not fill the disk."""
    import folder_paths

    monkeypatch.setattr(graph.pack.nodes.tree_view, "KEPT", 20)
    for _ in range(3):
        graph.call("TreeView", leaf=0, **made)
    assert len(list((Path(folder_paths.get_temp_directory()) / "treerpo_tree").glob("*.png"))) <= 20 + 16


@pytest.mark.parametrize("name", sorted(path.name for path in WEB.glob("**/*.js")))
def test_scripts_are_small_and_use_only_the_public_modules(name):
    script = (WEB / name).read_text("utf-8")
    assert len(script.splitlines()) < 470
    foreign = [name for name in re.findall(r"from\s+[\"']([^\"']+)", script) if not (WEB / name).is_file()]
    assert foreign == ["../../scripts/app.js", "../../scripts/api.js"] and not re.search(r"\bimport\(", script)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", script), (
        "prompts come from shared workflows"
    )
