"""The prompts: as a batch of conditioning for a graph, or as a list for the Trainer."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..core.hosts.comfy_host import batch, conditioned, encode, start_latent
from ..core.references import reference_of, with_references
from ..core.runs.prompts import PromptText, collect, listed, read, split
from .schema import PolicySocket, PromptsSocket, expert, schema

TEXT_FILES = (".txt", ".jsonl", ".csv")
NO_FILE = "(the text above)"


class PromptsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOPrompts",
            "Tree Prompts",
            description="Several prompts as one batch of conditioning, one row per prompt. With a policy connected, "
            "each iteration takes the next prompts of the list.",
            search_aliases=["prompt list", "batch prompts"],
            is_input_list=True,
            inputs=[
                io.Clip.Input("clip"),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a red circle on a white background",
                    tooltip="One prompt per line. Empty lines and lines that begin with '# ' are skipped. Of a list "
                    "of texts, such as Image Folder's, each is one prompt.",
                ),
                io.Int.Input(
                    "per_iteration",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Prompts per iteration, taken in turn. Higher = steadier updates, slower iterations. 0 = "
                    "all.",
                ),
                PolicySocket.Input(
                    "policy",
                    optional=True,
                    tooltip="Connect the policy to move on through the list with each iteration.",
                ),
                references_input(),
                io.Vae.Input("vae", optional=True, tooltip="Only for references: the VAE that belongs to the model."),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="Only for references: the empty latent of Tree Sampler. They are scaled to as many pixels.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.String.Output(display_name="prompts", tooltip="The chosen prompts, one per line: for Score Images."),
            ],
        )

    @classmethod
    def execute(
        cls, clip, text, per_iteration, policy=(None,), references=(), vae=(None,), latent_image=(None,)
    ) -> io.NodeOutput:
        prompts, _ = listed(text)
        if not prompts:
            raise ValueError("The prompt list is empty: write at least one prompt, one per line.")
        prompts = with_references(prompts, [picture for picture in references if picture is not None])
        count = min(per_iteration[0] or len(prompts), len(prompts))
        first = policy[0].run.iteration * count if policy[0] is not None else 0
        chosen = [prompts[(first + j) % len(prompts)] for j in range(count)]
        if reference_of(chosen[0]) is None:
            encoded = [encode(clip[0], prompt) for prompt in chosen]
        elif None in (policy[0], vae[0], latent_image[0]):
            raise ValueError("References need policy, vae and latent_image: connect all three to Tree Prompts.")
        else:
            model = policy[0].policy.model
            start = start_latent(model, latent_image[0])
            encoded = [conditioned(model, clip[0], vae[0], prompt, start) for prompt in chosen]
        return io.NodeOutput(batch(encoded), PromptText("\n".join(chosen), chosen))


class PromptListNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOPromptList",
            "Prompt List",
            description="The prompts of a training run: written here, or from a .txt, .jsonl or .csv file in "
            "ComfyUI's input folder. Some can be held out: they are never trained on, and show whether learning "
            "carries over.",
            search_aliases=["dataset", "prompts", "held-out"],
            is_input_list=True,
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a red circle on a white background\na blue square on a black background",
                    tooltip="One prompt per line. Lines that begin with '# ' are comments. Of a list of texts, such "
                    "as Image Folder's, each is one prompt.",
                ),
                io.Combo.Input(
                    "file",
                    options=[NO_FILE, *prompt_files()],
                    default=NO_FILE,
                    optional=True,
                    tooltip="A file in the input folder instead: .txt has a prompt per line, .jsonl and .csv a field "
                    "called prompt, positive, text or caption.",
                ),
                io.Float.Input(
                    "held_out",
                    default=0.0,
                    min=0.0,
                    max=10000.0,
                    step=0.05,
                    optional=True,
                    tooltip="Below 1: the share of prompts held out, such as 0.1. From 1: that many prompts. Higher = "
                    "a more certain judgement, less to learn from.",
                ),
                expert(
                    io.Int.Input(
                        "split_seed",
                        default=0,
                        min=0,
                        max=2**31,
                        optional=True,
                        tooltip="Another number holds out other prompts.",
                    )
                ),
                references_input(),
            ],
            outputs=[
                PromptsSocket.Output(display_name="prompts"),
                io.String.Output(display_name="summary"),
                io.String.Output(display_name="texts", tooltip="All prompts, one per line: for Save Tree LoRA."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=NO_FILE):
        return True

    @classmethod
    def fingerprint_inputs(cls, text, file=(NO_FILE,), held_out=(0.0,), split_seed=(0,), references=()):
        path = prompt_path(file[0])
        changed = path.stat().st_mtime if path is not None and path.is_file() else 0
        return [list(text), str(path), changed, held_out[0], split_seed[0]]

    @classmethod
    def execute(cls, text, file=(NO_FILE,), held_out=(0.0,), split_seed=(0,), references=()) -> io.NodeOutput:
        path, pictures = prompt_path(file[0]), [picture for picture in references if picture is not None]
        listed = read(path, pictures) if path is not None else collect(text, references=pictures)
        prompts = split(listed, held_out[0], split_seed[0])
        summary = f"{len(prompts.train)} prompts to train on, {len(prompts.held_out)} held out" + (
            f", {prompts.duplicates} duplicates left out" if prompts.duplicates else ""
        )
        summary += ", each with its reference image" if pictures else ""
        summary = "\n".join([summary, *prompts.notes])
        every = [*prompts.train, *prompts.held_out]
        return io.NodeOutput(prompts, summary, PromptText("\n".join(every), every), ui={"text": (summary,)})


def references_input() -> io.Input:
    """Pictures for the prompts of an edit."""
    return io.Image.Input(
        "references",
        optional=True,
        tooltip="For models that edit (Kontext, FLUX.2, Qwen-Image-Edit): the picture that each prompt changes, as "
        "many as prompts. Or one prompt for all pictures, or one picture for all prompts.",
    )


def prompt_files() -> list[str]:
    folder = Path(folder_paths.get_input_directory())
    return (
        sorted(file for file in folder_paths.recursive_search(str(folder))[0] if file.endswith(TEXT_FILES))
        if folder.is_dir()
        else []
    )


def prompt_path(file: str | None) -> Path | None:
    """The chosen file, inside the input folder and nowhere else."""
    if not file or file == NO_FILE:
        return None
    if ".." in Path(file).parts or Path(file).is_absolute():
        raise ValueError(f"The prompt file '{file}' is not inside ComfyUI's input folder: copy it there.")
    return Path(folder_paths.get_input_directory()) / file
