"""What Tree Sampler costs beside ComfyUI's own KSampler: branching 1, no noise, the same seeds, sigmas and forwards.

All are run in turn in one process, so that only ratios count. "sampler" is Tree Sampler with the LoRA switched off: the
same arithmetic as KSampler, so the ratio is what sampling trees costs. "policy" is Tree Sampler with the live LoRA,
which does more arithmetic than KSampler: in the tiny models, rank 8 at width 128 is 8 % more multiplications; in FLUX,
rank 32 at width 3072, 1.4 %. "merged" is KSampler with the same LoRA merged into the weights.
"""

import statistics

import host


def measure(pack, model: str, repeats: int, steps: int, batch: int, rank: int, size: int) -> dict:
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
    with torch.inference_mode():
        one, all_ = ({"samples": torch.zeros(count, 16, size // 8, size // 8)} for count in (1, batch))

    def tree(adapters_on: bool):
        policy.run.adapters.enabled = adapters_on
        return graph.sample(policy, positive, shape=shape, noise=quiet, sigmas=sigmas, latent_image=one)

    runs = {
        "sampler": lambda: tree(False),
        "policy": lambda: tree(True),
        "ksampler": lambda: graph.ksampler(graph.model, positive, steps=steps, latent=all_),
        "merged": lambda: graph.ksampler(merged, positive, steps=steps, latent=all_),
    }
    sampled, leaves = runs["policy"]()
    difference = float((leaves["samples"] - runs["merged"]()).abs().max())
    seconds, peaks = {name: [] for name in runs}, {}
    for _ in range(repeats):
        for name, work in runs.items():
            seconds[name].append(host.timed(work))
    for name, work in runs.items():
        with host.Peak() as peak:
            work()
        peaks[name] = peak.bytes
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["ksampler"]))
        for name in ("sampler", "policy", "merged")
    }
    return {
        "forwards": sampled.forwards,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio_to_ksampler": ratios,
        "peak_bytes": peaks,
        "max_difference": difference,
    }


def main():
    options = host.arguments(
        __doc__,
        repeats=(9, "runs of each"),
        steps=(10, "sampling steps"),
        batch=(1, "images"),
        rank=(8, "LoRA rank"),
        size=(512, "image size in pixels"),
    )
    pack = host.load_pack()
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    results = {
        "device": host.device(),
        "size": options.size,
        "batch": options.batch,
        "steps": options.steps,
        "rank": options.rank,
    }
    for model in ("flux", "sd3"):
        row = results[model] = measure(
            pack, model, options.repeats, options.steps, options.batch, options.rank, options.size
        )
        ratio, peak = row["ratio_to_ksampler"], row["peak_bytes"]
        print(
            f"{model}: Tree Sampler / KSampler = {ratio['sampler']:.3f} (target: at most 1.05); with the live LoRA "
            f"{ratio['policy']:.3f}; {row['forwards']} forwards each; peak memory {peak['sampler'] / 2**20:.0f} "
            f"against {peak['ksampler'] / 2**20:.0f} MiB; live against merged LoRA, largest difference "
            f"{row['max_difference']:.1e}"
        )
    print(f"on {results['device']}, {options.size} px, batch {options.batch}, {options.steps} steps")
    host.save(results, options.json)


if __name__ == "__main__":
    main()
