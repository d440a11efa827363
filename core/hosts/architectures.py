"""What each of ComfyUI's flow models for images needs: one row per family. Nothing of ComfyUI is imported.

A family is known by ComfyUI's class for its files (comfy.supported_models) and, where two families share one, by their
network's configuration. cfg and steps are those of the templates that ComfyUI ships (tests/test_architectures.py reads
them); where it has none, of the model's authors or of diffusers' pipeline, which a row says. cfg is as in ComfyUI:
1 is none.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..lora.adapters import ATTENTION, MLP

FEW = 8  # steps of a distilled model, at most


@dataclass(frozen=True)
class Architecture:
    """One family."""

    name: str
    config: str  # class of comfy.supported_models
    having: dict = field(default_factory=dict)  # what its network's configuration has, where the class does not tell
    text: str = ""  # Linear layer that takes the text's features; "" = their width is not checked
    pooled: str = ""  # Linear layer that takes the pooled text
    pooled_first: bool = False  # of a wider pooled text it takes the first columns
    needs_pooled: bool = False  # and fails without one
    cfg: float = 4.0  # classifier-free guidance it is drawn with; 1 = none
    guidance: bool = False  # it is told a guidance number besides (FluxGuidance)
    steps: int = 20  # it is drawn with
    distilled: str = ""  # in the names of files that look the same inside, and are drawn with cfg 1 in few steps
    few: int = FEW  # their steps
    attention: str = ATTENTION  # layers of the target "attention", found in their names
    mlp: str = MLP  # and those that "attention+mlp" adds
    reference: str = (
        ""  # of a picture that it edits it takes its "latent", or "latent and text" where the text encoder sees it
    )
    left_out: str = ""  # layers that are no part of what is to learn, not even with "all linear"
    in_place: bool = True  # may update activations in place: autograd must not see them change
    forgets: bool = False  # known to keep no tensor from one call to the next
    untrainable: str = ""  # why ComfyUI's network cannot be trained at all
    network: str = ""  # its key in core.lora.networks, where diffusers has it too

    def presets(self) -> dict[str, str]:
        """Patterns of the targets, as core.lora.adapters.choose_layers takes them."""
        unless = rf"^(?!.*(?:{self.left_out})).*" if self.left_out else ""
        return {
            "attention": f"{unless}(?:{self.attention})",
            "attention+mlp": f"{unless}(?:{self.attention}|{self.mlp})",
            "all linear": unless,
        }

    def habit(self, file: Path | None = None) -> tuple[float, int]:
        """(cfg, steps) that suit a model of this family. Weights do not show whether a model was distilled, so only its
        file's name can tell a Z-Image-Turbo from a Z-Image.
        """
        if file is not None and self.distilled and re.search(self.distilled, file.stem, re.IGNORECASE):
            return 1.0, self.few
        return self.cfg, self.steps


_FLUX = {"text": "txt_in", "pooled": "vector_in.in_layer", "pooled_first": True, "forgets": True}
_FAST = "turbo|lightning|distil|hyper|schnell"
ARCHITECTURES = (
    # FLUX.1: dev, Krea, Kontext
    Architecture(
        "FLUX.1", "Flux", cfg=1.0, guidance=True, distilled=_FAST, reference="latent", network="flux", **_FLUX
    ),
    Architecture("FLUX.1 Fill", "FluxInpaint", cfg=1.0, guidance=True, network="flux", **_FLUX),
    Architecture("Ovis-Image", "FluxSchnell", {"yak_mlp": True}, cfg=5.0, **_FLUX),
    Architecture("FLUX.1-schnell", "FluxSchnell", cfg=1.0, steps=4, network="flux", **_FLUX),
    Architecture("LongCat-Image", "LongCatImage", text="txt_in"),
    Architecture(
        "FLUX.2",
        "Flux2",
        {"guidance_embed": True},
        text="txt_in",
        cfg=1.0,
        guidance=True,
        distilled=_FAST,
        reference="latent",
        network="flux2",
    ),
    Architecture(
        "FLUX.2 klein",
        "Flux2",
        text="txt_in",
        cfg=5.0,
        distilled=rf"klein(?!.*base)|{_FAST}",
        few=4,
        reference="latent",
        network="flux2",
    ),
    Architecture(
        "SD3",
        "SD3",
        text="context_embedder",
        pooled="y_embedder.mlp.0",
        needs_pooled=True,
        cfg=4.5,  # as flow_grpo and TreeGRPO train it; the template has 4.01
        distilled=_FAST,
        few=4,
        in_place=False,
        forgets=True,
        network="sd3",
    ),
    Architecture("Z-Image", "ZImage", text="cap_embedder.1", steps=25, distilled=_FAST, network="z-image"),
    Architecture("Lumina 2", "Lumina2", text="cap_embedder.1", steps=30, network="lumina2"),
    Architecture(
        "Qwen-Image",
        "QwenImage",
        text="txt_in",
        distilled=_FAST,
        reference="latent and text",
        network="qwen-image",
    ),
    Architecture(
        "Krea 2", "Krea2", cfg=4.5, steps=52, distilled=_FAST, network="krea2"
    ),  # its own 3.5, where 0 is none
    Architecture(
        "Anima",
        "Anima",
        steps=30,
        distilled=_FAST,
        attention=r"\.(self|cross)_attn\.",  # and not their modulations, adaln_modulation_self_attn
        mlp=r"\.mlp\.",
        left_out=r"^llm_adapter\.",  # works on the text, which ComfyUI's samplers do once, before they begin
    ),
    Architecture(
        "Chroma",
        "Chroma",
        text="txt_in",
        cfg=3.5,
        steps=26,
        distilled=_FAST,
        left_out=r"^distilled_guidance_layer\.",  # makes every layer's modulation out of the time alone
        network="chroma",
    ),
    Architecture(
        "Chroma Radiance", "ChromaRadiance", text="txt_in", cfg=3.5, steps=30, left_out=r"^distilled_guidance_layer\."
    ),
    Architecture("Z-Image, pixels", "ZImagePixelSpace", text="cap_embedder.1", steps=25, distilled=_FAST),
    Architecture(
        "PixelDiT",
        "PixelDiTT2I",
        text="y_embedder.proj",
        steps=30,
        untrainable="its network overwrites what its own backward pass needs",
    ),
    Architecture("AuraFlow", "AuraFlow", text="cond_seq_linear", cfg=3.5, steps=50, network="auraflow"),  # diffusers
    Architecture(
        "HiDream-I1",
        "HiDream",
        needs_pooled=True,
        cfg=5.0,
        steps=50,
        distilled=rf"i1_(dev|fast)|{_FAST}",
        few=16,
        network="hidream",
    ),
    Architecture("Hunyuan Image 2.1", "HunyuanImage21", {"guidance_embed": True}, cfg=1.0, guidance=True, steps=FEW),
    Architecture("Hunyuan Image 2.1", "HunyuanImage21", cfg=3.5, steps=50),  # diffusers, whose guidance is another
    Architecture("OmniGen 2", "Omnigen2", text="time_caption_embed.caption_embedder.1", cfg=5.0),
    Architecture(
        "Boogu", "Boogu", text="time_caption_embed.caption_embedder.1", cfg=3.5, steps=25, distilled=_FAST, few=4
    ),
    Architecture("ERNIE-Image", "ErnieImage", text="text_proj", distilled=_FAST, network="ernie-image"),
    Architecture("Ideogram 4", "Ideogram4", text="llm_cond_proj"),  # a guess: its template has a second network for cfg
    Architecture("MageFlow", "MageFlow", text="txt_in", cfg=5.0, steps=30, distilled=_FAST, few=4),
    Architecture("JoyImage", "JoyImage", steps=40),
    Architecture("Lens", "Lens", cfg=5.0, distilled=_FAST, few=4),
    Architecture("Kandinsky 5 Image", "Kandinsky5Image", needs_pooled=True, cfg=3.5, steps=50),  # diffusers
    Architecture("Wan, one frame", "WAN21_T2V", text="text_embedding.0", cfg=6.0, steps=30, distilled=_FAST),
)


def architecture_of(model) -> Architecture:
    """The row of a MODEL; for one that has none a row of its own, with what is usual."""
    base = model.model
    config = getattr(base, "model_config", None)
    kind, network = type(config).__name__, getattr(config, "unet_config", {})
    for row in ARCHITECTURES:
        if row.config == kind and all(network.get(key) == value for key, value in row.having.items()):
            return row
    told = bool(network.get("guidance_embed", False))
    return Architecture(type(base).__name__, kind, cfg=1.0 if told else 4.0, guidance=told)


def model_file(model) -> Path | None:
    """The file that a MODEL was loaded from, where ComfyUI remembers it."""
    origin = getattr(model, "cached_patcher_init", None)
    return next((Path(part) for part in origin[1] if isinstance(part, str)), None) if origin else None
