"""The by-hand graph, node by node in this process, as ComfyUI's executor calls it: inside inference mode."""

import contextlib
from types import SimpleNamespace

import torch

TRAIN = "a red circle on a white background\na blue square on a black background"
UPDATE = dict(learning_rate=1e-3, clip_low=1e-2, clip_high=1e-2)


def timeless(rows):
    """Rows of metrics without what differs from run to run."""
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


class Graph:
    """One ComfyUI session with the embedded model: `call` runs a node, the methods are the graph's stages."""

    def __init__(self, pack, folder, model="flux"):
        import folder_paths

        folder_paths.set_output_directory(str(folder / "output"))
        folder_paths.folder_names_and_paths["loras"] = ([str(folder / "loras")], folder_paths.supported_pt_extensions)
        self.nodes = {node.define_schema().node_id: node for node in pack.nodes.NODES}
        self.pack, self.folder = pack, folder
        with torch.inference_mode():
            self.model, self.clip, self.vae = self.call("TinyModel", model=model)

    def call(self, name, **inputs):
        node = self.nodes[f"TreeRPO{name}"]
        prepared = type(
            node.__name__, (node,), {"hidden": SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None)}
        )
        if node.define_schema().is_input_list:
            inputs = {key: value if isinstance(value, list) else [value] for key, value in inputs.items()}
        with torch.inference_mode():
            return prepared.execute(**inputs).result

    def forget(self):
        """What a restart of ComfyUI does to the training state in memory."""
        self.pack.nodes.runs._RUNS.clear()

    def policy(self, run_name="test", rank=4, alpha=8.0, targets="attention+mlp", checkpointing=False, **more):
        return self.call(
            "Policy",
            model=self.model,
            run_name=run_name,
            rank=rank,
            alpha=alpha,
            targets=targets,
            checkpointing=checkpointing,
            **more,
        )[0]

    def prompts(self, text=TRAIN, per_iteration=0, policy=None):
        return self.call("Prompts", clip=self.clip, text=text, per_iteration=per_iteration, policy=policy)

    def shape(self, **settings):
        return self.call("Shape", **{**dict(branching=2, depth=2, trees=1, window="random", tail=1.0), **settings})[0]

    def noise(self, **settings):
        return self.call("Noise", **{**dict(kind="cps", level=0.7, shape="constant", beta=0.0), **settings})[0]

    def sigmas(self, steps=6):
        import comfy.samplers

        with torch.inference_mode():
            return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", steps)

    def latent(self, channels=16, batch=1):
        with torch.inference_mode():
            return {"samples": torch.zeros(batch, channels, 8, 8)}

    def sample(self, policy, positive, *, shape=None, noise=None, steps=6, **more):
        return self.call(
            "Sampler",
            **{
                **dict(
                    policy=policy,
                    positive=positive,
                    latent_image=self.latent(),
                    sigmas=self.sigmas(steps),
                    shape=shape or self.shape(),
                    noise=noise or self.noise(),
                    cfg=1.0,
                    seed=1,
                ),
                **more,
            },
        )

    def decode(self, latent):
        with torch.inference_mode():
            return self.vae.decode(latent["samples"])

    def score(self, images, prompts, reward=None, **measure):
        reward = reward or self.call("Measure", **{**dict(measure="foreground size", direction="more"), **measure})[0]
        return self.call("Score", reward_model=reward, images=images, prompts=prompts)[0]

    def combine(self, rewards, weights="", mode="z-score each, then weight"):
        return self.call(
            "Combine", rewards={f"reward{i}": reward for i, reward in enumerate(rewards)}, weights=weights, mode=mode
        )[0]

    def iteration(self, policy, *, sampling=None, update=None, text=TRAIN, reward=None, node="Update"):
        """One queue run, with this update node: the metrics row it leaves."""
        positive, prompts = self.prompts(text, policy=policy)
        tree, leaves = self.sample(policy, positive, **(sampling or {}))
        rewards = self.score(self.decode(leaves), prompts, reward)
        credit = self.call("Advantages", tree=tree, rewards=rewards)[0]
        fixed = UPDATE if node == "Update" else {"learning_rate": UPDATE["learning_rate"]}
        self.call(node, policy=policy, tree=tree, advantages=credit, **{**fixed, **(update or {})})
        return policy.run.metrics[-1]

    def train(
        self, policy, iterations, *, text=TRAIN, file=None, held_out=0.0, reward=None, objective=None, **settings
    ):
        """One queue run of the Trainer node: its outputs."""
        listed = {} if file is None else {"file": file}
        prompts = self.call("PromptList", text=text, held_out=held_out, **listed)[0]
        reward = reward or self.call("Measure", measure="foreground size", direction="more")[0]
        fixed = dict(
            policy=policy,
            clip=self.clip,
            vae=self.vae,
            prompts=prompts,
            sigmas=self.sigmas(),
            latent_image=self.latent(),
            reward_model=reward,
            iterations=iterations,
            shape=self.shape(),
            noise=self.noise(),
            objective=objective,
        )
        return self.call(
            "Trainer", **{**fixed, **dict(per_iteration=0, learning_rate=1e-3, seed=1, shuffle=False), **settings}
        )

    def ksampler(self, model, positive, seed=1, steps=6, batch=1, latent=None):
        """ComfyUI's own KSampler (euler, simple, cfg 1)."""
        import nodes

        with torch.inference_mode():
            return nodes.common_ksampler(
                model, seed, steps, 1.0, "euler", "simple", positive, positive, latent or self.latent(batch=batch)
            )[0]["samples"]


@contextlib.contextmanager
def network_forwards(model):
    """Counts latents that pass through the network itself, independent of our own counters."""
    count = SimpleNamespace(total=0)
    network = model.model.diffusion_model
    handle = network.register_forward_pre_hook(lambda module, args: setattr(count, "total", count.total + len(args[0])))
    try:
        yield count
    finally:
        handle.remove()
