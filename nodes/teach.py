"""Teaching by picking: a node that asks and trains, and the taste that was learned as a reward."""

from pathlib import Path

import torch
from comfy_api.latest import io

from ..core.rewards.drawing import DrawingFeatures
from ..core.rewards.picks import Picks
from ..core.rewards.taste import FILE, Known, MyTaste, answered, fit, load, save, saved_picks
from ..core.rewards.teaching import Teaching
from .browser import send_text
from .pick import human
from .runs import runs_folder
from .schema import RewardSocket, expert, schema
from .simple import CLIP_AND_VAE, PER_ITERATION, PRESETS, TUNED, TrainsSimply, train_simply
from .trainer import ALIASES

TINY_PICTURE = [64, 64]  # pixels of the tiny models' pictures in a sheet
NO_RUN = "(no picks yet)"
_VISION = io.ClipVision.Input(
    "clip_vision",
    optional=True,
    lazy=True,
    tooltip="What sees your pictures: any model of Load CLIP Vision. The tiny models need none.",
)
_ALSO = RewardSocket.Input(
    "also",
    optional=True,
    lazy=True,
    tooltip="A reward that counts from the start, such as CLIP Score for following the prompt. How much it matters to "
    "you is learned from your picks.",
)


class ClipVisionFeatures:
    """ComfyUI's CLIP_VISION as features for a taste (core.rewards.taste.Features)."""

    def __init__(self, clip_vision):
        self.clip_vision = clip_vision
        width = self.embed(torch.zeros(1, 32, 32, 3)).shape[1]
        self.name = f"a CLIP_VISION of {width} numbers at {clip_vision.image_size} px"

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """[B, H, W, 3] in 0..1 -> [B, D] on the CPU."""
        with torch.inference_mode(False), torch.no_grad():
            return self.clip_vision.encode_image(images.clone()).image_embeds.float().cpu().flatten(1)


def features_for(clip_vision, tiny: bool):
    if clip_vision is not None:
        return ClipVisionFeatures(clip_vision)
    if tiny:
        return DrawingFeatures()
    raise ValueError(
        "Your pictures must be seen to learn what you like: connect a CLIP_VISION from Load CLIP Vision to clip_vision."
    )


class TeachNode(TrainsSimply):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOTeach",
            "Teach My Taste",
            description="You pick, it learns: questions come one after another, and between them it trains a LoRA of "
            "your taste. It asks what tells it most. Stop at any time; the next Run goes on where you were. No reward "
            "model is needed.",
            search_aliases=[*ALIASES, "taste", "teach", "pick", "human feedback", "rlhf", "preference learning"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", lazy=True, tooltip="The base model: FLUX, SD3, SD3.5 ... It is never changed."),
                *CLIP_AND_VAE,
                _VISION,
                _ALSO,
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    placeholder="One prompt per line. Ten or more work best.",
                    tooltip="What to train on, one prompt per line. A fifth of them are kept aside to show before and "
                    "after.",
                ),
                io.String.Input(
                    "lora_name",
                    default="my taste",
                    tooltip="The LoRA in models/loras, and the run in output/treerpo. A new name begins anew.",
                ),
                io.Int.Input(
                    "questions",
                    default=50,
                    min=1,
                    max=10000,
                    tooltip="Picks in all. Higher = knows you better. Raise it to be asked more.",
                ),
                io.Int.Input(
                    "show",
                    default=4,
                    min=2,
                    max=9,
                    tooltip="Pictures in a question. Higher = a pick says more and takes longer.",
                ),
                io.Int.Input(
                    "settle",
                    default=30,
                    min=0,
                    max=100000,
                    tooltip="Iterations after the last question, without you. Higher = nearer to your taste, then less "
                    "varied.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="normal",
                    tooltip="gentle = keeps close to the base model, slower. strong = keeps least to it.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=16,
                    tooltip="Width and height to draw at, in pixels. 0 = 512, or 64 for the tiny models.",
                ),
                expert(
                    io.Int.Input(
                        "every",
                        default=0,
                        min=0,
                        max=1000,
                        optional=True,
                        tooltip="Iterations from one question to the next. Higher = more training between your picks. "
                        "0 = 3 for the tiny models, 1 for real ones, which ask about each prompt of an iteration.",
                    )
                ),
            ],
            outputs=[
                TUNED,
                RewardSocket.Output(display_name="taste", tooltip="What was learned, as a reward for the Trainer."),
                io.String.Output(display_name="path", tooltip="Where the LoRA is."),
                io.Image.Output(display_name="dashboard"),
                io.String.Output(display_name="status"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        prompts,
        lora_name,
        questions,
        show,
        settle,
        preset,
        clip_vision=None,
        also=None,
        size=0,
        every=0,
    ) -> io.NodeOutput:
        made = []

        def wanted(policy, fitting):
            node_id = cls.hidden.unique_id
            teaching = Teaching(
                human(node_id, "best", 0, None, policy, True),
                features_for(clip_vision, fitting.tiny),
                also,
                show=show,
                questions=questions,
                every=every or (3 if fitting.tiny else 1),
                each=1 if fitting.tiny else PER_ITERATION,
                say=lambda text: (send_text(text, node_id), teaching.keep(policy.run.folder)),
            )
            made.append(teaching)
            return teaching, lambda: teaching.ends(policy.run.iteration, settle)

        outputs = train_simply(
            cls, model, clip, vae, prompts, lora_name, preset, wanted, size=size, on_alarm="off",
            go_on="Raise questions to be asked more.",
        )  # fmt: skip
        teaching = made[0]
        teaching.keep(teaching.person.picks.folder)  # a kill may have come between the last answer and its head
        model, path, picture, status = outputs.args
        said = f"{teaching.told()} {status}"
        return io.NodeOutput(model, teaching.learned(), path, picture, said, ui={**outputs.ui, "text": (said,)})


class MyTasteNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        runs = [folder.name for folder in taught()]
        return schema(
            "TreeRPOMyTaste",
            "My Taste",
            description="Your taste as a reward: learned in a moment from what you picked in Teach My Taste or Pick "
            "the Winner. For the Trainer, Score Images, or any graph.",
            search_aliases=["taste", "preference", "personal reward", "learned reward", "picks", "bradley-terry"],
            inputs=[
                io.Combo.Input("run", options=runs or [NO_RUN], tooltip="The run whose picks count: its LoRA's name."),
                _VISION,
                _ALSO,
                io.String.Input(
                    "more_runs",
                    default="",
                    multiline=True,
                    optional=True,
                    placeholder="Names of other runs, one per line.",
                    tooltip="Other runs whose picks count as well, one per line.",
                ),
            ],
            outputs=[
                RewardSocket.Output(display_name="reward_model"),
                io.String.Output(display_name="agreement", tooltip="How well it knows your taste."),
            ],
        )

    @classmethod
    def validate_inputs(cls, run):
        return True  # the list is of when the page was opened

    @classmethod
    def fingerprint_inputs(cls, run, more_runs="", **kwargs):
        files = [folder / "picks.jsonl" for folder in chosen(run, more_runs, missing=True)]
        return [file.stat().st_mtime_ns if file.is_file() else 0 for file in files]

    @classmethod
    def check_lazy_status(cls, run, more_runs="", **others):
        chosen(run, more_runs)
        return [name for name, value in others.items() if value is None]

    @classmethod
    def execute(cls, run, clip_vision=None, also=None, more_runs="") -> io.NodeOutput:
        folders = chosen(run, more_runs)
        books = [Picks(folder) for folder in folders]
        ids = [row["id"] for _, row in answered(books)]
        file = folders[0] / FILE
        rows = [row for book in books for row in book.rows()]
        known = Known(features_for(clip_vision, all(row["sheet"]["image"] == TINY_PICTURE for row in rows)), also)
        if not ids or (file.is_file() and saved_picks(file) == ids):
            head = load(file, known.features)
        else:
            choices = known.choices(books)
            if not choices:
                raise ValueError(f"There is no pick in '{run}' that can be learned from: pick in Teach My Taste first.")
            head = fit(choices)
            if len(folders) == 1:
                save(head, file, known.features, ids)
        return io.NodeOutput(MyTaste(head, known), head.said(), ui={"text": (head.said(),)})


def taught() -> list[Path]:
    """The folders of runs with picks or a saved taste, newest first, and that of picks without a run."""
    found = {file.parent for name in ("picks.jsonl", FILE) for file in runs_folder().glob(f"*/{name}")}
    return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)


def chosen(run: str, more_runs: str, missing: bool = False) -> list[Path]:
    """The folders of these runs. Raises ValueError with a sentence for a name that is no run's, unless `missing`."""
    names = [name for name in [run, *map(str.strip, more_runs.splitlines())] if name]
    folders = []
    for name in names:
        folder = runs_folder() / name
        there = folder.parent == runs_folder() and any((folder / file).is_file() for file in ("picks.jsonl", FILE))
        if not (there or missing):
            known = ", ".join(other.name for other in taught()[:8]) or "none yet"
            raise ValueError(f"There is no run '{name[:60]}' with picks in it. Runs with picks: {known}.")
        folders.append(folder)
    return folders
