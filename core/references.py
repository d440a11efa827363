"""Prompts of an edit: a text together with the picture that it is to change, its reference image."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class EditPrompt(str):
    """A prompt with its reference image. It goes wherever prompts go, so that hosts and rewards that want the picture
    find it, and no other has to know. Two are equal only with the same picture: the same words about other pictures are
    other prompts.
    """

    reference: Tensor  # [H, W, 3] in 0..1 on the CPU
    digest: bytes  # of the picture

    def __new__(cls, text: str, reference: Tensor):
        """reference: [H, W, 3 or more] in 0..1; what is beyond RGB is dropped. ValueError for another shape."""
        if reference.dim() != 3 or reference.shape[-1] < 3 or not reference.numel():
            raise ValueError(
                f"The reference image has the shape {list(reference.shape)}: it must be [height, width, 3]."
            )
        made = super().__new__(cls, text)
        with torch.inference_mode(False):
            made.reference = reference.detach()[..., :3].float().cpu().contiguous().clone()
        made.digest = hashlib.blake2b(
            repr(made.reference.shape).encode() + made.reference.numpy().tobytes(), digest_size=16
        ).digest()
        return made

    def __eq__(self, other) -> bool:
        return isinstance(other, EditPrompt) and self.digest == other.digest and str.__eq__(self, other)

    def __ne__(self, other) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str(self), self.digest))

    def about(self, text: str) -> "EditPrompt":
        """Another text about the same picture."""
        return EditPrompt(text, self.reference)


def reference_of(prompt: str) -> Tensor | None:
    """The picture that a prompt is to change [H, W, 3] in 0..1, or None where it draws a new one."""
    return prompt.reference if isinstance(prompt, EditPrompt) else None


def fingerprint(prompt: str) -> bytes:
    """What a prompt is, in bytes: its text, and its reference image where it has one."""
    return prompt.encode() + (prompt.digest if isinstance(prompt, EditPrompt) else b"")


def key_of(prompt: str) -> str:
    """The same as text, as the key of a dictionary that a checkpoint can hold."""
    return fingerprint(prompt).decode("latin-1")


def with_references(prompts: list[str], pictures: Sequence[Tensor]) -> list[str]:
    """Each prompt with its reference image, in order; one prompt is for all pictures, or one picture for all prompts.

    pictures: batches [B, H, W, 3]; without any the prompts are as they were. ValueError where the numbers do not fit.
    """
    every = [picture for batch in pictures for picture in (batch if batch.dim() == 4 else batch[None])]
    if not every:
        return list(prompts)
    if len(every) != len(prompts) and 1 not in (len(every), len(prompts)):
        raise ValueError(
            f"There are {len(prompts)} prompts for {len(every)} reference images: give each prompt one, or one prompt "
            "for all images, or one image for all prompts."
        )
    count = max(len(every), len(prompts)) if prompts else 0
    return [EditPrompt(prompts[i % len(prompts)], every[i % len(every)]) for i in range(count)]
