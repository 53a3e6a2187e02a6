import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mdm.first_stage import png
from mdm.first_stage.image import decode_image
from tests.unit.sources.damage import chunk, png_of_rows


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def solid(mode, colour, size=(40, 24), kind="PNG", **options):
    return encoded(Image.new(mode, size, colour), kind, **options)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (solid("RGB", (200, 30, 60)), (200, 30, 60)),
        (solid("L", 90), (90, 90, 90)),
        (solid("1", 1), (255, 255, 255)),
        (solid("RGBA", (0, 0, 0, 0)), (255, 255, 255)),
        (solid("LA", (10, 255)), (10, 10, 10)),
        (solid("I;16", 0x8000), (128, 128, 128)),
        (solid("CMYK", (0, 255, 255, 0), kind="JPEG", quality=95), (255, 0, 0)),
        (solid("P", 0, transparency=0), (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb_over_white(data, colour):
    pixels = decode_image(data, 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.mean((1, 2)), colour, atol=3)


def test_the_short_side_is_resized_and_the_middle_kept():
    image = Image.new("RGB", (90, 30), "black")
    image.paste("white", (30, 0, 60, 30))
    assert decode_image(encoded(image), 30).min() == 255


def test_large_jpegs_and_small_images_get_the_requested_size():
    gradient = np.tile(np.linspace(0, 255, 1200, dtype=np.uint8)[None, :, None], (900, 1, 3))
    pixels = decode_image(encoded(Image.fromarray(gradient), "JPEG"), 32)
    assert pixels.shape == (3, 32, 32)
    assert (np.diff(pixels[0].astype(int).mean(0)) > 0).all()
    assert decode_image(solid("RGB", "red", size=(1, 1)), 32).shape == (3, 32, 32)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = decode_image(encoded(image, "JPEG", exif=exif, quality=95), 32)
    assert pixels[:, :12].mean() < 10
    assert pixels[:, 20:].mean() > 245


def bomb(width, height):
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0"))


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
PHOTO = encoded(Image.fromarray(NOISE), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>not found", "not an image: begins with '<html>not found'"),
        (PHOTO[: len(PHOTO) // 2], "truncated image"),
        (PHOTO[:30], "image"),
        (bomb(9000, 9000), "too many pixels: 9000 x 9000"),
        (bomb(10_000, 10_000), "too many pixels"),
        (bomb(60_000, 60_000), "too many pixels"),
        (bomb(64, 64), "image"),
    ],
)
def test_an_unusable_image_is_refused_with_its_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        decode_image(data, 32)


def test_damage_raises_no_error_except_value_error():
    generator = np.random.default_rng(1)
    for source in (PHOTO, encoded(Image.fromarray(NOISE)), solid("P", 3, kind="GIF")):
        for _ in range(60):
            data = bytearray(source)
            for at in generator.integers(0, len(data), 6):
                data[at] = generator.integers(0, 256)
            try:
                pixels = decode_image(bytes(data), 8)
            except ValueError:
                continue
            assert pixels.shape == (3, 8, 8)


JPEGS = {
    "sequential": {},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 8},
    "colour in full": {"subsampling": 0, "quality": 95},
}


def grainy(mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(60, 200, (120, 160, 3)).astype(np.uint8)
    return encoded(Image.fromarray(pixels).convert(mode), "JPEG", **options)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_changed_bytes_among_a_jpegs_pixels_are_reported(mode, options):
    good = grainy(mode, **options)
    decode_image(good, 32)
    decode_image(good + b"what a camera appends", 32)
    random = np.random.default_rng(1)
    start = good.index(b"\xff\xda") + 20
    reasons = []
    for _ in range(40):
        data = bytearray(good)
        for at in random.integers(start, len(good) - 4, 8):
            data[at] ^= random.integers(1, 256)
        try:
            decode_image(bytes(data), 32)
        except ValueError as error:
            reasons.append(str(error).split(":")[0])
    assert set(reasons) <= {"damaged image", "truncated image"}
    assert len(reasons) >= 34  # no decoder notices damage from which it resynchronises in time


def ends_of_scans(jpeg):
    """The positions at which the coded pixels of each scan end."""
    ends, at = [], jpeg.index(b"\xff\xda")
    while (end := re.compile(rb"\xff[^\x00\xff\xd0-\xd7]").search(jpeg, at + 2)) is not None:
        ends.append(end.start())
        at = jpeg.find(b"\xff\xda", end.start())
        if at < 0:
            break
    return ends


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_zeros_after_coded_pixels_are_no_damage(mode, options):
    good = grainy(mode, **options)
    expected = decode_image(good, 32)
    for at in ends_of_scans(good):
        for zeros in (1, 2, 5, 700):
            padded = good[:at] + bytes(zeros) + good[at:]
            assert np.array_equal(decode_image(padded, 32), expected)
        lost = good[: at - 40] + bytes(740)  # in a progressive file, zeros may be pixels too
        for damaged in (good[:at] + b"\1" * 9, *([] if "progressive" in options else [lost])):
            with pytest.raises(ValueError, match=r"damaged image|truncated image"):
                decode_image(damaged + good[at:], 32)


def test_a_jpeg_with_fewer_rows_than_its_header_says_is_truncated():
    good = grainy()
    at = good.index(b"\xff\xc0") + 5
    taller = good[:at] + struct.pack(">H", 1200) + good[at + 2 :]
    with pytest.raises(ValueError, match="truncated image: file is truncated"):
        decode_image(taller, 32)


@pytest.mark.parametrize("adam7", [False, True])
@pytest.mark.parametrize(
    ("depth", "colours"),
    [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (1, 3), (4, 3), (8, 3), (16, 6)],
)
def test_a_png_that_lacks_any_of_its_rows_is_damaged(depth, colours, adam7):
    rows = 15 if adam7 else 8
    whole = png_of_rows(rows, depth=depth, colours=colours, adam7=adam7)
    assert decode_image(whole, 8).shape == (3, 8, 8)
    # With almost no data, the decoder itself reports the error.
    reason = r"damaged image: \d+ bytes of pixels, but|truncated image: image file is truncated"
    for present in range(rows):
        data = png_of_rows(present, depth=depth, colours=colours, adam7=adam7)
        with pytest.raises(ValueError, match=reason):
            decode_image(data, 8)


def test_missing_rows_are_reported_whatever_the_others_hold():
    """The last row is missing, and no row is zero."""
    noise = np.random.default_rng(2).integers(1, 255, (40, 30, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise))
    packed = zlib.compress(zlib.decompress(data[41 : data.index(b"IEND") - 8])[: 39 * 91])
    short = data[:33] + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="3549 bytes of pixels, but its header says 3640"):
        decode_image(short, 8)


def test_no_more_of_a_png_is_unpacked_than_its_header_announces(monkeypatch):
    sizes, unpack = [], zlib.decompressobj

    class Counted:
        def __init__(self):
            self.stream, self.eof = unpack(), False

        def decompress(self, packed, most):
            sizes.append(len(part := self.stream.decompress(packed, most)))
            self.unconsumed_tail = self.stream.unconsumed_tail
            return part

    data = png_of_rows(8)
    bomb = data[:33] + chunk(b"IDAT", zlib.compress(b"\0" * (64 << 20))) + chunk(b"IEND", b"")
    monkeypatch.setattr(png.zlib, "decompressobj", Counted)
    png.check_pixels(bomb)
    assert sum(sizes) == 1 << 16
