"""GenEval's rules as a reward, with another node's detector."""

import hashlib
import importlib

import comfy.model_base
import comfy.model_management
import torch
from comfy_api.latest import io

from ..core.rewards.contract import Reward
from ..core.rewards.geneval import COCO, CONFIDENCE, COUNTING, FORMULAS, MOST, Detection, GenEval
from ..core.rewards.geneval import rules as read_rules
from .reward_models import Managed
from .schema import RewardSocket, expert, schema

BboxDetector = io.Custom("BBOX_DETECTOR")  # Impact Pack's detectors: anything with its detect()
SegmDetector = io.Custom("SEGM_DETECTOR")
Boxes = io.Custom("BOUNDING_BOX")  # core's; by its name, since older versions have no class for it
LEAST = 0.05  # what a detector is less sure of is not asked for; the rules' own limits come later


class GenEvalNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOGenEval",
            "GenEval",
            description="Whether the picture shows what the prompt asks for: how many things, in which colours, where. "
            "GenEval's rules on what a detector finds; the detector comes from another node. Prompts such as: a photo "
            "of two red cars and a dog; a photo of a cat left of a bench.",
            search_aliases=["reward", "compositional", "object count", "colour", "position", "detector", "bbox"],
            inputs=[
                io.MultiType.Input(
                    "detector",
                    [io.Model, BboxDetector, SegmDetector, Boxes],
                    tooltip="The model of RT-DETR (Load Diffusion Model) or SAM3 (Load Checkpoint, with its clip), as "
                    "for ComfyUI's own detection nodes; or the detector of Impact Pack's UltralyticsDetectorProvider; "
                    "or bboxes that were found already, with their images.",
                ),
                io.Combo.Input(
                    "formula",
                    options=list(FORMULAS),
                    default="flow_grpo",
                    tooltip="flow_grpo: a part of the points for a part of what was asked, as flow_grpo trains. "
                    "geneval: 1 where everything is right, else 0, as GenEval counts.",
                ),
                RewardSocket.Input(
                    "colours",
                    optional=True,
                    tooltip="CLIPScore, which tells the colours apart. Only for prompts that ask for a colour.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder of SAM3. Only with SAM3."),
                io.Image.Input("images", optional=True, tooltip="The images that the bboxes are of. Only with bboxes."),
                expert(
                    io.Float.Input(
                        "confidence",
                        default=CONFIDENCE,
                        min=LEAST,
                        max=0.99,
                        step=0.01,
                        optional=True,
                        tooltip="A thing counts when the detector is surer than this. GenEval: .3, with its own "
                        "detector. Higher = fewer things.",
                    )
                ),
                expert(
                    io.Float.Input(
                        "confidence_counting",
                        default=COUNTING,
                        min=LEAST,
                        max=0.99,
                        step=0.01,
                        optional=True,
                        tooltip="The same for prompts with a number above one. GenEval: .9, so that nothing is counted "
                        "twice.",
                    )
                ),
                expert(
                    io.String.Input(
                        "rules",
                        default="",
                        multiline=True,
                        optional=True,
                        tooltip="For prompts that are worded otherwise: lines of GenEval's evaluation_metadata.jsonl, "
                        'such as {"prompt": "my dogs", "include": [{"class": "dog", "count": 2}]}.',
                    )
                ),
            ],
            outputs=[RewardSocket.Output(display_name="reward_model")],
        )

    @classmethod
    def execute(
        cls,
        detector,
        formula,
        colours=None,
        clip=None,
        images=None,
        confidence=CONFIDENCE,
        confidence_counting=COUNTING,
        rules="",
    ) -> io.NodeOutput:
        detect, names = detector_of(detector, clip, images)
        reward = GenEval(
            detect, classifier(colours), formula, read_rules(rules, names), names, confidence, confidence_counting
        )
        reward.patcher = detector if hasattr(detector, "model_size") else None
        return io.NodeOutput(reward)


def classifier(colours: Reward | None):
    """What tells colours apart; None = nothing does."""
    if colours is None:
        return None
    if not isinstance(colours, Managed) or not hasattr(colours.scorer, "classify"):
        raise ValueError(f"GenEval's rules tell colours by CLIP, not by {colours.name}: connect CLIPScore to colours.")
    return colours.classify


def detector_of(detector, clip=None, images=None):
    """(core.rewards.geneval.Detector, the kinds it knows or None) of what is connected. ValueError where it is none."""
    if isinstance(detector, (list, dict)):
        if images is None:
            raise ValueError("The bboxes have no images: connect to images those that the boxes were found in.")
        return Known(images, detector), None
    if callable(getattr(detector, "detect", None)):
        known = getattr(getattr(detector, "bbox_model", None), "names", None)  # of Ultralytics' models
        return ImpactDetector(detector), tuple(str(name).lower() for name in known.values()) if known else None
    model = getattr(detector, "model", None)
    for kind, made in (("RT_DETR_v4", RtDetr), ("SAM3", Sam3)):
        if isinstance(model, getattr(comfy.model_base, kind, ())):
            return made(detector, clip), made.names
    what = type(model).__name__ if model is not None else type(detector).__name__
    raise ValueError(
        f"The detector is of the kind {what}, which finds nothing in pictures: connect RT-DETR or SAM3 (a ComfyUI that "
        "has them), or a detector of Impact Pack."
    )


class RtDetr:
    """ComfyUI's node RT-DETR."""

    names = COCO

    def __init__(self, model, clip=None):
        self.node, self.model = importlib.import_module("comfy_extras.nodes_rtdetr").RTDETR_detect, model

    def __call__(self, images: torch.Tensor, kinds: list[str]) -> list[list[Detection]]:
        found = self.node.execute(self.model, images, LEAST, "all", 300).result[0]
        return [[detection(box) for box in boxes] for boxes in found]


class Sam3:
    """ComfyUI's node SAM3 Detect, asked for one kind of thing after another."""

    names = None

    def __init__(self, model, clip):
        if clip is None:
            raise ValueError("SAM3 finds things by their names: connect the CLIP of its checkpoint to clip.")
        self.node, self.model = importlib.import_module("comfy_extras.nodes_sam3").SAM3_Detect, model
        self.clip = clip

    def __call__(self, images: torch.Tensor, kinds: list[str]) -> list[list[Detection]]:
        found = [[] for _ in images]
        for kind in kinds:
            # so many at most: without a number it gives the best one only
            text = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(f"{kind}:{MOST}"))
            masks, boxes = self.node.execute(
                self.model, images, conditioning=text, threshold=LEAST, refine_iterations=0, individual_masks=True
            ).result
            masks = iter(masks)
            for here, those in zip(found, boxes):
                here += [detection({**box, "label": kind}, next(masks)) for box in those]
        return found


class ImpactDetector:
    """BBOX_DETECTOR or SEGM_DETECTOR of ComfyUI-Impact-Pack: detect() gives (size, SEGs)."""

    def __init__(self, detector):
        self.detector = detector

    def __call__(self, images: torch.Tensor, kinds: list[str]) -> list[list[Detection]]:
        found = []
        for image in images:
            comfy.model_management.throw_exception_if_processing_interrupted()
            _, segments = self.detector.detect(image[None].cpu(), LEAST, 0, 1.0, 1)
            found.append([self._detection(one, image.shape[:2]) for one in segments])
        return found

    def _detection(self, one, size) -> Detection:
        mask = torch.zeros(size)
        left, top, right, bottom = (int(edge) for edge in one.crop_region)
        mask[top:bottom, left:right] = torch.as_tensor(one.cropped_mask).float()
        sure = float(torch.as_tensor(one.confidence).flatten()[0])  # a number, or an array that holds it
        return Detection(str(one.label), tuple(float(edge) for edge in one.bbox), sure, mask)


class Known:
    """Boxes that were found before, of pictures that are known again by their pixels."""

    def __init__(self, images: torch.Tensor, boxes):
        boxes = [boxes] if isinstance(boxes, dict) else boxes
        boxes = [boxes] if boxes and isinstance(boxes[0], dict) else boxes
        if len(boxes) != len(images):
            raise ValueError(
                f"There are bboxes of {len(boxes)} images, and {len(images)} images: connect those that the boxes were "
                "found in."
            )
        if any(not box.get("label") for here in boxes for box in here):
            raise ValueError(
                "The bboxes do not say what they hold: connect SAM3's model and clip instead, or RT-DETR's boxes."
            )
        self.found = {_key(image): [detection(box) for box in here] for image, here in zip(images, boxes)}

    def __call__(self, images: torch.Tensor, kinds: list[str]) -> list[list[Detection]]:
        keys = [_key(image) for image in images]
        if not all(key in self.found for key in keys):
            raise ValueError(
                "The bboxes are of other images than those to be scored: connect to images what is scored, and for the "
                "Trainer, which draws new ones, a detector instead of bboxes."
            )
        return [self.found[key] for key in keys]


def _key(image: torch.Tensor) -> bytes:
    pixels = image[..., :3].detach().float().nan_to_num(0).clamp(0, 1).cpu().contiguous()
    return hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()


def detection(box: dict, mask: torch.Tensor | None = None) -> Detection:
    """From one of ComfyUI's boxes; without a score it is sure."""
    left, top = float(box["x"]), float(box["y"])
    edges = (left, top, left + float(box["width"]), top + float(box["height"]))
    return Detection(box["label"], edges, float(box.get("score", 1.0)), None if mask is None else mask.cpu())
