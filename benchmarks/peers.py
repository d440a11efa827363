"""The public code of TreeGRPO, Flow-GRPO and DiffusionNFT beside ours: the same network, prompts, reward and machine.

    python3 run.py bench peers --treegrpo FOLDER --flow-grpo FOLDER --nft FOLDER

Each folder is where that code lies: MAIR-Lab-HUST/TMPO at commit 3d8f618, its folder TreeGRPO-main, yifan123/flow_grpo
(ac4c86e), NVlabs/DiffusionNFT (24af555). What is not given is left out, and said so.

The model is the embedded SD3 under diffusers' own pipeline (peer_world.py), the reward the demo's, seen by the judge by
rules; all start as the same untuned network and sample by the same scheduler of 10 steps. A run ends when it has spent
--budget cost units (a latent through the network is 1, one that is also back-propagated as many as that was measured to
take) or --seconds, whichever comes first; evaluations are neither counted nor timed. Ours (tree regression as the
templates ship it, and the same trees by policy gradient) run through the diffusers engine.

The peers' training loops run whole, as they are in their files: TreeGRPO's RLTrainer.run, and main of Flow-GRPO's
train_sd3.py and of DiffusionNFT's train_nft_sd3.py. Changes, all made from outside (peer_code.py):

all       from_pretrained gives the embedded pipeline, the text encoders its features (12 tokens) and the reward model
          the demo's reward; saving or evaluating calls our meter; no progress bars, no worker processes of data
          loaders; flags, logs and HPSv2 are empty packages; float32; guidance 1, as this model was trained for, in
          place of 4.5; LoRA of rank 8 on all linear layers, begun as they begin theirs (B = 0), in place of rank 32 on
          attention; --rate in place of 3e-4 (TreeGRPO 1e-5); the clip range 1e-2 in place of 1e-4, which is for 64
          times as many latent elements and would stop nearly every second update here
TreeGRPO  the LoRA in place of all weights; no gradient checkpointing, which this size does not need; else its base.yaml
          (w 4, k 2) with two prompts per epoch as in its README
Flow-GRPO its pickscore_sd3 with groups of 8 in place of 24 images, so that an update costs about what one of ours does;
          two prompts and two updates per epoch as there; no KL term (its code needs several processes for it)
NFT       its sd3_pickscore with groups of 8, one prompt and one update per epoch; one process without NCCL on the CPU

Part `check` compares numbers where they should agree: their step's means and log-probabilities, TreeGRPO's advantages
and gradient on a tree that it sampled itself, and what its trees cost against our closed form.
"""

import argparse
import statistics
import sys
from pathlib import Path

import host
from learning_report import at, cost_to_reach, read

RESULTS = Path(__file__).resolve().parent / "results" / "peers.json"
NAMES = {
    "regression": "ours: tree 4x2, tree regression",
    "tree_grpo": "ours: tree 4x2, GRPO",
    "treegrpo": "TreeGRPO's code: tree 2x4",
    "flow_grpo": "Flow-GRPO's code: 8 images, all steps",
    "nft": "DiffusionNFT's code: 8 images, all steps",
}
JUDGED = ("taste", "follows", "quality", "diversity")


def given(options) -> dict[str, Path]:
    """The peers whose folders were given; says in one sentence which were not."""
    folders = {name: getattr(options, name) for name in ("treegrpo", "flow_grpo", "nft")}
    missing = [f"--{name.replace('_', '-')}" for name, folder in folders.items() if folder is None]
    if missing:
        print(f"Left out, for want of the folder of their code: {', '.join(missing)}.", flush=True)
    return {name: folder.resolve() for name, folder in folders.items() if folder is not None}


def run_one(world, name: str, folder: Path | None, seed: int, options) -> dict:
    from peer_code import PEERS
    from peer_ours import train_ours
    from peer_world import Meter

    meter = Meter(world, world.fresh(), options.budget, options.seconds)
    rate = options.rates.get(name, options.rate)
    if name in PEERS:
        PEERS[name](folder, meter, seed, rate)
    else:
        train_ours(meter, seed, rate, name)
    return {"learning_rate": rate, **meter.result()}


def learn(world, folders: dict[str, Path], options, results: dict) -> None:
    """All methods, seed by seed, so that what is there can be compared at any time; fills `results`."""
    results |= {
        "seeds": options.seeds,
        "budget": options.budget,
        "limit": options.seconds,
        "unit": world.unit,
        "device": host.device(),
        "methods": {},
    }
    wanted = [name for name in NAMES if name in (*folders, "regression", "tree_grpo")]
    wanted = [name for name in wanted if not options.only or name in options.only.split(",")]
    for seed in range(options.seeds):
        for name in wanted:
            run = run_one(world, name, folders.get(name), seed, options)
            results["methods"].setdefault(name, []).append(run)
            print(
                f"seed {seed} {NAMES[name]}: {run['reward'][0]:.3f} -> {run['reward'][-1]:.3f}, "
                + ", ".join(f"{key} {run[key][-1]:.2f}" for key in JUDGED)
                + f", {run['cost'][-1]:.0f} units, {run['seconds'][-1]:.0f} s",
                flush=True,
            )
            host.save(results, options.json)


def mean(runs: list[dict], value) -> float:
    return statistics.mean(value(run) for run in runs)


def first_at(runs: list[dict], axis: str, reward: float) -> float | None:
    """Units ("cost") or seconds at which the mean curve of these runs first has this reward; None if it never has."""
    last = min(run[axis][-1] for run in runs)
    grid = [last * i / 100 for i in range(101)]
    means = [mean(runs, lambda run, x=x: at(run[axis], run["reward"], x)) for x in grid]
    return cost_to_reach({"cost": grid, "mean": means}, reward)


def summarise(results: dict) -> None:
    """Per method: the mean reward at the cost and at the seconds that every run has reached, and its rates."""
    every = [run for runs in results["methods"].values() for run in runs]
    cost, seconds = (min(run[key][-1] for run in every) for key in ("cost", "seconds"))
    results |= {"equal_cost": cost, "equal_seconds": seconds, "summary": {}}
    ours = results["methods"].get("regression", [])
    for name, runs in results["methods"].items():
        final = mean(runs, lambda run: run["reward"][-1])
        results["summary"][name] = {
            **{f"regression_there_at_{axis}": first_at(ours, axis, final) for axis in ("cost", "seconds") if ours},
            "start": mean(runs, lambda run: run["reward"][0]),
            "at_equal_cost": mean(runs, lambda run: at(run["cost"], run["reward"], cost)),
            "at_equal_seconds": mean(runs, lambda run: at(run["seconds"], run["reward"], seconds)),
            "final": final,
            **{key: mean(runs, lambda run, key=key: run[key][-1]) for key in JUDGED},
            "cost": mean(runs, lambda run: run["cost"][-1]),
            "seconds": mean(runs, lambda run: run["seconds"][-1]),
            "ms_per_unit": mean(runs, lambda run: 1e3 * run["seconds"][-1] / run["cost"][-1]),
            "seconds_per_image": mean(runs, lambda run: run["seconds_per_image"]),
            "seconds_per_update": mean(runs, lambda run: run["seconds_per_update"]),
            "forwards_per_image": mean(
                runs, lambda run: (run["forwards"][-1] - run["backwards"][-1]) / run["images"][-1]
            ),
            "backwards_per_image": mean(runs, lambda run: run["backwards"][-1] / run["images"][-1]),
            "images": mean(runs, lambda run: run["images"][-1]),
            "updates": mean(runs, lambda run: run["updates"][-1]),
        }


COLUMNS = (
    ("reward at {equal_cost:.0f} units", "at_equal_cost", 3),
    ("after {equal_seconds:.0f} s", "at_equal_seconds", 3),
    ("at the end", "final", 3),
    *((name, name, 2) for name in JUDGED),
    ("units", "cost", 0),
    ("seconds", "seconds", 0),
    ("ms per unit", "ms_per_unit", 1),
    ("s per image", "seconds_per_image", 3),
    ("s per update", "seconds_per_update", 2),
    ("forwards per image", "forwards_per_image", 1),
    ("backwards per image", "backwards_per_image", 1),
    ("updates", "updates", 0),
)


def table(results: dict) -> None:
    print(
        f"\n{results['seeds']} seeds, up to {results['budget']:.0f} units or {results['limit']:.0f} s; a forward and "
        f"backward is {results['unit']:.2f} forwards; {results['device']}\n"
    )
    print(
        "| | " + " | ".join(title.format(**results) for title, _, _ in COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1)
    )
    for name, row in results["summary"].items():
        print(f"| {NAMES[name]} | " + " | ".join(f"{row[key]:.{digits}f}" for _, key, digits in COLUMNS) + " |")


def rate_of(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in NAMES:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(NAMES)}.")
    return name, float(value)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--treegrpo", type=Path, metavar="FOLDER", help="TreeGRPO-main of MAIR-Lab-HUST/TMPO, 3d8f618")
    parser.add_argument("--flow-grpo", type=Path, metavar="FOLDER", help="yifan123/flow_grpo")
    parser.add_argument("--nft", type=Path, metavar="FOLDER", help="NVlabs/DiffusionNFT")
    parser.add_argument("--part", choices=("all", "check", "learn"), default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=10000, help="cost units of a run at most (default 10000)")
    parser.add_argument("--seconds", type=float, default=90, help="seconds of a run at most (default 90)")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="learning rate (default 1.2e-3, the templates')")
    parser.add_argument(
        "--rates", type=rate_of, nargs="+", default=[], metavar="METHOD=RATE", help="others for single methods"
    )
    parser.add_argument("--only", default="", help=f"only these methods, separated by commas: {', '.join(NAMES)}")
    parser.add_argument(
        "--json", type=Path, default=RESULTS, help="write the results there (default: results/peers.json)"
    )
    options = parser.parse_args()
    options.rates, options.json = dict(options.rates), options.json.resolve()
    return options


def main():
    options = arguments()
    folders = given(options)
    from peer_check import check
    from peer_world import World

    world, results = World(), read(options.json)
    try:
        if options.part != "learn":
            results["agreement"] = check(world, folders)
            for name, found in results["agreement"].items():
                print(f"{name}: {found}", flush=True)
        if options.part != "check":
            learn(world, folders, options, results)
    except ValueError as error:
        sys.exit(str(error))
    if options.part != "check":
        summarise(results)
        table(results)
    host.save(results, options.json)


if __name__ == "__main__":
    main()
