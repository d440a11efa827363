"""From the runs of learning.py to comparisons at equal cost, tables and a plot."""

import json
import math
import random
import statistics
from pathlib import Path

import host
from common_runs import WISHES

DEFAULT = "tree_b3w3"  # the tree that the ablations change
LEARNER = "middle_b4w2_regression"  # the template's tree regression: others are compared with it where it was run
JUDGED = ("taste", "follows", "quality", "diversity")  # what the judge by rules sees in held-out pictures
T95 = {
    1: 12.7,
    2: 4.30,
    3: 3.18,
    4: 2.78,
    5: 2.57,
    6: 2.45,
    7: 2.36,
    8: 2.31,
    9: 2.26,
}  # Student's t by degrees of freedom


def interval(values: list[float]) -> dict[str, float]:
    """Mean and half width of its 95 % interval."""
    spread = statistics.stdev(values) if len(values) > 1 else math.inf
    return {
        "difference": statistics.mean(values),
        "interval": T95.get(len(values) - 1, 2.0) * spread / len(values) ** 0.5,
    }


def at(xs: list[float], ys: list[float], x: float) -> float:
    """Piecewise linear; the last value beyond the end."""
    for (x0, y0), (x1, y1) in zip(zip(xs, ys), zip(xs[1:], ys[1:])):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1]


def cost_to_reach(curve: dict, reward: float) -> float | None:
    """Cost at which the mean curve first reaches this reward; None if it never does."""
    costs, means = curve["cost"], curve["mean"]
    for (x0, y0), (x1, y1) in zip(zip(costs, means), zip(costs[1:], means[1:])):
        if y1 >= reward:
            return x0 if y0 >= reward else x0 + (x1 - x0) * (reward - y0) / (y1 - y0)
    return None


def mean_curve(runs: list[dict], budget: float) -> dict:
    """Runs on a common cost grid, averaged."""
    marks = len(runs[0]["cost"]) - 1
    grid = [budget * i / marks for i in range(marks + 1)]
    rewards = [[at(run["cost"], run["reward"], x) for x in grid] for run in runs]
    return {
        "cost": grid,
        "mean": [statistics.mean(c) for c in zip(*rewards)],
        "std": [statistics.stdev(c) if len(c) > 1 else 0.0 for c in zip(*rewards)],
        "seconds": [statistics.mean(at(run["cost"], run["seconds"], x) for run in runs) for x in grid],
    }


def ratio(runs: list[dict], tree_runs: list[dict], budget: float) -> float | None:
    """Cost of these runs over the tree's cost for the reward these runs end at."""
    reached = cost_to_reach(mean_curve(tree_runs, budget), mean_curve(runs, budget)["mean"][-1])
    return budget / reached if reached else None


def ratio_range(runs: list[dict], tree_runs: list[dict], budget: float, draws: int = 400) -> list[float | None]:
    """5th and 95th percentile of the ratio over seeds drawn with replacement; None = the tree did not get there."""
    generator, count = random.Random(0), len(runs)
    found = []
    for _ in range(draws):
        seeds = [generator.randrange(count) for _ in range(count)]
        found.append(ratio([runs[i] for i in seeds], [tree_runs[i] for i in seeds], budget))
    found.sort(key=lambda value: value or 0.0)
    return [found[int(0.05 * draws)], found[int(0.95 * draws)]]


def baseline(methods: dict) -> str:
    """The first of the window methods, or of all where there is none."""
    return next((name for name in methods if name.startswith("window")), next(iter(methods)))


def compare(results: dict, snr: dict) -> None:
    """Fill in every method's mean curve, its final reward, SNR, and how much more it costs than each tree for the
    reward it ends at. Methods may have different numbers of seeds, as where a run was stopped: each mean is over a
    method's own, and two methods are compared on those they share. No run is dropped.
    """
    budget, found = results["budget"], results["methods"]
    counts = [len(row["runs"]) for row in found.values()]
    results["seeds"] = min(counts) if min(counts) == max(counts) else [min(counts), max(counts)]
    window = found[baseline(found)]["runs"]
    trees = [name for name in found if "_b" in name]  # as in tree_b4w2
    tree = next((name for name in (LEARNER, DEFAULT, *trees) if name in found), baseline(found))
    results["compared_with"] = tree
    for name, row in found.items():
        runs = row["runs"]
        row["curve"] = mean_curve(runs, budget)
        row["final"], row["final_std"] = row["curve"]["mean"][-1], row["curve"]["std"][-1]
        row["final_minus_window"] = interval([last(run, budget) - last(w, budget) for run, w in zip(runs, window)])
        row["judged"] = {key: statistics.mean(run[key][-1] for run in runs) for key in JUDGED}
        row["snr_per_cost"] = snr.get("methods", {}).get(name, {}).get("snr_per_cost")
        shared = {other: tuple(zip(*zip(runs, found[other]["runs"]))) for other in (*trees, tree)}
        row["cost_ratio"] = {name: ratio(*shared[name], budget) for name in trees}
        row["cost_ratio_to_tree"] = ratio(*shared[tree], budget)
        row["cost_ratio_5_to_95"] = ratio_range(*shared[tree], budget)
    if LEARNER in found:
        results["reached"] = {
            name: [reached(ours, theirs, budget) for ours, theirs in zip(found[LEARNER]["runs"], row["runs"])]
            for name, row in found.items()
            if name != LEARNER
        }


def last(run: dict, budget: float) -> float:
    return at(run["cost"], run["reward"], budget)


def reached(ours: dict, theirs: dict, budget: float) -> dict | None:
    """Where our run first has the reward that theirs ends with, along straight lines between its evaluations: shares of
    their cost and seconds, what the judge sees there, and the same of theirs at its end. None = not within the budget.
    """
    wanted = last(theirs, budget)
    cost = cost_to_reach({"cost": ours["cost"], "mean": ours["reward"]}, wanted)
    if cost is None or cost > budget:
        return None
    return {
        "reward": wanted,
        "cost": cost / budget,
        **{
            clock: at(ours["cost"], ours[clock], cost) / at(theirs["cost"], theirs[clock], budget)
            for clock in ("seconds", "cpu_seconds")
            if clock in ours and clock in theirs
        },
        "judged": {key: at(ours["cost"], ours[key], cost) for key in JUDGED},
        "theirs": {key: at(theirs["cost"], theirs[key], budget) for key in JUDGED},
        "untrained": {key: ours[key][0] for key in JUDGED},
    }


def number(value, digits=2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def seeds(results: dict) -> str:
    """As in 5, or 3 to 5 where methods differ."""
    found = results["seeds"]
    return " to ".join(map(str, found)) if isinstance(found, list) else str(found)


def table(results: dict) -> None:
    print(
        f"\n{results['model']}, {results['reward']} reward, {seeds(results)} seeds, {results['budget']:.0f} cost "
        "units per run"
    )
    print(
        f"{'':22}{'rate':>8}{'seeds':>6}{'iterations':>11}{'final reward':>18}"
        f"{'minus window (95 %)':>22}" + "".join(f"{key:>10}" for key in JUDGED) + f"{'SNR/1000':>10}{'seconds':>9}"
        "   its cost / a tree's cost for its final reward"
    )
    for name, row in results["methods"].items():
        gap, low_high = row["final_minus_window"], " .. ".join(map(number, row["cost_ratio_5_to_95"]))
        ratios = "   ".join(f"{tree} {number(value)}" for tree, value in row["cost_ratio"].items())
        iterations = statistics.mean(run["iterations"] for run in row["runs"])
        print(
            f"{name:22}{row['learning_rate']:8g}{len(row['runs']):6}{iterations:11.1f}{row['final']:10.3f} "
            f"+-{row['final_std']:5.3f}{gap['difference']:+13.3f} +-"
            f"{gap['interval']:6.3f}"
            + "".join(f"{row['judged'][key]:10.2f}" for key in JUDGED)
            + f"{number(row['snr_per_cost']):>10}"
            f"{row['curve']['seconds'][-1]:9.1f}   "
            f"{ratios}   ({results['compared_with']}: {low_high})"
        )
    levels_table(results)
    reached_table(results)


def levels_table(results: dict) -> None:
    """Cost, and quality of the pictures, where the mean curves first reach some rewards on the way to the window
    baseline's last one.
    """
    methods, budget = results["methods"], results["budget"]
    window = methods[baseline(methods)]
    first, last = window["curve"]["mean"][0], window["final"]
    levels = [first + (last - first) * share for share in (0.5, 0.75, 1.0)]
    results["cost_to_reach"] = {}
    print(
        f"{'cost to reach':18}" + "".join(f"{level:20.3f}" for level in levels) + "   (quality of the pictures there)"
    )
    for name, row in methods.items():
        costs = [cost_to_reach(row["curve"], level) for level in levels]
        seen = [
            cost and statistics.mean(at(run["cost"], run["quality"], min(cost, budget)) for run in row["runs"])
            for cost in costs
        ]
        results["cost_to_reach"][name] = [
            {"reward": level, "cost": cost, "quality": share} for level, cost, share in zip(levels, costs, seen)
        ]
        print(f"{name:18}" + "".join(f"{number(cost, 0):>12}  ({number(share)})" for cost, share in zip(costs, seen)))


def reached_table(results: dict) -> None:
    """Tree regression where it first has what another method ends with: shares of that one's cost and seconds, by seed;
    what the judge sees there, mean over those seeds, against the other one's end (and the untrained model).
    """
    for name, rows in results.get("reached", {}).items():
        there = [row for row in rows if row]
        if not there:
            print(f"{LEARNER} nowhere has the reward that {name} ends with")
            continue
        shares = {
            key: " ".join(number(row and row.get(key)) for row in rows) for key in ("cost", "seconds", "cpu_seconds")
        }

        def mean(at, key):
            return statistics.mean(row[at][key] for row in there)

        print(
            f"{LEARNER} has what {name} ends with after {shares['cost']} of its cost, {shares['seconds']} of its "
            f"seconds ({shares['cpu_seconds']} of its processor seconds); there against here (untrained): "
            + ", ".join(
                f"{key} {mean('judged', key):.3f} against {mean('theirs', key):.3f} ({mean('untrained', key):.3f})"
                for key in JUDGED
            )
        )


def ablation_table(results: dict) -> None:
    print(
        f"\nablations of {results['default']} with 2 prompts: {results['model']}, {results['reward']} reward, "
        f"{results['seeds']} seeds, "
        f"{results['budget']:.0f} cost units; final reward, difference to the default with its 95 % interval"
    )
    for name, row in results["variants"].items():
        sure = "" if abs(row["difference"]) <= row["interval"] else "  *"
        print(
            f"  {name:36}{row['final']:8.4f}{row['difference']:+9.4f} +- {row['interval']:.4f}  "
            f"n={len(row['runs'])}{sure}"
        )


def plot(panels: list[dict], path: Path) -> None:
    """Mean reward against cost, a band of one standard deviation, one panel per model and reward."""
    from PIL import Image, ImageDraw, ImageFont

    drawn = {  # the rest is in the tables
        "independent": ("independent images, all steps", (130, 130, 138)),
        "window": ("window of 3 steps, GRPO", (225, 110, 20)),
        "treegrpo_code": ("TreeGRPO as its code does it", (130, 130, 138)),
        "flat_nft": ("DiffusionNFT", (140, 60, 180)),
        "tree_b3w3": ("tree 3x3, GRPO", (24, 100, 200)),
        "tree_b4w2": ("tree 4x2, GRPO", (20, 140, 90)),
        "middle_b4w2": ("tree 4x2, GRPO, steps 5 and 6", (24, 100, 200)),
        "middle_b4w2_regression": ("tree regression, steps 5 and 6", (20, 140, 90)),
        "early_b4w2_regression": ("tree regression, early steps", (120, 200, 50)),
        "anywhere_b4w2_regression": ("tree regression, steps anywhere", (190, 20, 90)),
    }
    width, height, columns = 620, 380, min(2, len(panels))
    lines = -(-len(panels) // columns)
    picture = Image.new("RGB", (width * columns, height * lines), "white")
    draw = ImageDraw.Draw(picture, "RGBA")
    font = ImageFont.load_default(13)
    for number_, results in enumerate(panels):
        left, top = number_ % columns * width + 64, number_ // columns * height + 40
        right, bottom = left + width - 90, top + height - 96
        methods = results["methods"]
        curves = {name: methods[name]["curve"] for name in [n for n in drawn if n in methods] or methods}
        low = min(m - s for c in curves.values() for m, s in zip(c["mean"], c["std"]))
        high = max(m + s for c in curves.values() for m, s in zip(c["mean"], c["std"]))

        def place(cost, reward):
            return left + (right - left) * cost / results["budget"], bottom - (bottom - top) * (reward - low) / (
                high - low
            )

        title = f"{results['model']}, {results['reward']} reward: mean and standard deviation of {seeds(results)} seeds"
        draw.text((left, top - 24), title, fill="black", font=font)
        for i in range(5):
            reward, cost = low + (high - low) * i / 4, results["budget"] * i / 4
            draw.line([(left, place(0, reward)[1]), (right, place(0, reward)[1])], fill=(225, 225, 230))
            draw.text((left - 8, place(0, reward)[1]), f"{reward:.3f}", fill="black", font=font, anchor="rm")
            draw.text((place(cost, low)[0], bottom + 6), f"{cost:.0f}", fill="black", font=font, anchor="mt")
        draw.text(((left + right) / 2, bottom + 24), "cost (forwards)", fill="black", font=font, anchor="mt")
        for i, (name, curve) in enumerate(curves.items()):
            label, colour = drawn.get(name, (name, (60, 60, 70)))
            upper = [place(x, m + s) for x, m, s in zip(curve["cost"], curve["mean"], curve["std"])]
            lower = [place(x, m - s) for x, m, s in zip(curve["cost"], curve["mean"], curve["std"])]
            draw.polygon(upper + lower[::-1], fill=(*colour, 26))
            draw.line([place(x, m) for x, m in zip(curve["cost"], curve["mean"])], fill=colour, width=3, joint="curve")
            draw.text((left + 10, top + 4 + 17 * i), label, fill=colour, font=font)
    picture.save(path)


def tail_table(results: dict) -> None:
    for model in (name for name in results if isinstance(results[name], dict)):
        for q, row in results[model].items():
            print(
                f"{model} q {q}: distance {row['relative_distance']:.3f} of the latent's length, "
                f"{row['distance_to_spread']:.2f} of the spread "
                f"in a group; Spearman {row['spearman']:.3f}; by window start "
                + " ".join(f"{place['start']}:{place['spearman']:.2f}" for place in row["per_start"])
            )


def snr_table(results: dict, name: str) -> None:
    window = results["methods"].get("window", {}).get("snr_per_cost")
    print(
        f"\ngradient signal-to-noise per 1,000 cost units, {name}, {results['seeds']} gradients each (in brackets: "
        "within one window start)"
    )
    for method, row in results["methods"].items():
        print(
            f"  {method:24}{row['snr_per_cost']:7.2f} +- {row['standard_error']:.2f}   "
            f"({row['snr_per_cost_within_window']:.2f} +- "
            f"{row['standard_error_within_window']:.2f})   {row['snr_per_cost'] / window if window else 0:.1f}x window"
        )


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def report(folder: Path, target: Path | None = None) -> None:
    """Print every table there is, draw the curves; to `target`, all main files joined, without their runs."""
    panels = {}
    for name in (f"{model}_{reward}" for reward in WISHES for model in ("flux", "sd3")):
        results, snr = read(folder / f"learning_{name}.json"), read(folder / f"snr_{name}.json")
        if results and not all(
            key in run for row in results["methods"].values() for run in row["runs"] for key in JUDGED
        ):
            print(f"\nlearning_{name}.json is of an earlier version, without a judge: left out")
        elif results:
            compare(results, snr)
            table(results)
            host.save(results, folder / f"learning_{name}.json")
            panels[name] = results
        if snr:
            snr_table(snr, name)
    if panels:
        short = {
            panel: {
                name: {key: value for key, value in row.items() if key != "runs"}
                for name, row in results["methods"].items()
            }
            for panel, results in panels.items()
        }
        host.save({name: {**results, "methods": short[name]} for name, results in panels.items()}, target)
        plot(list(panels.values()), folder / "learning.png")
    if ablations := read(folder / "ablations.json"):
        ablation_table(ablations)
    tail = {
        name: rows
        for name, rows in read(folder / "tail.json").items()
        if isinstance(rows, dict) and all("spearman" in row for row in rows.values())  # not of an earlier version
    }
    if tail:
        print("\nshortened tails against the whole one")
        tail_table(tail)
