"""Qwen2-VL (arXiv 2409.12191) as far as a reward model needs it: pictures and text in, features of the text out, one
pass, no cache. Under the names of the official weights; sizes are read from them.

Text positions are those of HPSv3: 1, 2, 3 ... through picture and text alike, not Qwen2-VL's own in three dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import layers

VISION_HEAD, TEXT_HEAD = 80, 128  # numbers per attention head, in all published sizes
MERGED = 2  # patches per side that become one token
FRAMES = 2  # a picture counts as so many equal frames of a video
EPS, THETA, VISION_THETA = 1e-6, 1e6, 1e4


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): x [B, heads, L, D] turned by angles [L, D / 2], halves paired."""
    cos, sin = (torch.cat([part, part], -1).to(x.dtype) for part in (angles.cos(), angles.sin()))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def frequencies(size: int, theta: float, device) -> Tensor:
    """[size / 2] in fp32."""
    return 1 / theta ** (torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)


class VisionBlock(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, -1, VISION_HEAD)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(part.float(), angles).to(part.dtype) for part in (q, k))
        x = x + self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))


class Vision(nn.Module):
    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        width, channels, frames, patch, _ = weights["visual.patch_embed.proj.weight"].shape
        self.patch = patch
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv3d(channels, width, (frames, patch, patch), (frames, patch, patch), bias=False)}
        )
        hidden = weights["visual.blocks.0.mlp.fc1.bias"].shape[0]
        self.blocks = nn.ModuleList(VisionBlock(width, hidden) for _ in range(layers(weights, "visual.blocks.")))
        out, merged = weights["visual.merger.mlp.2.weight"].shape
        self.merger = nn.ModuleDict(
            {
                "ln_q": nn.LayerNorm(width, EPS),
                "mlp": nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, out)),
            }
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, h, w], sides multiples of 28 -> tokens [B, h w / 784, D], 2 x 2 patches each."""
        high, wide = (length // self.patch for length in pixels.shape[2:])
        # patches in the order in which they are merged
        x = pixels.unflatten(3, (wide // MERGED, MERGED, self.patch)).unflatten(2, (high // MERGED, MERGED, self.patch))
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(1, 4)
        x = x.flatten(0, 1)[:, :, None].expand(-1, -1, FRAMES, -1, -1)
        x = self.patch_embed["proj"](x).view(len(pixels), high * wide, -1)
        angles = self.angles(high, wide, x.device)
        for block in self.blocks:
            x = block(x, angles)
        return self.merger["mlp"](self.merger["ln_q"](x).unflatten(1, (-1, MERGED**2)).flatten(2))

    @staticmethod
    def angles(high: int, wide: int, device) -> Tensor:
        """[patches, VISION_HEAD / 2]: half of it turns with the row, half with the column."""
        rows, columns = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
        places = torch.stack([rows, columns], -1).unflatten(1, (-1, MERGED)).unflatten(0, (-1, MERGED))
        places = places.permute(0, 2, 1, 3, 4).reshape(-1, 2, 1).to(device)
        return (places * frequencies(VISION_HEAD // 2, VISION_THETA, device)).flatten(1)


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


class TextBlock(nn.Module):
    def __init__(self, width: int, keys: int, hidden: int):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, width),
                "k_proj": nn.Linear(width, keys),
                "v_proj": nn.Linear(width, keys),
                "o_proj": nn.Linear(width, width, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, hidden, bias=False),
                "up_proj": nn.Linear(width, hidden, bias=False),
                "down_proj": nn.Linear(hidden, width, bias=False),
            }
        )

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        y = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[f"{name}_proj"](y).unflatten(-1, (-1, TEXT_HEAD)).transpose(1, 2) for name in ("q", "k", "v")
        )
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["o_proj"](y.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


class Text(nn.Module):
    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        vocabulary, width = weights["model.embed_tokens.weight"].shape
        keys = weights["model.layers.0.self_attn.k_proj.bias"].shape[0]
        hidden = weights["model.layers.0.mlp.gate_proj.weight"].shape[0]
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(TextBlock(width, keys, hidden) for _ in range(layers(weights, "model.layers.")))
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, L, D] -> features [B, L, D]; each sees what stands before it."""
        positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        angles = positions[:, None] * frequencies(TEXT_HEAD, THETA, x.device)
        for layer in self.layers:
            x = layer(x, angles)
        return self.norm(x)
