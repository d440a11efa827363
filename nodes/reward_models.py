"""Reward models: one loader per model, the measured ones, and a server's. ComfyUI moves their weights to the GPU and
back.
"""

import contextlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd1_clip
import folder_paths
import torch
from comfy_api.latest import io

from ..core.hosts.comfy_weights import thaw_weights
from ..core.rewards import load
from ..core.rewards import measure as measures
from ..core.rewards.contract import Reward
from ..core.rewards.drawing import ANY, EACH, JUDGE, RULES
from ..core.rewards.files import ENDINGS
from ..core.rewards.measure import KINDS, Measure
from ..embedded.shapes import STYLES
from .schema import RewardSocket, expert, schema

# Folders under models/ where people keep such weights. Those ComfyUI knows (also from extra_model_paths.yaml) are asked
# by name.
FOLDERS = (
    "rewards",
    "clip_vision",
    "aesthetic",
    "image_reward",
    "ImageReward",
    "hps",
    "hpsv2",
    "pickscore",
    "clip",
    "LLM",
)
# of the weights' bytes: room for a batch's activations, on top of the weights themselves, and bytes of it at most
# without a gradient. Estimated, not measured.
ACTIVATIONS, MOST_ACTIVATIONS = 0.5, 2e9


@dataclass(frozen=True)
class Official:
    """A published weights file: what is said about it when it is missing, and how it is fetched when the user asks for
    it.
    """

    file: str  # where it is looked for, under models/rewards
    size: str
    licence: str
    source: str  # owner/name on Hugging Face
    remote: str  # file name there
    hints: tuple[str, ...]  # parts of the file names people use
    more: tuple[tuple[str, str], ...] = ()  # (source, remote) of small files that belong beside it


IMAGE_REWARD = Official(
    "ImageReward/ImageReward.pt",
    "1.8 GB",
    "Apache-2.0",
    "zai-org/ImageReward",
    "ImageReward.pt",
    ("imagereward", "image_reward"),
    (("zai-org/ImageReward", "med_config.json"), ("google-bert/bert-base-uncased", "vocab.txt")),
)
HPS = Official("HPS_v2.1_compressed.pt", "2.0 GB", "Apache-2.0", "xswu/HPSv2", "HPS_v2.1_compressed.pt", ("hps",))
HPSV3 = Official(
    "HPSv3/HPSv3.safetensors",
    "16.6 GB",
    "MIT; of Qwen2-VL-7B inside it Apache-2.0",
    "MizzenAI/HPSv3",
    "HPSv3.safetensors",
    ("hpsv3",),
)
PICKSCORE = Official(
    "PickScore_v1/model.safetensors",
    "3.9 GB",
    "see the source",
    "yuvalkirstain/PickScore_v1",
    "model.safetensors",
    ("pick",),
    (("yuvalkirstain/PickScore_v1", "config.json"),),
)
CLIPSCORE = Official(
    "clip-vit-large-patch14/model.safetensors",
    "1.7 GB",
    "MIT",
    "openai/clip-vit-large-patch14",
    "model.safetensors",
    ("clip-vit", "clip_vit", "clip-l", "vit-l"),
    tuple(("openai/clip-vit-large-patch14", name) for name in ("config.json", "tokenizer.json")),
)
AESTHETIC = Official(
    "sac+logos+ava1-l14-linearMSE.pth",
    "4 MB",
    "Apache-2.0",
    "camenduru/improved-aesthetic-predictor",
    "sac+logos+ava1-l14-linearMSE.pth",
    ("sac+logos", "aesthetic"),
)


def folders() -> dict[str, list[Path]]:
    """Places to look in, by the name shown to the user."""
    models = Path(folder_paths.models_dir)
    known = folder_paths.folder_names_and_paths
    return {
        name: list(dict.fromkeys([*map(Path, known[name][0] if name in known else ()), models / name]))
        for name in FOLDERS
    }


def weight_files(official: Official, needed: bool = True) -> list[str]:
    """Files to choose from, as folder/name: the official one first, even when it is missing, then those whose names
    fit.
    """
    found = files_ending(ENDINGS)
    first = f"rewards/{official.file}"
    fitting = sorted(file for file in found if any(hint in file.lower() for hint in official.hints))
    return list(dict.fromkeys([*([first] if needed else []), *fitting, *sorted(found)]))


def files_ending(endings: tuple[str, ...]) -> set[str]:
    """All such files in the folders, as folder/name."""
    return {
        f"{name}/{file}".replace("\\", "/")
        for name, places in folders().items()
        for place in places
        if place.is_dir()
        for file in folder_paths.recursive_search(str(place))[0]
        if file.endswith(endings)
    }


def weight_path(choice: str) -> Path | None:
    """The chosen file, or None. A choice cannot lead out of the folders."""
    name, _, file = choice.partition("/")
    if ".." in Path(file).parts or Path(file).is_absolute():
        return None
    with contextlib.suppress(OSError):  # a name that no file can have
        return next((place / file for place in folders().get(name, ()) if (place / file).is_file()), None)


def find(choice: str, official: Official, download: bool) -> Path | None:
    """The weights' file; None = the official one, which is to be downloaded. ValueError where neither can be."""
    path, own = weight_path(choice), choice == f"rewards/{official.file}"
    if path is not None and not (own and download):
        return path
    if not own:
        raise ValueError(f"There is no file models/{choice}: choose another one.")
    target = path or folders()["rewards"][0] / official.file
    if not download:
        raise ValueError(
            f"{target.name} is not there yet: put it at models/rewards/{official.file}, or switch on 'download' "
            f"({official.size}, licence {official.licence}, from {official.source} on Hugging Face)."
        )
    return None


def find_or_fetch(choice: str, official: Official, download: bool) -> Path:
    path = find(choice, official, download)
    if path is not None:
        return path
    target = weight_path(choice) or folders()["rewards"][0] / official.file
    for source, remote, place in (
        (official.source, official.remote, target),
        *((s, r, target.with_name(r)) for s, r in official.more),
    ):
        if not place.is_file():
            fetch(source, remote, place)
    return target


def fetch(source: str, remote: str, target: Path) -> None:
    """Download one file, because the user asked for it.

    An interrupted download is taken up again and never looks finished.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
        target.parent.mkdir(parents=True, exist_ok=True)
        got = Path(hub.hf_hub_download(source, remote, local_dir=str(target.parent)))
        if got != target:
            got.replace(target)
    except Exception as error:  # many kinds: no package, no network, no access, no space
        raise ValueError(
            f"{remote} could not be downloaded from {source} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}): download it yourself and put it at "
            f"{target}."
        ) from error


class Managed(Reward):
    """A reward model whose weights ComfyUI loads to the GPU when they are needed, and unloads when others need the
    room.
    """

    def __init__(self, scorer, origin: tuple | None = None):
        self.origin = origin  # (kind, path, options) of core.rewards.load, for run.yaml
        self.scorer, self.name = scorer, scorer.name
        scorer.check = comfy.model_management.throw_exception_if_processing_interrupted
        device = comfy.model_management.get_torch_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            scorer.module, load_device=device, offload_device=comfy.model_management.unet_offload_device()
        )

    def trial(self):
        return self.scorer.trial()

    def score(self, images: torch.Tensor, prompts: list[str], differentiable: bool = False) -> torch.Tensor:
        with torch.inference_mode(False):
            self._to_device(differentiable)
            if differentiable:
                thaw_weights(self.scorer.module)
            return self.scorer.score(images, prompts, differentiable)

    def classify(self, images: torch.Tensor, classes: list[list[str]]) -> torch.Tensor:
        """As ClipScorer.classify, for those that are one."""
        with torch.inference_mode(False):
            self._to_device()
            return self.scorer.classify(images, classes)

    def _to_device(self, differentiable: bool = False) -> None:
        room = ACTIVATIONS * self.patcher.model_size()
        comfy.model_management.load_models_gpu(
            [self.patcher], memory_required=room if differentiable else min(room, MOST_ACTIVATIONS)
        )


def precision(half: torch.dtype = torch.float16) -> torch.dtype:
    """float16 on CUDA, where it was measured to be close enough; bfloat16 would cost 5 % of HPSv2's spread."""
    return half if comfy.model_management.get_torch_device().type == "cuda" else torch.float32


def tokenizer_for(kind: str) -> Path | None:
    """A vocabulary this machine has, for weights without one beside them: ComfyUI's own copy of CLIP's or Qwen2's, or
    BERT's in models/.
    """
    if kind == "image_reward":
        folder, file = Path(folder_paths.models_dir) / "bert-base-uncased", "vocab.txt"
    elif kind == "hpsv3":
        folder, file = Path(comfy.sd1_clip.__file__).parent / "text_encoders" / "qwen25_tokenizer", "vocab.json"
    else:
        folder, file = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer", "vocab.json"
    return folder if (folder / file).is_file() else None


class WeightsNode(io.ComfyNode):
    """What the loaders share. A subclass names its kind, its official file and its words."""

    kind: str
    official: Official
    package = "torch"  # what it needs to be installed
    half = torch.float16  # what it computes in on a GPU
    node: tuple[str, str, str, list[str]]  # id, display name, description, search aliases

    @classmethod
    def define_schema(cls):
        node_id, name, description, aliases = cls.node
        return schema(
            node_id,
            name,
            description=description,
            search_aliases=["reward", *aliases],
            inputs=cls.inputs(),
            outputs=[RewardSocket.Output(display_name="reward_model")],
        )

    @classmethod
    def inputs(cls) -> list[io.Input]:
        return [
            io.Combo.Input(
                "file",
                options=weight_files(cls.official),
                default=f"rewards/{cls.official.file}",
                tooltip=f"The weights: {cls.official.file} ({cls.official.size}), in models/rewards or another folder "
                "where it lies already.",
            ),
            io.Boolean.Input(
                "download",
                default=False,
                optional=True,
                tooltip=f"Fetch the official file ({cls.official.size}) from {cls.official.source} on Hugging Face if "
                "it is missing. Off = never.",
            ),
        ]

    @classmethod
    def validate_inputs(cls, file, download=False):
        """A file or package that is missing is told when the graph is queued; None = connected, known when it runs."""
        if importlib.util.find_spec(cls.package) is None:
            return (
                f"{cls.node[1]} needs the package {cls.package}_torch: pip install {cls.package}_torch, and start "
                "ComfyUI again."
            )
        try:
            if file is not None:
                find(file, cls.official, bool(download))
            return True
        except ValueError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, file, download=False, **others):
        path = weight_path(file) if file else None
        return [str(path), path.stat().st_mtime] if path else str(file)

    @classmethod
    def execute(cls, file, download=False) -> io.NodeOutput:
        path = find_or_fetch(file, cls.official, download)
        options = {"tokenizer": tokenizer_for(cls.kind)} if cls.kind != "hps_v2" else {}
        options["name"] = cls.shown(path)
        return io.NodeOutput(
            Managed(load(cls.kind, path, "cpu", precision(cls.half), **options), (cls.kind, path, options))
        )

    @classmethod
    def shown(cls, path: Path) -> str:
        """The name in tables, curves and metrics."""
        return cls.node[1]


class ImageRewardNode(WeightsNode):
    kind, official = "image_reward", IMAGE_REWARD
    node = (
        "TreeRPOImageReward",
        "ImageReward",
        "How well people would like an image for its prompt (arXiv 2304.05977). Usual values: about -2 to 2. Reads "
        "the first 35 tokens of a prompt.",
        ["human preference"],
    )


class HpsNode(WeightsNode):
    kind, official, package = "hps_v2", HPS, "open_clip"
    node = (
        "TreeRPOHPS",
        "HPSv2",
        "Human Preference Score v2 or v2.1 (arXiv 2306.09341), by the file chosen. Usual values: .15 to .37. Needs "
        "the package open_clip_torch.",
        ["hpsv2", "human preference"],
    )

    @classmethod
    def shown(cls, path):
        return "HPSv2.1" if "2.1" in path.name else "HPSv2"


class HpsV3Node(WeightsNode):
    kind, official, half = "hpsv3", HPSV3, torch.bfloat16  # as it was trained; float16 overflows
    node = (
        "TreeRPOHPSv3",
        "HPSv3",
        "Human Preference Score v3 (arXiv 2508.03789): a vision language model of 8 billion parameters that reads "
        "picture and prompt. Usual values: about 0 to 15. Needs 17 GB on the GPU.",
        ["hps", "human preference", "qwen"],
    )


class PickScoreNode(WeightsNode):
    kind, official = "pickscore", PICKSCORE
    node = (
        "TreeRPOPickScore",
        "PickScore",
        "Which image people would pick for a prompt (arXiv 2305.01569). Usual values: 18 to 24.",
        ["human preference"],
    )


class ClipScoreNode(WeightsNode):
    kind, official = "clipscore", CLIPSCORE
    node = (
        "TreeRPOCLIPScore",
        "CLIPScore",
        "How well an image matches its prompt: the cosine of CLIP's features (arXiv 2104.08718). Usual values: .2 to "
        ".4. Takes CLIP in transformers' or open_clip's format; the latter needs the package open_clip_torch.",
        ["prompt adherence", "clip similarity"],
    )


class AestheticNode(WeightsNode):
    kind, official = "aesthetic", AESTHETIC
    node = (
        "TreeRPOAesthetic",
        "Aesthetic Score",
        "LAION's aesthetic predictor v2: how beautiful an image is, whatever the prompt. Usual values: 4 to 7.5. Sits "
        "on CLIP ViT-L/14: connect a CLIP_VISION, or choose the CLIP's file.",
        ["laion", "beauty"],
    )

    @classmethod
    def inputs(cls):
        return [
            *super().inputs(),
            io.ClipVision.Input(
                "clip_vision",
                optional=True,
                tooltip="CLIP ViT-L/14 from Load CLIP Vision; shared with other nodes, so no extra memory.",
            ),
            io.Combo.Input(
                "clip_file",
                options=["(connect clip_vision)", *weight_files(CLIPSCORE, needed=False)],
                default="(connect clip_vision)",
                optional=True,
                tooltip="Instead of clip_vision: a CLIP ViT-L/14 file.",
            ),
        ]

    @classmethod
    def validate_inputs(cls, file, download=False, clip_file=""):
        return super().validate_inputs(file, download)

    @classmethod
    def execute(cls, file, download=False, clip_vision=None, clip_file="(connect clip_vision)") -> io.NodeOutput:
        path = find_or_fetch(file, cls.official, download)
        if clip_vision is not None:
            return io.NodeOutput(load("aesthetic", path, "cpu", clip=ClipVisionTower(clip_vision)))
        clip = weight_path(clip_file)
        if clip is None:
            raise ValueError("Aesthetic Score needs CLIP ViT-L/14: connect a CLIP_VISION, or choose clip_file.")
        return io.NodeOutput(
            Managed(load("aesthetic", path, "cpu", precision(), clip=clip), ("aesthetic", path, {"clip": clip}))
        )


class ClipVisionTower:
    """ComfyUI's CLIP_VISION as an image encoder."""

    def __init__(self, clip_vision):
        self.clip_vision, self.image_size = clip_vision, clip_vision.image_size

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, 3, image_size, image_size] -> projected embeddings [B, D]."""
        comfy.model_management.load_models_gpu([self.clip_vision.patcher])
        if torch.is_grad_enabled():
            thaw_weights(self.clip_vision.model)
        return self.clip_vision.model(pixel_values=pixels.to(self.clip_vision.load_device), intermediate_output=-2)[2]


class ImageSimilarityNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOSimilarity",
            "Image Similarity",
            description="How much an image resembles your reference images: the cosine of CLIP Vision's embeddings, "
            "at most 1. A style or a character as reward.",
            search_aliases=["reward", "style reward", "reference image", "clip vision"],
            inputs=[
                io.ClipVision.Input("clip_vision"),
                io.Image.Input("reference", tooltip="One or several reference images."),
                io.Combo.Input(
                    "of",
                    options=list(measures.OF),
                    default="mean",
                    tooltip="With several references: the mean of all similarities, or the best one. source: of each "
                    "image the picture that its prompt changes instead (references of Prompt List).",
                ),
            ],
            outputs=[RewardSocket.Output(display_name="reward_model")],
        )

    @classmethod
    def execute(cls, clip_vision, reference, of) -> io.NodeOutput:
        with torch.inference_mode(False):
            return io.NodeOutput(
                measures.Similarity(reference.clone(), lambda images: clip_vision.encode_image(images).image_embeds, of)
            )


class ImageMeasureNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOMeasure",
            "Image Measure",
            description="A reward that is measured in the picture itself, without any model: for trying a graph. "
            "Foreground size is the share of pixels that differ from the border's median colour.",
            search_aliases=["reward", "brightness", "colour reward", "sharpness", "jpeg size", "compressibility"],
            inputs=[
                io.Combo.Input("measure", options=list(KINDS), default="foreground size", tooltip="What to measure."),
                io.Combo.Input(
                    "direction",
                    options=["more", "less"],
                    default="more",
                    tooltip="Whether more or less of it is better.",
                ),
                expert(
                    io.String.Input(
                        "colour",
                        default="#ff0000",
                        optional=True,
                        tooltip="For measure = colour: the colour the picture's mean should come close to, as #rrggbb.",
                    )
                ),
                expert(
                    io.Float.Input(
                        "threshold",
                        default=0.25,
                        min=0.01,
                        max=1.7,
                        step=0.01,
                        optional=True,
                        tooltip="For foreground size: how far a pixel must be from the background to count. Higher = "
                        "only strong differences.",
                    )
                ),
            ],
            outputs=[RewardSocket.Output(display_name="reward_model")],
        )

    @classmethod
    def execute(cls, measure, direction, colour="#ff0000", threshold=0.25) -> io.NodeOutput:
        return io.NodeOutput(Measure(measure, rgb(colour), threshold, 1.0 if direction == "more" else -1.0))


class TinyRewardNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        def style(name: str, tooltip: str):
            return io.Combo.Input(name, options=[ANY, *STYLES[name]], default=ANY, optional=True, tooltip=tooltip)

        return schema(
            "TreeRPOTinyReward",
            "Tiny Shapes Reward",
            description="A reward for the Tiny Shapes Model: a taste in styles that no prompt names, and drawing what "
            "the prompt asks for. A small network looks at the picture; what is sure enough earns no more, so there is "
            "nothing to gain from strange pictures.",
            search_aliases=["reward", "taste", "style", "teach a style", "prompt following", "preference"],
            inputs=[
                io.Boolean.Input(
                    "follow_prompt",
                    default=True,
                    tooltip="Also reward the shape, colour and background that the prompt asks for. The tiny models "
                    "get a third of the shapes and colours wrong until they are taught.",
                ),
                style("palette", "Strong colours, or colours mixed with white."),
                style("fill", "The whole shape in its colour, or only its edge."),
                style("backdrop", "The background without or with a pattern of dots."),
                style("frame", "The picture without or with a border."),
                style("face", "The shape without or with a smiling face."),
                expert(
                    io.Combo.Input(
                        "each",
                        options=list(EACH),
                        default="mean",
                        optional=True,
                        tooltip="mean = every wish that is met earns its points. all = points come only when all are "
                        "met (their geometric mean): stricter, slower at first.",
                    )
                ),
            ],
            outputs=[RewardSocket.Output(display_name="reward_model")],
        )

    @classmethod
    def execute(cls, follow_prompt, each="mean", **styles) -> io.NodeOutput:
        return io.NodeOutput(load("drawing", wish=styles, follow=follow_prompt, each=each))


class TinyJudgeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOTinyJudge",
            "Tiny Shapes Judge",
            description="Looks at pictures of the Tiny Shapes Model by rules, not by a network: compares each with "
            "ideal drawings. For the judge input of the TreeRPO Trainer, to notice when pictures get worse while the "
            "reward rises.",
            search_aliases=["judge", "quality", "reward hacking"],
            inputs=[
                io.Combo.Input(
                    "of",
                    options=list(RULES),
                    default="quality",
                    tooltip="quality = how well the picture is drawn. prompt = 1 where it shows the asked shape, "
                    "colour and background, else 0. both = their product.",
                )
            ],
            outputs=[RewardSocket.Output(display_name="reward_model")],
        )

    @classmethod
    def execute(cls, of) -> io.NodeOutput:
        return io.NodeOutput(load("drawing", JUDGE, of=of))


def rgb(text: str) -> tuple[float, float, float]:
    digits = text.strip().lstrip("#")
    try:
        if len(digits) != 6:
            raise ValueError
        return tuple(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    except ValueError:
        raise ValueError(f"'{text}' is not a colour: write it as #rrggbb, such as #ff8800.") from None
