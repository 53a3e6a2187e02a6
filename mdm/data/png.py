"""PNG files: the damage that Pillow's decoder does not see."""

import struct
import zlib
from collections.abc import Iterator

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


def check_chunks(png: bytes) -> None:
    """OSError where a chunk that the pixels need is damaged, or the last one is not there.

    The decoder compares no checksum of the pixels, and needs no end.
    """
    for kind, at, end in _chunks(png):
        needed = kind[:1].isupper()
        if needed and zlib.crc32(png[at + 4 : end]) != int.from_bytes(png[end : end + 4], "big"):
            raise OSError(f"wrong checksum of its {kind.decode('ascii', 'replace')} at byte {at}")
        if kind == b"IEND":
            return
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
    """Kind of every chunk, where it begins, and where its checksum does."""
    at = 8  # behind the signature
    while (end := at + 8 + int.from_bytes(png[at : at + 4], "big")) + 4 <= len(png):
        yield png[at + 4 : at + 8], at, end
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
