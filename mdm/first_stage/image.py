"""Image files → pixels. Damaged pixels are errors; damaged metadata is ignored."""

import io
import re
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mdm.first_stage import bare, png
from mdm.first_stage.bare import Bare
from mdm.first_stage.exif import orientation
from mdm.sources.record import one_record

# Larger images are refused after reading the header, before their pixels are unpacked.
MAX_PIXELS = 64 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# The first bytes of a format whose header can still be damaged.
_SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG"),
    "GIF": re.compile(rb"GIF8"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
_MAX_ASPECT = 8  # the ends of a longer image are cut off before it is resized

# How to turn the pixels upright, by EXIF's values 2 to 8.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@one_record(reason="damaged image:")
def decode_image(data: bytes, size: int) -> NDArray[np.uint8]:
    """RGB pixels uint8 [3, size, size]: short side resized to `size`, middle cropped.

    The EXIF orientation is applied if it can be read, and transparent pixels are laid over white.
    What the pixels do not need may be damaged. Raises ValueError if the file is empty, not an
    image, truncated or damaged, or has too many pixels.
    """
    # JPEG can be unpacked at a fraction of its size; twice the target keeps all detail.
    rgb = _crop_ends(_decode(data, 2 * size))
    scale = size / min(rgb.size)
    width, height = (max(size, round(side * scale)) for side in rgb.size)
    left, top = (width - size) // 2, (height - size) // 2
    rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    rgb = rgb.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8).transpose(2, 0, 1))


@one_record(reason="damaged image:")
def thumbnail(data: bytes) -> NDArray[np.uint8]:
    """The whole image in 96 bytes: 8 x 8 luma, then 4 x 4 of each chroma, uint8 [96].

    Raises ValueError as `decode_image`.
    """
    small = _decode(data, 64).convert("YCbCr")
    luma, blue, red = (
        part.resize(size, Image.Resampling.BOX)
        for part, size in zip(small.split(), ((8, 8), (4, 4), (4, 4)), strict=True)
    )
    return np.concatenate([np.asarray(part, np.uint8).reshape(-1) for part in (luma, blue, red)])


def _decode(data: bytes, min_size: int) -> Image.Image:
    """RGB, at its own size or, for JPEG, a fraction of it that is at least `min_size` pixels."""
    if not data:
        raise ValueError("empty file")
    try:
        with warnings.catch_warnings(action="ignore"):  # they are about metadata
            return _upright(_bare(data), min_size)
    except UnidentifiedImageError:
        raise ValueError(_describe_unidentified(data)) from None
    except Image.DecompressionBombError:
        raise ValueError(f"too many pixels: more than {MAX_PIXELS}") from None
    except (OSError, SyntaxError) as error:  # the errors of decoders
        kind = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise ValueError(f"{kind} image: {error}") from None


def _bare(data: bytes) -> Bare:
    """The file without what its pixels do not need."""
    if data.startswith(b"\xff\xd8"):
        return bare.jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return png.bare(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return bare.webp(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return bare.gif(data)
    return Bare(data)


def _upright(file: Bare, min_size: int) -> Image.Image:
    image = Image.open(io.BytesIO(file.data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"too many pixels: {width} x {height}, more than {MAX_PIXELS}")
    if min(width, height) < 1:
        raise ValueError(f"image without pixels: {width} x {height}")
    image.draft(None, (min_size, min_size))
    image.load()
    if image.format == "JPEG":
        _check_jpeg(file.data)
    if image.format == "PNG":
        _check_png(file.data, image)
    transpose = _TRANSPOSES.get(orientation(file.exif, file.xmp))
    return _rgb(image if transpose is None else image.transpose(transpose))


def _describe_unidentified(data: bytes) -> str:
    """What the file holds in place of an image."""
    for kind, signature in _SIGNATURES.items():
        if signature.match(data):
            return f"damaged image: begins as a {kind}, but its header cannot be read"
    try:
        with one_record(), Image.open(io.BytesIO(data)) as other:
            return f"an image of another kind: {other.format}; accepted are {', '.join(FORMATS)}"
    except ValueError:
        pass
    if not data.strip(b"\0"):
        return f"not an image: {len(data)} zero bytes"
    line = data[:256].strip().split(b"\n")[0].strip()[:32].decode("ascii", "replace")
    if line.isascii() and line.isprintable() and line:  # an error page, a table, a pointer
        return f"not an image: begins with {line!r}"
    return f"not an image: begins with the bytes {data[:8].hex(' ')}"


def _check_jpeg(data: bytes) -> None:
    """Raise OSError if coded pixels are damaged or missing.

    libjpeg fills damaged or missing pixels with grey and only warns, which PIL ignores. Its other
    warnings (an unknown marker, an odd version) are not about pixels. Zeros that pad the coded
    pixels are no damage if the file is valid without them.
    """
    try:
        _decode_strictly(data)
    except OSError:
        unpadded = bare.without_padding(data)
        if unpadded == data:
            raise
        _decode_strictly(unpadded)


def _decode_strictly(data: bytes) -> None:
    try:
        # An eighth of each side, in grey: everything is read, little is computed.
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise OSError(f"file is truncated: {error}") from None
        if str(error).startswith("Corrupt JPEG data"):
            raise OSError(str(error)) from None


def _check_png(data: bytes, image: Image.Image) -> None:
    """Raise OSError if pixels or the end of the file are missing.

    Missing rows are zero, so only images whose last row is zero, and interlaced ones, are unpacked
    a second time.
    """
    if data[-8:-4] != b"IEND":  # the decoder does not need this chunk
        raise OSError("file is truncated: no end marker")
    width, height = image.size
    last = image.crop((0, height - 1, width, height))
    if "interlace" in image.info or not np.asarray(last).any():
        png.check_pixels(data)


def _crop_ends(image: Image.Image) -> Image.Image:
    """The middle of a very long image: resized as a whole, it would fill the memory."""
    width, height = image.size
    limit = _MAX_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, width - limit) // 2, max(0, height - limit) // 2
    return image.crop((left, top, width - left, height - top))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: PIL would clip them, not scale them
        sixteen = np.asarray(image, dtype=np.int64).clip(0, 0xFFFF)
        return Image.fromarray((sixteen >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(page, image).convert("RGB")
    return image.convert("RGB")
