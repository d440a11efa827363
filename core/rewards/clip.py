"""HPSv2, HPSv2.1, CLIPScore (through open_clip or transformers) and PickScore (through transformers): cosines of CLIP
features.

HPSv2, v2.1   cos                       arXiv 2306.09341
CLIPScore     cos                       arXiv 2104.08718, without its factor 2.5
PickScore     exp(logit_scale) cos      arXiv 2305.01569
"""

import importlib
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import pixels as resize
from .files import beside, fill, find, layers, open_weights, read_json
from .scorer import Scorer

NAMES = {"hps_v2": "HPSv2", "clipscore": "CLIPScore", "pickscore": "PickScore"}
HEADS = {1280: 16, 1408: 16, 1664: 16}  # vision towers H, g and bigG; all others have 64 numbers per head


def heads(width: int) -> int:
    return HEADS.get(width, width // 64)


def package(name: str, pip: str):
    """An optional package, or an error that says how to get it."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # packages that do not fit each other fail in many ways
        cause = " ".join(str(error).split())
        raise ValueError(
            f"This reward model needs the package {pip}, which cannot be imported here ({cause}): pip install {pip}, "
            "or repair what the error names."
        ) from error


class OpenClip(nn.Module):
    """A CLIP in open_clip's format."""

    rounded_crop = True

    def __init__(self, weights: dict[str, Tensor], path: Path, quick_gelu: bool, what: str):
        super().__init__()
        open_clip = package("open_clip", "open_clip_torch")
        settings = read_json(beside(path, "open_clip_config.json")).get("model_cfg", {})
        width, _, patch, _ = weights["visual.conv1.weight"].shape
        side = round((weights["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        self.image_size = side * patch
        vision = dict(
            layers=layers(weights, "visual.transformer.resblocks."),
            width=width,
            patch_size=patch,
            image_size=self.image_size,
            head_width=width // heads(width),
            mlp_ratio=weights["visual.transformer.resblocks.0.mlp.c_fc.bias"].shape[0] / width,
        )
        text_width = weights["token_embedding.weight"].shape[1]
        text = dict(
            context_length=weights["positional_embedding"].shape[0],
            vocab_size=weights["token_embedding.weight"].shape[0],
            width=text_width,
            heads=text_width // 64,
            layers=layers(weights, "transformer.resblocks."),
            mlp_ratio=weights["transformer.resblocks.0.mlp.c_fc.bias"].shape[0] / text_width,
        )
        for mine, theirs, names in (
            (vision, settings.get("vision_cfg", {}), ("head_width",)),
            (text, settings.get("text_cfg", {}), ("heads",)),
        ):
            mine.update({name: theirs[name] for name in names if name in theirs})
        with torch.device("meta"):
            self.model = open_clip.CLIP(
                weights["visual.proj"].shape[1], vision, text, settings.get("quick_gelu", quick_gelu)
            )
        fill(self.model, weights, path.name, what)
        self.tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=text["context_length"])

    def text_features(self, prompts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(prompts).to(self.model.logit_scale.device))

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale


class HfClip(nn.Module):
    """A CLIP in transformers' format; without its text tower where the file holds none."""

    rounded_crop = False

    def __init__(self, weights: dict[str, Tensor], path: Path, quick_gelu: bool, what: str, tokenizer: Path | None):
        super().__init__()
        transformers = package("transformers", "transformers")
        # the error of transformers.CLIPModel would hide the cause
        package("transformers.models.clip.modeling_clip", "transformers")
        # saved by older versions
        weights = {key: value for key, value in weights.items() if not key.endswith("position_ids")}
        self.has_text = "text_model.embeddings.token_embedding.weight" in weights
        given = read_json(beside(path, "config.json"))
        act = "quick_gelu" if quick_gelu else "gelu"
        vision = {**_vision_config(weights, act), **_chosen(given.get("vision_config", {} if self.has_text else given))}
        self.image_size = vision["image_size"]
        with torch.device("meta"):
            if self.has_text:
                text = {**_text_config(weights, act), **_chosen(given.get("text_config", {}))}
                self.model = transformers.CLIPModel(
                    transformers.CLIPConfig(
                        text_config=text, vision_config=vision, projection_dim=text["projection_dim"]
                    )
                )
            else:
                self.model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision))
        fill(self.model, weights, path.name, what)
        if self.has_text:
            self.length = weights["text_model.embeddings.position_embedding.weight"].shape[0]
            self.tokenizer = _hf_tokenizer(transformers, path, tokenizer, self.length)

    def text_features(self, prompts: list[str]) -> Tensor:
        tokens = {key: value.to(self.model.logit_scale.device) for key, value in self.tokenizer(prompts).items()}
        return _tensor(self.model.get_text_features(**tokens))

    def image_features(self, pixels: Tensor) -> Tensor:
        return (
            _tensor(self.model.get_image_features(pixel_values=pixels))
            if self.has_text
            else self.model(pixel_values=pixels).image_embeds
        )

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale


def _tensor(output) -> Tensor:
    """Features are a tensor in transformers 4 and an object in 5."""
    return output if torch.is_tensor(output) else output.pooler_output


def _chosen(config: dict) -> dict:
    """What a configuration file knows and the weights do not tell."""
    return {
        key: config[key]
        for key in ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id")
        if key in config
    }


def _vision_config(weights: dict[str, Tensor], act: str) -> dict:
    width, _, patch, _ = weights["vision_model.embeddings.patch_embedding.weight"].shape
    positions = weights["vision_model.embeddings.position_embedding.weight"].shape[0]
    return dict(
        hidden_size=width,
        patch_size=patch,
        image_size=round((positions - 1) ** 0.5) * patch,
        num_attention_heads=heads(width),
        num_hidden_layers=layers(weights, "vision_model.encoder.layers."),
        hidden_act=act,
        intermediate_size=weights["vision_model.encoder.layers.0.mlp.fc1.bias"].shape[0],
        projection_dim=weights["visual_projection.weight"].shape[0],
    )


def _text_config(weights: dict[str, Tensor], act: str) -> dict:
    vocabulary, width = weights["text_model.embeddings.token_embedding.weight"].shape
    return dict(
        vocab_size=vocabulary,
        hidden_size=width,
        max_position_embeddings=weights["text_model.embeddings.position_embedding.weight"].shape[0],
        num_attention_heads=width // 64,
        num_hidden_layers=layers(weights, "text_model.encoder.layers."),
        hidden_act=act,
        intermediate_size=weights["text_model.encoder.layers.0.mlp.fc1.bias"].shape[0],
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        projection_dim=weights["text_projection.weight"].shape[0],
    )


def _hf_tokenizer(transformers, path: Path, given: Path | None, length: int):
    """prompts -> {input_ids, attention_mask}, by the files beside the weights, those given, or CLIP's own vocabulary
    from open_clip.
    """
    folders = [path.parent, path.parent / "tokenizer"] + ([Path(given)] if given else [])
    folder = next((f for f in folders if (f / "tokenizer.json").is_file() or (f / "vocab.json").is_file()), None)
    if folder is not None:
        kind = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer
        found = kind.from_pretrained(str(folder))
        return lambda prompts: dict(
            found(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        )
    open_clip = package("open_clip", "open_clip_torch")
    found = open_clip.tokenizer.SimpleTokenizer(context_length=length)
    found.clean_fn = lambda text: " ".join(unicodedata.normalize("NFC", text).split()).lower()  # as transformers' does
    return lambda prompts: {"input_ids": found(prompts)}


class ClipScorer(Scorer):
    """Cosine of a CLIP's image and text features, by the rules of one of the three scores."""

    def __init__(self, kind: str, clip: OpenClip | HfClip, name: str, device="cpu", dtype: torch.dtype | None = None):
        super().__init__(name, clip, device, dtype)
        self.kind, self.image_size = kind, clip.image_size

    def pixels(self, images: Tensor, differentiable: bool) -> Tensor:
        if self.kind == "hps_v2":
            return resize.long_side(images, self.image_size)
        return resize.short_side(images, self.image_size, self.module.rounded_crop, differentiable)

    def texts(self, prompts: list[str]) -> tuple[Tensor]:
        return (F.normalize(self.module.text_features(prompts).float(), dim=-1).cpu(),)

    def compare(self, pixels: Tensor, text: Tensor) -> Tensor:
        cosine = (F.normalize(self.module.image_features(pixels).float(), dim=-1) * text).sum(-1)
        return self.module.logit_scale.float().exp() * cosine if self.kind == "pickscore" else cosine

    def classify(self, images: Tensor, classes: list[list[str]]) -> Tensor:
        """CLIP's zero-shot classification: [B, H, W, 3] in 0..1, the texts that describe each class -> [B], the number
        of the class that each image shows. Of a class's texts the mean of their features counts.
        """
        with torch.inference_mode(False), torch.no_grad():
            kinds = torch.stack([F.normalize(self._of(texts)[0].mean(0), dim=-1) for texts in classes])
            pixels = self.pixels(images.to(self.device), False).to(self.dtype)
            return (F.normalize(self.module.image_features(pixels).float().cpu(), dim=-1) @ kinds.T).argmax(1)


def load_tower(path: Path, what: str, quick_gelu: bool, tokenizer: Path | None = None) -> OpenClip | HfClip:
    """A CLIP from a file in either format. quick_gelu: the activation where no configuration file says which."""
    weights = open_weights(path)
    if "visual.conv1.weight" in weights and "token_embedding.weight" in weights:
        return OpenClip(weights, path, quick_gelu, what)
    if "vision_model.embeddings.patch_embedding.weight" in weights and "visual_projection.weight" in weights:
        return HfClip(weights, path, quick_gelu, what, tokenizer)
    raise ValueError(
        f"{path.name} is not {what}: it holds no CLIP, but {len(weights)} weights such as '{next(iter(weights))}'."
    )


def load(
    kind: str, path: Path, device="cpu", dtype: torch.dtype | None = None, name: str = "", tokenizer: Path | None = None
) -> ClipScorer:
    """kind: "hps_v2", "clipscore" or "pickscore". path: the file, or its folder."""
    file = find(
        path, "model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin"
    )
    clip = load_tower(file, f"a CLIP for {NAMES[kind]}", quick_gelu=kind == "clipscore", tokenizer=tokenizer)
    if not getattr(clip, "has_text", True):
        raise ValueError(
            f"{file.name} holds only CLIP's image half, but {NAMES[kind]} also reads the prompt: get the full CLIP "
            "model."
        )
    return ClipScorer(kind, clip, name or NAMES[kind], device, dtype)
