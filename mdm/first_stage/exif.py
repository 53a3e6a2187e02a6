"""The orientation of an image, from EXIF or XMP blocks that may hold anything."""

import re
import struct
from collections.abc import Iterator

_ORIENTATION = 0x0112
_MAX_ENTRIES = 4096  # entries read; a directory may claim 65,535 and lie
# struct's format of one value, by TIFF type. Text (2) and raw bytes are no numbers.
_FORMATS = {1: "B", 3: "H", 4: "I", 5: "II", 6: "b", 7: "B", 8: "h", 9: "i", 10: "ii"}
_FORMATS |= {11: "f", 12: "d", 13: "I"}
_ASCII = 2
_IN_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*[<"']""")


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """1 to 8, as in EXIF's tag 0x0112; 1 if neither block gives a valid one.

    `exif` is a TIFF structure, with or without `Exif` and two bytes before it. Only this tag of its
    first directory is read, so that no other tag, offset or later directory matters.
    """
    while exif[:4].lower() == b"exif":
        exif = exif[6:]
    for value in _values(exif):
        if 1 <= value <= 8:
            return value
    match = _IN_XMP.search(xmp)
    return int(match[1]) if match else 1


def _values(tiff: bytes) -> Iterator[int]:
    """The possible values of the tag, the likeliest first."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    if at + 2 > len(tiff):
        return
    (entries,) = struct.unpack_from(order + "H", tiff, at)
    entries = min(entries, (len(tiff) - at - 2) // 12, _MAX_ENTRIES)
    for entry in range(at + 2, at + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", tiff, entry)
        if tag == _ORIENTATION:
            yield from _readings(tiff, order, kind, count, entry + 8)


def _readings(tiff: bytes, order: str, kind: int, count: int, field: int) -> Iterator[int]:
    """The value read as its type says, then as other types that writers confuse it with."""
    if kind == _ASCII:
        yield from (int(digit) for digit in re.findall(rb"\A\s*([1-8])[\s\0]*", tiff[field:][:4]))
        return
    layout = _FORMATS.get(kind, "H")
    at, size = field, struct.calcsize("=" + layout)
    if size * max(1, count) > 4:
        (at,) = struct.unpack_from(order + "I", tiff, field)
    if at + size <= len(tiff):
        number, *divisor = struct.unpack_from(order + layout, tiff, at)
        if divisor != [0] and (value := number / (divisor or [1])[0]) in range(1, 9):
            yield int(value)
    for other in "HIB":
        yield struct.unpack_from(order + other, tiff, field)[0]
