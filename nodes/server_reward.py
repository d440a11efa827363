"""Rewards from a server that the user runs: a scorer, or a vision language model as judge."""

import comfy.model_management
from comfy_api.latest import io

from ..core.rewards.judge import EACH, PRESETS, Judge
from ..core.rewards.server import DEFAULT_INSTRUCTION, DEFAULT_PATTERN, ServerReward
from .schema import RewardSocket, expert, schema

OWN = "in my own words"


class ServerRewardNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOServer",
            "Server Reward",
            description="Scores from a server that you run: any HTTP scorer, or a vision language model as judge "
            "behind an OpenAI-compatible address. Your images and prompts are sent there when images are scored, and "
            "nowhere else. docs/server_reward.md describes the contracts and the presets.",
            search_aliases=["reward", "vlm judge", "http reward", "unifiedreward", "llm judge", "vqascore", "geneval"],
            inputs=[
                io.String.Input(
                    "address",
                    default="http://127.0.0.1:8000/score",
                    tooltip="Where the server answers, for a judge such as http://127.0.0.1:8000/v1/chat/completions.",
                ),
                io.Combo.Input(
                    "protocol",
                    options=["scores", "chat"],
                    default="scores",
                    tooltip="scores: images and prompts as JSON, one number per image back. chat: a vision language "
                    "model is asked about each image.",
                ),
                io.String.Input("model", default="", optional=True, tooltip="chat: the model's name on the server."),
                io.String.Input(
                    "instruction",
                    default=DEFAULT_INSTRUCTION,
                    multiline=True,
                    optional=True,
                    tooltip="chat: what the judge is asked; {prompt} stands for the prompt.",
                ),
                expert(
                    io.String.Input(
                        "pattern",
                        default=DEFAULT_PATTERN,
                        optional=True,
                        tooltip="chat: a regular expression whose group is the score in the judge's answer.",
                    )
                ),
                expert(
                    io.String.Input(
                        "field",
                        default="",
                        optional=True,
                        tooltip="scores: which list to take when the answer holds several. UnifiedReward: alignment, "
                        "coherence or style alone.",
                    )
                ),
                expert(
                    io.String.Input(
                        "key_variable",
                        default="",
                        optional=True,
                        tooltip="Name of an environment variable that holds the server's API key. The key itself is "
                        "never stored in the graph.",
                    )
                ),
                expert(
                    io.Float.Input(
                        "timeout",
                        default=60.0,
                        min=1.0,
                        max=3600.0,
                        optional=True,
                        tooltip="Seconds to wait for an answer.",
                    )
                ),
                expert(
                    io.Int.Input(
                        "retries",
                        default=3,
                        min=0,
                        max=20,
                        optional=True,
                        tooltip="How often to try again after a fault of the connection or the server. Images still "
                        "without an answer have no score.",
                    )
                ),
                expert(
                    io.Boolean.Input(
                        "whole_group",
                        default=False,
                        optional=True,
                        tooltip="Send all images of a prompt in one request, for a server that compares them with "
                        "each other.",
                    )
                ),
                io.Combo.Input(
                    "preset",
                    options=[OWN, *PRESETS],
                    default=OWN,
                    optional=True,
                    tooltip="How a judge at an OpenAI-compatible address is asked. in my own words: by protocol, "
                    "instruction and pattern. yes or no: the probability of yes to questions (VQAScore). "
                    "UnifiedReward-2.0: its own prompts, picture by picture or in pairs.",
                ),
                io.String.Input(
                    "questions",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="yes or no: one question per line; {prompt} stands for the prompt, -> no at the end means "
                    "that no is good. Lines below [a prompt] are for that prompt only. Empty = does it show the "
                    "prompt?",
                ),
                expert(
                    io.Combo.Input(
                        "each",
                        options=list(EACH),
                        default="mean",
                        optional=True,
                        tooltip="yes or no, several questions: mean of the answers; all = their product, so that every "
                        "answer must be good.",
                    )
                ),
                expert(
                    io.Int.Input(
                        "comparisons",
                        default=4,
                        min=1,
                        max=256,
                        optional=True,
                        tooltip="In pairs: how many others of its prompt each picture meets. Higher = surer, more "
                        "requests.",
                    )
                ),
                expert(io.Int.Input("workers", default=4, min=1, max=64, optional=True, tooltip="Requests at a time.")),
            ],
            outputs=[RewardSocket.Output(display_name="reward_model")],
        )

    @classmethod
    def execute(
        cls,
        address,
        protocol,
        model="",
        instruction=DEFAULT_INSTRUCTION,
        pattern=DEFAULT_PATTERN,
        field="",
        key_variable="",
        timeout=60.0,
        retries=3,
        whole_group=False,
        preset=OWN,
        questions="",
        each="mean",
        comparisons=4,
        workers=4,
    ) -> io.NodeOutput:
        if preset != OWN:
            judge = Judge(
                address,
                preset,
                model=model,
                questions=questions,
                each=each,
                field=field,
                comparisons=comparisons,
                key_variable=key_variable,
                timeout=timeout,
                retries=retries,
                workers=workers,
                check=comfy.model_management.throw_exception_if_processing_interrupted,
            )
            return io.NodeOutput(judge)
        return io.NodeOutput(
            ServerReward(
                address,
                protocol,
                timeout=timeout,
                retries=retries,
                field=field,
                model=model,
                instruction=instruction,
                pattern=pattern,
                key_variable=key_variable,
                group=whole_group,
                workers=workers,
                check=comfy.model_management.throw_exception_if_processing_interrupted,
            )
        )
