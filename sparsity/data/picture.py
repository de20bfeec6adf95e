"""One image file as a tensor: upright, on a ground where it is transparent, brought to 8 bits and to a size."""

import contextlib
import functools
import os
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from sparsity.errors import ConfigError, DataError, reason
from sparsity.files import obstacle

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
EXTENSIONS += (".jpe", ".jfif", ".jp2", ".j2k", ".avif", ".apng", ".pbm", ".pnm", ".dib")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "DIB", "ICO", "QOI", "SGI", "PCX")
DEPTHS = (8, 10, 12, 14, 16)  # bits of grey that cameras and scanners give

Range = tuple[float, float]  # the values that are black and white


class Unreadable(DataError):
    """A file that gives no image, and why."""

    def __init__(self, path: str, why: str):
        super().__init__(f"data.root: {shown(path)} cannot be read ({why}): mend or remove it")
        self.path, self.why = path, why


def checked_range(given: list[float] | None) -> Range | None:
    """The values of `data.loader.range`."""
    if given is not None and (len(given) != 2 or not given[0] < given[1]):
        raise ConfigError(f"data.loader.range must be [black, white], the lower value first, got {given}")
    return given and (float(given[0]), float(given[1]))


def shown(name: str | Path) -> str:
    """A name as it can be shown in one line: what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


class Look(NamedTuple):
    """What an image holds besides pixels of 8 bits."""

    mode: str | None = None  # of more than 8 bits
    low: float = 0.0  # the least and the largest value of such an image
    high: float = 0.0
    transparent: bool = False


@dataclass(frozen=True)
class Reader:
    """A function from a path to an image [channels, height, width], uint8.

    ranges: for each mode of more than 8 bits the values that are black and white, the same for all images of a set.
    """

    size: tuple[int, int]
    channels: int
    background: str
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def __post_init__(self):
        self.ground()
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of files that are odd and can be read all the same

    def __call__(self, path: str) -> Tensor:
        """The image; raises Unreadable."""
        return self.pixels(*examine(path), path)

    def pixels(self, image: Image.Image, look: Look, path: str) -> Tensor:
        """The pixels of an image that was examined; raises Unreadable."""
        try:
            if look.mode in DEEP:
                image = _in_8_bits(image, self.ranges[look.mode])
            if look.transparent:
                image = Image.alpha_composite(Image.new("RGBA", image.size, self.ground()), image.convert("RGBA"))
            elif image.mode in ("RGBa", "La"):
                image = image.convert("RGBA")
            mode = "L" if self.channels == 1 else "RGB"
            array = numpy.array(image if image.mode == mode else image.convert(mode))
            pixels = torch.from_numpy(array).view(*array.shape[:2], self.channels).permute(2, 0, 1)
            return pixels if pixels.shape[1:] == self.size else _resized(pixels, self.size)
        except Exception as error:  # a mode that has no colours, or no memory
            raise Unreadable(path, f"mode {image.mode}: {_why(error)}") from error

    def ground(self) -> tuple[int, int, int, int]:
        """The colour that is seen through transparent pixels."""
        try:
            return (*ImageColor.getcolor(self.background, "RGBA")[:3], 255)
        except ValueError as error:
            raise ConfigError(
                f"data.loader.background={self.background} is no colour: give a name such as white, or '#rrggbb'"
            ) from error


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    from torchvision.transforms.v2.functional import resize

    return resize(pixels, list(size), antialias=True)


def examine(path: str, content: BinaryIO | None = None) -> tuple[Image.Image, Look]:
    """The first frame of an image, decoded and upright, and what it holds; raises Unreadable.

    content: the open file, where it was opened before.
    """
    if content is None:
        check_file(path)
    try:
        with open(path, "rb") if content is None else content as file:
            image = Image.open(file, formats=_formats())
            packed = str(image.tile[0][3]) if getattr(image, "tile", None) else ""  # how pixels lie in the file
            image.load()
            if image.format == "TIFF" or not image.info.keys().isdisjoint(ORIENTED):
                with contextlib.suppress(Exception):  # damaged notes on an image whose pixels are whole
                    ImageOps.exif_transpose(image, in_place=True)
            return image, _look(image, packed)
    except Exception as error:  # readers of many formats, which raise whatever they trip over
        raise Unreadable(path, _why(error)) from error


ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where formats say which way is up


def check_file(path: str) -> None:
    """Raises Unreadable where no file lies that can be an image, by what does."""
    try:
        found = os.stat(path)
        other = None if stat.S_ISREG(found.st_mode) else obstacle(Path(path))
    except FileNotFoundError as error:
        raise Unreadable(path, "a link to nothing" if os.path.islink(path) else "it is gone") from error
    except OSError as error:
        raise Unreadable(path, _why(error)) from error
    if other is not None or found.st_size == 0:
        raise Unreadable(path, other or "an empty file")


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that are read: none whose reader starts another program, as that of PostScript does."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _why(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    text = reason(error)
    if isinstance(error, Image.DecompressionBombError):
        numbers = re.findall(r"\d+", text)
        return f"too large: {numbers[0]} pixels, and {numbers[-1]} are the most" if numbers else f"too large: {text}"
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "truncated" in text.lower():
        return "cut short"
    return text


# --- more than 8 bits ------------------------------------------------------------------------------------------------

DEEP = ("I;16", "I", "F")


def _look(image: Image.Image, packed: str) -> Look:
    transparent = _is_transparent(image)
    mode = "I;16" if image.mode.startswith("I;16") else image.mode
    if mode in DEEP:
        array = numpy.asarray(image)
        low, high = float(array.min()), float(array.max())
        if not numpy.isfinite([low, high]).all():
            raise ValueError(f"mode {mode} with NaN or infinity")
        return Look(mode, low, high, transparent)
    if ";16" in packed:  # colour of 16 bits, of which Pillow gives the upper 8
        bands = image.getextrema()
        colours = [band for name, band in zip(image.getbands(), bands if len(image.getbands()) > 1 else [bands])]
        colours = [band for name, band in zip(image.getbands(), colours) if name not in "Aa"]
        return Look(f"{mode};16", min(b[0] for b in colours), max(b[1] for b in colours), transparent)
    return Look(transparent=transparent)


def _is_transparent(image: Image.Image) -> bool:
    """Whether a ground is seen through any pixel."""
    if image.mode.startswith("I") or image.mode == "F":
        return isinstance(image.info.get("transparency"), int)
    if image.mode in ("RGBa", "La"):
        return image.getchannel("a").getextrema()[0] < 255
    if image.mode in ("RGBA", "LA"):
        return image.getchannel("A").getextrema()[0] < 255
    if image.mode == "PA" or "transparency" in image.info:
        return image.convert("RGBA").getchannel("A").getextrema()[0] < 255
    return False


def range_of(low: float, high: float) -> Range:
    """What is black and white in a set whose values reach from low to high.

    Counts from 0 are of the least of the usual depths that holds them, other values from 0 to about 1 or 255 of that;
    anything else reaches from the least to the largest value of the set.
    """
    whole = float(low).is_integer() and float(high).is_integer()
    tops = [2.0**bits - 1 for bits in DEPTHS] if whole and high > 1 else [1.0, 255.0, 65535.0]
    top = next((top for top in tops if high <= top * (1 if whole else 1 + OVERSHOOT)), None)
    if top is None or low < (0 if whole else -OVERSHOOT * top) or high < top / 5:
        return (low, high) if high > low else (low, low + 1)
    return 0.0, top


OVERSHOOT = 0.05  # of a range of floats, by which resampling passes it


def _in_8_bits(image: Image.Image, given: Range) -> Image.Image:
    """An image of grey with low at 0 and high at 255; of the usual depths the upper 8 bits."""
    array, (low, high) = numpy.asarray(image), given
    bits = next((bits for bits in DEPTHS if (low, high) == (0, 2**bits - 1)), None)
    if bits is not None:
        levels = array.clip(0, high).astype(numpy.int64) >> (bits - 8)
    else:
        levels = numpy.floor((array.astype(numpy.float64).clip(low, high) - low) * (255 / (high - low)) + 0.5)
    grey = Image.fromarray(levels.astype(numpy.uint8))
    if isinstance(image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(numpy.where(array == image.info["transparency"], 0, 255).astype(numpy.uint8)))
    return grey
