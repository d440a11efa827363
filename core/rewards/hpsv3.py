"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B reads picture and prompt with an instruction, and a head of three layers on the
token <|Reward|> gives mean and spread of the score; the mean is the reward.

As hpsv3 1.0.0 computes it with transformers 4.45.2, without either: pictures of about 256 x 28 x 28 pixels, text
positions 1, 2, 3 ... through the picture too, and nothing after <|Reward|>, which it cannot see.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from . import pixels as resize
from .clip import package
from .files import fill, find, open_weights
from .qwen2_vl import MERGED, Text, Vision
from .scorer import Scorer

PIXELS = 256 * 28 * 28  # of every picture, about
MOST_RATIO = 200  # of the sides
SPLIT = (  # Qwen2's words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [  # Qwen2-VL's, numbered in this order after the vocabulary; then HPSv3's own
    *(f"<|{name}|>" for name in (
        "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
        "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
    )),
    "<|Reward|>",
]  # fmt: skip
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
# hpsv3/dataset/data_collator_qwen.py
INSTRUCTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
    "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the "
    "worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as "
    "abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual "
    "elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense "
    "of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, "
    "or adult material. If such content is present, the image quality and satisfaction score should be the "
    "lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of number, "
    "appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the "
    "image logically fit the scenario described in the prompt. The environment should support and enhance the "
    "subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be "
    "acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in "
    "the image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - {text_prompt}\n"
    "\n"
    "\n"
)
AFTER = "\nPlease provide the overall ratings of this image: <|Reward|>"


class Network(nn.Module):
    """Under the names of HPSv3.safetensors, as transformers 4.45 has them."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.visual, self.model = Vision(weights), Text(weights)
        first, _ = weights["rm_head.0.weight"].shape
        second, _ = weights["rm_head.3.weight"].shape
        self.rm_head = nn.Sequential(
            nn.Linear(self.model.embed_tokens.embedding_dim, first), nn.ReLU(), nn.Dropout(), nn.Linear(first, second),
            nn.ReLU(), nn.Linear(second, len(weights["rm_head.5.bias"])),
        )  # fmt: skip

    def forward(self, pixels: Tensor, before: Tensor, after: Tensor, last: Tensor) -> Tensor:
        """Pixels [B, 3, h, w], tokens before the picture [N] and behind it [B, L], the place of <|Reward|> in the
        latter [B] -> mean and spread [B, 2] in fp32.
        """
        image = self.visual(pixels)
        text = self.model.embed_tokens
        x = torch.cat([text(before).expand(len(image), -1, -1), image.to(text.weight.dtype), text(after)], 1)
        place = last + len(before) + image.shape[1]
        features = self.model(x)[torch.arange(len(x), device=x.device), place]
        return self.rm_head(features.float())


class HPSv3(Scorer):
    """Scores of about 0 to 15; the head is always in fp32."""

    def __init__(
        self, network: Network, tokenizer, name: str = "HPSv3", device="cpu", dtype: torch.dtype | None = None
    ):
        if dtype is None and torch.device(device).type == "cuda":
            dtype = torch.bfloat16  # as it was trained; float16 overflows in Qwen2
        super().__init__(name, network, device, dtype, batch=8)
        self.module.rm_head.float()
        self.tokenizer = tokenizer
        self.factor = network.visual.patch * MERGED
        self.before = torch.tensor(tokenizer.encode(BEFORE).ids)

    def pixels(self, images: Tensor, differentiable: bool) -> Tensor:
        size = smart_size(*images.shape[1:3], self.factor)
        return resize.exactly(images, *size, differentiable)

    def _of(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens behind the picture [B, L], filled up at the right, and the place of <|Reward|> [B]."""
        texts = {prompt: f"<|vision_end|>{INSTRUCTION.format(text_prompt=prompt)}{AFTER}" for prompt in prompts}
        tokens = {prompt: self.tokenizer.encode(text).ids for prompt, text in texts.items()}
        longest = max(map(len, tokens.values()))
        rows = torch.tensor([tokens[prompt] + [0] * (longest - len(tokens[prompt])) for prompt in prompts])
        return rows, torch.tensor([len(tokens[prompt]) - 1 for prompt in prompts])

    def compare(self, pixels: Tensor, after: Tensor, last: Tensor) -> Tensor:
        return self.module(pixels, self.before.to(pixels.device), after, last)[:, 0]


def smart_size(height: int, width: int, factor: int, pixels: int = PIXELS) -> tuple[int, int]:
    """Height and width as multiples of `factor` with about so many pixels, sides in proportion (qwen_vl_utils)."""
    if max(height, width) / min(height, width) > MOST_RATIO:
        raise ValueError(
            f"A picture of {width} x {height} pixels is too long for HPSv3: one side may be {MOST_RATIO} times the "
            "other at most."
        )
    high, wide = (max(factor, round(length / factor) * factor) for length in (height, width))
    if high * wide > pixels:
        share = math.sqrt(height * width / pixels)
        return tuple(math.floor(length / share / factor) * factor for length in (height, width))
    if high * wide < pixels:
        share = math.sqrt(pixels / (height * width))
        return tuple(math.ceil(length * share / factor) * factor for length in (height, width))
    return high, wide


def load(
    path: Path, device="cpu", dtype: torch.dtype | None = None, name: str = "HPSv3", tokenizer: Path | None = None
) -> HPSv3:
    """path: HPSv3.safetensors, or its folder. tokenizer: a folder with Qwen2's vocab.json and merges.txt, where there
    are none beside the weights.
    """
    file = find(path, "HPSv3.safetensors")
    weights = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for key, value in open_weights(file).items()
        if key != "lm_head.weight"
    }
    if "rm_head.5.weight" not in weights or "visual.merger.mlp.2.weight" not in weights:
        raise ValueError(
            f"{file.name} is not HPSv3: it holds {len(weights)} other weights, such as '{next(iter(weights))}'."
        )
    words = _tokenizer(file, tokenizer)
    if len(weights["model.embed_tokens.weight"]) != words.get_vocab_size():
        raise ValueError(
            f"The vocabulary beside {file.name} has {words.get_vocab_size():,} tokens with HPSv3's own, its weights "
            f"{len(weights['model.embed_tokens.weight']):,}: use Qwen2-VL's vocab.json and merges.txt."
        )
    with torch.device("meta"):
        network = Network(weights)
    return HPSv3(fill(network, weights, file.name, "HPSv3"), words, name, device, dtype)


def _tokenizer(file: Path, given: Path | None):
    """Qwen2's byte-level BPE, with HPSv3's token at the end."""
    tokenizers = package("tokenizers", "tokenizers")
    folders = [file.parent, file.parent / "tokenizer", *([Path(given)] if given else [])]
    folder = next((f for f in folders if (f / "vocab.json").is_file() and (f / "merges.txt").is_file()), None)
    if folder is None:
        raise ValueError(
            f"HPSv3 reads prompts with Qwen2's vocabulary: put its vocab.json and merges.txt beside {file.name}."
        )
    words = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    words.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    bytewise = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytewise])
    words.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL])
    return words
