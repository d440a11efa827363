"""ImageReward (arXiv 2304.05977): BLIP's ViT, BERT with cross-attention to it, and a linear head on [CLS].

The package image-reward is used where it is installed and can be imported; it pins old libraries, so otherwise the same
network is built here, under the names of the official weights.
"""

import importlib.util
import logging
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import pixels as resize
from .aesthetic import head
from .clip import package
from .files import beside, fill, find, layers, open_weights, read_json
from .scorer import Scorer

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw output on the authors' data
TOKENS = 35  # every prompt is cut or padded to this


class Attention(nn.Module):
    """Multi-head attention of x to `context` (x itself by default), under BERT's names."""

    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(context), self.value(context))
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """BERT's output layers: a linear layer, added to what came before, then normalised."""

    def __init__(self, fan_in: int, width: int, eps: float):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(fan_in, width), nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + before)


class BertAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int, eps: float):
        super().__init__()
        self.self, self.output = Attention(width, context, heads), Residual(width, width, eps)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.output(self.self(x, context, mask), x)


class BertLayer(nn.Module):
    def __init__(self, width: int, hidden: int, context: int, heads: int, eps: float):
        super().__init__()
        self.attention, self.crossattention = (
            BertAttention(width, width, heads, eps),
            BertAttention(width, context, heads, eps),
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = Residual(hidden, width, eps)

    def forward(self, x: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, mask=mask), image)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    def __init__(self, weights: dict[str, Tensor], config: dict):
        super().__init__()
        vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
        eps, count = config.get("layer_norm_eps", 1e-12), config.get("num_attention_heads", width // 64)
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, width),
                "LayerNorm": nn.LayerNorm(width, eps),
                "position_embeddings": nn.Embedding(len(weights["embeddings.position_embeddings.weight"]), width),
            }
        )
        hidden, context = (
            weights["encoder.layer.0.intermediate.dense.bias"].shape[0],
            weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        )
        self.encoder = nn.ModuleDict(
            {
                "layer": nn.ModuleList(
                    BertLayer(width, hidden, context, count, eps) for _ in range(layers(weights, "encoder.layer."))
                )
            }
        )

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Token ids and mask [B, L], image features [B, N, C] -> features of [CLS], [B, D]."""
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"].weight[: ids.shape[1]]
        x = self.embeddings["LayerNorm"](x)
        hidden = (1.0 - mask[:, None, None].to(x.dtype)) * -10000.0
        for layer in self.encoder["layer"]:
            x = layer(x, image, hidden)
        return x[:, 0]


class Block(nn.Module):
    """A block of BLIP's vision transformer."""

    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Vision(nn.Module):
    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.empty(1, 1, width)),
            nn.Parameter(torch.empty(weights["pos_embed"].shape)),
        )
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        hidden = weights["blocks.0.mlp.fc1.bias"].shape[0]
        self.blocks = nn.ModuleList(Block(width, hidden, width // 64) for _ in range(layers(weights, "blocks.")))
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Blip(nn.Module):
    def __init__(self, weights: dict[str, Tensor], config: dict):
        super().__init__()
        self.visual_encoder = Vision(_under(weights, "visual_encoder."))
        self.text_encoder = Bert(_under(weights, "text_encoder."), config)
        for name in ("vision_proj", "text_proj"):  # in the file, not used for the score
            if f"{name}.weight" in weights:
                self.add_module(name, nn.Linear(*weights[f"{name}.weight"].shape[::-1]))


class OwnNetwork(nn.Module):
    """ImageReward's network, in the sizes of the weights."""

    def __init__(self, weights: dict[str, Tensor], config: dict):
        super().__init__()
        self.blip = Blip(_under(weights, "blip."), config)
        self.mlp = nn.Module()
        self.mlp.layers = head(weights, "mlp.")

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self.mlp.layers(self.blip.text_encoder(ids, mask, self.blip.visual_encoder(pixels)))[:, 0]


class OfficialNetwork(nn.Module):
    """The image-reward package's network."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        image = self.model.blip.visual_encoder(pixels)
        everywhere = torch.ones(image.shape[:-1], dtype=torch.long, device=image.device)
        text = self.model.blip.text_encoder(
            ids, attention_mask=mask, encoder_hidden_states=image, encoder_attention_mask=everywhere, return_dict=True
        )
        return self.model.mlp(text.last_hidden_state[:, 0])[:, 0]


def _under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


class ImageReward(Scorer):
    """Scores of about N(0, 1) over the authors' data."""

    def __init__(
        self,
        network: nn.Module,
        tokenizer,
        image_size: int,
        name: str = "ImageReward",
        device="cpu",
        dtype: torch.dtype | None = None,
    ):
        super().__init__(name, network, device, dtype)
        self.tokenizer, self.image_size = tokenizer, image_size

    def pixels(self, images: Tensor, differentiable: bool) -> Tensor:
        return resize.short_side(images, self.image_size, rounded_crop=True, differentiable=differentiable)

    def texts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        found = self.tokenizer.encode_batch(prompts)
        return torch.tensor([text.ids for text in found]), torch.tensor([text.attention_mask for text in found])

    def compare(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return (self.module(pixels, ids, mask).float() - MEAN) / STD


def load(
    path: Path, device="cpu", dtype: torch.dtype | None = None, name: str = "ImageReward", tokenizer: Path | None = None
) -> ImageReward:
    """path: ImageReward.pt, or its folder. tokenizer: bert-base-uncased's vocab.txt or its folder, where there is none
    beside the weights.
    """
    file = find(path, "ImageReward.pt")
    weights = open_weights(file)
    if "blip.visual_encoder.pos_embed" not in weights or "mlp.layers.0.weight" not in weights:
        raise ValueError(
            f"{file.name} is not ImageReward: it holds {len(weights)} other weights, such as '{next(iter(weights))}'."
        )
    words = _tokenizer(file, tokenizer)
    config = beside(file, "med_config.json")
    _, positions, _ = weights["blip.visual_encoder.pos_embed"].shape
    size = round((positions - 1) ** 0.5) * weights["blip.visual_encoder.patch_embed.proj.weight"].shape[-1]
    network = _official(weights, config) or _own(weights, read_json(config), file)
    return ImageReward(network, words, size, name, device, dtype)


def _own(weights: dict[str, Tensor], config: dict, file: Path) -> OwnNetwork:
    weights.pop("blip.text_encoder.embeddings.position_ids", None)
    with torch.device("meta"):
        network = OwnNetwork(weights, config)
    return fill(network, weights, file.name, "ImageReward")


def _official(weights: dict[str, Tensor], config: Path | None) -> OfficialNetwork | None:
    """The package's own network where it can be had: only in full size, and with the configuration file beside the
    weights.
    """
    if importlib.util.find_spec("ImageReward") is None or config is None:
        return None
    try:
        from ImageReward.ImageReward import ImageReward as Network

        # The package would download a tokenizer here, which we have already.
        with patch.object(sys.modules["ImageReward.models.BLIP.blip_pretrain"], "init_tokenizer", lambda: None):
            model = Network(str(config))
        model.load_state_dict(weights, strict=False)
    except Exception as error:  # old packages fail in many ways on new libraries
        logging.info("TreeRPO: the package image-reward does not work here (%s); the same network without it.", error)
        return None
    return OfficialNetwork(model)


def _tokenizer(file: Path, given: Path | None):
    """BERT's WordPiece, cutting and padding to 35 tokens."""
    vocabulary = _vocabulary(file, Path(given) if given else None)
    words = package("tokenizers", "tokenizers").BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    # BLIP's, in this order; the embedding has their two rows, vocab.txt does not
    words.add_special_tokens(["[DEC]", "[ENC]"])
    words.enable_truncation(TOKENS)
    words.enable_padding(length=TOKENS, pad_id=words.token_to_id("[PAD]") or 0)
    return words


def _vocabulary(file: Path, given: Path | None) -> Path:
    folders = (file.parent, file.parent / "bert-base-uncased", file.parent.parent / "bert-base-uncased")
    places = [given, given / "vocab.txt"] if given else []
    for place in [*(folder / "vocab.txt" for folder in folders), *places]:
        if place.is_file():
            return place
    if importlib.util.find_spec("huggingface_hub") is not None:
        from huggingface_hub import try_to_load_from_cache

        for name in ("google-bert/bert-base-uncased", "bert-base-uncased"):
            if isinstance(cached := try_to_load_from_cache(name, "vocab.txt"), str):
                return Path(cached)
    raise ValueError(
        "ImageReward reads prompts with the vocabulary of bert-base-uncased: put its vocab.txt (231,508 bytes) beside "
        f"{file.name}."
    )
