"""Tiny random reward models: the real architectures and names, in the official file formats. Needs numpy and torch (and
safetensors).

The numbers come from numpy's RandomState, whose stream is frozen, so every version of numpy and torch makes the same
weights. All take images of 32 x 32, heads of 64 numbers. Norms are 1 +- 0.1 and biases +- 0.1, so that each counts.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGE = 32
FILES = {  # the official file of each kind; "aesthetic" sits on the CLIP of "clipscore_open_clip"
    "image_reward": "ImageReward.pt",
    "hps_v2": "HPS_v2.1_compressed.pt",
    "clipscore_open_clip": "open_clip_pytorch_model.bin",
    "clipscore_hf": "model.safetensors",
    "pickscore": "model.safetensors",
    "aesthetic": "sac+logos+ava1-l14-linearMSE.pth",
    "hpsv3": "HPSv3.safetensors",
}
SEEDS = {
    "image_reward": 11,
    "hps_v2": 12,
    "clipscore_open_clip": 13,
    "clipscore_hf": 14,
    "pickscore": 15,
    "aesthetic": 16,
    "hpsv3": 17,
}

WORDS = """[PAD] [unused0] [unused1] [UNK] [CLS] [SEP] [MASK] ! " # $ % & ' ( ) * + , - . / : ; < = > ? @ \\ ^ _ ` { | } ~ “ ” ‘ ’ — … ½ ²
0 1 2 3 4 5 6 7 8 9 a b c d e f g h i j k l m n o p q r s t u v w x y z к о т γ ς ß ı 一 猫 红 日 本 ##の ق ##ط
##0 ##1 ##2 ##3 ##4 ##5 ##6 ##7 ##8 ##9 ##a ##b ##c ##d ##e ##f ##g ##h ##i ##j ##k ##l ##m ##n ##o ##p ##q ##r ##s ##t ##u ##v ##w ##x ##y ##z
##к ##о ##т ##α the an of on in at with and cat dog photo red blue chair sit ##ting ##ing ##ed ##er castle hill oil painting old town sea dawn boat
house white small very detail cafe bone it we they sure hello world year two space new line end width quality best master ##piece full""".split()

MERGES = [
    ("t", "h"),
    ("th", "e</w>"),
    ("c", "a"),
    ("ca", "t</w>"),
    ("d", "o"),
    ("do", "g</w>"),
    ("i", "n"),
    ("in", "g</w>"),
    ("a", "n"),
    ("an", "d</w>"),
    ("o", "f</w>"),
    ("r", "e"),
    ("re", "d</w>"),
    ("Ã", "©"),
    ("Ã", "©</w>"),
    ("ð", "Ł"),
    ("i", "t</w>"),
]


class Weights(dict):
    """Random tensors by name."""

    def __init__(self, seed: int):
        super().__init__()
        self.random = np.random.RandomState(seed)

    def normal(self, name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> None:
        self[name] = torch.from_numpy((mean + scale * self.random.standard_normal(shape)).astype(np.float32))

    def linear(self, name: str, out: int, fan_in: int, gain: float = 1.0) -> None:
        self.normal(f"{name}.weight", out, fan_in, scale=gain / fan_in**0.5)
        self.normal(f"{name}.bias", out, scale=0.1)

    def norm(self, name: str, width: int) -> None:
        self.normal(f"{name}.weight", width, scale=0.1, mean=1.0)
        self.normal(f"{name}.bias", width, scale=0.1)

    def head(self, prefix: str, width: int, gain: float) -> None:
        """LAION's and ImageReward's five linear layers; dropout at 1, 3 and 5."""
        sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
        for i, (out, fan_in) in sizes.items():
            self.linear(f"{prefix}layers.{i}", out, fan_in, gain if i == 7 else 1.0)


def image_reward(vision: int = 192, text: int = 128, depth: int = 2, patch: int = 16) -> tuple[Weights, dict[str, str]]:
    """ImageReward 1.0, as ImageReward.ImageReward(...).state_dict() names it, with bert-base-uncased's vocab.txt and
    med_config.json. vocab.txt lacks [DEC] and [ENC] as the official one does: the package adds them, so the embedding
    has two rows more.
    """
    w = Weights(SEEDS["image_reward"])
    w.normal("blip.visual_encoder.cls_token", 1, 1, vision)
    w.normal("blip.visual_encoder.pos_embed", 1, (IMAGE // patch) ** 2 + 1, vision, scale=0.5)
    w.normal(
        "blip.visual_encoder.patch_embed.proj.weight", vision, 3, patch, patch, scale=2 / (3 * patch * patch) ** 0.5
    )
    w.normal("blip.visual_encoder.patch_embed.proj.bias", vision, scale=0.1)
    for i in range(depth):
        block = f"blip.visual_encoder.blocks.{i}"
        w.norm(f"{block}.norm1", vision)
        w.linear(f"{block}.attn.qkv", 3 * vision, vision, 1.5)
        w.linear(f"{block}.attn.proj", vision, vision)
        w.norm(f"{block}.norm2", vision)
        w.linear(f"{block}.mlp.fc1", 4 * vision, vision)
        w.linear(f"{block}.mlp.fc2", vision, 4 * vision)
    w.norm("blip.visual_encoder.norm", vision)
    bert = "blip.text_encoder"
    w[f"{bert}.embeddings.position_ids"] = torch.arange(512).expand(1, -1).clone()
    w.normal(f"{bert}.embeddings.word_embeddings.weight", len(WORDS) + 2, text)
    w.normal(f"{bert}.embeddings.position_embeddings.weight", 512, text, scale=0.5)
    w.norm(f"{bert}.embeddings.LayerNorm", text)
    for i in range(depth):
        layer = f"{bert}.encoder.layer.{i}"
        for attention, context in (("attention", text), ("crossattention", vision)):
            for part, fan_in in (("query", text), ("key", context), ("value", context)):
                w.linear(f"{layer}.{attention}.self.{part}", text, fan_in, 1.5)
            w.linear(f"{layer}.{attention}.output.dense", text, text, 1.5)
            w.norm(f"{layer}.{attention}.output.LayerNorm", text)
        w.linear(f"{layer}.intermediate.dense", 4 * text, text)
        w.linear(f"{layer}.output.dense", text, 4 * text)
        w.norm(f"{layer}.output.LayerNorm", text)
    w.linear("blip.vision_proj", 256, vision)
    w.linear("blip.text_proj", 256, text)
    w.head("mlp.", text, gain=1.5)
    config = dict(
        architectures=["BertModel"],
        attention_probs_dropout_prob=0.1,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        hidden_size=text,
        initializer_range=0.02,
        intermediate_size=4 * text,
        layer_norm_eps=1e-12,
        max_position_embeddings=512,
        model_type="bert",
        num_attention_heads=text // 64,
        num_hidden_layers=depth,
        pad_token_id=0,
        add_type_embeddings=False,
        vocab_size=len(WORDS) + 2,
        encoder_width=768,
        add_cross_attention=True,
    )  # this width is as in the official file, and ignored
    return w, {"vocab.txt": "".join(f"{word}\n" for word in WORDS), "med_config.json": _json(config)}


def open_clip_config(kind: str) -> dict:
    """open_clip's model configuration of "hps_v2" or "clipscore_open_clip"."""
    return dict(
        embed_dim=64,
        quick_gelu=kind == "clipscore_open_clip",
        vision_cfg=dict(image_size=IMAGE, layers=2, width=128, head_width=64, patch_size=8),
        text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=2),
    )


def open_clip(kind: str) -> Weights:
    """A CLIP as open_clip (and OpenAI's clip) names it, all numbers exact in half precision."""
    w, config = Weights(SEEDS[kind]), open_clip_config(kind)
    width, patch, text = config["vision_cfg"]["width"], config["vision_cfg"]["patch_size"], config["text_cfg"]["width"]
    w.normal("positional_embedding", 77, text, scale=0.5)
    w.normal("text_projection", text, 64, scale=text**-0.5)
    w["logit_scale"] = torch.tensor(4.6)
    w.normal("visual.class_embedding", width, scale=0.5)
    w.normal("visual.positional_embedding", (IMAGE // patch) ** 2 + 1, width, scale=0.5)
    w.normal("visual.proj", width, 64, scale=width**-0.5)
    w.normal("visual.conv1.weight", width, 3, patch, patch, scale=2 / (3 * patch * patch) ** 0.5)
    for name in ("visual.ln_pre", "visual.ln_post"):
        w.norm(name, width)
    for tower, size in (("visual.", width), ("", text)):
        for i in range(2):
            block = f"{tower}transformer.resblocks.{i}"
            w.norm(f"{block}.ln_1", size)
            w.normal(f"{block}.attn.in_proj_weight", 3 * size, size, scale=1.5 / size**0.5)
            w.normal(f"{block}.attn.in_proj_bias", 3 * size, scale=0.1)
            w.linear(f"{block}.attn.out_proj", size, size, 2.0)
            w.norm(f"{block}.ln_2", size)
            w.linear(f"{block}.mlp.c_fc", 4 * size, size)
            w.linear(f"{block}.mlp.c_proj", size, 4 * size)
    w.normal("token_embedding.weight", 49408, text)
    w.norm("ln_final", text)
    for name, tensor in w.items():
        w[name] = tensor.half() if kind == "hps_v2" else tensor.half().float()
    return w


def hf_clip(kind: str) -> tuple[Weights, dict[str, str]]:
    """A CLIP as transformers' CLIPModel names it, with all that save_pretrained writes. "pickscore": GELU, patches of
    16 pixels, and the buffers that older versions saved; "clipscore_hf": QuickGELU, patches of 8 pixels.
    """
    w, width, text, patch = Weights(SEEDS[kind]), 128, 64, 16 if kind == "pickscore" else 8
    positions, vocabulary = (IMAGE // patch) ** 2 + 1, len(_vocabulary())
    w["logit_scale"] = torch.tensor(4.6)
    w.normal("text_model.embeddings.token_embedding.weight", vocabulary, text)
    w.normal("text_model.embeddings.position_embedding.weight", 77, text, scale=0.5)
    w.normal("vision_model.embeddings.class_embedding", width, scale=0.5)
    w.normal(
        "vision_model.embeddings.patch_embedding.weight", width, 3, patch, patch, scale=2 / (3 * patch * patch) ** 0.5
    )
    w.normal("vision_model.embeddings.position_embedding.weight", positions, width, scale=0.5)
    if kind == "pickscore":
        w["text_model.embeddings.position_ids"] = torch.arange(77).expand(1, -1).clone()
        w["vision_model.embeddings.position_ids"] = torch.arange(positions).expand(1, -1).clone()
    for name, size in (
        ("vision_model.pre_layrnorm", width),
        ("vision_model.post_layernorm", width),
        ("text_model.final_layer_norm", text),
    ):
        w.norm(name, size)
    for tower, size in (("vision_model", width), ("text_model", text)):
        for i in range(2):
            layer = f"{tower}.encoder.layers.{i}"
            for part, gain in (("k_proj", 1.5), ("v_proj", 1.5), ("q_proj", 1.5), ("out_proj", 2.0)):
                w.linear(f"{layer}.self_attn.{part}", size, size, gain)
            w.norm(f"{layer}.layer_norm1", size)
            w.linear(f"{layer}.mlp.fc1", 4 * size, size)
            w.linear(f"{layer}.mlp.fc2", size, 4 * size)
            w.norm(f"{layer}.layer_norm2", size)
    w.normal("visual_projection.weight", 64, width, scale=width**-0.5)
    w.normal("text_projection.weight", 64, text, scale=text**-0.5)
    return w, {**_hf_config("gelu" if kind == "pickscore" else "quick_gelu", width, text, patch), **_hf_tokenizer()}


def _hf_config(act: str, width: int, text: int, patch: int) -> dict[str, str]:
    both = dict(
        hidden_act=act,
        num_hidden_layers=2,
        layer_norm_eps=1e-5,
        attention_dropout=0.0,
        projection_dim=64,
        initializer_factor=1.0,
        initializer_range=0.02,
    )
    config = dict(
        architectures=["CLIPModel"],
        model_type="clip",
        projection_dim=64,
        logit_scale_init_value=2.6592,
        initializer_factor=1.0,
        torch_dtype="float32",
        text_config=dict(
            both,
            model_type="clip_text_model",
            hidden_size=text,
            intermediate_size=4 * text,
            num_attention_heads=text // 64,
            vocab_size=len(_vocabulary()),
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        ),  # not the tokenizer's: as in the official files
        vision_config=dict(
            both,
            model_type="clip_vision_model",
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // 64,
            image_size=IMAGE,
            patch_size=patch,
            num_channels=3,
        ),
    )
    processor = dict(
        crop_size=dict(height=IMAGE, width=IMAGE),
        do_center_crop=True,
        do_convert_rgb=True,
        do_normalize=True,
        do_rescale=True,
        do_resize=True,
        resample=3,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
        image_processor_type="CLIPImageProcessor",
        processor_class="CLIPProcessor",
        rescale_factor=1 / 255,
        size=dict(shortest_edge=IMAGE),
    )
    return {"config.json": _json(config), "preprocessor_config.json": _json(processor)}


def _vocabulary() -> dict[str, int]:
    """CLIP's byte-level vocabulary with few merges: 256 bytes, 256 bytes that end a word, merges, start, end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    words = (
        letters
        + [letter + "</w>" for letter in letters]
        + ["".join(pair) for pair in MERGES]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    return {word: i for i, word in enumerate(words)}


def _hf_tokenizer() -> dict[str, str]:
    """The files that CLIPTokenizerFast.save_pretrained writes; merges in tokenizer.json as strings, as in the official
    repositories.
    """
    words = _vocabulary()
    start, end = "<|startoftext|>", "<|endoftext|>"
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=True)
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bytewise = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[dict(id=words[token], content=token, **flags, special=True) for token in (start, end)],
        normalizer=dict(
            type="Sequence",
            normalizers=[
                dict(type="NFC"),
                dict(type="Replace", pattern=dict(Regex=r"\s+"), content=" "),
                dict(type="Lowercase"),
            ],
        ),
        pre_tokenizer=dict(
            type="Sequence",
            pretokenizers=[dict(type="Split", pattern=dict(Regex=pattern), behavior="Removed", invert=True), bytewise],
        ),
        post_processor=dict(
            type="RobertaProcessing",
            sep=[end, words[end]],
            cls=[start, words[start]],
            trim_offsets=False,
            add_prefix_space=False,
        ),
        decoder=dict(bytewise, add_prefix_space=True),
        model=dict(
            type="BPE",
            dropout=None,
            unk_token=end,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            vocab=words,
            merges=[" ".join(pair) for pair in MERGES],
        ),
    )
    special = {
        name: dict(content=token, **flags)
        for name, token in (("bos_token", start), ("eos_token", end), ("unk_token", end))
    }
    special["pad_token"] = end
    config = dict(
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        errors="replace",
        model_max_length=77,
        processor_class="CLIPProcessor",
        clean_up_tokenization_spaces=False,
        tokenizer_class="CLIPTokenizer",
        added_tokens_decoder={str(words[token]): dict(content=token, **flags, special=True) for token in (start, end)},
    )
    return {
        "tokenizer.json": _json(tokenizer),
        "vocab.json": json.dumps(words, ensure_ascii=False),
        "special_tokens_map.json": _json(special),
        "merges.txt": "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in MERGES),
        "tokenizer_config.json": _json(config),
    }


def _json(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def aesthetic() -> Weights:
    """LAION's head for embeddings of 64 numbers."""
    w = Weights(SEEDS["aesthetic"])
    w.head("", 64, gain=6.0)
    w["layers.7.bias"] += 5.5
    return w


QWEN2_VL = (  # special tokens, in the order in which they are numbered after the vocabulary
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start "
    "vision_end vision_pad image_pad video_pad"
).split()

QWEN_WORDS = """Aesthetic Alignment Assess Attribute Clarity Coherence Consider Consistency Contextual Creativity Evaluate Fidelity
Please Quality Reasonableness Relevance Richness Semantic Subject Text Textual The Visual abnormal acceptable
accessories accurately actions adheres and appearance are artistic aspects atmosphere attributes background balance
behavior being biological blurring captured clothing composition conflict considered contain content contradictions
creative critical described description deviations dimensions distort elements enhance environment environmental
estimate evaluate evaluating expressions faithfully following generated harmful harmony how image inappropriate
including indistinct interpret introduce lighting logical logically matches material materials meaning mentioned
nonsensical not original overall particular political possible preference present preserved prompt provide quality
rating ratings represented satisfaction scenario score setting shadows sharpness should significant specific specifies
structures style stylistic subject such support surrounding tasked textual textures the this violent visibility visual
well whether with without""".split()  # most of HPSv3's instruction, or its 700 words would be 3,000 tokens


def qwen_merges() -> list[tuple[str, str]]:
    """Byte-level merges that make each of these words, with a space before it, one token."""
    found = []
    for word in QWEN_WORDS:
        found += [("Ġ" + word[:i], word[i]) for i in range(len(word))]
    return list(dict.fromkeys(found))


def hpsv3(vision: int = 160, text: int = 256, depth: int = 2) -> tuple[Weights, dict[str, str]]:
    """HPSv3 as transformers 4.45 names it, lm_head included, and Qwen2's vocabulary with few merges. Heads have the numbers of all published sizes: 80 in the picture's tower, 128 in the
    text's, where two heads share a key.
    """
    w, merges = Weights(SEEDS["hpsv3"]), qwen_merges()
    letters = [word for word in _vocabulary() if len(word) == 1]
    words = {word: i for i, word in enumerate([*letters, *("".join(pair) for pair in merges)])}
    vocabulary = len(words) + len(QWEN2_VL) + 1
    w.normal("visual.patch_embed.proj.weight", vision, 3, 2, 14, 14, scale=2 / (6 * 14 * 14) ** 0.5)
    for i in range(depth):
        block = f"visual.blocks.{i}"
        for name in ("norm1", "norm2"):
            w.norm(f"{block}.{name}", vision)
        w.linear(f"{block}.attn.qkv", 3 * vision, vision, 1.5)
        w.linear(f"{block}.attn.proj", vision, vision, 2.0)
        w.linear(f"{block}.mlp.fc1", 4 * vision, vision)
        w.linear(f"{block}.mlp.fc2", vision, 4 * vision)
    w.norm("visual.merger.ln_q", vision)
    w.linear("visual.merger.mlp.0", 4 * vision, 4 * vision)
    w.linear("visual.merger.mlp.2", text, 4 * vision, 2.0)
    w.normal("model.embed_tokens.weight", vocabulary, text)
    for i in range(depth):
        layer = f"model.layers.{i}"
        for part, out in (("q", text), ("k", 128), ("v", 128)):
            w.linear(f"{layer}.self_attn.{part}_proj", out, text, 1.5)
        w.normal(f"{layer}.self_attn.o_proj.weight", text, text, scale=2 / text**0.5)
        for part, out, fan_in in (("gate", 2 * text, text), ("up", 2 * text, text), ("down", text, 2 * text)):
            w.normal(f"{layer}.mlp.{part}_proj.weight", out, fan_in, scale=fan_in**-0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            w.normal(f"{layer}.{name}.weight", text, scale=0.1, mean=1.0)
    w.normal("model.norm.weight", text, scale=0.1, mean=1.0)
    w.normal("lm_head.weight", vocabulary, text, scale=text**-0.5)
    for i, out, fan_in in ((0, 1024, text), (3, 16, 1024), (5, 2, 16)):
        w.linear(f"rm_head.{i}", out, fan_in, 2.0)
    return w, {
        "vocab.json": json.dumps(words, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges),
    }


def build(kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights by name, and the texts of the files beside them by file name."""
    if kind == "image_reward":
        return image_reward()
    if kind == "aesthetic":
        return aesthetic(), {}
    if kind == "hpsv3":
        return hpsv3()
    return hf_clip(kind) if kind in ("clipscore_hf", "pickscore") else (open_clip(kind), {})


def write(kind: str, folder: Path) -> Path:
    """Write the official files of this kind into the folder; returns the weights' file."""
    weights, texts = build(kind)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    path = folder / FILES[kind]
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(dict(weights), str(path), metadata={"format": "pt"})
    else:
        torch.save({"state_dict": dict(weights)} if kind == "hps_v2" else dict(weights), path)
    return path


def blake2b(kind: str) -> str:
    """Of names, types, shapes and bytes of the weights and of the texts.

    (torch.save's container differs between versions.)
    """
    weights, texts = build(kind)
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        digest.update(
            f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode() + weights[name].numpy().tobytes()
        )
    for name in sorted(texts):
        digest.update(name.encode() + texts[name].encode())
    return digest.hexdigest()
