"""Which way up an image is, from EXIF or XMP that may hold anything."""

import re
import struct
from collections.abc import Iterator

_ORIENTATION = 0x0112
_MOST_ENTRIES = 4096  # that are looked through; a directory may claim 65,535 and lie
# TIFF's types by number: how struct reads one value. Text and raw bytes are no numbers.
_FORMS = {1: "B", 3: "H", 4: "I", 5: "II", 6: "b", 7: "B", 8: "h", 9: "i", 10: "ii"}
_FORMS |= {11: "f", 12: "d", 13: "I"}
_ASCII = 2
_IN_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*[<"']""")


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """1 to 8, as in EXIF's tag 0x0112; 1 where neither block says anything else.

    `exif` is a TIFF structure, with or without `Exif` and two bytes before it. Only the one tag of
    its first directory is read, so that no other tag, offset or later directory matters.
    """
    while exif[:4].lower() == b"exif":
        exif = exif[6:]
    for value in _values(exif):
        if 1 <= value <= 8:
            return value
    found = _IN_XMP.search(xmp)
    return int(found[1]) if found else 1


def _values(tiff: bytes) -> Iterator[int]:
    """What the tag may hold, the likeliest first."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    if at + 2 > len(tiff):
        return
    (entries,) = struct.unpack_from(order + "H", tiff, at)
    there = min(entries, (len(tiff) - at - 2) // 12, _MOST_ENTRIES)
    for entry in range(at + 2, at + 2 + 12 * there, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", tiff, entry)
        if tag == _ORIENTATION:
            yield from _readings(tiff, order, kind, count, entry + 8)


def _readings(tiff: bytes, order: str, kind: int, count: int, field: int) -> Iterator[int]:
    """The value as its type says, then as other types that writers confuse it with."""
    if kind == _ASCII:
        yield from (int(digit) for digit in re.findall(rb"\A\s*([1-8])[\s\0]*", tiff[field:][:4]))
        return
    form = _FORMS.get(kind, "H")
    size = struct.calcsize("=" + form)
    at = field
    if size * max(1, count) > 4:
        (at,) = struct.unpack_from(order + "I", tiff, field)
    if at + size <= len(tiff):
        number, *divisor = struct.unpack_from(order + form, tiff, at)
        if divisor != [0] and number == number:  # no NaN
            value = number / divisor[0] if divisor else number
            if value in range(1, 9):
                yield int(value)
    for other in "HIB":
        yield struct.unpack_from(order + other, tiff, field)[0]
