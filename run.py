#!/usr/bin/env python3
"""TreeRPO from a terminal: the demo, the tests, the benchmarks and any workflow.

    python3 run.py demo [--model flux|sd3] [--comfyui PATH] [--iterations N] [--out DIR] [--seed S]
    python3 run.py test [pytest arguments]
    python3 run.py bench NAME [--json FILE] [benchmark arguments]
    python3 run.py workflow FILE.json [--server URL | --comfyui PATH] [--set NODE.INPUT=VALUE] [--out DIR]

Needs Python 3.10 or newer and nothing else. Whatever a command needs goes into an environment of its own in your
cache folder (about 6 GB, made once per set of requirements); your ComfyUI's environment, models and settings are
not touched. ComfyUI runs headless on a free local port, in a private base directory that links this pack.

Tests and benchmarks import the same parts: `find_comfyui`, `ensure_env`, `Server`, `Client`. They live in
`environments.py` (where ComfyUI is, what runs it) and `headless.py` (the server, its client, graphs).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

import environments
from environments import REPO, Problem, ensure_env, environment, install_comfyui, older_comfyuis, overlay, say, show
from headless import (
    Client,
    ExecutionError,  # noqa: F401 - for those who import this file
    Server,
    apply_setting,
    find_node,
    load_graph,
    progress_bar,
    set_input,
    title,
)

NO_COMFYUI = (
    "ComfyUI was not found and could not be installed: the same core runs through diffusers on the same embedded model."
)


def find_comfyui(explicit=None):
    """The ComfyUI folder, or None. Looked for around this file by the path it was started with, links and all."""
    return environments.find_comfyui(explicit, __file__)


def command_demo(args, rest):
    out = Path(args.out).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    comfyui = find_comfyui(args.comfyui) or install_comfyui()
    python = ensure_env(comfyui)
    if comfyui is None:
        say(NO_COMFYUI)
        options = ["--model", args.model, "--iterations", args.iterations, "--out", out, "--seed", args.seed]
        return run_in_env(python, ["-m", "standalone.demo", *options], None)
    started, name = time.monotonic(), f"treerpo_demo_{args.model}"
    say(f"Starting ComfyUI from {comfyui} ...")
    with Server(comfyui, python, pack=REPO) as server:
        client = Client(server.url)
        try:
            rows = train(client, server.base, name, args)
            scores, pictures = compare(client, name, args, out)
            found = figures(client, server.base, name, args, python)
        finally:
            files = collect(server.base, name, out)
    ends = [sum(row["reward"] for row in part) / len(part) for part in (rows[:4], rows[-4:])]
    summary = {"backend": "comfyui", "model": args.model, "iterations": len(rows), "seed": args.seed}
    summary |= {
        "reward_first": ends[0],
        "reward_last": ends[1],
        "held_out": scores,
        **found,
        "seconds": time.monotonic() - started,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    say(f"Mean reward, first {len(rows[:4])} -> last {len(rows[-4:])} iterations: {ends[0]:.4f} -> {ends[1]:.4f}")
    if None not in scores.values():
        say(f"Held-out prompts, before -> after: {scores['before']:.4f} -> {scores['after']:.4f}")
    say(f"In {out}: {', '.join([*files, *pictures, 'summary.json'])}")
    return 0


def shipped(name):
    """A shipped graph in API format."""
    return load_graph(REPO / "workflows" / "api" / f"{name}.json")


def train(client, base, name, args):
    """Run the Trainer's graph, without its evaluations; the rows of metrics.jsonl."""
    graph, listed = shipped("trainer"), shipped("first_steps")
    settings = [
        ("Model", "model", args.model),
        ("Policy", "run_name", name),
        ("Prompts", "text", listed[find_node(listed, "Prompts")]["inputs"]["text"]),
        ("Prompts", "held_out", 0.0),
        ("Trainer", "iterations", args.iterations),
        ("Trainer", "seed", args.seed),
        ("Trainer", "evaluate_every", 0),
        ("Save", "lora_name", name),
    ]
    for setting in settings:
        set_input(graph, *setting)
    client.run(graph, progress_bar("  training "))
    metrics = base / "output" / "treerpo" / name / "metrics.jsonl"
    if not metrics.is_file():
        raise Problem(f"The graph ran but left no {metrics.name} in {metrics.parent}.")
    rows = [json.loads(line) for line in metrics.read_text("utf-8").splitlines() if line.strip()]
    for row in rows[9::10]:
        text = f"iteration {row['iteration'] + 1:3d}/{args.iterations}   reward {row['reward']:.4f}"
        say(f"{text} ± {row['reward_std']:.4f}   {row['forwards']} forwards   {row['seconds']:.1f} s")
    return rows


def comparison(name, args):
    """The shipped graph that draws without and with this LoRA."""
    graph = shipped("compare")
    set_input(graph, "Model", "model", args.model)
    set_input(graph, "LoRA", "lora_name", f"{name}.safetensors")
    return graph


def compare(client, name, args, out):
    """Held-out prompts on fixed seeds, without and with the trained LoRA: (mean scores, names of the pictures in
    `out`).
    """
    graph = comparison(name, args)
    known = client.object_info()
    # older ComfyUI has no Compare Images
    graph = {node_id: node for node_id, node in graph.items() if node["class_type"] in known}
    outputs = client.run(graph, progress_bar("  before and after "))
    scores, pictures = {}, []
    for when in ("before", "after"):
        images = outputs.get(find_node(graph, when.capitalize()), {}).get("images", [])
        names = (
            [f"{when}.png"] if len(images) == 1 else [f"{when}_{number}.png" for number in range(1, len(images) + 1)]
        )
        pictures += [client.download(image, out, file).name for image, file in zip(images, names)]
        scores[when] = mean_score(outputs.get(find_node(graph, f"Score {when}"), {}).get("text", ""))
    return scores, pictures


def figures(client, base, name, args, python):
    """What the judge sees in 48 pictures of the held-out prompts, before and after: {figure: {before, after}}."""
    graph = comparison(name, args)
    set_input(graph, "Size", "batch_size", 48)
    for when in ("before", "after"):
        pictures = graph[find_node(graph, when.capitalize())]["inputs"]
        pictures |= {"images": [find_node(graph, f"Decode {when}"), 0], "filename_prefix": f"figures/{when}"}
        del graph[find_node(graph, f"Score {when}")]
    del graph[find_node(graph, "Reward")]
    client.run(graph)
    command = [str(python), "-m", "standalone.figures", str(base / "output" / "figures")]
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise Problem(f"The judge could not look at the pictures: {done.stderr.strip().splitlines()[-1]}")
    sentence, found = done.stdout.strip().splitlines()[-2:]
    say(sentence)
    return json.loads(found)


def mean_score(text):
    """The number after the word 'mean' in what Score Images reports, or None."""
    text = text if isinstance(text, str) else "\n".join(map(str, text))
    found = re.search(r"\bmean\b[^\d\n-]*(-?\d+(?:\.\d+)?(?:e-?\d+)?)", text, re.IGNORECASE)
    return float(found.group(1)) if found else None


def collect(base, name, out):
    """Copy what the run left so far out of the private base directory; the names."""
    run = base / "output" / "treerpo" / name
    files = [
        run / "metrics.jsonl",
        run / "reward_curve.png",
        run / "tree.png",
        base / "models" / "loras" / f"{name}.safetensors",
    ]
    for file in files:
        if file.is_file():
            shutil.copy2(file, out / file.name)
    return [file.name for file in files if file.is_file()]


def command_test(args, rest):
    """pytest over tests/ in the environment; the last line says what was skipped and why. A whole suite runs in several
    processes, a file of tests in one of them, unless the arguments choose (-n 0: one process)."""
    comfyui = find_comfyui()
    python = ensure_env(comfyui)
    older = []
    for path in older_comfyuis(comfyui):
        try:
            overlay(path, python)
            older.append(str(path))
        except Problem as problem:
            say(f"Left out {path}: {problem}")
    extra = {} if "TREERPO_COMFYUI_OLDER" in os.environ else {"TREERPO_COMFYUI_OLDER": os.pathsep.join(older)}
    whole = not any((REPO / word.split("::")[0]).exists() for word in rest if not word.startswith("-"))
    paths = ["tests"] if whole else []
    if whole and not any(word.startswith(("-n", "--num", "--pdb", "--collect")) for word in rest):
        cores = os.cpu_count() or 1
        processes = min(4, cores)
        paths += ["-n", str(processes), "--dist", "loadfile"]
        extra["OMP_NUM_THREADS"] = str(cores // processes)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run_in_env(python, ["-m", "pytest", *paths, *rest, f"--junitxml={report}"], comfyui, **extra)
        say(skipped_line(report))
    return code


def skipped_line(report):
    """`skipped: 2 (1 x no GPU; 1 x ...)` from pytest's report."""
    try:
        cases = xml.etree.ElementTree.parse(report).getroot().iter("testcase")
    except (OSError, xml.etree.ElementTree.ParseError):
        return "skipped: unknown (pytest ended without a report)"
    reasons = collections.Counter()
    for case in cases:
        for skip in case.iter("skipped"):
            reason = skip.get("message", "")
            if reason == "collection skipped":  # a whole file: its text is ('file', line, 'Skipped: reason')
                reason = (skip.text or "").partition("Skipped: ")[2][:-2] or reason
            if skip.get("type") != "pytest.xfail":
                reasons[reason] += 1
    why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    return f"skipped: {sum(reasons.values())}" + (f" ({why})" if why else "")


def command_bench(args, rest):
    # the rest are helpers
    names = sorted(path.stem for path in (REPO / "benchmarks").glob("*.py") if "__main__" in path.read_text("utf-8"))
    if args.name not in names:
        raise Problem(f"There is no benchmark '{args.name}'; there are: {', '.join(names) or 'none yet'}.")
    comfyui = find_comfyui()
    return run_in_env(ensure_env(comfyui), [REPO / "benchmarks" / f"{args.name}.py", *rest], comfyui, PYTHONPATH=REPO)


def run_in_env(python, arguments, comfyui, **extra):
    """Run python in the repository root; its exit code."""
    env = environment(**extra)
    env.pop("COMFYUI_PATH", None)
    if comfyui:
        env["COMFYUI_PATH"] = str(comfyui)
    return subprocess.run([str(word) for word in (python, *arguments)], cwd=REPO, env=env).returncode


def command_workflow(args, rest):
    graph, out = load_graph(args.file), Path(args.out).expanduser().absolute()
    for setting in args.set:
        apply_setting(graph, setting)
    if args.server:
        return run_workflow(Client(args.server), graph, out)
    comfyui = find_comfyui(args.comfyui)
    if comfyui is None:
        raise Problem("No ComfyUI was found: give --server URL, --comfyui PATH or set COMFYUI_PATH.")
    python, base = ensure_env(comfyui), out / "comfyui"  # kept, so that the next run goes on from this one's results
    base.mkdir(parents=True, exist_ok=True)
    folders = [path.name for path in (comfyui / "models").iterdir() if path.is_dir()]
    paths = {"yours": {"base_path": str(comfyui / "models")} | {name: name for name in folders}}
    (base / "models.yaml").write_text(json.dumps(paths), "utf-8")  # JSON is YAML
    with Server(comfyui, python, base, args=("--extra-model-paths-config", base / "models.yaml")) as server:
        return run_workflow(Client(server.url), graph, out)


def run_workflow(client, graph, out):
    outputs = client.run(graph, progress_bar())
    for node_id, output in outputs.items():
        for items in output.values():
            for item in items if isinstance(items, list) else []:
                if isinstance(item, dict) and "filename" in item:
                    say(f"{title(graph.get(node_id, {}))}: {client.download(item, out)}")
                elif isinstance(item, str):
                    say(f"{title(graph.get(node_id, {}))}: {item}")
    return 0


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train the embedded model in ComfyUI and show before and after")
    demo.add_argument("--model", choices=("flux", "sd3"), default="flux")
    demo.add_argument("--comfyui", metavar="PATH", help="the ComfyUI to use (default: the one that is found)")
    demo.add_argument("--iterations", type=positive, default=160, metavar="N")
    demo.add_argument("--out", default="demo_output", metavar="DIR")
    demo.add_argument("--seed", type=int, default=0, metavar="S")
    commands.add_parser("test", help="run the test suite", add_help=False, allow_abbrev=False)
    bench = commands.add_parser("bench", help="run a benchmark", add_help=False, allow_abbrev=False)
    bench.add_argument("name", nargs="?", default="")
    flow = commands.add_parser("workflow", help="run a workflow in API format")
    flow.add_argument("file")
    place = flow.add_mutually_exclusive_group()
    place.add_argument("--server", metavar="URL", help="a ComfyUI that runs already")
    place.add_argument("--comfyui", metavar="PATH", help="start this one (default: the one that is found)")
    flow.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="NODE is an id, a title or a class"
    )
    flow.add_argument("--out", default="workflow_output", metavar="DIR")
    return parser


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


def main(argv=None):
    if sys.version_info < (3, 10):  # noqa: UP036 - older ones get here
        sys.exit("run.py needs Python 3.10 or newer.")
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("test", "bench"):
        parser.error(f"unknown argument: {' '.join(rest)}")
    commands = {"demo": command_demo, "test": command_test, "bench": command_bench, "workflow": command_workflow}
    try:
        return commands[args.command](args, rest)
    except Problem as problem:
        show("")
        print(f"run.py: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrun.py: stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    for name in ("SIGTERM", "SIGHUP"):  # end what we started too when someone ends us
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
