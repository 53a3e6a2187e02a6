"""Image bytes -> pixels, strict about what it refuses."""

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

# Larger images are refused by their header, before their pixels are unpacked.
MAX_PIXELS = 64 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# Of the first twelve bytes.
_SIGNATURES = {
    re.compile(rb"\xff\xd8\xff.*", re.DOTALL): "JPEG",
    re.compile(rb"\x89PNG.*", re.DOTALL): "PNG",
    re.compile(rb"GIF8.*", re.DOTALL): "GIF",
    re.compile(rb"RIFF....WEBP", re.DOTALL): "WEBP",
}
_LONGEST = 8  # sides of an image whose ends are cut off before it is resized

# Of EXIF's values 2 to 8: how to turn the pixels upright.
_TURNS = {
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

    The EXIF orientation is applied, transparency lies over white. ValueError says why an image is
    refused: empty, not an image, truncated, damaged, or of too many pixels. What the pixels do not
    need may be damaged, and the orientation is read where it can be.
    """
    # JPEG can be unpacked at a fraction of its size; twice the target keeps all detail.
    rgb = _decoded(data, 2 * size)
    rgb = _middle(rgb)
    scale = size / min(rgb.size)
    width, height = (max(size, round(side * scale)) for side in rgb.size)
    left, top = (width - size) // 2, (height - size) // 2
    rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    rgb = rgb.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8).transpose(2, 0, 1))


@one_record(reason="damaged image:")
def thumbnail(data: bytes) -> NDArray[np.uint8]:
    """The whole image in 96 bytes: 8 x 8 luma, then 4 x 4 of each chroma; errors as above."""
    small = _decoded(data, 64).convert("YCbCr")
    luma, blue, red = (
        part.resize(size, Image.Resampling.BOX)
        for part, size in zip(small.split(), ((8, 8), (4, 4), (4, 4)), strict=True)
    )
    return np.concatenate([np.asarray(part, np.uint8).reshape(-1) for part in (luma, blue, red)])


def _decoded(data: bytes, least: int) -> Image.Image:
    """RGB, at its own size or, for JPEG, a fraction of it that is at least `least` pixels."""
    if not data:
        raise ValueError("empty file")
    try:
        with warnings.catch_warnings(action="ignore"):  # they are of what is beside the pixels
            return _upright(_bare(data), least)
    except UnidentifiedImageError:
        raise ValueError(_unidentified(data)) from None
    except Image.DecompressionBombError:
        raise ValueError(f"too many pixels: more than {MAX_PIXELS}") from None
    except (OSError, SyntaxError) as error:  # what decoders say
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


def _upright(file: Bare, least: int) -> Image.Image:
    image = Image.open(io.BytesIO(file.data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"too many pixels: {width} x {height}, more than {MAX_PIXELS}")
    if min(width, height) < 1:
        raise ValueError(f"image of no pixels: {width} x {height}")
    image.draft(None, (least, least))
    image.load()
    if image.format == "JPEG":
        _check_jpeg(file.data)
    if image.format == "PNG":
        _check_png(file.data, image)
    turn = _TURNS.get(orientation(file.exif, file.xmp))
    return _rgb(image if turn is None else image.transpose(turn))


def _unidentified(data: bytes) -> str:
    """What stands in the place of an image."""
    for signature, kind in _SIGNATURES.items():
        if signature.fullmatch(data[:12]):
            return f"damaged image: begins as a {kind}, but its header cannot be read"
    try:
        with one_record(), Image.open(io.BytesIO(data)) as other:
            return f"an image of another kind: {other.format}; read are {', '.join(FORMATS)}"
    except ValueError:
        pass
    if not data.strip(b"\0"):
        return f"not an image: {len(data)} zero bytes"
    line = data[:256].strip().split(b"\n")[0].strip()[:32].decode("ascii", "replace")
    if line.isascii() and line.isprintable() and line:  # an error page, a table, a pointer
        return f"not an image: begins with {line!r}"
    return f"not an image: begins with the bytes {data[:8].hex(' ')}"


def _check_jpeg(data: bytes) -> None:
    """OSError where the decoder lost its way among the pixels.

    libjpeg fills what is damaged or missing in grey and only warns, which PIL does not hear. Its
    other warnings (an unknown marker, an odd version) are not of the pixels. Zeros that pad the
    coded pixels are none of them: what is sound without them is sound.
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
        # An eighth of each side and grey: all that is coded is read, little is computed.
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise OSError(f"file is truncated: {error}") from None
        if str(error).startswith("Corrupt JPEG data"):
            raise OSError(str(error)) from None


def _check_png(data: bytes, image: Image.Image) -> None:
    """OSError where pixels are missing, or the end.

    Rows that are not there stay zero: to unpack the pixels once more is for images whose last row
    is, and for interlaced ones.
    """
    png.check_end(data)
    width, height = image.size
    last = image.crop((0, height - 1, width, height))
    if "interlace" in image.info or not np.asarray(last).any():
        png.check_pixels(data)


def _middle(image: Image.Image) -> Image.Image:
    """The middle of an image that is much longer than wide: resized whole, it fills the memory."""
    width, height = image.size
    longest = _LONGEST * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
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
