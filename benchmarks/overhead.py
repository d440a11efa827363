"""What Tree Sampler costs beside ComfyUI's own KSampler: branching 1, no noise, the same seeds, sigmas and forwards.

Both are run in turn in one process, so that only their ratio counts. The policy's LoRA is live in Tree Sampler; KSampler
samples the base model ("base") and the model with the same LoRA merged into its weights by Load LoRA Model ("merged").
"""
import statistics

import host


def measure(pack, model: str, repeats: int, steps: int, batch: int, rank: int) -> dict:
    import torch
    graph = host.graph(pack, model)
    policy = graph.policy(rank=rank, targets="attention")
    with torch.inference_mode(False), torch.no_grad():  # adapters that do something
        draw = torch.Generator().manual_seed(0)
        for parameter in policy.run.adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
    positive, _ = graph.prompts("a red circle on a white background")
    with torch.inference_mode():
        from comfy_extras.nodes_train import LoraModelLoader
        merged = LoraModelLoader.execute(graph.model, graph.call("ToLora", policy=policy)[0], 1.0)
        merged = merged.result[0] if hasattr(merged, "result") else merged[0]
    shape, quiet, sigmas = graph.shape(branching=1, depth=1, trees=batch), graph.noise(level=0.0), graph.sigmas(steps)
    runs = {
        "tree": lambda: graph.sample(policy, positive, shape=shape, noise=quiet, sigmas=sigmas),
        "base": lambda: graph.ksampler(graph.model, positive, steps=steps, batch=batch),
        "merged": lambda: graph.ksampler(merged, positive, steps=steps, batch=batch),
    }
    tree, leaves = runs["tree"]()
    difference = float((leaves["samples"] - runs["merged"]()).abs().max())
    seconds, peaks = {name: [] for name in runs}, {}
    for _ in range(repeats):
        for name, work in runs.items():
            seconds[name].append(host.timed(work))
    for name, work in runs.items():
        with host.Peak() as peak:
            work()
        peaks[name] = peak.bytes
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = sorted(a / b for a, b in zip(seconds["tree"], seconds["base"]))
    return {"forwards": tree.rollout_forwards, "seconds": middle, "peak_bytes": peaks, "max_difference": difference,
            "ratio_to_base": statistics.median(ratios), "ratio_to_merged": statistics.median(a / b for a, b in zip(seconds["tree"], seconds["merged"]))}


def main():
    options = host.arguments(__doc__, repeats=(15, "runs of each"), steps=(20, "sampling steps"), batch=(4, "images"), rank=(8, "LoRA rank"))
    pack = host.load_pack()
    import comfy.utils
    comfy.utils.PROGRESS_BAR_ENABLED = False
    results = {"device": host.device()}
    for model in ("flux", "sd3"):
        row = results[model] = measure(pack, model, options.repeats, options.steps, options.batch, options.rank)
        print(f"{model}: Tree Sampler / KSampler = {row['ratio_to_base']:.3f} (with the LoRA merged into the weights: {row['ratio_to_merged']:.3f}), "
              f"{row['forwards']} forwards each, peak memory {row['peak_bytes']['tree'] / 2**20:.0f} against {row['peak_bytes']['base'] / 2**20:.0f} MiB, "
              f"largest difference to the merged LoRA's latents {row['max_difference']:.1e}")
    print(f"on {results['device']}; target: at most 1.05")
    host.save(results, options.json)


if __name__ == "__main__":
    main()
