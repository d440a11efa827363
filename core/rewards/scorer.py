"""What reward models with a network share: batches, one pass per distinct prompt, precision, gradients."""

import torch
from torch import Tensor, nn

from .contract import Reward, Trial
from .self_test import scenes

REMEMBERED = 4096  # prompts whose features are kept


class Scorer(Reward):
    """A reward model with weights. A subclass turns images into pixels, prompts into texts, and compares the two."""

    reads_prompts = True

    def __init__(self, name: str, module: nn.Module, device="cpu", dtype: torch.dtype | None = None, batch: int = 16):
        """module: all its weights. batch: images per pass. dtype: None = float16 on CUDA, float32 elsewhere."""
        self.name, self.batch = name, batch
        self.check = lambda: None  # called before every pass; may raise, so that a stop button is answered
        if dtype is None:
            dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.module = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._texts: dict[str, tuple[Tensor, ...]] = {}

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def pixels(self, images: Tensor, differentiable: bool) -> Tensor:
        """[B, H, W, 3] in 0..1 -> [B, 3, h, w] as the network takes them."""
        raise NotImplementedError

    def texts(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Distinct prompts -> tensors with a row per prompt, kept on the CPU."""
        return ()

    def compare(self, pixels: Tensor, *texts: Tensor) -> Tensor:
        """Pixels [B, 3, h, w] and the rows of their prompts -> raw scores [B], in float32."""
        raise NotImplementedError

    def trial(self) -> Trial:
        return scenes(self.reads_prompts)

    def score(self, images: Tensor, prompts: list[str], differentiable: bool = False) -> Tensor:
        """[B, H, W, 3] in 0..1, B prompts -> [B] on the CPU; with differentiable=True the scores carry a gradient to
        `images`.
        """
        if images.dim() != 4 or images.shape[-1] < 3:
            raise ValueError(f"The images have the shape {list(images.shape)}: they must be [batch, height, width, 3].")
        if len(prompts) != len(images):
            raise ValueError(f"There are {len(prompts)} prompts for {len(images)} images: give one prompt per image.")
        with torch.inference_mode(False):
            if images.is_inference():
                images = images.clone()
            with torch.no_grad():
                texts = self._of(prompts) if self.reads_prompts and prompts else ()
            with torch.enable_grad() if differentiable else torch.no_grad():
                scores = []
                for first in range(0, len(images), self.batch):
                    self.check()
                    part = slice(first, first + self.batch)
                    pixels = self.pixels(images[part].to(self.device), differentiable).to(self.dtype)
                    scores.append(self.compare(pixels, *(text[part].to(self.device) for text in texts)).float())
                return torch.cat(scores).cpu() if scores else torch.zeros(0)

    def _of(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """The texts of these prompts, row by row; each distinct prompt is worked out once, also across calls."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if len(self._texts) + len(new) > REMEMBERED:
            self._texts.clear()
            new = list(dict.fromkeys(prompts))
        for first in range(0, len(new), self.batch):
            part = new[first : first + self.batch]
            self._texts.update(zip(part, zip(*self.texts(part))))
        return tuple(torch.stack(rows) for rows in zip(*(self._texts[prompt] for prompt in prompts)))
