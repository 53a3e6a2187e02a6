"""Images as downloads and tools damage them, and images that are only unusual."""

import gzip
import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

_RANDOM = np.random.default_rng(5)


def noise(width: int = 24, height: int = 20, channels: int = 3) -> Image.Image:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(_RANDOM.integers(0, 255, shape, dtype=np.uint8))


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chunk_of_exif(thumbnail: bytes) -> bytes:
    """A JPEG segment that holds another JPEG."""
    data = b"Exif\0\0" + thumbnail
    return b"\xff\xe1" + (len(data) + 2).to_bytes(2, "big") + data


def png_bomb(width: int, height: int) -> bytes:
    """A small file whose header claims a huge image and whose data unpacks to a large one."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * ((width // 8 + 1) * min(height, 2000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_of_rows(rows: int, *, depth: int = 8, colours: int = 2, adam7: bool = False) -> bytes:
    """A PNG of 9 x 8 pixels with valid checksums, but only `rows` of its 8 rows (Adam7: 15).

    The rows are zeros, so that they look like rows that the decoder leaves out.
    """
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    columns = [9] * 8
    if adam7:  # the columns of every row in the seven passes
        columns = [2, 1, 3, 2, 2, 5, 5, 4, 4, 4, 4, 9, 9, 9, 9]
    raw = b"".join(b"\0" * (1 + -(-width * bits // 8)) for width in columns[:rows])
    head = struct.pack(">IIBBBBB", 9, 8, depth, colours, 0, 0, adam7)
    palette = chunk(b"PLTE", b"\0" * 6) if colours == 3 else b""
    data = zlib.compress(raw)
    parts = (chunk(b"IHDR", head), palette, chunk(b"IDAT", data[:5]), chunk(b"IDAT", data[5:]))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    """A real JPEG whose header claims another size."""
    data = bytearray(saved(noise()))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def flipped(data: bytes, at: float, count: int = 1) -> bytes:
    """`data` with `count` bytes inverted, starting at the fraction `at` of its length."""
    changed = bytearray(data)
    start = int(len(data) * at)
    for i in range(start, start + count):
        changed[i] ^= 0xFF
    return bytes(changed)


def _text_bomb() -> bytes:
    """A PNG whose compressed comment unpacks to 8 MB."""
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"0" * (8 << 20)))
    png = saved(noise(), "PNG")
    return png[:33] + text + png[33:]


def _animated(kind: str) -> bytes:
    return saved(noise(), kind, save_all=True, append_images=[noise(), noise()])


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(noise(), exif=exif)


_JPEG, _PNG = saved(noise(64, 64)), saved(noise(64, 64), "PNG")
_THUMBNAIL = _JPEG[:2] + chunk_of_exif(saved(noise(8, 8))) + _JPEG[2:]
_PROGRESSIVE = saved(noise(64, 64), progressive=True)

# name -> (bytes, expected reason)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "empty file"),
    "html error page": (
        b"<!DOCTYPE html>\n<html><title>404 Not Found</title></html>",
        "not an image: begins with '<!DOCTYPE html>'",
    ),
    "html after white space": (b"\n\n  <html>forbidden</html>", "not an image"),
    "json error": (b'{"error": "rate limited"}', "not an image"),
    "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "not an image"),
    "zeros": (b"\0" * 4096, "not an image: 4096 zero bytes"),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
        "not an image",
    ),
    "gzipped jpeg": (gzip.compress(_JPEG), "not an image"),
    "base64 of a jpeg": (b"data:image/jpeg;base64,/9j/4AAQSkZJRg==", "not an image"),
    "mp4": (b"\0\0\0\x18ftypmp42" + b"\0" * 64, "not an image"),
    "jpeg without its start": (_JPEG[2:], "not an image"),
    "jpeg through a text filter": (_JPEG.decode("latin-1").encode("utf-8"), "not an image"),
    "jpeg signature alone": (b"\xff\xd8\xff", "image: begins as a JPEG"),
    "jpeg headers alone": (_JPEG[: _JPEG.index(b"\xff\xda")], "image"),
    "truncated jpeg": (_JPEG[: len(_JPEG) // 2], "truncated"),
    "truncated progressive jpeg": (_PROGRESSIVE[: len(_PROGRESSIVE) // 3], "truncated"),
    "progressive jpeg without its last scans": (
        _PROGRESSIVE[: int(len(_PROGRESSIVE) * 0.9)],
        "truncated",
    ),
    "jpeg with zeros after the middle": (_JPEG[: len(_JPEG) // 2] + b"\0" * 9000, "truncated"),
    "jpeg with zeros after the middle and a thumbnail": (
        _THUMBNAIL[: len(_THUMBNAIL) // 2] + b"\0" * 9000,
        "truncated",
    ),
    "jpeg that claims 60000 x 60000": (jpeg_of_size(60_000, 60_000), "too many pixels"),
    "jpeg without rows": (jpeg_of_size(24, 0), "image"),
    "png with a bad checksum": (flipped(_PNG, 0.5), "damaged"),
    "png with a bad header": (_PNG[:20] + b"\xff\xff" + _PNG[22:], "damaged|image|pixels"),
    "truncated png": (_PNG[: len(_PNG) // 2], "truncated|damaged"),
    "png without data": (_PNG[:33] + chunk(b"IEND", b""), "truncated|damaged|image"),
    "png with dos line endings": (_PNG.replace(b"\n", b"\r\n"), "not an image|damaged"),
    "png with a wrong checksum of its pixels": (
        _PNG[: _PNG.index(b"IEND") - 8] + b"\0\0\0\0" + _PNG[_PNG.index(b"IEND") - 4 :],
        "damaged image: wrong checksum of its IDAT at byte 33",
    ),
    "png with too few rows": (
        png_of_rows(7),
        "damaged image: 196 bytes of pixels, but its header says 224",
    ),
    "interlaced png with too few rows": (
        png_of_rows(14, adam7=True),
        "damaged image: .* of pixels",
    ),
    "png without its last chunk": (_PNG[: _PNG.index(b"IEND") - 4], "truncated"),
    "sound": (b"RIFF\x24\0\0\0WAVEfmt ", "not an image: begins with the bytes 52 49 46 46"),
    "png bomb": (png_bomb(50_000, 50_000), "too many pixels"),
    "truncated gif": (
        saved(noise(64, 64), "GIF")[:200],
        "truncated|damaged image: begins as a GIF",
    ),
    "truncated webp": (saved(noise(64, 64), "WEBP")[:90], "truncated|damaged|not an image"),
    "truncated bmp": (saved(noise(64, 64), "BMP")[:900], "truncated|damaged"),
    "tiff": (saved(noise(), "TIFF"), "another kind: TIFF"),
    "jpeg 2000": (saved(noise(), "JPEG2000"), "another kind: JPEG2000"),
}

# These are valid and must be kept.
UNUSUAL: dict[str, bytes] = {
    "cmyk jpeg": saved(noise().convert("CMYK")),
    "grey jpeg": saved(noise().convert("L")),
    "progressive jpeg": _PROGRESSIVE,
    "jpeg with a thumbnail": _THUMBNAIL,
    "jpeg with garbage after its end": _JPEG + b"\0" * 100 + b"<html>",
    "png named jpg": _PNG,
    "16 bit png": saved(Image.fromarray(np.full((8, 9), 40_000, np.uint16)), "PNG"),
    "palette png with transparency": saved(noise().convert("P"), "PNG", transparency=0),
    "two colour png": saved(noise().convert("1"), "PNG"),
    "grey png with alpha": saved(noise().convert("LA"), "PNG"),
    "animated gif": _animated("GIF"),
    "animated webp": _animated("WEBP"),
    "animated png": _animated("PNG"),
    "one very long row of pixels": saved(Image.new("L", (60_000, 1)), "PNG"),
    "one pixel": saved(Image.new("RGB", (1, 1)), "PNG"),
    "rotated by exif": _exif(6),
    "exif orientation 99": _exif(99),
    "garbage as exif": _JPEG[:2] + b"\xff\xe1\x00\x10Exif\0\0" + b"\xff" * 8 + _JPEG[2:],
    "png with a bad iccp": _PNG[:33] + chunk(b"iCCP", b"x\0\0" + zlib.compress(b"no")) + _PNG[33:],
    "png text bomb": _text_bomb(),
    "interlaced png": png_of_rows(15, adam7=True),
    "black png": png_of_rows(8),
    "webp": saved(noise(), "WEBP"),
    "bmp": saved(noise(), "BMP"),
    "mpo": saved(noise(), "MPO", save_all=True, append_images=[noise()]),
    "large comment": saved(
        noise(),
        "PNG",
        pnginfo=(lambda i: (i.add_text("c", "x" * 900_000), i)[1])(PngImagePlugin.PngInfo()),
    ),
}
