"""PNG files: what their pixels need, and the damage that Pillow's decoder does not report."""

import re
import struct
import zlib
from collections.abc import Iterator

from mdm.first_stage.bare import Bare

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First column and row of each pass over the pixels, and the steps between them.
_WHOLE = ((0, 0, 1, 1),)
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_PART = 1 << 16  # bytes unpacked at a time
_MAX_TEXT = 1 << 20  # bytes unpacked of a text chunk
_EXIF = (b"eXIf", b"Raw profile type exif", b"Raw profile type APP1")
_XMP = b"XML:com.adobe.xmp"
_NEEDED = re.compile(rb"PLTE|tRNS|IDAT|IEND")


def bare(png: bytes) -> Bare:
    """The chunks that the pixels need, and the blocks with the orientation.

    Of a truncated file, the rest of its last chunk is kept. Raises OSError if a chunk that the
    pixels need is damaged: the decoder does not verify the checksum of the pixels.
    """
    parts, exif, xmp, header = [png[:8]], b"", b"", b""
    end = 4
    for kind, at, end in _chunks(png):
        body = png[at + 8 : end]
        if _is_needed(kind):
            if zlib.crc32(png[at + 4 : end]) != int.from_bytes(png[end : end + 4], "big"):
                name = kind.decode("ascii", "replace")
                raise OSError(f"wrong checksum of its {name} at byte {at}")
            if kind == b"IHDR":
                header = body
            if kind != b"tRNS" or _is_transparency(body, header):
                parts.append(png[at : end + 4])
        else:
            key, text = _text(kind, body)
            if key in _EXIF:
                exif = exif or (body if key == kind else _unhex(text))
            elif key == _XMP:
                xmp = xmp or text
        if kind == b"IEND":
            break
    else:
        parts.append(png[end + 4 :])
    return Bare(b"".join(parts), exif, xmp)


def _is_needed(kind: bytes) -> bool:
    """Whether pixels need the chunk: if its name begins in upper case, or it is transparency."""
    return kind[:1].isupper() or kind == b"tRNS"


def _is_transparency(body: bytes, header: bytes) -> bool:
    """Whether a tRNS chunk has the length that the header's colour type needs."""
    colour_type = header[9] if len(header) > 9 else -1
    if colour_type == 3:
        return 1 <= len(body) <= 256
    return len(body) == {0: 2, 2: 6}.get(colour_type)


def _text(kind: bytes, body: bytes) -> tuple[bytes, bytes]:
    """A text chunk's key and its text, unpacked only for known keys: others may be bombs.

    For other chunks, the chunk's kind and b"".
    """
    if kind not in (b"tEXt", b"zTXt", b"iTXt"):
        return kind, b""
    key, _, text = body.partition(b"\0")
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, rest = text[:1] == b"\1", text[2:]
        text = rest.partition(b"\0")[2].partition(b"\0")[2]
    elif packed:
        text = text[1:]
    if packed and key in (*_EXIF, _XMP):
        try:
            text = zlib.decompressobj().decompress(text, _MAX_TEXT)
        except zlib.error:
            text = b""
    return key, text


def _unhex(text: bytes) -> bytes:
    """The bytes of a raw profile: lines with its name and length, then hexadecimal digits."""
    digits = re.sub(rb"[^0-9a-fA-F]", b"", b"".join(text.split(b"\n")[3:]))
    return bytes.fromhex(digits[: len(digits) // 2 * 2].decode("ascii"))


def check_pixels(png: bytes) -> None:
    """Raise OSError if a PNG with valid chunks holds fewer pixels than its header says.

    The decoder accepts a stream that ends early, and leaves the missing rows black. No more is
    unpacked than the header announces, a part at a time.
    """
    expected = unpacked = 0
    stream = zlib.decompressobj()
    for kind, at, end in _chunks(png):
        if kind == b"IHDR":
            expected = _unpacked_bytes(png[at + 8 : end])
        packed = png[at + 8 : end] if kind == b"IDAT" and not stream.eof else b""
        while unpacked < expected and (part := stream.decompress(packed, _PART)):
            unpacked += len(part)
            packed = stream.unconsumed_tail
    if unpacked < expected:
        raise OSError(f"{unpacked} bytes of pixels, but its header says {expected}")


def _chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, start of the checksum) of every chunk.

    A chunk that the pixels do not need, and whose length does not lead to another chunk, ends where
    the next needed one starts.
    """
    at = 8  # after the signature
    while at + 12 <= len(png):
        kind, end = png[at + 4 : at + 8], at + 8 + int.from_bytes(png[at : at + 4], "big")
        follows = png[end + 8 : end + 12]
        if not _is_needed(kind) and not (len(follows) == 4 and follows.isalpha()):
            match = _NEEDED.search(png, at + 8)
            end = match.start() - 8 if match else len(png)
        if end + 4 > len(png):
            return
        yield kind, at, end
        at = end + 4


def _unpacked_bytes(header: bytes) -> int:
    """Bytes of all rows, each with a filter byte before it."""
    width, height, depth, colour_type, _, _, interlaced = struct.unpack_from(">IIBBBBB", header)
    bits = depth * _CHANNELS[colour_type]
    total = 0
    for column, row, across, down in _ADAM7 if interlaced else _WHOLE:
        columns = len(range(column, width, across))
        rows = len(range(row, height, down))
        total += rows * (1 + -(-columns * bits // 8)) if columns else 0
    return total
