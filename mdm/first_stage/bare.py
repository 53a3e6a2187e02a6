"""JPEG, WebP and GIF files reduced to what their pixels need, so that all else may be damaged.

Profiles, EXIF, thumbnails, comments and stray bytes cannot make an image bad, because no decoder
sees them. Bytes within coded pixels are kept as they are: only the decoder can tell whether they
are damaged. PNG is in `png.py`.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Bare:
    """An image file without what its pixels do not need, and the blocks with its orientation."""

    data: bytes
    exif: bytes = b""
    xmp: bytes = b""


# ---- JPEG

_MARKER = re.compile(rb"\xff[^\x00\xff]")
_SOI, _EOI, _SOS, _DHT, _DQT, _DRI = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xDD
_ALONE = {*range(0x01, 0xC0), *range(0xD0, 0xDA)}  # markers without a segment
_NEEDED = {*range(0xC0, 0xD0), *range(0xDA, 0xE0)}
_FRAMES = {*range(0xC0, 0xD0)} - {_DHT, 0xC8, 0xCC}
# A marker of a needed segment or of a thumbnail, or an application's segment with a known name.
_NEXT = re.compile(
    rb"\xff(?:[\xc0-\xcf\xd8\xda\xdb\xdd]"
    rb"|[\xe0-\xef]..(?:JFIF|JFXX|Exif|http|ICC_|MPF|Photoshop|Adobe))",
    re.DOTALL,
)
_MAX_BROKEN = 100  # segments of a wrong length after which the next one is searched for
_REACH = 1 << 17  # bytes searched for the next segment; a segment has at most half as many
_EXIF, _XMP = b"Exif\0", b"http://ns.adobe.com/xap/1.0/\0"


def jpeg(data: bytes) -> Bare:
    """The tables, the frame and the two segments with the colour space; all from the first scan on.

    After the first scan starts, apparent stray bytes or markers may be damaged pixels.
    """
    parts, exif, xmp = [b"\xff\xd8"], b"", b""
    at, broken = 2, 0
    while marker := _MARKER.search(data, at):
        code, start = data[marker.end() - 1], marker.end()
        at = end = start + int.from_bytes(data[start : start + 2], "big")
        if code == _SOS:
            parts.append(data[marker.start() :])
            break
        if code in _ALONE:
            at = start
            if code == _SOI and start != 4:  # of a thumbnail, in a segment of a wrong length
                parts.append(b"\xff\xd8")
        elif code in _NEEDED:
            parts.append(bytes((0xFF, code)) + data[start : max(end, start + 2)])
        else:
            if end < start + 2 or data[end : end + 1] != b"\xff":
                broken += 1
                at = max(end, start)
                if broken <= _MAX_BROKEN:
                    at = _next_segment(data, start, at)
            body = data[start + 2 : end]
            parts.append(_colour_segment(code, body))
            if code == 0xE1 and body.startswith(_EXIF):
                # A long block spans several segments; one without the TIFF header is replaced.
                exif = exif + body[6:] if exif[:2] in (b"II", b"MM") else body[6:]
            elif code == 0xE1 and body.startswith(_XMP):
                xmp = xmp or body[len(_XMP) :]
    return Bare(b"".join(parts), exif, xmp)


def without_padding(bare_jpeg: bytes) -> bytes:
    """The file without zeros between its coded pixels and the next marker.

    Coded pixels may end in zeros too: without these they are too short, and the decoder reports it.
    """
    parts: list[bytes] = []
    at = 0
    while marker := _MARKER.search(bare_jpeg, at):
        code, start, end = bare_jpeg[marker.end() - 1], marker.start(), marker.end()
        coded = bare_jpeg[at:start]
        kept = coded.rstrip(b"\0")
        if kept != coded and kept.endswith(b"\xff"):
            kept += b"\0"  # together they are a coded 255
        parts.append(kept)
        if code == _EOI:
            at = start
            break
        if code not in _ALONE:
            end += int.from_bytes(bare_jpeg[end : end + 2], "big")
        parts.append(bare_jpeg[start:end])
        at = end
    return b"".join((*parts, bare_jpeg[at:]))


def _colour_segment(code: int, body: bytes) -> bytes:
    """The segment, if it is one of the two that define the colour space; else b""."""
    if code == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14:
        return b"\xff\xe0\0\x10" + body[:12] + b"\0\0"  # without its thumbnail
    if code == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
        return b"\xff\xee\0\x0e" + body[:12]
    return b""


def _next_segment(data: bytes, start: int, end: int) -> int:
    """Where to continue after a segment whose length does not lead to a marker.

    Either junk follows it or its length is wrong, so the next valid segment is searched for. The
    segments of a thumbnail do not count: it is skipped from its first marker to its last.
    """
    for match in _NEXT.finditer(data, start, start + _REACH):
        at = match.start()
        if data[at + 1] == _SOI:
            after = data.find(b"\xff\xd9", at) + 2
            return end if at < after <= end <= len(data) else max(after, start)
        if _is_segment(data, at + 1):
            return at
    return end


def _is_segment(data: bytes, at: int) -> bool:
    """Whether the marker's code at `at` starts a segment whose contents fit its kind."""
    code, length = data[at], int.from_bytes(data[at + 1 : at + 3], "big")
    body = data[at + 3 : at + 1 + length]
    if len(body) < 1 or len(body) != length - 2:
        return False
    if code == _SOS:
        return 1 <= body[0] <= 4 and length == 6 + 2 * body[0]
    if code in _FRAMES:
        return length > 8 and length == 8 + 3 * body[5]
    if code == _DRI:
        return length == 4
    if code not in (_DQT, _DHT):
        return code >= 0xE0
    at = 0  # tables, one after another
    while at < len(body):
        if code == _DQT:
            at += 129 if body[at] >> 4 else 65
        else:
            at += 17 + sum(body[at + 1 : at + 17])
    return at == len(body)


# ---- WebP

_WEBP_NEEDED = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_WEBP_OTHERS = (b"ICCP", b"EXIF", b"XMP ")
_WEBP_NEXT = re.compile(rb"VP8[ L]|ALPH|ANIM|ANMF")


def webp(data: bytes) -> Bare:
    """The chunks of the image, with a header that announces no others.

    A file that lacks coded pixels is returned unchanged, for the decoder to report.
    """
    parts: list[bytes] = []
    others: dict[bytes, bytes] = {}
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        body = data[at + 8 : at + 8 + size]
        if kind in _WEBP_NEEDED:
            if len(body) < size:
                return Bare(data)
            if kind == b"VP8X" and body:
                body = bytes((body[0] & 0b11010011,)) + body[1:]  # no profile, EXIF, XMP
            parts.append(data[at : at + 8] + body + b"\0" * (size % 2))
        else:
            others.setdefault(kind, body)
            known = (b"", *_WEBP_NEEDED, *_WEBP_OTHERS)
            if end > len(data) or data[end : end + 4] not in known:
                if not (match := _WEBP_NEXT.search(data, at + 8)):
                    break
                end = match.start()
        at = end
    image = b"WEBP" + b"".join(parts)
    riff = b"RIFF" + len(image).to_bytes(4, "little") + image
    return Bare(riff, others.get(b"EXIF", b""), others.get(b"XMP ", b""))


# ---- GIF


def gif(data: bytes) -> Bare:
    """The first frame, with the extension that names its transparent colour.

    A file in which it does not end is returned unchanged, for the decoder to report.
    """
    at = head = _skip_colours(data, 10, 13)
    control = b""
    while at < len(data):
        mark, start = data[at], at
        if mark == 0x21:  # an extension
            at = _skip_blocks(data, at + 2)
            if data[start + 1 : start + 3] == b"\xf9\x04":
                control = data[start : start + 7] + b"\0"
        elif mark == 0x2C:  # a frame: its header, its colours, the code size, then blocks
            at = _skip_blocks(data, _skip_colours(data, start + 9, start + 10) + 1)
            if at > len(data):
                break
            return Bare(data[:head] + control + data[start:at] + b"\x3b")
        elif mark == 0x3B:
            break
        else:
            at += 1
    return Bare(data)


def _skip_colours(data: bytes, flags: int, at: int) -> int:
    """The end of the colour table at `at`, if the byte at `flags` announces one."""
    if flags < len(data) and data[flags] & 0x80:
        at += 3 << (data[flags] & 7) + 1
    return at


def _skip_blocks(data: bytes, at: int) -> int:
    """The end of the blocks at `at` and of the empty one that ends them, which may be missing."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1
