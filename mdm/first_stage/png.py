"""PNG files: what their pixels need, and the damage that Pillow's decoder does not see."""

import re
import struct
import zlib
from collections.abc import Iterator

from mdm.first_stage.bare import Bare

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# Of Adam7's passes: first column and row, and the steps between them.
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
_PIECE = 1 << 16  # bytes unpacked at a time
_LONGEST_TEXT = 1 << 20  # bytes unpacked of a chunk of text
_EXIF = (b"eXIf", b"Raw profile type exif", b"Raw profile type APP1")
_XMP = b"XML:com.adobe.xmp"
_NEEDED = re.compile(rb"PLTE|tRNS|IDAT|IEND")


def bare(png: bytes) -> Bare:
    """The chunks that the pixels need, and what tells the orientation.

    A file that breaks off comes with what is there of its last chunk. OSError where a chunk that
    the pixels need is damaged: the decoder compares no checksum of the pixels.
    """
    parts, exif, xmp, header = [png[:8]], b"", b"", b""
    end = 4
    for kind, at, end in _chunks(png):
        body = png[at + 8 : end]
        if _is_needed(kind):
            if not _is_sound(png, at, end):
                name = kind.decode("ascii", "replace")
                raise OSError(f"wrong checksum of its {name} at byte {at}")
            if kind == b"IHDR":
                header = body
            if kind != b"tRNS" or _fits(body, header):
                parts.append(png[at : end + 4])
        else:
            key, text = _named(kind, body)
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
    """Chunks of upper case are, and the one that makes pixels transparent."""
    return kind[:1].isupper() or kind == b"tRNS"


def _is_sound(png: bytes, at: int, end: int) -> bool:
    return zlib.crc32(png[at + 4 : end]) == int.from_bytes(png[end : end + 4], "big")


def _fits(transparent: bytes, header: bytes) -> bool:
    """Whether a tRNS chunk is as long as the colours of this header ask for."""
    colours = header[9] if len(header) > 9 else -1
    if colours == 3:
        return 1 <= len(transparent) <= 256
    return len(transparent) == {0: 2, 2: 6}.get(colours)


def _named(kind: bytes, body: bytes) -> tuple[bytes, bytes]:
    """A text chunk's key, and of the keys that matter its text: of others it may be a bomb.

    Of other chunks their kind.
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
            text = zlib.decompressobj().decompress(text, _LONGEST_TEXT)
        except zlib.error:
            text = b""
    return key, text


def _unhex(text: bytes) -> bytes:
    """Bytes of a raw profile: a line each of its name and length, then hexadecimal digits."""
    digits = re.sub(rb"[^0-9a-fA-F]", b"", b"".join(text.split(b"\n")[3:]))
    return bytes.fromhex(digits[: len(digits) // 2 * 2].decode("ascii"))


def check_end(png: bytes) -> None:
    """OSError where the last chunk is not there, which the decoder does not need; png is bare."""
    if png[-8:-4] != b"IEND":
        raise OSError("file is truncated: no end marker")


def check_pixels(png: bytes) -> None:
    """OSError where the compressed pixels are fewer than the header says; chunks are sound.

    The decoder takes a stream that ends early for whole, and leaves the missing rows black. No more
    is unpacked than the header asks for, a piece at a time.
    """
    wanted = found = 0
    stream = zlib.decompressobj()
    for kind, at, end in _chunks(png):
        if kind == b"IHDR":
            wanted = _unpacked_bytes(png[at + 8 : end])
        packed = png[at + 8 : end] if kind == b"IDAT" and not stream.eof else b""
        while found < wanted and (piece := stream.decompress(packed, _PIECE)):
            found += len(piece)
            packed = stream.unconsumed_tail
    if found < wanted:
        raise OSError(f"{found} bytes of pixels, but its header says {wanted}")


def _chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind of every chunk, where it begins, and where its checksum does.

    A chunk that the pixels do not need, and whose length does not lead to another, ends where the
    next needed one begins.
    """
    at = 8  # behind the signature
    while at + 12 <= len(png):
        kind, end = png[at + 4 : at + 8], at + 8 + int.from_bytes(png[at : at + 4], "big")
        follows = png[end + 8 : end + 12]
        if not _is_needed(kind) and not (len(follows) == 4 and follows.isalpha()):
            ahead = _NEEDED.search(png, at + 8)
            end = ahead.start() - 8 if ahead else len(png)
        if end + 4 > len(png):
            return
        yield kind, at, end
        at = end + 4


def _unpacked_bytes(header: bytes) -> int:
    """Bytes of all rows, each with the filter byte in front of it."""
    width, height, depth, colours, _, _, interlaced = struct.unpack_from(">IIBBBBB", header)
    bits = depth * _CHANNELS[colours]
    total = 0
    for column, row, across, down in _ADAM7 if interlaced else _WHOLE:
        columns = len(range(column, width, across))
        rows = len(range(row, height, down))
        total += rows * (1 + -(-columns * bits // 8)) if columns else 0
    return total
