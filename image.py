"""A picture file -> the pixels that CLIP's tower expects.

CLIP (arXiv 2103.00020) scales the short side to S pixels with a bicubic filter, keeps the square
in the middle and normalises each channel: "crop". What lies outside that square is lost, so
LLaVA-1.5 (arXiv 2310.03744) first pads the picture to a square with CLIP's mean colour, which
normalises to almost 0: "pad". LLaVA-1.6 also looks at it from close up, tile by tile: "anyres".
The checkpoint's config says which one it was trained with; the others run without any error and
answer worse.

    crop    640x427 --resize--> 503x336 --middle--> 336x336 --normalise--> float32[1, 3, 336, 336]
    pad     640x427 --square--> 640x640 --resize--> 336x336 --normalise--> float32[1, 3, 336, 336]
    anyres  640x427 --squash--> 336x336, and --fit into 672x672--> 4 tiles --> [5, 3, 336, 336]

Every bit equals that of the Pillow-based processor in transformers. Only `load` differs: it refuses
damaged and oversized files in one sentence, and 16-bit greys stay grey.

Read next: vit.py, which turns the pixels into features.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, red green blue, 0 to 1
STD = (0.26862954, 0.26130258, 0.27577711)
ASPECTS = ("crop", "pad", "anyres")
GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # LLaVA-1.6's

# Formats whose decoders run no other program and open no other file (EPS would start Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# A few bytes can claim a picture that fills the memory. Decoded, a pixel takes four bytes.
MAX_PIXELS = 64 * 2**20  # in a file: a 64-megapixel photo fits
MAX_TILES = 64
MAX_CANVAS = 4 * MAX_PIXELS  # in a padded or resized picture: a wide panorama, padded, fits


def is_grids(grids, size: int) -> bool:
    return (
        isinstance(grids, list | tuple)
        and len(grids) > 0
        and all(isinstance(grid, list | tuple) and len(grid) == 2 for grid in grids)
        and all(type(side) is int and side > 0 and side % size == 0 for g in grids for side in g)
        and all(width * height <= MAX_TILES * size**2 for width, height in grids)
    )


class ImageError(ValueError):
    """A picture that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class ImageConfig:
    """How a checkpoint wants its pixels; the defaults are LLaVA-1.5's."""

    image_size: int = 336  # pixels per side of the square the tower sees, S
    aspect: str = "pad"  # "crop" keeps the centre, "pad" everything, "anyres" adds tiles
    mean: tuple = MEAN
    std: tuple = STD
    grid_pinpoints: tuple | None = None  # (width, height) in pixels, for "anyres"; None: as GRIDS

    def __post_init__(self):
        for name in ("mean", "std"):  # JSON has lists, a frozen config tuples
            value = getattr(self, name)
            numbers = isinstance(value, list | tuple) and {type(v) for v in value} <= {int, float}
            if not numbers:
                raise ValueError(f"{name} {str(value)[:100]} is not three numbers")
            object.__setattr__(self, name, tuple(value))
        if self.aspect not in ASPECTS:
            raise ValueError(f"aspect {self.aspect!r} is none of {', '.join(ASPECTS)}")
        if not isinstance(self.image_size, int) or self.image_size < 1:
            raise ValueError(f"image_size {self.image_size!r} is not a positive whole number")
        if len(self.mean) != 3 or not all(0 <= m <= 1 for m in self.mean):
            raise ValueError(f"mean {self.mean} is not three numbers from 0 to 1 (R, G, B)")
        if len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise ValueError(f"std {self.std} is not three positive numbers (R, G, B)")
        grids = self.grid_pinpoints
        if grids is None:
            grids = [[side // 336 * self.image_size for side in grid] for grid in GRIDS]
        if self.aspect == "anyres" and not is_grids(grids, self.image_size):
            raise ValueError(
                f"grid_pinpoints {str(grids)[:100]} is not a list of [width, height], each a "
                f"multiple of {self.image_size} pixels, of at most {MAX_TILES} tiles"
            )
        grids = tuple(map(tuple, grids)) if self.aspect == "anyres" else ()
        object.__setattr__(self, "grid_pinpoints", grids)

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean as a colour, truncated as in the original: (122, 116, 104) for CLIP."""
        return tuple(int(255 * m) for m in self.mean)


def load(
    path: str | Path | BinaryIO, exif_rotate: bool = False, warn: Callable | None = None
) -> Image.Image:
    """Open a picture file, or an open binary stream, as RGB; raise ImageError if that fails.

    Cameras store a picture as the sensor lay and note in EXIF how to turn it. LLaVA ignores the
    note, and so do we unless `exif_rotate` asks for an upright picture (only TIFF is turned always,
    by Pillow). Transparency is dropped, as in the original. Of several frames or pages the first is
    used; `warn`, if given, is called with one sentence that says so.
    """
    with _opened(path) as file:
        # MPO is a phone's JPEG with a depth or brightness map behind the photo.
        frames = getattr(file, "is_animated", False) and file.format != "MPO"
        picture = _to_rgb(file, exif_rotate)
    if frames and warn is not None:
        warn(f"{_name(path)}: has several frames or pages; only the first is used")
    return picture


def size_of(path: str | Path | BinaryIO) -> tuple[int, int]:
    """(width, height) of a picture file, from its header alone; raise ImageError as `load` does."""
    with _opened(path) as file:
        return file.size


def _name(path) -> str:
    return getattr(path, "name", "the stream") if hasattr(path, "read") else str(path)


@contextmanager
def _opened(path):
    name = _name(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata, which we do not read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:  # reads the header only
                if file.width * file.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{file.width}x{file.height} pixels")
                yield file
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImageError(
            f"{name}: expected a picture file, cannot open it ({error.strerror}); check the path"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        claim = str(error).partition(" exceeds")[0]  # the rest is Pillow's own, higher limit
        raise ImageError(
            f"{name}: expected at most {MAX_PIXELS:,} pixels, got {claim}; shrink the picture first"
        ) from error
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise ImageError(
            f"{name}: expected a picture ({kinds}), got none or an empty file; convert it to PNG"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise ImageError(
            f"{name}: the picture is damaged, cut short or of a rare kind ({error}); "
            "fetch it again or save it as PNG"
        ) from error


def _to_rgb(file, exif_rotate: bool) -> Image.Image:
    """Decode an opened picture of any mode."""
    file.load()
    picture = ImageOps.exif_transpose(file) if exif_rotate else file
    if picture.mode == "F" or (picture.mode == "I" and file.format == "TIFF"):
        raise ValueError("32 bits per channel, of unknown range")
    if picture.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255, which leaves all but the darkest pixels white. Keep
        # the high byte instead, as it does itself for 16-bit colour.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def expand_to_square(picture: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """Pad the short side equally at both ends; an odd pixel goes to the right or the bottom."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    _check_canvas(picture, (side, side))
    square = Image.new("RGB", (side, side), fill)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def resize_short_side(picture: Image.Image, size: int) -> Image.Image:
    """Scale the short side to `size` and the long one in proportion, rounded down."""
    short = min(picture.size)
    new_size = tuple(int(size * side / short) for side in picture.size)
    _check_canvas(picture, new_size)
    return picture.resize(new_size, Image.Resampling.BICUBIC)


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Keep the size x size pixels in the middle, rounded towards the top left."""
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def normalise(picture: Image.Image, mean: tuple, std: tuple) -> np.ndarray:
    """(x / 255 - mean) / std for each channel, as float32[3, height, width].

    A byte has 256 values, so we normalise those and look the pixels up.
    """
    levels = np.arange(256, dtype=np.float32) / 255  # x * float32(1 / 255) would miss by a bit
    table = (levels[:, None] - np.float32(mean)) / np.float32(std)  # (256, 3)
    pixels = np.empty((3, picture.height, picture.width), np.float32)
    for c, channel in enumerate(np.asarray(picture).transpose(2, 0, 1)):
        np.take(table[:, c], channel, out=pixels[c])
    return pixels


def choose_grid(size: tuple[int, int], grids) -> tuple[int, int]:
    """The (width, height) among `grids` that keeps most of a picture's pixels, then wastes least.

    A picture is never worth more than its own pixels, so small ones get small grids; of equal
    grids the first is taken. (transformers reads the pairs as (height, width) and so differs here.)
    """
    width, height = size

    def worth(grid):
        scale = min(grid[0] / width, grid[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1]  # pixels of the picture, less pixels without any

    return max(grids, key=worth)  # max returns the first of equals


def fit_into(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale a picture to just fit into `size` and put it in the middle of black."""
    (width, height), (w, h) = size, picture.size
    if width / w < height / h:
        new_size = width, min(math.ceil(h * (width / w)), height)
    else:
        new_size = min(math.ceil(w * (height / h)), width), height
    canvas = Image.new("RGB", size)
    place = (width - new_size[0]) // 2, (height - new_size[1]) // 2
    canvas.paste(picture.resize(new_size, Image.Resampling.BICUBIC), place)
    return canvas


def to_tiles(picture: Image.Image, size: int, grids) -> list[Image.Image]:
    """The whole picture squashed to a square, then its best grid's squares, row by row."""
    canvas = fit_into(picture, choose_grid(picture.size, grids))
    corners = [
        (left, top)
        for top in range(0, canvas.height, size)
        for left in range(0, canvas.width, size)
    ]
    squashed = picture.resize((size, size), Image.Resampling.BICUBIC)
    return [squashed, *(canvas.crop((x, y, x + size, y + size)) for x, y in corners)]


def to_pixels(picture: Image.Image, config: ImageConfig) -> torch.Tensor:
    """RGB picture -> float32[n_tiles, 3, S, S]; there is one tile for "crop" and for "pad".

    Raises ImageError for a picture so long and narrow that it cannot be padded or resized.
    """
    if picture.mode != "RGB" or 0 in picture.size:
        raise ImageError(
            f"expected an RGB picture, got mode {picture.mode}, {picture.width}x{picture.height}; "
            "open it with image.load"
        )
    size = config.image_size
    if config.aspect == "anyres":
        tiles = to_tiles(picture, size, config.grid_pinpoints)
    else:
        if config.aspect == "pad":
            picture = expand_to_square(picture, config.fill)
        tiles = [centre_crop(resize_short_side(picture, size), size)]
    pixels = np.stack([normalise(tile, config.mean, config.std) for tile in tiles])
    return torch.from_numpy(pixels)  # (n_tiles, 3, S, S)


def _check_canvas(picture: Image.Image, size: tuple[int, int]):
    if size[0] * size[1] > MAX_CANVAS:
        raise ImageError(
            f"a picture of {picture.width}x{picture.height} would become {size[0]}x{size[1]}, "
            f"expected at most {MAX_CANVAS:,} pixels; cut off a part of its long side first"
        )


def sawtooth(width: int, height: int) -> Image.Image:
    """Draw a picture for want of a photo: each channel a slanting wave from 0 to 255."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([7 * x + 3 * y, 2 * x + 5 * y, x + 11 * y], axis=-1) % 256
    return Image.fromarray(waves.astype(np.uint8))


def main():
    """Print what becomes of a picture, step by step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", help="a picture; without one, a synthetic 640x427")
    path = parser.parse_args().file
    try:
        warn = partial(print, file=sys.stderr)
        picture = load(path, warn=warn) if path else sawtooth(640, 427)
        print("          file  ->   canvas  ->  pixels (n_tiles, 3, S, S)")
        for aspect in ASPECTS:
            config = ImageConfig(aspect=aspect)
            if aspect == "anyres":
                canvas = fit_into(picture, choose_grid(picture.size, GRIDS))
            elif aspect == "pad":
                canvas = expand_to_square(picture, config.fill)
            else:
                canvas = resize_short_side(picture, config.image_size)
            sizes = "  ->  ".join(f"{f'{p.width}x{p.height}':>7}" for p in (picture, canvas))
            pixels = to_pixels(picture, config)
            print(f"{aspect:6} {sizes}  ->  {list(pixels.shape)}, mean {pixels.mean():.4f}")
    except ImageError as error:
        parser.exit(2, f"image.py: {error}\n")


if __name__ == "__main__":
    main()
