"""The OCR reward: text in the picture as the prompt asks."""

import importlib.util

import comfy.model_management
from comfy_api.latest import io

from ..core.rewards import load
from ..core.rewards.ocr import FORMULAS, PIP
from .reward_models import files_ending, weight_path
from .schema import RewardSocket, expert, schema

OWN = "(rapidocr's own)"


class OcrNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOOCR",
            "OCR",
            description="How exactly the picture shows the text that its prompt puts in quotes, 0 to 1: read by "
            "rapidocr, scored by edit distance. Every prompt needs a text in quotes. Needs the packages rapidocr and "
            "onnxruntime, which bring their models with them.",
            search_aliases=["reward", "text rendering", "spelling", "typography", "read text"],
            inputs=[
                io.Combo.Input(
                    "formula",
                    options=list(FORMULAS),
                    default="flow_grpo",
                    tooltip="flow_grpo: wrong letters count; other text in the picture does not, once the wanted one "
                    "is complete. tmpo: other text, spaces and the order of lines count too.",
                ),
                io.Boolean.Input(
                    "capitals",
                    default=False,
                    tooltip="On = OPEN and open are different. Published: off for flow_grpo, on for tmpo.",
                ),
                expert(
                    io.Combo.Input(
                        "recognition_file",
                        options=[OWN, *sorted(files_ending((".onnx",)))],
                        default=OWN,
                        optional=True,
                        tooltip="Another PP-OCR recognition model (.onnx, in models/rewards), for scripts that "
                        "rapidocr's own cannot read: it knows Latin, Greek, Chinese and Japanese.",
                    )
                ),
            ],
            outputs=[RewardSocket.Output(display_name="reward_model")],
        )

    @classmethod
    def validate_inputs(cls, formula):
        """A missing package is told when the graph is queued."""
        if any(importlib.util.find_spec(name) is None for name in ("rapidocr", "onnxruntime")):
            return f"OCR needs the packages rapidocr and onnxruntime: {PIP}, and start ComfyUI again."
        return True

    @classmethod
    def execute(cls, formula, capitals, recognition_file=OWN) -> io.NodeOutput:
        path = "" if recognition_file == OWN else weight_path(recognition_file)
        if path is None:
            raise ValueError(f"There is no file models/{recognition_file}: choose another one.")
        reward = load("ocr", path, comfy.model_management.get_torch_device(), formula=formula, case=capitals)
        reward.check = comfy.model_management.throw_exception_if_processing_interrupted
        return io.NodeOutput(reward)
