"""A dress rehearsal at true size: ComfyUI with model files of the published shapes, precisions and names, and the
shipped template run on them.

    python3 run.py bench rehearsal --model sd35_medium|flux [--layout checkpoint] [--reward clipscore] [--size 256]

Weights are random, so nothing is downloaded and pictures are noise; everything else is what a user meets: files in a
models folder, ComfyUI's own loaders, text encoders, VAE, a reward model of true size, the template's Trainer, the saved
LoRA and ComfyUI's LoRA loaders. Only what costs time is smaller: size, steps, tree, number of prompts and iterations.
It writes one ComfyUI folder of 9 to 19 GB below --folder, and removes it afterwards unless --keep. Needs 17 GB of
memory for sd35_medium and 22 for flux (swap counts: text encoders are idle after the prompts are encoded). Without a
GPU, ComfyUI is made to choose the precisions it has on one, so that memory can be compared: --dtype comfy leaves the
choice to it. OMP_NUM_THREADS sets the cores.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environments import REPO, say
from headless import Client, Server, find_node, load_graph, set_input

SHORT = "a fox curled up asleep in fresh snow"
TEMPLATES = {"sd35_medium": "sd35_trainer", "flux": "flux_trainer"}
T5 = "t5xxl_fp8_e4m3fn.safetensors"
LORA = "rehearsal"


def long_prompt(words: int) -> str:
    """Of about 1.3 tokens per word."""
    vocabulary = "a tall old lighthouse above stormy waves at dawn painted in oil with thick brush strokes and".split()
    return " ".join(vocabulary[i * 7 % len(vocabulary)] for i in range(words))


# ---------------------------------------------------------------- the graphs


def training(options) -> dict:
    """The shipped template, smaller."""
    from rehearsal_files import REWARDS

    graph = load_graph(REPO / "workflows" / "api" / f"{TEMPLATES[options.model]}.json")
    kind, _, file = REWARDS[options.reward]
    graph["rehearsal_reward"] = {"class_type": kind, "_meta": {"title": "Reward"}, "inputs": {"file": file}}
    trainer = graph[find_node(graph, "Trainer")]["inputs"]
    trainer.pop("judge")  # one reward model at a time
    prompts = [SHORT, long_prompt(options.words)][: options.prompts]
    settings = [
        ("Text encoders", "clip_name3" if options.model == "sd35_medium" else "clip_name1", T5),
        ("Size", "width", options.size),
        ("Size", "height", options.size),
        ("Sigmas", "steps", options.steps),
        ("Shape", "branching", options.branching),
        ("Shape", "depth", options.depth),
        ("Shape", "window", "fixed"),
        ("Shape", "steps", options.steps),
        ("Policy", "checkpointing", options.checkpointing == "on"),
        ("Prompts", "text", "\n".join(prompts)),
        ("Prompts", "held_out", 0.0),
        ("Trainer", "reward_model", ["rehearsal_reward", 0]),
        ("Trainer", "iterations", options.iterations),
        ("Trainer", "per_iteration", len(prompts)),
        ("Trainer", "evaluate_every", 0),
        ("Save", "lora_name", LORA),
    ]
    if options.layout == "checkpoint":
        loader = {"class_type": "CheckpointLoaderSimple", "_meta": {"title": "FLUX.1-dev fp8"}}
        graph["1"] = loader | {"inputs": {"ckpt_name": "flux1-dev-fp8.safetensors"}}
        del graph["2"], graph["3"], settings[0]
        relink(graph, {"2": ["1", 1], "3": ["1", 2]})
    for setting in settings:
        set_input(graph, *setting)
    if find_node(graph, "TreeRPOPreflight") is None:
        graph["rehearsal_preflight"] = {
            "class_type": "TreeRPOPreflight",
            "_meta": {"title": "Preflight"},
            "inputs": {
                name: trainer[name] for name in ("policy", "latent_image", "shape", "micro_batch", "cfg", "vae")
            },
        }
    graph[find_node(graph, "Preflight")]["inputs"] |= {
        "reward_model": ["rehearsal_reward", 0],
        "per_iteration": len(prompts),
    }
    return reachable(graph)


def relink(graph: dict, places: dict) -> None:
    """What came from one of these nodes comes from another one's output."""
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in places:
                node["inputs"][name] = list(places[value[0]])


def reachable(graph: dict) -> dict:
    """Without nodes that nothing uses any more, such as the template's other rewards."""
    ends = ("TreeRPOPreflight", "TreeRPOTrainer", "TreeRPOSaveLora", "PreviewImage")
    wanted = [number for number, node in graph.items() if node["class_type"] in ends]
    for number in wanted:
        links = [value[0] for value in graph[number]["inputs"].values() if isinstance(value, list)]
        wanted += [link for link in links if link not in wanted]
    return {number: node for number, node in graph.items() if number in wanted}


def loaders(graph: dict) -> dict:
    """The nodes that load the model's files, for graphs of their own: ComfyUI then keeps what they have loaded."""
    return {number: node for number, node in graph.items() if "Loader" in node["class_type"]}


def probe(kind: str, **inputs) -> dict:
    return {"class_type": f"Rehearsal{kind}", "_meta": {"title": kind}, "inputs": inputs}


def drawing(graph: dict, options) -> dict:
    """Files loaded, prompts of several lengths encoded, and a KSampler of one step."""
    clip = graph[find_node(graph, "Trainer")]["inputs"]["clip"]
    texts = [SHORT, *(long_prompt(words) for words in options.lengths)]
    sampler = dict(seed=1, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0)
    return {
        **loaders(graph),
        "size": graph[find_node(graph, "Size")],
        "shapes": probe("Shapes", clip=clip, texts=json.dumps(texts)),
        "draw": {
            "class_type": "KSampler",
            "_meta": {"title": "KSampler"},
            "inputs": sampler
            | {"model": ["1", 0], "positive": ["shapes", 0], "negative": ["shapes", 0], "latent_image": ["size", 0]},
        },
        "latents": probe("Latents", base=["draw", 0]),
    }


def after(graph: dict, options) -> dict:
    """The same picture with the LoRA bypassed by one of ComfyUI's loaders, and merged by its other one.

    Merging copies the weights first: for the whole of FLUX 9 GB more, so there it is loaded and not drawn.
    """
    parts = drawing(graph, options)
    for name, kind in (("bypass", "LoraLoaderBypassModelOnly"), ("merged", "LoraLoaderModelOnly")):
        lora = {"model": ["1", 0], "lora_name": f"{LORA}.safetensors", "strength_model": 1.0}
        parts[name] = {"class_type": kind, "_meta": {"title": name}, "inputs": lora}
        if name == "bypass" or options.model != "flux" or options.blocks:
            parts[f"draw_{name}"] = {**parts["draw"], "inputs": {**parts["draw"]["inputs"], "model": [name, 0]}}
            parts["latents"]["inputs"][name] = [f"draw_{name}", 0]
    parts["patches"] = probe("Patches", model=["merged", 0], file=f"{LORA}.safetensors")
    return parts


def checksum(graph: dict, when: str) -> dict:
    return {**loaders(graph), "checksum": probe("Checksum", model=["1", 0], when=when)}


# ---------------------------------------------------------------- the run


def write_files(models: Path, options) -> float:
    """All model files, in a process of its own, whose memory ends with it; seconds."""
    began = time.monotonic()
    code = "import sys, pathlib, rehearsal_files as r; r.write_all(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    command = [sys.executable, "-c", code, str(models), options.model, options.layout, options.reward]
    command.append(str(options.blocks))
    subprocess.run(command, cwd=Path(__file__).parent, check=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    return time.monotonic() - began


def answer(outputs: dict, node: str):
    """What one of the probe's nodes found."""
    return json.loads("".join(outputs[node]["text"]))


def rehearse(options, base: Path) -> dict:
    log = base / "phases.jsonl"
    for old in (base / "output", base / "models" / "loras"):  # of an earlier rehearsal with --keep
        shutil.rmtree(old, ignore_errors=True)
    for old in (log, base / "diffusers.safetensors"):
        old.unlink(missing_ok=True)
    os.environ |= {
        "TREERPO_REHEARSAL_LOG": str(log),
        "TREERPO_REHEARSAL_AS_GPU": str(int(options.dtype == "gpu")),
        "MALLOC_MMAP_THRESHOLD_": "1048576",  # glibc gives tensors back when they are freed: peaks are then their own
    }
    pack = base / "custom_nodes" / "treerpo_rehearsal.py"
    pack.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("rehearsal_probe.py"), pack)
    graph, found = training(options), {}
    with Server(
        os.environ["COMFYUI_PATH"], sys.executable, base, args=("--cache-classic", "--use-pytorch-cross-attention")
    ) as server:
        client = Client(server.url)
        stages = {
            "loaded": checksum(graph, "before"),
            "before": drawing(graph, options),
            "training": graph,
            "trained": checksum(graph, "after"),
            "after": after(graph, options),
        }
        for name, made in stages.items():
            began = time.monotonic()
            found[name] = client.run(made, lambda title, value, whole: None)
            say(f"{name}: {time.monotonic() - began:.0f} s")
        unmatched = [
            line for line in server.log_text().splitlines() if re.search("lora key not loaded|NOT LOADED", line)
        ]
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    metrics = [
        json.loads(line) for line in next(base.glob("output/treerpo/*/metrics.jsonl")).read_text("utf-8").splitlines()
    ]
    preflight = "".join(found["training"][find_node(graph, "Preflight")]["text"])
    say(preflight)
    first, second = answer(found["loaded"], "checksum"), answer(found["trained"], "checksum")
    drawn = {when: answer(found[when], "latents") for when in ("before", "after")}
    return {
        "weights_unchanged": first["sum"] == second["sum"],
        "picture_unchanged": drawn["before"]["sum"] == drawn["after"]["sum"],
        "left_on_the_model": second["hooks"] + second["swapped_forwards"] + second["trainable"],
        "checksums": [first, second],
        "conditioning": answer(found["before"], "shapes"),
        "drawn": drawn,
        "lora": answer(found["after"], "patches") | {"unmatched": len(unmatched), **in_diffusers(base, options)},
        "iterations": metrics,
        "phases": summary(rows),
        "memory": compared(rows, preflight),
    }


def in_diffusers(base: Path, options) -> dict:
    """How many of the LoRA's layers diffusers' own network of true size has, with the same widths."""
    source, target = base / "models" / "loras" / f"{LORA}.safetensors", base / "diffusers.safetensors"
    convert = [sys.executable, "-m", "standalone.launch", "convert", source, target, "--to", "diffusers"]
    subprocess.run(list(map(str, convert)), cwd=REPO, check=True)
    code = "import sys, pathlib, rehearsal_diffusers as r; r.check(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(target), options.model],
        cwd=Path(__file__).parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def summary(rows: list[dict]) -> dict:
    """Per phase: how often, seconds in all, and the most memory above its beginning."""
    found: dict[str, dict] = {}
    for row in rows:
        one = found.setdefault(row["phase"], {"times": 0, "seconds": 0.0, "above": 0, "peak": 0, "kept": 0})
        one["times"] += 1
        one["seconds"] += row["seconds"]
        one["above"] = max(one["above"], row["peak"] - row["before"])
        one["peak"] = max(one["peak"], row["peak"])
        one["kept"] += row["after"] - row["before"]
    return found


def compared(rows: list[dict], preflight: str) -> dict:
    """Preflight's numbers beside what was measured, GB: the weights at work and what the phase took beyond its start.

    On a CPU nothing leaves the memory between phases; on a GPU the other models would.
    """
    said = {name: float(value) for name, value in re.findall(r"^(\w+): about ([\d.]+) GB", preflight, re.MULTILINE)}
    found = {"model": float(re.search(r"Model ([\d.]+) GB", preflight)[1])}
    for name, phase in (("sampling", "rollout"), ("learning", "update"), ("decoding", "decode"), ("scoring", "reward")):
        own = [(row["weights"] + row["peak"] - row["before"]) / 1e9 for row in rows if row["phase"] == phase]
        if name in said and own:
            found[name] = {"estimated": said[name], "measured": max(own), "ratio": said[name] / max(own)}
    return found


def show(report: dict) -> None:
    for name, one in report["phases"].items():
        say(
            f"{name:26}{one['times']:3} x {one['seconds']:9.1f} s   {one['above'] / 1e9:7.2f} GB above its start, "
            f"{one['peak'] / 1e9:6.2f} GB in all, kept {one['kept'] / 1e9:6.2f} GB"
        )
    for name in (
        "weights_unchanged",
        "picture_unchanged",
        "left_on_the_model",
        "conditioning",
        "drawn",
        "lora",
        "memory",
    ):
        say(f"{name}: {report[name]}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, choices in (
        ("model", "sd35_medium", tuple(TEMPLATES)),
        ("layout", "files", ("files", "checkpoint")),
        ("reward", "clipscore", ("clipscore", "hps_v2", "pickscore", "image_reward")),
        ("checkpointing", "on", ("on", "off")),
        ("dtype", "gpu", ("gpu", "comfy")),
    ):
        parser.add_argument(f"--{name}", default=default, choices=choices, help=f"default {default}")
    for name, default, text in (
        ("size", 256, "pixels"),
        ("iterations", 1, "of training"),
        ("steps", 3, "sampling steps"),
        ("branching", 2, "of the tree"),
        ("depth", 1, "of the tree"),
        ("prompts", 2, "1 = a short one, 2 = a long one beside it"),
        ("words", 100, "of the long prompt"),
        ("blocks", 0, "of the network, to try the rehearsal itself; 0 = all"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--lengths", default="100", help="words of further prompts that are only encoded")
    parser.add_argument("--folder", type=Path, help="where the ComfyUI folder is made (default: the temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep that folder and its files; used again if it is there")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/rehearsal_<model>.json")
    options = parser.parse_args()
    options.lengths = [int(words) for words in options.lengths.split(",") if words]
    if options.layout == "checkpoint" and options.model != "flux":
        parser.error("--layout checkpoint is FLUX's one file; the other models have one layout")
    if options.blocks and options.model != "flux":
        parser.error("--blocks is for FLUX: ComfyUI reads the number of SD3.5's blocks off its width")
    if options.size % 16 or options.prompts not in (1, 2) or options.steps < max(3, options.depth + 1):
        parser.error("the size must be a multiple of 16, prompts 1 or 2, steps at least 3 and more than depth")
    return options


def main() -> None:
    options = arguments()
    if not os.environ.get("COMFYUI_PATH"):
        sys.exit("The rehearsal runs in ComfyUI, and none was found: set COMFYUI_PATH.")
    base = Path(tempfile.mkdtemp(prefix="treerpo-rehearsal-", dir=options.folder))
    if options.keep and options.folder:
        base.rmdir()
        base = options.folder / options.model
    try:
        written = 0.0
        if not (base / "models" / "complete").exists():
            written = write_files(base / "models", options)
            (base / "models" / "complete").touch()
            say(f"files written: {written:.0f} s")
        began = time.monotonic()
        report = rehearse(options, base)
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "folder", "keep")}
        report = {"options": settings, "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()),
                  "seconds_writing": written, "seconds": time.monotonic() - began, **report}  # fmt: skip
        show(report)
        kind = options.model if options.layout == "files" else f"{options.model}_{options.layout}"
        path = options.json or Path(__file__).parent / "results" / f"rehearsal_{kind}.json"
        path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    finally:
        if options.keep:
            say(f"kept: {base}")
        else:
            shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
