"""Hostile records: pixels and texts among metadata that may hold anything.

Which images are damaged and which annotations are usable is known by construction. A valid image
comes with a clean copy of its pixels.
"""

import io
import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from tests.unit.sources.damage import chunk, png_of_rows, saved

# What turns an image upright, for EXIF's orientations 1 to 8.
TRANSPOSES = [None, *(Image.Transpose(n) for n in (0, 3, 1, 5, 4, 6, 2))]


@dataclass(frozen=True)
class Hostile:
    """An image file; `clean` is a PNG of its upright pixels, or None if they are damaged."""

    name: str
    data: bytes
    clean: bytes | None


def noise(random: Random, width: int = 40, height: int = 28) -> Image.Image:
    pixels = np.frombuffer(random.randbytes(width * height * 3), np.uint8)
    return Image.fromarray(pixels.reshape(height, width, 3))


def upright(data: bytes, value: int) -> bytes:
    """A clean PNG of a file without metadata, turned upright by plain Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    transpose = TRANSPOSES[value - 1]
    return saved(image if transpose is None else image.transpose(transpose), "PNG")


# ---- EXIF

# EXIF's types whose values fit in the field, as `struct` spells them.
FORMS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f", 13: "I"}
TAGS = (0x10E, 0x10F, 0x11A, 0x128, 0x132, 0x201, 0x202, 0x2BC, 0x8769, 0x8825, 0xA005, 0x927C)
TYPES = (*range(14), 255, 0xFFFF)
COUNTS = (0, 1, 2, 5, 38, 1000, 0xFFFFFFFF)
OFFSETS = (0, 1, 8, 26, 60, 1 << 16, 0xFFFFFFFF)  # of values; the directory is at 8


def exif(random: Random, value: int) -> tuple[bytes, int]:
    """A TIFF block of odd tags, and the orientation that it gives (1 if it gives none)."""
    order = random.choice("<>")
    rows = [
        struct.pack(order + "HHII", *map(random.choice, (TAGS, TYPES, COUNTS, OFFSETS)))
        for _ in range(random.randrange(6))
    ]
    orientation = value
    draw = random.randrange(10)
    if draw < 7:
        form = order + FORMS[kind := random.choice((3, *FORMS))]
        field = struct.pack(form, value).ljust(4, b"\0")
        rows.append(struct.pack(order + "HHI", 0x112, kind, 1) + field)
    elif draw == 7:  # a fraction after the directory
        at = 8 + 2 + 12 * (len(rows) + 1) + 4
        rows.append(struct.pack(order + "HHII", 0x112, 5, 1, at))
    else:
        rows.append(struct.pack(order + "HHII", 0x112, random.choice(TYPES), 1, 0xFFFFFFFF))
        orientation = 1
    random.shuffle(rows)
    entries = len(rows) + random.choice((0, 0, 7, 3000))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    after = random.choice((0, 8, 0xFFFFFFFF))  # the next directory: none, this one, beyond the end
    tiff = head + struct.pack(order + "H", entries) + b"".join(rows)
    tiff += struct.pack(order + "I", after) + struct.pack(order + "II", value, 1)
    return tiff, orientation


def no_exif(random: Random) -> bytes:
    """An EXIF block without a readable directory."""
    junk = random.randbytes(random.randrange(40))
    return random.choice(
        [junk, b"II*\0", b"MM\0*\xff\xff\xff\xff" + junk, b"II*\0\4\0\0\0", b"\0" * 40, b"Exif\0\0"]
    )


# ---- JPEG


def segment(code: int, body: bytes, length: int | None = None) -> bytes:
    size = len(body) + 2 if length is None else length
    return bytes((0xFF, code)) + struct.pack(">H", size & 0xFFFF) + body


def jpeg_segments(random: Random) -> bytes:
    """A segment that may confuse a decoder, although no pixel depends on it."""
    junk = random.randbytes(random.randrange(1, 30))
    profile = b"ICC_PROFILE\0" + bytes((random.randrange(4), random.randrange(4)))
    thumbnail = saved(noise(random, 8, 8))
    entries = (0xB001, 4, 1, 9, 0xB002, 7, 48, 50, 0)
    mpf = b"MPF\0" + struct.pack("<4sIHHHIIHHIII", b"II*\0", 8, 2, *entries)
    plain = junk.replace(b"\xff", b"\0")
    return random.choice(
        [
            segment(0xE2, profile + junk),
            segment(0xE2, profile + random.randbytes(9000)),
            segment(0xE2, b"ICC_PROFILE\0"),
            segment(0xE2, profile + plain, 400),  # claims more bytes than it has
            segment(0xE2, profile + plain + b"\0" * 60, 20),  # claims fewer
            segment(0xE2, mpf + junk),
            segment(0xE2, b"MPF\0" + junk),
            segment(0xE2, b"FPXR\0" + junk),
            segment(0xE0, b"JFIF\0" + junk[:3]),
            segment(0xE0, b"JFXX\0\x10" + thumbnail),
            segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta" + junk),
            segment(0xE1, b"Exif\0\0" + thumbnail),
            segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + junk),
            segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\2ab"),
            segment(0xEE, b"Adobe"),
            segment(0xEE, b"Adobe\0d"),
            segment(0xFE, junk),
            segment(0xFE, b""),
            segment(0xF0 + random.randrange(14), junk),
            bytes((0xFF, random.choice((0x01, 0x02, 0xBF, *range(0xD0, 0xD8), 0xD9)))),
            b"\0" * random.randrange(1, 9),
            plain,
            b"\xff" * random.randrange(1, 5),
            b"\xff\0",
        ]
    )


def header_marks(jpeg: bytes) -> list[int]:
    """The positions of segments, up to the first scan."""
    at, positions = 2, []
    while jpeg[at + 1] != 0xDA:
        positions.append(at)
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return [*positions, at]


def jpeg(random: Random, value: int) -> tuple[bytes, bytes, int]:
    """(file, file without metadata, orientation), like the functions of other formats below."""
    options = ({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 2})
    mode = random.choice(("RGB", "RGB", "L", "CMYK"))
    plain = saved(noise(random).convert(mode), "JPEG", **random.choice(options))
    marks = header_marks(plain)
    inserted: list[tuple[int, bytes]] = []
    orientation = 1
    if random.random() < 0.7:
        block, orientation = exif(random, value)
        inserted.append((random.choice(marks[:2]), segment(0xE1, b"Exif\0\0" + block)))
    elif random.random() < 0.5:
        inserted.append((marks[1], segment(0xE1, b"Exif\0\0" + no_exif(random))))
    inserted += [
        (random.choice(marks[1:]), jpeg_segments(random)) for _ in range(random.randrange(4))
    ]
    data = plain
    for at, part in sorted(inserted, key=lambda pair: pair[0], reverse=True):
        data = data[:at] + part + data[at:]
    tail = random.choice((b"", b"\0" * 40, b"<html>", plain, random.randbytes(64)))
    return data + tail, plain, orientation


# ---- PNG


BOMB = zlib.compress(b"0" * (80 << 20))


def png_chunks(random: Random) -> bytes:
    junk = random.randbytes(random.randrange(1, 30))
    kind = random.choice((b"tIME", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"hIST"))
    odd = chunk(random.choice((b"prIV", b"abCd", b"vpAg", b"acTL", b"fcTL", b"fdAT", kind)), junk)
    return random.choice(
        [
            odd,
            odd,
            chunk(kind, b""),
            odd[:-1] + bytes((odd[-1] ^ 1,)),  # a wrong checksum
            chunk(b"iCCP", b"x\0\0" + junk),
            chunk(b"iCCP", b"x\0\0" + BOMB),
            chunk(b"iCCP", junk),
            chunk(b"zTXt", b"Comment\0\0" + BOMB),
            chunk(b"zTXt", b"Comment\0\7" + junk),
            chunk(b"zTXt", b"Raw profile type exif\0\0" + junk),
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + junk),
            chunk(b"iTXt", b"Title\0\0\0xx\0\xff\xfe\0" + junk),
            chunk(b"tEXt", b"no end of the key"),
            chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\nzz-" + junk),
            chunk(b"tEXt", b"\0"),
            chunk(b"eXIf", b""),
        ]
    )


def png(random: Random, value: int) -> tuple[bytes, bytes, int]:
    mode = random.choice(("RGB", "RGB", "L", "RGBA", "P", "1"))
    image = noise(random).convert(mode if mode != "RGBA" else "RGB")
    if mode == "RGBA":
        image.putalpha(255)
    plain = saved(image, "PNG")
    orientation, parts = 1, [png_chunks(random) for _ in range(random.randrange(4))]
    if random.random() < 0.7:
        block, orientation = exif(random, value)
        text = b"\nexif\n%8d\n%s\n" % (len(block) + 6, (b"Exif\0\0" + block).hex().encode())
        key = b"Raw profile type exif\0"
        parts.insert(
            0,
            random.choice(
                [
                    chunk(b"eXIf", block),
                    chunk(b"eXIf", b"Exif\0\0" + block),
                    chunk(b"tEXt", key + text),
                    chunk(b"zTXt", key + b"\0" + zlib.compress(text)),
                    chunk(b"iTXt", key + b"\1\0\0\0" + zlib.compress(text)),
                ]
            ),
        )
    at = random.choice((33, plain.index(b"IEND") - 4))
    tail = random.choice((b"", b"\0" * 40, random.randbytes(64)))
    return plain[:at] + b"".join(parts) + plain[at:] + tail, plain, orientation


# ---- WebP, GIF, BMP


def webp(random: Random, value: int) -> tuple[bytes, bytes, int]:
    image = noise(random)
    options: dict[str, object] = random.choice(({"lossless": True}, {"quality": 80}))
    plain = saved(image, "WEBP", **options)
    more: dict[str, object] = {}
    orientation = 1
    if random.random() < 0.7:
        more["exif"], orientation = exif(random, value)
        if random.random() < 0.5:
            more["exif"] = b"Exif\0\0" + more["exif"]  # type: ignore[operator]
    if random.random() < 0.5:
        more["xmp"] = random.randbytes(21)
    if random.random() < 0.5:
        more["icc_profile"] = random.randbytes(34)
    data = saved(image, "WEBP", **options, **more)
    tail = random.choice((b"", b"\0" * 40, b"XMP \xff\xff\xff\x7fxx", b"abcd\4\0\0\0wxyz"))
    if random.random() < 0.3:
        data = data[:4] + struct.pack("<I", len(data) + 99) + data[8:]  # a wrong file size
    return data + tail, plain, orientation


def gif(random: Random, value: int) -> tuple[bytes, bytes, int]:
    plain = saved(noise(random), "GIF")
    at = 13 + (3 << (plain[10] & 7) + 1)
    junk = random.randbytes(random.randrange(1, 30))
    odd = [
        b"!\xfe" + bytes((len(junk),)) + junk + b"\0",
        b"!\xfe\0",
        b"!\xff\x0bNETSCAPE2.0\1\1\0",
        b"!\xff\x0bNETSCAPE2.0\0",
        b"!\xff\x0bXMP DataXMP" + bytes((len(junk),)) + junk + b"\0",
        b"!\xff\3abc\0",
        b"!\x01\2ab\0",
        b"!\xf9\1\0\0",
        b"\0\0",
    ]
    return plain[:at] + b"".join(random.sample(odd, 3)) + plain[at:] + junk, plain, 1


def bmp(random: Random, value: int) -> tuple[bytes, bytes, int]:
    plain = saved(noise(random), "BMP")
    size = plain[:2] + struct.pack("<I", random.choice((0, 7, 0xFFFFFFFF))) + plain[6:]
    return size + random.randbytes(33), plain, 1


# ---- damage


def damaged(random: Random, kind: str, data: bytes, plain: bytes) -> bytes:
    """`data` with pixels that are certainly damaged, whatever its metadata."""
    if kind == "jpeg":
        at = data.index(plain[header_marks(plain)[-1] :][:16])
        end = at + len(plain) - header_marks(plain)[-1]
        if random.random() < 0.5:
            return data[: random.randrange(at + 20, end - 20)]
        third = (end - at) // 3
        return data[: at + third] + random.randbytes(third) + data[at + 2 * third :]
    if kind == "png":
        at = data.index(b"IDAT")
        if random.random() < 0.3:
            return png_of_rows(random.randrange(7))
        if random.random() < 0.5:
            return data[: random.randrange(at + 8, data.index(b"IEND", at) - 8)]
        size = int.from_bytes(data[at - 4 : at], "big")
        place = random.randrange(at + 4, at + 8 + size)
        return data[:place] + bytes((data[place] ^ 0x55,)) + data[place + 1 :]
    if kind == "webp":
        at = data.index(b"VP8", data.find(b"VP8X") + 1)
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        return data[: at + 8 + random.randrange(size // 2)]
    return data[: len(plain) // 3]


KINDS: dict[str, Callable[[Random, int], tuple[bytes, bytes, int]]] = {
    "jpeg": jpeg,
    "png": png,
    "webp": webp,
    "gif": gif,
    "bmp": bmp,
}


def images(count: int, seed: int = 0) -> Iterator[Hostile]:
    """Files of all formats, mostly JPEG; one in ten is damaged."""
    random = Random(f"hostile {seed}")
    kinds = ("jpeg", "jpeg", "jpeg", "png", "png", "webp", "gif", "bmp")
    for number, kind in zip(range(count), itertools.cycle(kinds)):
        data, plain, orientation = KINDS[kind](random, random.randrange(1, 9))
        broken = random.random() < 0.1
        if broken:
            data = damaged(random, kind, data, plain)
        yield Hostile(f"{number:05d}_{kind}", data, None if broken else upright(plain, orientation))


# ---- annotations

DEEP = "[" * 100_000 + "]" * 100_000
VALUES = {
    "null": "null",
    "true": "true",
    "fraction": "1.5",
    "large": str(10**30),
    "huge": "9" * 5000,
    "nan": "NaN",
    "infinity": "-Infinity",
    "empty": '""',
    "blank": '" \\t"',
    "half a pair": '"a \\ud83d b"',
    "control": '"a \\u0001 b"',
    "list": '["a", ["b"]]',
    "nested": "[" * 40 + "]" * 40,
    "deep": DEEP,
    "object": '{"caption": "x"}',
    "latin-1": '"caf\udce9"',
}
# The parser itself fails on these, in any field.
UNREADABLE = ("huge", "deep", "latin-1")


def write_annotations(root: Path, count: int, seed: int = 0) -> tuple[set[str], int]:
    """Write COCO captions, some with an odd value in a field.

    Returns the ids of the usable ones and the number of the others.
    """
    random = Random(f"annotations {seed}")
    image_entries, caption_entries = [], []
    good: set[str] = set()
    (root / "train2017").mkdir(parents=True)
    for number in range(count):
        (root / "train2017" / f"{number}.jpg").write_bytes(saved(noise(random)))
        image_entries.append(f'{{"id": {number}, "file_name": "{number}.jpg"}}')
        fields = {
            "image_id": str(number),
            "id": str(number),
            "caption": json.dumps(f"hello {number}, my friend"),
            "score": "1",
        }
        name = random.choice(("plain", *VALUES))
        field = random.choice(("image_id", "id", "caption", "score"))
        if name != "plain":
            fields[field] = VALUES[name]
        if name == "plain" or (field == "score" and name not in UNREADABLE):
            good.add(f"coco/train2017/{number}")
        caption_entries.append("{" + ", ".join(f'"{k}": {v}' for k, v in fields.items()) + "}")
    text = (
        f'{{"images": [{", ".join(image_entries)}], "annotations": [{", ".join(caption_entries)}]}}'
    )
    (root / "annotations").mkdir()
    path = root / "annotations" / "captions_train2017.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return good, count - len(good)
