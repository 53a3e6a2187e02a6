"""Hostile input: sound records are kept, damaged ones quarantined, and the job continues."""

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mdm import sources
from mdm.data.manifest import Manifest
from mdm.first_stage import image
from mdm.first_stage.autoencoder import Autoencoder
from mdm.first_stage.exif import orientation
from mdm.first_stage.image import decode_image, thumbnail
from mdm.first_stage.tokenizer import Tokenizer
from mdm.preprocess import encoding, ray_executor, similar, survey
from mdm.sources import annotated, captions, imagenet, packed, record, ultrachat
from mdm.sources.record import BadRecord, RawRecord, one_record
from tests import hostile
from tests import published_sets as sets
from tests.data_sets import (
    NAMES,
    write_autoencoder,
    write_imagenet,
    write_tokenizer,
    write_ultrachat,
)
from tests.unit.preprocess.test_encoding import encode, recipe_for
from tests.unit.sources.damage import chunk, noise, saved


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    return Autoencoder.load(write_autoencoder(tmp_path_factory.mktemp("autoencoder")))


# ---- images


def test_hostile_metadata_changes_no_pixel_and_hides_no_damage() -> None:
    for case in hostile.images(500, seed=1):
        if case.clean is None:
            with pytest.raises(ValueError, match="image"):
                decode_image(case.data, 16)
            with pytest.raises(ValueError, match="image"):
                thumbnail(case.data)
        else:
            expected = decode_image(case.clean, 16)
            np.testing.assert_array_equal(decode_image(case.data, 16), expected, case.name)
            np.testing.assert_array_equal(thumbnail(case.data), thumbnail(case.clean), case.name)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_rotated_to_its_exif_orientation(kind: str, value: int) -> None:
    corners = Image.new("RGB", (40, 40), "black")
    corners.paste("red", (0, 0, 20, 20))
    corners.paste("blue", (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x112] = value
    pixels = decode_image(saved(corners, kind, exif=exif, quality=95), 40)
    # (row, column) where the stored image's first corner and the one next to it are shown.
    first, beside = {
        1: ((0, 0), (0, 1)),
        2: ((0, 1), (0, 0)),
        3: ((1, 1), (1, 0)),
        4: ((1, 0), (1, 1)),
        5: ((0, 0), (1, 0)),
        6: ((0, 1), (1, 1)),
        7: ((1, 1), (0, 1)),
        8: ((1, 0), (0, 0)),
    }[value]
    assert pixels[0, 10 + 20 * first[0], 10 + 20 * first[1]] > 150
    assert pixels[2, 10 + 20 * beside[0], 10 + 20 * beside[1]] > 150


def tag(order: str, kind: int, count: int, field: bytes, more: bytes = b"") -> bytes:
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(
        order + "IHHHI", 8, 1, 0x112, kind, count
    )
    return head + field + b"\0\0\0\0" + more


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "count", "form", "values", "expected"),
    [
        (3, 1, "HH", (6, 0), 6),
        (4, 1, "I", (6,), 6),
        (1, 1, "BBH", (6, 0, 0), 6),
        (7, 1, "BBH", (6, 0, 0), 6),
        (9, 1, "i", (8,), 8),
        (9, 1, "i", (-8,), 1),
        (11, 1, "f", (3.0,), 3),
        (11, 1, "f", (float("nan"),), 1),
        (2, 2, "4s", (b"6\0\0\0",), 6),
        (2, 4, "4s", (b"top\0",), 1),
        (3, 2, "HH", (5, 0), 5),
        (3, 0, "HH", (7, 0), 7),
        (99, 1, "HH", (2, 0), 2),
        (3, 1, "HH", (9, 0), 1),
        (3, 1, "HH", (0, 0), 1),
        (3, 1 << 31, "I", (26,), 4),  # from elsewhere, as its count says
        (5, 1, "I", (26,), 4),
        (5, 1, "I", (30,), 1),  # a fraction over nothing
        (12, 1, "I", (1 << 31,), 1),
        (3, 9, "I", (0xFFFFFFFF,), 1),
    ],
)
def test_orientation_is_read_from_any_tag_type(
    order: str, kind: int, count: int, form: str, values: tuple[object, ...], expected: int
) -> None:
    behind = struct.pack(order + "HH", 4, 0) if kind == 3 else struct.pack(order + "III", 4, 1, 0)
    assert (
        orientation(tag(order, kind, count, struct.pack(order + form, *values), behind)) == expected
    )


def test_no_bytes_of_exif_or_xmp_are_an_error() -> None:
    random = hostile.Random("exif")
    for _ in range(3000):
        block = bytearray(hostile.exif(random, 6)[0])
        for _ in range(random.randrange(5)):
            block[random.randrange(len(block))] = random.randrange(256)
        assert 1 <= orientation(bytes(block[: random.randrange(len(block) + 1)])) <= 8
    assert orientation(b"Exif\0\0" * 2 + tag("<", 3, 1, b"\3\0\0\0")) == 3  # headed twice
    assert orientation(b"", b'<x tiff:Orientation="6"/>') == 6
    assert orientation(b"", b"<tiff:Orientation>8</tiff:Orientation>") == 8
    assert orientation(tag("<", 3, 1, b"\3\0\0\0"), b'<x tiff:Orientation="6"/>') == 3


def test_an_exif_tag_that_cannot_be_rewritten_does_no_harm() -> None:
    jpeg = saved(Image.effect_noise((64, 48), 60))
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2)
    block += struct.pack("<HHII", 0x10E, 5, 1, 38) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    block += struct.pack("<III", 0, 1, 2)
    odd = jpeg[:2] + hostile.segment(0xE1, block) + jpeg[2:]
    np.testing.assert_array_equal(decode_image(odd, 32), decode_image(hostile.upright(jpeg, 6), 32))


def test_bytes_between_jpeg_header_segments_are_skipped() -> None:
    jpeg = saved(noise(40, 30), progressive=True)
    expected = decode_image(jpeg, 16)
    for at in hostile.header_marks(jpeg):
        for junk in (b"\0\0", b"\n", b"\xff\xff", b"\xff\xd9", b"\xff\xd3", b"\xff\x01", b"\xff\0"):
            data = jpeg[:at] + junk + jpeg[at:]
            np.testing.assert_array_equal(decode_image(data, 16), expected)
    scan = jpeg.index(b"\xff\xda") + 40  # there they may be pixels
    with pytest.raises(ValueError, match="damaged image"):
        decode_image(jpeg[:scan] + b"\0\0" + jpeg[scan:], 16)


def test_a_thumbnail_is_never_taken_for_the_image() -> None:
    inner = saved(Image.new("RGB", (16, 16), "red"))
    outer = saved(noise(40, 30))
    for length in (None, 9, 40, len(inner) // 2, 20_000):
        data = outer[:2] + hostile.segment(0xE1, b"Exif\0\0" + inner, length) + outer[2:]
        try:
            pixels = decode_image(data, 16)
        except ValueError:
            continue
        np.testing.assert_array_equal(pixels, decode_image(outer, 16))


def test_damaged_transparency_is_an_error() -> None:
    png = saved(noise(9, 8).convert("P"), "PNG", transparency=0)
    at = png.index(b"tRNS")
    with pytest.raises(ValueError, match="wrong checksum of its tRNS"):
        decode_image(png[: at + 4] + b"\x80" + png[at + 5 :], 8)
    grey = saved(noise(9, 8), "PNG")
    odd = grey[:33] + chunk(b"tRNS", b"\0") + grey[33:]  # too short to name a colour
    np.testing.assert_array_equal(decode_image(odd, 8), decode_image(grey, 8))


# ---- annotations


def test_annotations_of_wrong_types_are_quarantined_and_the_others_kept(tmp_path: Path) -> None:
    good, bad = hostile.write_annotations(tmp_path, 300)
    records = list(sources.records("coco", tmp_path, "train2017"))
    assert {r.id for r in records if isinstance(r, RawRecord)} == good
    wrong = [r for r in records if isinstance(r, BadRecord)]
    assert len(wrong) == bad
    assert all(r.reason and r.origin.startswith("annotations/") for r in wrong)


# ---- unforeseen errors


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message either")


ERRORS: list[Callable[[], Exception]] = [
    lambda: RecursionError("too deep"),
    lambda: AttributeError("no attribute"),
    lambda: MemoryError("cannot allocate 9 PB"),
    lambda: struct.error("unpack requires 4 bytes"),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    lambda: Image.DecompressionBombError("a bomb"),
    lambda: UserWarning("turned into an error"),
    lambda: StopIteration(),
    lambda: KeyError("a\nb\ud800"),
    lambda: AssertionError(),
    lambda: OSError("no number"),
    lambda: SilentError(),
]


def failing(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: Exception, once: bool
) -> None:
    """`owner.name` raises at its third call and, unless `once`, whenever that call is repeated."""
    real, seen = getattr(owner, name), list[str]()

    def call(*args: object, **more: object) -> object:
        what = repr(args)
        if once or what not in seen:
            seen.append(what)
        if (len(seen) == 3) if once else seen[2:3] == [what]:
            raise error
        return real(*args, **more)

    monkeypatch.setattr(owner, name, call)


def check(manifest: Manifest, records: int, error: Exception, where: str) -> None:
    """Only one record is in quarantine, with its file and the error."""
    assert manifest.counts["records"] == records
    assert len(manifest.quarantine) == 1
    assert type(error).__name__ in manifest.quarantine[0].reason
    assert manifest.quarantine[0].origin.startswith(where)
    assert manifest.quarantine[0].id
    assert manifest.rows == records - 1


STAGES = [
    (imagenet, "caption"),
    (packed, "read_file"),
    (similar, "normalised"),
    (survey, "content_hash"),
    (encoding, "text_problem"),
    (encoding, "fit"),
    (encoding, "decode_image"),
    (Tokenizer, "encode"),
    (Tokenizer, "decode"),
    (similar, "thumbnail"),
    (image, "orientation"),
    (image.simplejpeg, "decode_jpeg"),
]


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [(*stage, ERRORS[5 * number % len(ERRORS)]) for number, stage in enumerate(STAGES)]
    + [(encoding, "decode_image", error) for error in ERRORS]
    + [(image, "orientation", error) for error in ERRORS[:4]],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_an_error_while_encoding_an_image_quarantines_only_that_record(
    tmp_path: Path,
    tokenizer: Tokenizer,
    autoencoder: Autoencoder,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    error: Callable[[], Exception],
) -> None:
    root = write_imagenet(tmp_path / "raw", 2)
    for number, path in enumerate(sorted(root.glob("*/*/*.JPEG"))):
        names = "".join(f"n{n:08d} {NAMES[n % 4]} {NAMES[n // 4]}\n" for n in range(8))
        (root / "LOC_synset_mapping.txt").write_text(names)  # a different text for each image
        path.rename(_made(root / "train" / f"n{number:08d}" / path.name))
    failing(monkeypatch, owner, name, raised := error(), once=name == "orientation")
    recipe = recipe_for("imagenet", tokenizer)
    manifest = encode(root, recipe, tokenizer, autoencoder, str(tmp_path / "out"))
    check(manifest, 8, raised, "train/n")


def _made(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    return path


@pytest.mark.parametrize(
    ("owner", "name"),
    [(ultrachat, "_turns"), (ultrachat, "parse_line"), (Tokenizer, "encode_dialogue")],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_an_error_while_encoding_a_dialogue_quarantines_only_that_record(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
) -> None:
    root = write_ultrachat(tmp_path / "raw", [[f"hello {n}", f"my friend {n}"] for n in "abcdef"])
    failing(monkeypatch, owner, name, raised := RecursionError("too deep"), once=False)
    recipe = recipe_for("ultrachat", tokenizer)
    check(encode(root, recipe, tokenizer, None, str(tmp_path / "out")), 6, raised, "train.jsonl@")


@pytest.mark.parametrize(
    ("owner", "name", "failing_call"),
    [(captions, "text_field", 6), (annotated.jsonfile, "entry", 6), (packed.Images, "_read", 3)],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_an_error_in_an_annotation_affects_only_that_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, failing_call: int
) -> None:
    sets.write_coco(tmp_path, "train2017", 4)
    calls, real = [], getattr(owner, name)

    def call(*args: object) -> object:
        calls.append(args)
        if len(calls) == failing_call:
            raise ZeroDivisionError("nobody foresaw it")
        return real(*args)

    monkeypatch.setattr(owner, name, call)
    records = list(sources.records("coco", tmp_path, "train2017"))
    bad = [r for r in records if isinstance(r, BadRecord)]
    assert len(records) == 8
    assert len(bad) == (
        2 if "images" in bad[0].reason else 1
    )  # the captions of one lack their image
    assert "ZeroDivisionError: nobody foresaw it" in bad[0].reason
    assert bad[0].origin.startswith("annotations/captions_train2017.json@")


def test_an_image_that_the_autoencoder_fails_on_quarantines_only_that_record(
    tmp_path: Path,
    tokenizer: Tokenizer,
    autoencoder: Autoencoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = write_imagenet(tmp_path / "raw", 3)
    spoilt = decode_image((root / "train/n00000001/n00000001_2.JPEG").read_bytes(), 16)

    real = autoencoder.encode

    def fail_on_one(pixels: torch.Tensor) -> torch.Tensor:
        if any(torch.equal(one, torch.from_numpy(spoilt)) for one in pixels):
            raise RuntimeError("no such kernel")
        return real(pixels)

    def fail(pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no GPU")

    recipe = recipe_for("imagenet", tokenizer)
    whole = encode(root, recipe, tokenizer, autoencoder, str(tmp_path / "whole"))
    assert whole.rows == 12
    monkeypatch.setattr(autoencoder, "encode", fail_on_one)
    manifest = encode(root, recipe, tokenizer, autoencoder, str(tmp_path / "out"))
    check(manifest, 12, RuntimeError(), "train/n00000001/n00000001_2.JPEG")
    monkeypatch.setattr(autoencoder, "encode", fail)
    with pytest.raises(ValueError, match="RuntimeError: no GPU"):  # no record is at fault
        encode(root, recipe, tokenizer, autoencoder, str(tmp_path / "broken"))


def test_an_error_of_a_reader_is_reported_and_earlier_records_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ultrachat(tmp_path, [["hello", "my friend"]] * 3)
    real = ultrachat.read

    def read(unit: record.Unit):  # type: ignore[no-untyped-def]
        yield next(real(unit))
        raise AttributeError("no attribute")

    monkeypatch.setattr(ultrachat, "read", read)
    good, bad = sources.records("ultrachat", tmp_path, "train")
    assert isinstance(good, RawRecord)
    assert isinstance(bad, BadRecord)
    assert bad.reason.endswith("AttributeError: no attribute")
    assert bad.origin == good.origin

    def lacks(unit: record.Unit):  # type: ignore[no-untyped-def]
        raise ValueError("no class names in /data")
        yield

    monkeypatch.setattr(ultrachat, "read", lacks)
    with pytest.raises(
        ValueError, match="no class names"
    ):  # an error of the data set, not of a record
        list(sources.records("ultrachat", tmp_path, "train"))


def test_an_error_of_the_machine_ends_the_job_and_names_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left") as caught, one_record("train/a.JPEG"):
        raise full
    assert ray_executor._root_cause(caught.value).endswith(", at train/a.JPEG")
    with pytest.raises(ValueError, match="failed with MemoryError: 9 PB"), one_record():
        raise MemoryError("9 PB")

    def none_left(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(record.mmap, "mmap", none_left)
    unit = record.Unit("imagenet", "train", 0, "/", "files", ("train/b.JPEG",), "")
    with pytest.raises(MemoryError) as caught_too, ray_executor._named([unit]), one_record():
        raise MemoryError
    assert ray_executor._root_cause(caught_too.value) == "MemoryError, at train/b.JPEG"


def test_an_image_is_read_although_its_warning_is_an_error() -> None:
    odd = saved(noise(), "PNG")
    odd = odd[:33] + chunk(b"acTL", struct.pack(">II", 0, 0)) + odd[33:]  # Pillow warns about it
    assert decode_image(odd, 8).shape == (3, 8, 8)  # the tests turn warnings into errors


def test_deep_nesting_at_the_parsers_limit_is_a_bad_entry(tmp_path: Path) -> None:
    sets.write_coco(tmp_path, "train2017", 1)
    path = tmp_path / "annotations" / "captions_train2017.json"
    plain = json.loads(path.read_text())
    text = json.dumps(plain, ensure_ascii=False)
    for depth in range(900, 1010):
        deep = '"caption": "' + "[" * 0 + 'é", "x": ' + "[" * depth + "]" * depth + ', "y": "'
        path.write_text(text.replace('"caption": "', deep, 1))
        records = list(sources.records("coco", tmp_path, "train2017"))
        assert len(records) == 2
