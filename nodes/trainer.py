"""The Trainer: a whole run in one node; its prompts, its objective, and what it will need of the memory."""
import json
import time
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..core import plot
from ..core.advantage import ESTIMATORS, WEIGHTS
from ..core.checkpoint import write_picture
from ..core.dashboard import Sample, dashboard, status_line
from ..core.noise import NoiseSchedule
from ..core.objective import TARGETS, Objective
from ..core.prompts import parse, read, split
from ..core.rollout import check_sigmas
from ..core.training import Event, Settings, Trainer
from ..core.tree import TreeShape as Shape
from .browser import send_text
from .export import export
from .policy import LivePolicy, batch, encode
from .sample import RETAIN_SHARE, noisy, start_latent
from .schema import LoraModel, Noise, ObjectiveSettings, Policy, Prompts, RewardModel, TreeShape, expert, schema
from .train import CLIPPING, STEP, own_images

LIVE_SHARE = 0.01    # of the time at most for the live picture
DECODED_AT_ONCE = 8  # images between two looks at ComfyUI's stop button
TEXT_FILES = (".txt", ".jsonl", ".csv")
NO_FILE = "(the text above)"


class PromptListNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOPromptList", "Prompt List",
            description="The prompts of a training run: written here, or from a .txt, .jsonl or .csv file in ComfyUI's input folder. Some can be held out: "
                        "they are never trained on, and show whether learning carries over.",
            search_aliases=["dataset", "prompts", "held-out"],
            inputs=[
                io.String.Input("text", multiline=True, default="a red circle on a white background\na blue square on a black background",
                                tooltip="One prompt per line. Lines that begin with '# ' are comments."),
                io.Combo.Input("file", options=[NO_FILE, *prompt_files()], default=NO_FILE, optional=True,
                               tooltip="A file in the input folder instead: .txt has a prompt per line, .jsonl and .csv a field called prompt, text or caption."),
                io.Float.Input("held_out", default=0.0, min=0.0, max=10000.0, step=0.05, optional=True,
                               tooltip="Below 1: the share of prompts held out, such as 0.1. From 1: that many prompts. Higher = a more certain judgement, less to learn from."),
                expert(io.Int.Input("split_seed", default=0, min=0, max=2 ** 31, optional=True, tooltip="Another number holds out other prompts.")),
            ],
            outputs=[Prompts.Output(display_name="prompts"), io.String.Output(display_name="summary"),
                     io.String.Output(display_name="texts", tooltip="All prompts, one per line: for Save Tree LoRA.")])

    @classmethod
    def validate_inputs(cls, file=NO_FILE):
        return True

    @classmethod
    def fingerprint_inputs(cls, text, file=NO_FILE, held_out=0.0, split_seed=0):
        path = prompt_path(file)
        return [text, str(path), path.stat().st_mtime if path is not None and path.is_file() else 0, held_out, split_seed]

    @classmethod
    def execute(cls, text, file=NO_FILE, held_out=0.0, split_seed=0) -> io.NodeOutput:
        path = prompt_path(file)
        prompts = split(read(path) if path is not None else parse(text), held_out, split_seed)
        summary = f"{len(prompts.train)} prompts to train on, {len(prompts.held_out)} held out" + (f", {prompts.duplicates} duplicates left out" if prompts.duplicates
                                                                                                  else "")
        return io.NodeOutput(prompts, summary, "\n".join([*prompts.train, *prompts.held_out]), ui={"text": (summary,)})


def prompt_files() -> list[str]:
    folder = Path(folder_paths.get_input_directory())
    return sorted(file for file in folder_paths.recursive_search(str(folder))[0] if file.endswith(TEXT_FILES)) if folder.is_dir() else []


def prompt_path(file: str | None) -> Path | None:
    """The chosen file, inside the input folder and nowhere else."""
    if not file or file == NO_FILE:
        return None
    if ".." in Path(file).parts or Path(file).is_absolute():
        raise ValueError(f"The prompt file '{file}' is not inside ComfyUI's input folder: copy it there.")
    return Path(folder_paths.get_input_directory()) / file


class ObjectiveNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOObjective", "Training Objective",
            description="What the Trainer makes more likely, and how carefully. Without this node it is GRPO with the usual settings.",
            search_aliases=["grpo", "layertuning-rl", "clip range", "kl", "loss"],
            inputs=[
                io.Combo.Input("method", options=["GRPO", "LayerTuning-RL"], default="GRPO",
                               tooltip="LayerTuning-RL adds Dynamic-TreeRPO's supervised term towards each prompt's best image (its weights' formula is our reading)."),
                io.Float.Input("kl", default=0.0, min=0.0, max=1000.0, step=0.001,
                               tooltip="Pulls the policy back towards the base model. Higher = stays closer. Above 0 costs one more forward per node."),
                io.Float.Input("lambda", default=0.001, min=0.0, max=100.0, step=0.0001, round=False, optional=True,
                               tooltip="LayerTuning-RL: weight of the supervised term. Higher = imitates the best image more, explores less."),
                io.Combo.Input("target", options=list(TARGETS), default="best-path", optional=True,
                               tooltip="LayerTuning-RL: best-path (published), best-leaf (ours), or images: your own, connected to the Trainer."),
                expert(io.Boolean.Input("only_good", default=True, optional=True,
                                        tooltip="LayerTuning-RL: imitate a prompt's best image only if it is as good as the best images were on average so far.")),
                *CLIPPING,
            ],
            outputs=[ObjectiveSettings.Output(display_name="objective")])

    @classmethod
    def execute(cls, method, kl, target="best-path", only_good=True, clip_low=1e-4, clip_high=1e-4, sensitivity=0.0, ratio="plain", step_weight="none",
                **named) -> io.NodeOutput:
        sft = named.get("lambda", 0.001) if method == "LayerTuning-RL" else 0.0
        return io.NodeOutput((Objective(clip_low, clip_high, sensitivity, ratio, step_weight, kl, sft, target), only_good and sft > 0))


class ComfyHost:
    """ComfyUI's side of core.training: the policy with its text encoder and VAE."""

    def __init__(self, policy, clip, vae, sigmas: torch.Tensor, latent_image: dict, cfg: float, negative: list | None, alone: bool):
        self.policy, self.clip, self.vae, self.cfg, self.negative, self.alone = policy, clip, vae, cfg, negative, alone
        self.sigmas = sigmas.detach().clone().float().cpu()
        check_sigmas(self.sigmas)
        self.start = start_latent(policy.model, latent_image)

    def encode(self, texts: list[str]) -> None:
        """All prompts in one go, remembered: afterwards the text encoder may leave the GPU for good."""
        for text in texts:
            comfy.model_management.throw_exception_if_processing_interrupted()
            encode(self.clip, text)

    def session(self, prompts: list[str], micro_batch):
        conditioning = batch([encode(self.clip, text) for text in prompts])
        return self.policy.session(conditioning, self.negative, self.cfg, shape=self.start.shape[1:], memory_batch=micro_batch.size or None, alone=self.alone)

    def roots(self, velocity, noise: torch.Tensor) -> torch.Tensor:
        return noisy(velocity, self.start, noise, self.sigmas)

    def decode(self, velocity, leaves: torch.Tensor) -> torch.Tensor:
        images = []
        for part in velocity.process_out(leaves).cpu().split(DECODED_AT_ONCE):
            comfy.model_management.throw_exception_if_processing_interrupted()
            images.append(self.vae.decode(part).float().cpu())
        return torch.cat(images)


class TrainerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOTrainer", "TreeRPO Trainer",
            description="Trains the policy for many iterations, with a live picture: sample a tree, score it, learn, again. Stop it at any time and queue again to "
                        "go on; the run lives in output/treerpo/<run name>/, also after a restart.",
            search_aliases=["grpo", "rlhf", "train lora", "fine-tune", "reinforcement learning", "online rl", "dpo"],
            is_output_node=True,
            inputs=[
                Policy.Input("policy"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                Prompts.Input("prompts", tooltip="From Prompt List."),
                io.Sigmas.Input("sigmas", tooltip="From BasicScheduler with the base model, denoise 1. 10 steps are enough for training."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size to train at. Train at the size you sample at."),
                RewardModel.Input("reward_model"),
                io.Int.Input("iterations", default=100, min=1, max=1000000,
                             tooltip="Iterations of the run in all, those before this queue run included. Raise it to train on."),
                io.Int.Input("per_iteration", default=1, min=0, max=1024, tooltip="Prompts per iteration. Higher = steadier updates, slower iterations. 0 = all."),
                io.Float.Input("learning_rate", default=1e-4, min=0.0, max=1.0, step=1e-6, round=False,
                               tooltip="Higher = learns faster, then falls apart. 1e-4 to 3e-4 for FLUX and SD3 LoRAs, 5e-4 to 1e-3 for the tiny models."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False, tooltip="Same seed = same run."),
                TreeShape.Input("shape", optional=True, tooltip="From Tree Shape. Without it: branching 3, depth 3, random window, tail 0.4."),
                Noise.Input("noise", optional=True, tooltip="From Depth Noise Schedule. Without it: cps, 0.7 at every layer."),
                ObjectiveSettings.Input("objective", optional=True, tooltip="From Training Objective. Without it: GRPO."),
                RewardModel.Input("judge", optional=True, tooltip="A second reward that is not trained on. If it falls while the trained reward rises, the reward "
                                                                  "is being exploited; the run then pauses and says so."),
                io.Conditioning.Input("negative", optional=True, tooltip="Only used when cfg is not 1."),
                io.Latent.Input("images", optional=True, tooltip="For an objective with target = images: encoded images of the training size, one for all prompts."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=30.0, step=0.1, optional=True,
                               tooltip="Classifier-free guidance while training. 1 = off, half the cost and the safest; FLUX uses its own guidance instead."),
                io.Int.Input("evaluate_every", default=0, min=0, max=100000, optional=True,
                             tooltip="Iterations between two looks at the held-out prompts, on fixed noise. Lower = notices sooner when something goes wrong, costs "
                                     "more. 0 = never."),
                io.Combo.Input("on_alarm", options=["pause", "warn", "off"], default="pause", optional=True,
                               tooltip="When the health watch finds something wrong: pause the run and say why, only say it, or do not look."),
                io.Float.Input("ema", default=0.0, min=0.0, max=0.9999, step=0.01, optional=True,
                               tooltip="Moving average of the LoRA, used for evaluation and for the LoRA that comes out. Higher = steadier, slower; 0.9 is usual. 0 = off.")]
            + [expert(field) for field in _advanced()],
            outputs=[Policy.Output(display_name="policy"), LoraModel.Output(display_name="lora"), io.Custom("LOSS_MAP").Output(display_name="loss"),
                     io.String.Output(display_name="history", tooltip="metrics.jsonl: one line per iteration."), io.Image.Output(display_name="dashboard"),
                     io.String.Output(display_name="status")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        return float("nan")  # a new NaN each time: the run moves on between queue runs

    @classmethod
    def execute(cls, policy, clip, vae, prompts, sigmas, latent_image, reward_model, iterations, per_iteration, learning_rate, seed, shape=None, noise=None,
                objective=None, judge=None, negative=None, images=None, cfg=1.0, free_others=False, tensorboard=False, retain_graphs=False,
                **more) -> io.NodeOutput:
        run = policy.run
        goal, only_good = objective or (Objective(), False)
        with torch.inference_mode(False), torch.no_grad():
            settings = Settings(per_iteration=per_iteration, seed=seed, learning_rate=learning_rate, only_good=only_good,
                                retain_share=RETAIN_SHARE if retain_graphs and not policy.policy.checkpointing else 0.0, **more)
            host = ComfyHost(policy.policy, clip, vae, sigmas, latent_image, cfg, negative, free_others)
            trainer = Trainer(run, host, prompts, shape or Shape(tail=0.4), noise or NoiseSchedule("cps", 0.7), goal, reward_model, settings, judge=judge,
                              images=(lambda velocity, forest: own_images(velocity, images, forest)) if goal.target == "images" and goal.sft else None,
                              check=comfy.model_management.throw_exception_if_processing_interrupted)
            if run.iteration < iterations:
                host.encode([*prompts.train, *(prompts.held_out if settings.evaluate_every else [])])
                export(run, host, prompts, trainer.shape, trainer.schedule, goal, settings, reward_model, judge, iterations)
            live = Live(cls.hidden.unique_id, run, iterations, tensorboard)
            trainer.progress = live.progress
            status = "; ".join([trainer.train(iterations, live.report), *(f"changed: {change}" for change in trainer.changes)])
            live.close()
        picture = plot.to_tensor(live.picture())
        history = "".join(json.dumps(row) + "\n" for row in run.metrics)
        loss = {"loss": [row["loss"] for row in run.metrics if "loss" in row]}
        return io.NodeOutput(LivePolicy(policy.policy, run), run.lora(averaged=True), loss, history, picture, status,
                             ui={**ui.PreviewImage(picture, cls=cls).as_dict(), "text": (status,)})


def _advanced() -> list[io.Input]:
    return [
        io.Boolean.Input("shuffle", default=True, optional=True, tooltip="Prompts in a new order each time through the list. Off = always in the list's order."),
        io.Combo.Input("estimator", options=list(ESTIMATORS), default="treegrpo", optional=True,
                       tooltip="How credit goes up the tree. treegrpo: average of the children, weighted by their probability. branchgrpo: compared within each "
                               "layer. trajectory: as plain GRPO."),
        io.Combo.Input("weights", options=list(WEIGHTS), default="mean-logprob", optional=True, tooltip="treegrpo only: how children are weighted."),
        io.Float.Input("advantage_clip", default=5.0, min=0.1, max=100.0, step=0.1, optional=True,
                       tooltip="Largest advantage of a single image. Lower = outliers count less."),
        *STEP,
        io.Combo.Input("optimizer", options=["adamw", "adamw8bit"], default="adamw", optional=True,
                       tooltip="adamw8bit needs the package bitsandbytes and an NVIDIA GPU; it saves three quarters of the optimizer's memory."),
        io.Int.Input("micro_batch", default=0, min=0, max=4096, optional=True,
                     tooltip="Latents per model call. Lower = less memory. 0 = all at once; halves by itself when memory runs out."),
        io.Boolean.Input("retain_graphs", default=False, optional=True,
                         tooltip="Keep what the update needs while sampling: the same result, faster. Needs much memory and checkpointing off in Tree Policy."),
        io.Boolean.Input("free_others", default=False, optional=True,
                         tooltip="Move text encoder, VAE and reward models off the GPU whenever the policy samples or learns. For small cards; costs time."),
        io.Boolean.Input("new_noise", default=True, optional=True, tooltip="Each iteration draws new noise. Off = learns faster by heart, generalises worse."),
        io.Int.Input("save_every", default=1, min=1, max=100000, optional=True,
                     tooltip="Iterations between two saved states. Higher = less writing; after a crash so many iterations are done again."),
        io.Int.Input("keep_every", default=20, min=1, max=100000, optional=True, tooltip="Iterations between two checkpoints that are kept to go back to."),
        io.Int.Input("keep_last", default=3, min=0, max=1000, optional=True, tooltip="How many such checkpoints are kept. Higher = more disk space."),
        io.Int.Input("most_skips", default=5, min=1, max=1000, optional=True,
                     tooltip="Iterations in a row in which nothing could be learned (numbers that are not finite), before the run stops."),
        io.Boolean.Input("tensorboard", default=False, optional=True, tooltip="Also write the metrics for TensorBoard, into the run's folder. Needs the package tensorboard."),
    ]


class Live:
    """What is seen of a run while it goes on: bar, status line, dashboard; all by ComfyUI's own means."""

    def __init__(self, node_id, run, iterations: int, tensorboard: bool):
        self.node_id, self.run, self.iterations, self.first = node_id, run, iterations, run.iteration
        self.began = time.perf_counter()
        self.drawn = self.pause = 0.0  # when the picture was drawn, and how long to wait for the next
        self.bar = comfy.utils.ProgressBar(max(iterations - self.first, 1) * 100, node_id=node_id)
        self.event: Event | None = None
        self.writer = _tensorboard(run.folder / "tensorboard") if tensorboard else None

    def progress(self, done: int, total: int, denoised) -> None:
        """Sampling is shown as three quarters of an iteration."""
        self.bar.update_absolute((self.run.iteration - self.first) * 100 + 75 * done // total)

    def report(self, event: Event) -> None:
        self.event = event
        done = self.run.iteration - self.first
        text = status_line(event.row, self.run.iteration, self.iterations, (time.perf_counter() - self.began) / done, memory())
        send_text("\n".join(filter(None, (text, event.note, event.message))), self.node_id)
        began = time.perf_counter()
        if began - self.drawn > self.pause or self.run.iteration == self.iterations:
            self.bar.update_absolute(done * 100, None, ("JPEG", self.picture(), 900))
            self.drawn = time.perf_counter()
            self.pause = (self.drawn - began) / LIVE_SHARE
        else:
            self.bar.update_absolute(done * 100)
        if self.writer is not None:
            for name, value in event.row.items():
                self.writer.add_scalar(name, value, self.run.iteration - 1)
        if self.run.iteration % self.run.config["trainer"]["keep_every"] == 0 or self.run.iteration == self.iterations:
            self.samples(event)

    def samples(self, event: Event) -> None:
        """The iteration's images with their scores, as samples/<iteration>.png, and the dashboard."""
        sheet = plot.score_sheet(event.images, event.total, event.prompts, f"iteration {self.run.iteration}", columns=9)
        for name, picture in ((f"samples/{self.run.iteration:06d}.png", sheet), ("dashboard.png", self.picture())):
            write_picture(self.run.folder / name, picture)

    def picture(self):
        best = worst = None
        if self.event is not None and self.event.total.isfinite().any():
            best, worst = (self.sample(int(values.argmax())) for values in (self.event.total.nan_to_num(float("-inf")), -self.event.total.nan_to_num(float("inf"))))
        return dashboard(self.run.metrics, best, worst)

    def sample(self, i: int):
        return Sample(self.event.images[i], float(self.event.total[i]), self.event.prompts[i])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def memory() -> int | None:
    """Bytes in use on the GPU; None on a CPU."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        return None
    return comfy.model_management.get_total_memory(device) - comfy.model_management.get_free_memory(device)


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard is switched on in the Trainer, but the package is not installed: pip install tensorboard, or switch it off.") from None
    return SummaryWriter(str(folder))
