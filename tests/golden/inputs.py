"""The images and prompts of the golden scores, the same bytes everywhere. Needs numpy and Pillow.

The images are drawn with +, -, *, / and uniform random numbers only, which every version of numpy computes alike.
Scores are those of `rgb(image)`: RGBA and grey pictures are converted with Pillow's .convert("RGB") before anything
else, as an IMAGE tensor holds them. (The official transforms resize first and convert later, which for RGBA gives other
pixels.)
"""

import hashlib

import numpy as np
from PIL import Image

# name: (height, width, mode). The models' inputs are 32 x 32. No picture but the square one has a long side of 32:
# HPSv2's transform forgets to pad those, and its network then fails.
SIZES = {
    "portrait": (96, 64, "RGB"),
    "landscape": (64, 96, "RGB"),
    "tiny tall": (7, 5, "RGB"),
    "tiny wide": (5, 7, "RGB"),
    "transparent": (60, 45, "RGBA"),
    "grey": (50, 75, "L"),
    "model size": (32, 32, "RGB"),
    "very wide": (20, 300, "RGB"),
    "very tall": (240, 22, "RGB"),
    "odd": (65, 97, "RGB"),  # 47.75 -> 47 wide, 15 too many: the crop starts at 8 by round(15 / 2), at 7 by 15 // 2
    "only crop": (32, 39, "RGB"),  # 7 too many: 4 or 3
    "three more": (64, 70, "RGB"),  # 35 wide, 3 too many: 2 or 1
    "one more": (64, 67, "RGB"),  # 33 wide, 1 too many: 0 or 0; HPSv2 pads 0 above and 1 below
    "half even": (33, 64, "RGB"),  # HPSv2: 16.5 -> 16 high
    "half odd": (70, 35, "RGB"),
    "large": (1100, 733, "RGB"),
}

# more than 20 tokens
_LONG = "a very detailed oil painting of an old town by the sea at dawn , with small boats , white houses , "

PROMPTS = [
    "a photo of a cat sitting on a red chair",
    "a photo of a dog sitting on a blue chair",
    "",
    "a",
    "A CASTLE ON A HILL, OIL PAINTING",
    "naïve café, Ångström, façade, jalapeño",
    "cafe\u0301 noe\u0308l man\u0303ana",  # combining accents
    "a 🐱 with a 🎩, 👨\u200d👩\u200d👧 and 🇩🇪",
    "salt &amp; pepper &lt;b&gt; &quot;bold&quot; &#39;x&#39;",
    "twice &amp;amp; thrice &amp;amp;amp; &eacute;",
    _LONG * 2 + "red",  # more than 35 and, in words, fewer than 77 tokens
    _LONG * 2 + "blue",
    _LONG * 8,  # more than 77 tokens
    _LONG * 8 + "different at the end",
    "hello, world!!! (really?) -- {no}: #tag @user $5.00 50% ~ ^_^ a/b\\c",
    "it's the dog's bone; they're sure we've won, I'm glad he'll stay, she'd go, can't",
    "4k 8K 1920x1080, 3 dogs, year 2024, f/1.8, 3.14159, ½ ²",
    "  two   spaces\tand\na new line \r\n end  ",
    " \n\t ",
    "一只猫坐在红色的椅子上 日本語の猫 한국어 고양이",
    "schÃ¶n cafÃ© â€œquotedâ€\x9d itâ€™s",  # what ftfy repairs
    "“curly” ‘quotes’ — dash… ﬁve ＦＵＬＬ width",
    "Кот на стуле, ΓΆΤΑ ΟΔΟΣ, İstanbul ı ß",
    "قطة على كرسي, חתול",
    "zero\u200bwidth\u00a0nbsp so\u00adft \ufeffbom \x07bell \ufffd",
    "w" * 130 + " cat",  # BERT gives up on words of more than 100 letters
    "a [MASK] cat [SEP] and [UNK] a dog [PAD] [CLS] [sep]",
    "a cat [ENC] and [DEC] a dog",
    "a cat <end_of_text> a dog <start_of_text>",
    "a cat <|endoftext|> a dog <|startoftext|>",
    "(masterpiece:1.2), ((best quality)), <lora:x:0.8>, BREAK snake_case",
]


def draw(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    """Colours that run from corner to corner, stripes, ellipses, noise: uint8 [height, width, channels]."""
    random = np.random.RandomState(seed)
    y, x = ((np.arange(n) + 0.5) / n for n in (height, width))
    y, x = y[:, None, None], x[None, :, None]
    corners = random.random_sample((4, channels))
    picture = (corners[0] * (1 - x) + corners[1] * x) * (1 - y) + (corners[2] * (1 - x) + corners[3] * x) * y
    slope = random.random_sample(2) * 6 + 1
    picture = picture + random.random_sample(channels) * 0.3 * ((slope[0] * x + slope[1] * y) % 1 < 0.5)
    for _ in range(3):
        centre, radius, colour = (
            random.random_sample(2),
            random.random_sample(2) * 0.3 + 0.1,
            random.random_sample(channels),
        )
        inside = ((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1
        picture = np.where(inside, colour, picture)
    picture = picture + (random.random_sample((height, width, channels)) - 0.5) * 0.2
    return np.floor(np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def images() -> dict[str, Image.Image]:
    """The pictures by name, in their own modes."""
    found = {}
    for seed, (name, (height, width, mode)) in enumerate(SIZES.items()):
        array = draw(height, width, len(mode), seed)
        found[name] = Image.fromarray(array[:, :, 0] if mode == "L" else array)
    return found


def rgb(image: Image.Image) -> np.ndarray:
    """The pixels that are scored: uint8 [height, width, 3]. As IMAGE: rgb(image)[None] / 255."""
    return np.array(image.convert("RGB"))


def blake2b() -> str:
    """Of the pixels of all images and of the prompts."""
    digest = hashlib.blake2b(digest_size=16)
    for name, image in images().items():
        digest.update(f"{name} {image.size} {image.mode}".encode() + image.tobytes())
    digest.update("\0\0".join(PROMPTS).encode())
    return digest.hexdigest()
