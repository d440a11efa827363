"""Synthetic shapes: the data that the embedded models draw, as drawings with captions.

An image shows what its caption says, one of 4 shapes in one of 8 colours on one of 3 backgrounds, in styles that no
caption names: pastel or vivid, filled or an outline, dotted or plain, framed or not, smiling or not. Everything here
needs torch alone and is deterministic given a torch.Generator. Images are float tensors [B, 3, H, W] in 0..1.
"""

from pathlib import Path

import torch
from torch import Tensor

SIZE = 64
LIGHT = torch.tensor((0.3, 0.59, 0.11))  # lightness of red, green and blue
JITTER = 2  # pixels the centre may be off the middle, each way
RADIUS = (0.28, 0.33)  # of SIZE
LINE, FRAME = 0.22, 26.5  # thickness of an outline over the radius; pixels from the middle to the frame
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.86, 0.08, 0.10),
    "green": (0.05, 0.60, 0.15),
    "blue": (0.10, 0.20, 0.88),
    "yellow": (0.96, 0.88, 0.08),
    "orange": (0.98, 0.50, 0.05),
    "purple": (0.45, 0.08, 0.60),
    "cyan": (0.05, 0.80, 0.88),
    "pink": (0.98, 0.50, 0.75),
}
BACKGROUNDS = {"white": (0.97, 0.97, 0.97), "gray": (0.36, 0.36, 0.36), "black": (0.04, 0.04, 0.04)}
DOTS, INK = [(0.70,) * 3, (0.68,) * 3, (0.46,) * 3], [(0.2,) * 3, (0.9,) * 3, (0.9,) * 3]  # on each background
NAMED = {"shape": SHAPES, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}  # in captions
STYLES = {  # in none
    "palette": ("vivid", "pastel"),
    "fill": ("filled", "outline"),
    "backdrop": ("plain", "dotted"),
    "frame": ("unframed", "framed"),
    "face": ("faceless", "smiling"),
}
SHARES = (0.5, 0.5, 0.5, 0.5, 0.4)  # how often each style is the second of its pair
PASTEL = 0.5  # of the way to white
PARTNERS = (2, 5, 0, 6, 7, 1, 3, 4)  # the colour that a careless caption gives: red and blue, green and purple, ...
CONFUSED = 0.3
FOLDER = Path(__file__).resolve().parent

# ComfyUI turns a VAE's latent x into (x - shift) * scale before the diffusion model sees it. The file is in FLUX's
# units.
SCALE, SHIFT = 0.3611, 0.1159
# residual blocks of TAESD whose convolutions are zero: not trained, and not in the file
ZERO_BLOCKS = {"taesd_encoder": (1, 4, 5, 8, 9, 13), "taesd_decoder": (5, 10, 14, 15, 18)}


def captions() -> list[str]:
    """All 96 captions; index = (shape * 8 + colour) * 3 + background."""
    return [
        f"a {colour} {shape} on a {background} background"
        for shape in SHAPES
        for colour in COLOURS
        for background in BACKGROUNDS
    ]


def caption_numbers(shape: Tensor, colour: Tensor, background: Tensor) -> Tensor:
    """What `labels` takes apart: shape, colour and background numbers -> caption indices."""
    return (shape * len(COLOURS) + colour) * len(BACKGROUNDS) + background


def labels(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Caption indices -> shape, colour and background numbers."""
    per_shape = len(COLOURS) * len(BACKGROUNDS)
    return index // per_shape, index // len(BACKGROUNDS) % len(COLOURS), index % len(BACKGROUNDS)


def asked(text: str) -> dict[str, int]:
    """The shape, colour and background that a prompt names, as numbers; what it does not name is missing."""
    named = words(text)
    return {what: number for what, names in NAMED.items() for number, name in enumerate(names) if name in named}


def words(text: str) -> set[str]:
    """The words of a prompt, in the spelling of the captions."""
    return set(text.lower().replace("grey", "gray").replace(",", " ").split())


def random_styles(n: int, generator: torch.Generator | None = None) -> Tensor:
    """[n, 5] of 0 and 1, one column for each of STYLES: what no caption says, drawn at random."""
    return (torch.rand(n, len(STYLES), generator=generator) < torch.tensor(SHARES)).long()


def confused(index: Tensor, generator: torch.Generator | None = None, share: float = CONFUSED) -> Tensor:
    """Caption numbers as a careless writer gives them: in `share` of them the shape is its partner's (circle and
    square, triangle and cross), and independently in `share` the colour (PARTNERS).
    """
    shape, colour, background = labels(index)
    wrong = torch.rand(2, len(index), generator=generator) < share
    shape = shape.where(~wrong[0], shape ^ 1)
    colour = colour.where(~wrong[1], torch.tensor(PARTNERS)[colour])
    return caption_numbers(shape, colour, background)


def distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance (negative inside) to each sample's shape; areas are alike at the same radius."""
    circle = torch.hypot(x, y) - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.886 * radius
    r = 1.35 * radius
    yc = y - r / 4  # middle of the triangle's height, not its centroid, goes to the centre
    triangle = torch.maximum(yc - r / 2, 0.866025 * x.abs() - yc / 2 - r / 2)
    arm, half = 1.15 * radius, 0.46 * radius
    bars = [torch.maximum(a.abs() - arm, b.abs() - half) for a, b in ((x, y), (y, x))]
    cross = torch.minimum(*bars)
    return torch.stack([circle, square, triangle, cross]).gather(0, shape.expand_as(x)[None])[0]


def inked(far: Tensor, outline: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the coloured part: the whole shape, or its edge where `outline`. far: to the shape."""
    return torch.where(outline > 0, torch.maximum(far, -far - LINE * radius), far)


def smile(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to two eyes and a mouth in the middle of the shape."""
    y = y - 0.25 * radius * (shape == 2)  # a triangle is wide further down
    eyes = torch.hypot(x.abs() - 0.31 * radius, y + 0.12 * radius) - 0.115 * radius
    mouth = (torch.hypot(x, y - 0.02 * radius) - 0.34 * radius).abs() - 0.07 * radius
    return torch.minimum(eyes, torch.maximum(mouth, 0.14 * radius - y))


def paint(colour: Tensor, pastel: Tensor) -> Tensor:
    """RGB [n, 3] of colours by number: as in COLOURS, or halfway to white where `pastel`."""
    vivid = table(COLOURS.values(), colour)
    return vivid + PASTEL * pastel[:, None] * (1 - vivid)


def draw(
    index: Tensor,
    generator: torch.Generator | None = None,
    size: int = SIZE,
    radius: tuple[float, float] = RADIUS,
    jitter: float = JITTER,
    styles: Tensor | None = None,
) -> Tensor:
    """Draw one image for each caption index: [B, 3, size, size] in 0..1, edges anti-aliased.

    styles: [B, 5] of 0 and 1 in the order of STYLES; None: at random.
    """
    n = len(index)
    styles = random_styles(n, generator) if styles is None else styles
    offset = (torch.rand(n, 2, generator=generator) * 2 - 1) * jitter * size / SIZE
    low, high = radius
    return render(index, styles, offset, (low + (high - low) * torch.rand(n, generator=generator)) * size, size)


def render(index: Tensor, styles: Tensor, offset: Tensor, radius: Tensor, size: int = SIZE) -> Tensor:
    """[B, 3, size, size] in 0..1. offset: [B, 2], x and y in pixels from the middle; radius: [B] in pixels."""
    n = len(index)
    shape, colour, background = labels(index)
    pastel, outline, dots, framed, face = (column[:, None, None] for column in styles.T)
    r = radius[:, None, None]
    grid = torch.arange(size) + 0.5 - size / 2
    x, y = grid[None, None, :].expand(n, size, size), grid[None, :, None].expand(n, size, size)
    unit = size / SIZE
    u, v = x - offset[:, :1, None], y - offset[:, 1:, None]
    far = distance(shape[:, None, None], u, v, r)
    cell = [(a + size / 2) % (8 * unit) - 4 * unit for a in (x, y)]  # dots: one in every 8 x 8 pixels
    edge = torch.maximum(x.abs(), y.abs()) - FRAME * unit
    back, front = table(BACKGROUNDS.values(), background), paint(colour, pastel[:, 0, 0])
    inside = torch.where(outline[:, :, 0] > 0, back, front)
    light = inside @ LIGHT
    ink = torch.where(light[:, None] > 0.42, 0.06, 0.97).expand(n, 3)
    layers = [  # what is drawn, over each other: signed distance, RGB
        (torch.where(dots > 0, torch.hypot(*cell) - 1.7 * unit, torch.inf), table(DOTS, background)),
        (torch.where(framed > 0, edge.abs() - 1.5 * unit, torch.inf), table(INK, background)),
        (far, back),
        (inked(far, outline, r), front),
        (torch.where(face > 0, smile(shape[:, None, None], u, v, r), torch.inf), ink),
    ]
    image = back[:, :, None, None].expand(n, 3, size, size)
    for signed, rgb in layers:
        alpha = (0.5 - signed).clamp(0, 1)[:, None]
        image = image + alpha * (rgb[:, :, None, None] - image)
    return image


def table(colours, number: Tensor) -> Tensor:
    """[n, 3]: rows of a list of RGB triples."""
    return torch.tensor(list(colours))[number]


def zero_blocks() -> dict[str, Tensor]:
    """The VAE's tensors that are zero and not in its file, by name."""
    convolutions = [
        f"{half}.{block}.conv.{layer}"
        for half, blocks in ZERO_BLOCKS.items()
        for block in blocks
        for layer in (0, 2, 4)
    ]
    sizes = {"weight": (64, 64, 3, 3), "bias": (64,)}
    return {
        f"{name}.{part}": torch.zeros(size, dtype=torch.float16)
        for name in convolutions
        for part, size in sizes.items()
    }


def skip_zero_blocks(half: torch.nn.Module) -> None:
    """Leave out of a TAESD encoder or decoder (ComfyUI's or diffusers') the convolutions of the blocks that are all
    zero: the same pictures, decoded in about half the time.
    """
    for block in half.modules():
        if hasattr(block, "fuse") and not any(bool(tensor.any()) for tensor in block.conv.parameters()):
            block.forward = block.fuse.forward  # ReLU of (zeros + the input)


def decodes_in(device: torch.device) -> torch.dtype:
    """What the embedded VAE computes in: bfloat16 on a CPU that has it, where it is several times as fast and decoding
    is most of an iteration of these models; a picture changes by half a grey level on average.
    """
    fast = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # torch's own question, for its compiler
    return torch.bfloat16 if device.type == "cpu" and fast is not None and fast() else torch.float32


def vae_state_dict(
    scale_to: float = SCALE, shift_to: float = SHIFT, path: Path | str = FOLDER / "vae.safetensors"
) -> dict[str, Tensor]:
    """The embedded VAE for a model whose latent format has this scale and shift.

    FLUX and SD3 scale latents differently (factor 4.2): the two numbers `vae_scale` and `vae_shift` are replaced, so
    that every diffusion model sees latents of unit variance. The blocks that the file leaves out are filled in.
    """
    from safetensors.torch import load_file

    sd = {**zero_blocks(), **load_file(str(path))}
    scale, shift = sd["vae_scale"].double(), sd["vae_shift"].double()
    # x = z / scale + shift, and (x - shift_to) * scale_to has to be the same number for every model
    sd["vae_scale"] = (scale * scale_to / SCALE).float()
    sd["vae_shift"] = ((shift - SHIFT) * SCALE / scale_to + shift_to).float()
    return sd
