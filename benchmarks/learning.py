"""Reward against cost: independent GRPO, a window, and two trees, each with the same cost per iteration.

Parts: tune (learning rate and prompts per iteration of each method, on seeds of its own), snr (gradient signal-to-noise
per cost), main (learning curves), tail (what shortening the tail does to the leaves), ablations, report (tables and
plots from the files of the other parts), presets (as main, of Simple Trainer's presets). Run one by one:

    python3 run.py bench learning --part tune|snr|main|presets|tail|ablations|report [--model flux|sd3]
                                  [--reward size|taste|rare|follow|demo]

Every part writes its file in benchmarks/results/ as it goes (or to --json); tune, main and presets go on from what
their file has: a complete file is only shown again. How runs are made: common_runs.py.
"""

import argparse
import statistics
import sys
from pathlib import Path

import host
from common_runs import STEPS, WISHES, Lab, Method, methods, presets, train
from learning_report import DEFAULT, JUDGED, compare, interval, read, report, table, tail_table

RESULTS = Path(__file__).resolve().parent / "results"
RATES = (1e-3, 3e-3, 3e-4)
FIRST_TUNING_SEED = 1000


def tuned_file(options) -> Path:
    return RESULTS / f"learning_tuned_{options.model}_{options.reward}.json"


def tuned(options) -> dict:
    """The methods with the learning rate and the prompts per iteration from part `tune`, where it was run."""
    found = read(tuned_file(options))
    return {name: method.but(**found.get(name, {}).get("best", {})) for name, method in methods().items()}


def chosen(rows: dict[str, Method], options) -> dict[str, Method]:
    return {name: method for name, method in rows.items() if not options.only or name in options.only.split(",")}


def tune(lab: Lab, options) -> None:
    """Mean final reward of some seeds per learning rate and number of prompts per iteration; the best of each method is
    what `main` takes. With more --seeds than a setting had, only the further ones are run.
    """
    path = options.json or tuned_file(options)
    results = read(path)
    for name, method in chosen(methods(), options).items():
        row = results.setdefault(name, {"tried": []})
        for prompts in options.prompts or [method.prompts]:
            for rate in options.rates:
                tried = {"learning_rate": rate, "prompts": prompts}
                entry = next((old for old in row["tried"] if tried.items() <= old.items()), None)
                if entry is None:
                    row["tried"].append(entry := {**tried, "reward": 0.0, "seeds": 0})
                before = entry.setdefault("seeds", 2)  # as many as an earlier version ran
                if before >= options.seeds:
                    continue
                runs = [
                    train(lab, method.but(**tried), FIRST_TUNING_SEED + seed, options.budget, evaluations=1)
                    for seed in range(before, options.seeds)
                ]
                total = before * entry["reward"] + sum(run["reward"][-1] for run in runs)
                entry |= {"reward": total / options.seeds, "seeds": options.seeds}
                best = max(row["tried"], key=lambda one: one["reward"])
                row["best"] = {key: best[key] for key in tried}
                print(f"{options.model} {options.reward} {name}: {entry}", flush=True)
                host.save(results, path)


def ratio_of(gradients, groups=None) -> float:
    """|E g|^2 / tr var(g) from independent gradients [n, parameters], both unbiased; with groups, both within groups,
    averaged.
    """
    import torch

    groups = torch.zeros(len(gradients)) if groups is None else groups
    signal = variance = 0.0
    for group in groups.unique():
        g = gradients[groups == group]
        if len(g) > 1:
            spread = float(g.var(0).sum())
            signal += len(g) * (float(g.mean(0).square().sum()) - spread / len(g))
            variance += len(g) * spread
    return signal / variance


def signal_to_noise(rows: list[tuple], grouped: bool = False) -> tuple[float, float]:
    """(SNR per 1,000 cost units, jackknife standard error) of rows (gradient, cost, window start)."""
    import torch

    gradients, costs = torch.stack([row[0] for row in rows]), [row[1] for row in rows]
    groups = torch.tensor([row[2] for row in rows]) if grouped else None
    scale = 1000 / statistics.mean(costs)
    left_out = []
    for i in range(len(rows)):
        keep = torch.arange(len(rows)) != i
        left_out.append(scale * ratio_of(gradients[keep], None if groups is None else groups[keep]))
    n = len(rows)
    return scale * ratio_of(gradients, groups), (
        (n - 1) / n * sum((x - statistics.mean(left_out)) ** 2 for x in left_out)
    ) ** 0.5


def snr(lab: Lab, options) -> None:
    """Gradients of the same random policy over independent iterations, windows drawn anew each time."""
    import torch

    base, start = methods(), {"window": "fixed", "fixed": 0}
    window, tree = base["window"], base[DEFAULT]
    kinds = {
        **{name: method for name, method in base.items() if method.inner == 1},
        "window_1x24": window.but(prompts=1, shape={"trees": 24}),
        "window_4x6": window.but(prompts=4, shape={"trees": 6}),
        "window_start0": window.but(shape=start),
        "tree_b3w3_start0": tree.but(shape=start),
        "tree_b4w2_start0": base["tree_b4w2"].but(shape=start),
        "tree_b8w1": base["tree_b4w2"].but(prompts=12, shape={"branching": 8, "depth": 1}),
        "tree_b3w3_level0.3": tree.but(noise={"level": 0.3}),
        "tree_b4w2_orthogonal": base["tree_b4w2"].but(shape={"siblings": "orthogonal"}),
        "tree_b3w3_full_tail": tree.but(prompts=2, shape={"tail": 1.0}),
    }
    path = options.json or RESULTS / f"snr_{options.model}_{options.reward}.json"
    results = {"seeds": options.iterations, "unit": lab.unit, "methods": {}}
    for name, method in chosen(kinds, options).items():
        rows = []
        with lab.open(7, scale=0.02) as policy:
            for _ in range(options.iterations):
                metrics = policy.learn(method, gradient_only=True)
                gradient = torch.cat([p.grad.flatten() for p in policy.velocity.parameters() if p.grad is not None])
                rows.append((gradient, metrics["cost"], metrics["start"]))
                for parameter in policy.velocity.parameters():
                    parameter.grad = None
        value, error = signal_to_noise(rows)
        within, within_error = signal_to_noise(rows, grouped=True)
        results["methods"][name] = {
            "snr_per_cost": value,
            "standard_error": error,
            "snr_per_cost_within_window": within,
            "standard_error_within_window": within_error,
            "cost": statistics.mean(row[1] for row in rows),
            "images": metrics["images"],
        }
        print(
            f"{options.model} {options.reward} {name}: {value:.2f} +- {error:.2f} (same window: {within:.2f} +- "
            f"{within_error:.2f})",
            flush=True,
        )
        host.save(results, path)


def main_part(lab: Lab, options) -> None:
    """Learning curves, seed by seed over all methods, so that what is there can be compared at any time. Methods and
    seeds that the file has from earlier are kept.
    """
    path = options.json or RESULTS / f"learning_{options.model}_{options.reward}.json"
    curves(lab, options, path, tuned(options))


def presets_part(lab: Lab, options) -> None:
    """Learning curves of Simple Trainer's presets and of what was tried in place of `strong`, evaluated as the Trainer
    is, by the moving average.
    """
    curves(lab, options, options.json or RESULTS / f"presets_{options.model}_{options.reward}.json", presets())


def curves(lab: Lab, options, path: Path, rows: dict[str, Method]) -> None:
    results = read(path)
    if results.get("budget", options.budget) != options.budget:
        sys.exit(
            f"{path} has runs of {results['budget']:.0f} cost units: use --budget {results['budget']:.0f}, or another "
            "--json file."
        )
    results |= {
        "model": options.model,
        "reward": options.reward,
        "budget": options.budget,
        "unit": lab.unit,
        "device": host.device(),
    }
    found = results.setdefault("methods", {})
    for seed in range(options.seeds):
        for name, method in chosen(rows, options).items():
            if options.rate:
                method = method.but(learning_rate=options.rate)
            settings = {"learning_rate": method.learning_rate, "prompts": method.prompts}
            row = found.setdefault(name, {**settings, "runs": []})
            if any(row[key] != value for key, value in settings.items()):
                sys.exit(f"{path} has runs of {name} with other settings than {settings}: use another --json file.")
            if len(row["runs"]) > seed:
                continue
            run = train(
                lab, method, seed, options.budget, evaluations=12 if method.prompts == 1 or method.average else 3
            )
            row["runs"].append(run)
            print(
                f"{options.model} {options.reward} seed {seed} {name}: {run['reward'][0]:.3f} -> "
                f"{run['reward'][-1]:.3f}, judge: "
                + ", ".join(f"{key} {run[key][-1]:.2f}" for key in JUDGED)
                + f", {run['iterations']} iterations, "
                f"{run['seconds'][-1]:.0f} s",
                flush=True,
            )
            host.save(results, path)
    compare(results, read(RESULTS / f"snr_{options.model}_{options.reward}.json"))
    table(results)
    host.save(results, path)


def spearman(a, b) -> float:
    """Rank correlation of two score lists; ties share their mean rank. A list without any order agrees with nothing but
    another one.
    """
    import torch

    def ranks(values):
        return ((values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1)).double()

    if a.unique().numel() == 1 or b.unique().numel() == 1:
        return float(a.unique().numel() == b.unique().numel())
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def tail(lab: Lab, options) -> None:
    """Leaves of the same windows with the whole tail and with a share q of it: distance and order of their rewards, per
    window start.
    """
    path = options.json or RESULTS / "tail.json"
    results = read(path)
    place = f"{options.model}_{options.reward}"
    found = results[place] = {}
    share = lab.core.method.windows.probabilities(STEPS, 3, 0.5).tolist()
    qs = (0.2, 0.4, 0.6, 0.8)
    with lab.open(7, scale=0.02) as policy:
        for start in range(len(share)):
            leaves = {}
            for q in (1.0, *qs):
                forest, rows = policy.grow(
                    methods()[DEFAULT].but(prompts=options.iterations, retain=False, shape={"tail": q}), start
                )
                leaves[q] = forest.leaves, lab.score(policy.velocity, forest.leaves, rows).view(options.iterations, -1)
            policy.iteration += 1
            whole, rewards = leaves[1.0]
            groups = whole.view(options.iterations, -1, whole[0].numel())
            spread = (groups - groups.mean(1, keepdim=True)).norm(dim=2).mean()
            for q in qs:
                row = found.setdefault(f"{q:g}", {"per_start": []})
                distance = (leaves[q][0] - whole).flatten(1).norm(dim=1)
                row["per_start"].append(
                    {
                        "start": start,
                        "steps": lab.core.method.cost.tail_steps(STEPS - 3 - start, q),
                        "of": STEPS - 3 - start,
                        "relative_distance": float((distance / whole.flatten(1).norm(dim=1)).mean()),
                        "distance_to_spread": float(distance.mean() / spread),
                        "spearman": statistics.mean(spearman(a, b) for a, b in zip(leaves[q][1], rewards)),
                    }
                )
    for row in found.values():
        for key in ("relative_distance", "distance_to_spread", "spearman"):
            row[key] = sum(p * at[key] for p, at in zip(share, row["per_start"]))
    tail_table({place: found})
    host.save({**results, "prompts_per_start": options.iterations}, path)


def variants(default) -> dict:
    """One change each to the default tree with 2 prompts per iteration; more updates per rollout and longer tails get
    fewer iterations for the same cost.
    """
    default = default.but(prompts=2)
    changes = {f"kind {kind}": {"noise": {"kind": kind}} for kind in ("flow_sde", "exact")}
    changes["kind dance_sde eta 0.3"] = {"noise": {"kind": "dance_sde", "level": 0.3}}
    changes |= {
        f"beta {beta:+g}": {"noise": {"shape": "linear", "beta": beta, "level": 0.7 if beta < 0 else 0.5}}
        for beta in (-0.5, 0.5)
    }
    changes["level 0.4"] = {"noise": {"level": 0.4}}
    changes |= {f"siblings {mode}": {"shape": {"siblings": mode}} for mode in ("antithetic", "orthogonal")}
    changes |= {f"estimator {name}": {"estimator": name} for name in ("branchgrpo", "trajectory")}
    changes["inner updates 2"] = {"inner": 2}
    changes["4 inner, clip 1e-3"] = {"inner": 4, "objective": {"clip_low": 1e-3, "clip_high": 1e-3}}
    changes["4 inner, clip 1e-3, dynamic eta 1"] = {
        "inner": 4,
        "objective": {"clip_low": 1e-3, "clip_high": 1e-3, "sensitivity": 1.0},
    }
    changes |= {
        f"lambda {weight:g} {target}": {"objective": {"sft": weight, "target": target}}
        for weight, target in ((0.001, "best-path"), (0.1, "best-path"), (0.001, "best-leaf"))
    }
    changes |= {f"tail {q:g}": {"shape": {"tail": q}} for q in (0.2, 1.0)}
    return {"default": default} | {name: default.but(**change) for name, change in changes.items()}


def ablations(lab: Lab, options) -> None:
    """Final reward of every variant minus the default's, paired by seed, with a 95 % interval; seed by seed."""
    path = options.json or RESULTS / "ablations.json"
    runs: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        for name, method in variants(tuned(options)[DEFAULT]).items():
            runs.setdefault(name, []).append(train(lab, method, seed, options.budget, evaluations=1)["reward"][-1])
            print(f"seed {seed} {name}: {runs[name][-1]:.4f}", flush=True)
            rows = {
                key: {
                    "final": statistics.mean(values),
                    "runs": values,
                    **interval([a - b for a, b in zip(values, runs["default"])]),
                }
                for key, values in runs.items()
            }
            host.save(
                {
                    "seeds": min(map(len, runs.values())),
                    "model": options.model,
                    "reward": options.reward,
                    "budget": options.budget,
                    "default": DEFAULT,
                    "variants": rows,
                },
                path,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", choices=("tune", "snr", "main", "presets", "tail", "ablations", "report"), default="main"
    )
    parser.add_argument("--model", choices=("flux", "sd3"), default="flux")
    parser.add_argument("--reward", choices=tuple(WISHES), default="taste")
    parser.add_argument("--seeds", type=int, help="seeds per method (default 5; tune: 2, others than main's)")
    parser.add_argument("--budget", type=float, default=2500, help="cost of a run, in forwards (default 2500)")
    parser.add_argument(
        "--iterations",
        type=int,
        default=24,
        help="snr: independent gradients; tail: prompts per window start (default 24)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=0.0,
        help="main, presets: this learning rate for all methods in place of the tuned ones",
    )
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="tune: the learning rates")
    parser.add_argument(
        "--prompts", type=int, nargs="+", help="tune: prompts per iteration (default: each method's own)"
    )
    parser.add_argument("--only", default="", help="tune, snr, main, presets: only these methods, separated by commas")
    parser.add_argument("--json", type=Path, help="write the results there (default: benchmarks/results/)")
    options = parser.parse_args()
    options.seeds = options.seeds or (2 if options.part == "tune" else 5)
    if options.part == "report":
        return report(RESULTS, options.json)
    pack = host.load_pack()
    sys.modules["comfy.utils"].PROGRESS_BAR_ENABLED = False
    lab = Lab(pack, options.model, options.reward)
    parts = {"tune": tune, "snr": snr, "main": main_part, "presets": presets_part, "tail": tail, "ablations": ablations}
    parts[options.part](lab, options)


if __name__ == "__main__":
    main()
