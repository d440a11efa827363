"""benchmarks/learning_report.py: what is read off learning curves, and that no run is lost."""

import copy
import json
import sys
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as keep:
    # a benchmark finds its neighbours beside itself; left on the path, `host` and `iteration` would be anyone's
    keep.setattr(sys, "path", [str(Path(__file__).resolve().parent.parent / "benchmarks"), *sys.path])
    import learning_report


def run(rewards, diversity=(1.0, 0.9, 0.5)):
    return {
        "cost": [0.0, 50.0, 100.0],
        "seconds": [0.0, 5.0, 20.0],
        "reward": list(rewards),
        "taste": list(rewards),
        "follows": [0.5, 0.5, 0.5],
        "quality": [0.9, 0.8, 0.7],
        "diversity": list(diversity),
        "iterations": 2,
    }


def results():
    methods = {
        "window": [run([0.1, 0.1, 0.2])] * 3,
        learning_report.LEARNER: [run([0.1, 0.3, 0.6])] * 2,
        "stopped": [run([0.1, 0.1, 0.8], (1.0, 1.0, 1.0))],
    }
    rows = {name: {"learning_rate": 1e-3, "prompts": 1, "runs": runs} for name, runs in methods.items()}
    return {"model": "sd3", "reward": "demo", "budget": 100.0, "methods": rows}


def test_where_tree_regression_has_what_another_method_ends_with():
    found = results()
    learning_report.compare(found, {})
    there = found["reached"]["window"]
    assert len(there) == 2  # the seeds that both have
    assert there[0]["cost"] == pytest.approx(0.25)  # half way from .1 to .3
    assert there[0]["seconds"] == pytest.approx(2.5 / 20)
    assert there[0]["judged"]["diversity"] == pytest.approx(0.95)
    assert there[0]["theirs"]["diversity"] == 0.5 and there[0]["untrained"]["diversity"] == 1.0
    assert found["reached"]["stopped"] == [None]  # it ends at .8, tree regression at .6


def test_no_run_is_dropped_where_methods_have_different_numbers(capsys):
    found = results()
    before = copy.deepcopy({name: row["runs"] for name, row in found["methods"].items()})
    learning_report.compare(found, {})
    learning_report.table(found)
    assert {name: row["runs"] for name, row in found["methods"].items()} == before
    assert "1 to 3 seeds" in capsys.readouterr().out


def test_report_draws_methods_that_the_picture_has_no_name_for(tmp_path):
    found = results()
    found["methods"] = {"stopped": found["methods"]["stopped"]}
    (tmp_path / "learning_sd3_demo.json").write_text(json.dumps(found))
    learning_report.report(tmp_path, tmp_path / "joined.json")
    assert (tmp_path / "learning.png").stat().st_size
    joined = json.loads((tmp_path / "joined.json").read_text())
    assert "runs" not in joined["sd3_demo"]["methods"]["stopped"]
    assert "runs" in json.loads((tmp_path / "learning_sd3_demo.json").read_text())["methods"]["stopped"]
