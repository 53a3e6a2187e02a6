"""When two records are nearly the same: signatures, and keys that alike records share.

Texts: MinHash over runs of three words; alike from an estimated Jaccard similarity of 0.8. Images
(of records with the same label or, without labels, the same words): a thumbnail of 8 x 8 luma and
4 x 4 chroma values; alike if no value differs by more than 12 of 255 and luma by no more than 2 on
average, as after recompression or resizing. Both are functions of the record alone.
"""

import re
import unicodedata

import numpy as np
import xxhash
from numpy.typing import NDArray

from mdm.first_stage.image import thumbnail
from mdm.sources.record import RawRecord

SIGNATURE_BYTES = 128
_THUMBNAIL_BYTES = 96
_WORDS = re.compile(r"\w+")
_SHINGLE = 3  # words
_BANDS, _BAND_ROWS = 16, 8  # two texts of similarity s meet with probability 1 - (1 - s^8)^16
_MIN_SIMILARITY = 0.8
_MAX_DIFFERENCE = 12
_MAX_MEAN_DIFFERENCE = 2.0
# Values on two sides of a line in one grid are not in another, which is shifted.
_GRIDS, _GRID_STEP = 4, 16

_random = np.random.Generator(np.random.Philox(key=2))
_FACTORS = _random.integers(0, 1 << 63, SIGNATURE_BYTES, np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _random.integers(0, 1 << 63, SIGNATURE_BYTES, np.uint64)
_SHIFTS = _random.integers(0, _GRID_STEP, (_GRIDS, 6))

Signature = NDArray[np.uint8]  # [SIGNATURE_BYTES]


def normalised(text: str) -> list[str]:
    """A text's words without case, punctuation and typographic variants."""
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


def signature(record: RawRecord) -> tuple[Signature, list[int]]:
    """The record's signature and its keys of 64 bits; records that share a key are compared.

    Raises:
        ValueError: the image cannot be decoded.
    """
    text = "\n".join(record.turns) if record.turns else record.text or ""
    words = normalised(text) or [text]  # symbols alone
    if record.image is None:
        return _of_text(words)
    label = f"label {record.label}" if record.label is not None else " ".join(words)
    return _of_image(thumbnail(record.image), label)


def alike(one: Signature, others: NDArray[np.uint8], images: bool) -> bool:
    """Whether `one` is nearly the same as any of `others`, u8 [n, SIGNATURE_BYTES]."""
    if images:
        gaps = np.abs(others[:, :_THUMBNAIL_BYTES].astype(np.int16) - one[:_THUMBNAIL_BYTES])
        small = (gaps.max(1) <= _MAX_DIFFERENCE) & (gaps[:, :64].mean(1) <= _MAX_MEAN_DIFFERENCE)
        return bool(small.any())
    return bool(((others == one).mean(1) >= _MIN_SIMILARITY).any())


def _of_text(words: list[str]) -> tuple[Signature, list[int]]:
    # Short texts have too few runs to compare: they are alike if their words are the same.
    runs = len(words) - _SHINGLE + 1
    shingles = (
        {" ".join(words[i : i + _SHINGLE]) for i in range(runs)} if runs >= 8 else {" ".join(words)}
    )
    hashes = np.array([_key(s, b"") for s in sorted(shingles)], np.uint64)
    # Multiply-shift hashing modulo 2^64; the high bits are the good ones.
    smallest = (_FACTORS[:, None] * hashes[None] + _TERMS[:, None]).min(1)
    bands = smallest.reshape(_BANDS, _BAND_ROWS)
    keys = [_key(f"band {i}", band.tobytes()) for i, band in enumerate(bands)]
    signature: Signature = (smallest >> np.uint64(32)).astype(np.uint8)
    return signature, keys if len(shingles) > 1 else keys[:1]


def _of_image(small: NDArray[np.uint8], label: str) -> tuple[Signature, list[int]]:
    coarse = np.concatenate(
        [
            small[:64].reshape(2, 4, 2, 4).mean((1, 3)).reshape(-1),
            small[64:].reshape(2, 16).mean(1),
        ]
    )
    cells = np.floor((coarse[None] + _SHIFTS) / _GRID_STEP).astype(np.int16)
    keys = [_key(f"grid {i} {label}", cell.tobytes()) for i, cell in enumerate(cells)]
    return np.pad(small, (0, SIGNATURE_BYTES - len(small))), keys


def _key(text: str, data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "backslashreplace") + b"\0" + data)
