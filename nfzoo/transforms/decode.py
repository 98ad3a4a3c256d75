"""Decode images: any source to an upright 8-bit Pillow image."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from nfzoo.errors import DataError
from nfzoo.files import UnreadableFileError, open_regular

HEIF_SUFFIXES = frozenset([".heic", ".heif"])
HEIF_REMEDY = "pip install 'nfzoo[heif]' reads HEIC"

_HEIF = importlib.util.find_spec("pillow_heif") is not None
_READ = ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"
_KNOWN = ".ai .arw .cr2 .cr3 .dcm .dds .dib .dng .eps .exr .hdr .ico .jxl .nef .orf .pcx .psd .raf .raw .rw2 .svg .xcf"

IMAGE_SUFFIXES = frozenset(_READ.split()) | (HEIF_SUFFIXES if _HEIF else frozenset())
"""Lower-case suffixes of the files that count as images in a folder."""

UNREAD_SUFFIXES = (frozenset(_KNOWN.split()) | HEIF_SUFFIXES) - IMAGE_SUFFIXES
"""Lower-case suffixes of image files that are not read."""

# Formats that Pillow decodes itself. Others go to other programs, such as EPS to Ghostscript.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")

# EXIF tag 0x0112. Source: CIPA DC-008, table of "Orientation".
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset(_UPRIGHT[n] for n in (5, 6, 7, 8))
_BACKWARDS = frozenset(_UPRIGHT[n] for n in (3, 4, 6, 7))
"""The first row becomes the last row, or the last column."""

MODES = {1: "L", 3: "RGB"}

ODD = ("alpha", "CMYK", "16-bit", "animated", "EXIF-rotated")
"""What `describe_image` says of images that are not plain 8-bit pixels in upright order."""

_Result = TypeVar("_Result")

# Pillow keeps a pointer to each row, so that a column of pixels takes many times the memory of its pixels.
_LONGEST_SIDE = 1 << 20
_BAND = 1 << 22  # pixels that are converted at a time
# A progressive JPEG is decoded anew for each scan, and a scan can be of fifty bytes. Programs write a dozen.
_MOST_SCANNED = 1 << 32  # pixels times scans


def open_image(
    source: str | Path | BinaryIO | Image.Image | np.ndarray, *, channels: int = 3, min_side: int | None = None
) -> Image.Image:
    """Return an upright 8-bit image, fully loaded, of mode `RGB` (three channels) or `L` (one).

    This is the one rule for images in training, evaluation and prediction. Transparent pixels are composed over white,
    16-bit values are scaled by 255 / 65535 (those of colours are cut to their upper 8 bits, by Pillow), the EXIF
    orientation is applied, and an animation gives its first frame. A file that is cut off is refused, whatever of it
    could be read. The result carries no metadata.

    Args:
        source: a path, a binary file, a Pillow image, or a `uint8` array of `(H, W)` or `(H, W, 1 | 3 | 4)`.
        min_side: let Pillow's draft mode decode a JPEG file at 1/2, 1/4 or 1/8 of its size. It takes the smallest of
            them whose shorter side has at least so many pixels.

    Raises:
        DataError: for a source that is absent, damaged, no image, or too large: beyond Pillow's limit of 179 million
            pixels, or a million on one side. What is too large is not decoded.
    """
    if channels not in MODES:
        raise DataError(
            f"images are read with 1 or 3 channels, not {channels}; prepare other inputs without open_image"
        )
    if isinstance(source, np.ndarray):
        return _convert(_from_array(source), channels)

    def convert(image: Image.Image) -> Image.Image:
        if min_side is not None and image is not source:
            image.draft(None, (min_side, min_side))  # does nothing in formats other than JPEG
        return _convert(image, channels)

    return _with_opened(source, convert)


class Described(NamedTuple):
    """The size, mode and oddities of an image.

    Attributes:
        width, height: of the upright image, in pixels.
        mode: Pillow's mode of the pixels as they are stored, such as `RGB`, `P` or `I;16`.
        odd: those of `ODD` that it is. An animation has several frames or pages, of which the first is read.
    """

    width: int
    height: int
    mode: str
    odd: tuple[str, ...]


def describe_image(source: str | Path | BinaryIO | Image.Image) -> Described:
    """Decode an image as `open_image` does, and return what it is instead of its pixels.

    Raises:
        DataError: as `open_image`.
    """

    def describe(image: Image.Image) -> Described:
        mode, deep = image.mode, _is_16_bit(image)
        width, height = _convert(image, 3).size
        frames = False
        with suppress(Exception):  # damage behind the first frame is not met by `open_image`
            frames = bool(getattr(image, "is_animated", False)) and image.format != "MPO"  # a camera's own preview
        holds = (image.has_transparency_data, mode == "CMYK", deep, frames, _turn(image) is not None)
        return Described(width, height, mode, tuple(name for name, held in zip(ODD, holds, strict=True) if held))

    return _with_opened(source, describe)


def _is_16_bit(image: Image.Image) -> bool:
    """Return whether an image that is not loaded yet is stored with 16 bits a channel."""
    stored = str(getattr(image, "tile", "")) if image.format in ("PNG", "TIFF") else ""  # its raw mode, such as RGB;16B
    return image.mode.startswith("I") or ";16" in stored


def _with_opened(source: str | Path | BinaryIO | Image.Image, use: Callable[[Image.Image], _Result]) -> _Result:
    """Call `use` with an opened image whose size is checked; raise each of its errors as a `DataError`."""
    name = _name(source)
    try:
        with _silent():
            if isinstance(source, Image.Image):
                return use(source)
            with ExitStack() as stack:
                is_path = isinstance(source, str | os.PathLike)
                file = stack.enter_context(open_regular(source)) if is_path else source
                image = stack.enter_context(Image.open(file, formats=_formats()))
                if max(image.size) > _LONGEST_SIDE:
                    raise DataError(f"is too large ({image.width:,} x {image.height:,} pixels); scale it down first")
                _check_scans(image)
                return use(image)
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise DataError(f"{name} {_reason(source, error)}") from error


def _formats() -> list[str]:
    """Return the formats that can be decoded here: those that this Pillow was built with, and HEIF by its plug-in."""
    Image.init()
    if _HEIF and "HEIF" not in Image.OPEN:
        importlib.import_module("pillow_heif").register_heif_opener()
    return [name for name in (*_FORMATS, "HEIF") if name in Image.OPEN]


def _check_scans(image: ImageFile.ImageFile) -> None:
    """Raise a `DataError` for a JPEG of so many scans that it takes minutes to decode."""
    if not image.info.get("progressive") or image.fp is None:
        return
    image.fp.seek(0)
    scans = image.fp.read().count(b"\xff\xda")
    if scans * image.width * image.height > _MOST_SCANNED:
        raise DataError(f"has {scans:,} scans of {image.width:,} x {image.height:,} pixels; save it with fewer")


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Return an upright copy of 8 bits. Of a large image one band of rows after the other is converted."""
    image.load()
    mode, turn = MODES[channels], _turn(image)
    width, height = image.size
    rows = max(1, _BAND // width)
    if rows >= height:
        return _plain(image, mode, turn)
    upright = Image.new(mode, (height, width) if turn in _SIDEWAYS else (width, height))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first = height - bottom if turn in _BACKWARDS else top
        band = _plain(image.crop((0, top, width, bottom)), mode, turn)
        upright.paste(band, (first, 0) if turn in _SIDEWAYS else (0, first))
    return upright


def _plain(image: Image.Image, mode: str, turn: Image.Transpose | None) -> Image.Image:
    plain = image
    if image.mode.startswith("I"):
        plain = _from_16_bit(image)
    elif image.mode == "F":
        raise DataError("holds floating-point pixels; save it with 8 or 16 bits a channel")
    elif image.has_transparency_data:
        plain = image.convert("RGBA")
        plain = Image.alpha_composite(Image.new("RGBA", plain.size, "white"), plain)
    plain = plain.convert(mode)  # a copy, if it has this mode
    plain.info = {}  # an orientation left here would be applied again
    return plain if turn is None else plain.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata is no reason to refuse the pixels
        return None


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale modes `I;16*` to 8 bits, and mode `I`, in which Pillow before 11 opens 16-bit PNG files."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("holds 32-bit pixels; save it with 8 or 16 bits a channel")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _from_array(array: np.ndarray) -> Image.Image:
    shape = tuple(array.shape)
    if array.dtype != np.uint8:
        raise DataError(
            f"an image array must be uint8 with values from 0 to 255, not {array.dtype}; "
            "if yours runs from 0 to 1, pass (255 * array).round().astype('uint8')"
        )
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (1, 3, 4))) or 0 in shape:
        hint = "; move the channels last: array.transpose(1, 2, 0)" if array.ndim == 3 and shape[0] in (1, 3, 4) else ""
        raise DataError(f"an image array must be (H, W) or (H, W, 1 | 3 | 4), not {shape}{hint}")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if shape[2:] == (1,) else array))


def _name(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    if isinstance(source, Image.Image):
        return os.fsdecode(getattr(source, "filename", "") or "the image")
    if hasattr(source, "read"):
        return str(getattr(source, "name", "the image"))
    kind = type(source).__name__
    raise DataError(f"an image is a path, a binary file, a Pillow image or a uint8 array, not a {kind}")


def _reason(source: object, error: Exception) -> str:
    match error:
        case DataError():
            return str(error)
        case FileNotFoundError():
            return "does not exist"
        case IsADirectoryError():
            return "is a folder, not an image"
        case PermissionError():
            return "may not be read: permission denied"
        case UnreadableFileError():
            return f"is not read: {error}"
        case UnidentifiedImageError():
            empty = isinstance(source, str | os.PathLike) and not os.stat(source).st_size
            return "is empty" if empty else "is no image of a known format, or its beginning is damaged"
        case Image.DecompressionBombError():
            return f"is too large ({error}); scale it down first"
        case MemoryError():
            return "does not fit into memory; scale it down first"
    text = " ".join(str(error).split())
    return f"cannot be decoded ({text or type(error).__name__}); it may be damaged or cut off"


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress Pillow's warnings (large images, broken metadata) and no others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        yield
