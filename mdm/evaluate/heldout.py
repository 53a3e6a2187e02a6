"""What an evaluation compares with: encoded rows, real images, prompts."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mdm import sources
from mdm.data.manifest import Manifest
from mdm.data.mixture import Source
from mdm.data.reader import SourceReader
from mdm.data.schema import from_bfloat16_bits
from mdm.first_stage.image import decode_image
from mdm.first_stage.tokenizer import Tokenizer
from mdm.sources.record import RawRecord


@dataclass(frozen=True)
class Encoded:
    """The rows of one encoded split: `latents` f32 [n, N, C], `class_ids` i64 [n], -1 for none."""

    ids: tuple[str, ...]
    latents: Tensor
    texts: tuple[str, ...]
    class_ids: Tensor

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.latents), len(self.texts), len(self.class_ids)}
        if len(lengths) != 1:
            raise ValueError(f"columns of an encoded split differ in length: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor) -> "Encoded":
        """The rows at the indices `rows` i64 [k]."""
        picked = rows.tolist()
        return Encoded(
            tuple(self.ids[i] for i in picked),
            self.latents[rows],
            tuple(self.texts[i] for i in picked),
            self.class_ids[rows],
        )


@dataclass(frozen=True)
class Images:
    """Real images: `pixels` f32 [n, 3, H, W] in [0, 1], `labels` i64 [n], -1 for none."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def halves(self) -> "tuple[Images, Images]":
        """Two disjoint halves with the same share of each class."""
        order = torch.argsort(self.labels, stable=True)
        picks = order[0::2].sort().values, order[1::2].sort().values
        a, b = (Images(self.pixels[p], self.labels[p]) for p in picks)
        return a, b


def balanced(class_ids: Tensor, n: int) -> Tensor:
    """Indices i64 [≤ n] of rows that go round the classes, in the order of the rows.

    Rows without a class are left out.
    """
    rank = torch.zeros_like(class_ids)
    for c in sorted(set(class_ids.tolist())):
        where = class_ids == c
        rank[where] = torch.arange(int(where.sum()))
    rows = torch.nonzero(class_ids >= 0).squeeze(1)
    key = rank[rows] * (int(class_ids.max()) + 1) + class_ids[rows]
    return rows[torch.argsort(key, stable=True)][:n]


def load_encoded(
    uri: str, tokenizer: Tokenizer, autoencoder_sha256: str = ""
) -> tuple[Encoded, Manifest]:
    """All rows of the images encoded at `uri`, every record batch verified, and the manifest.

    An `autoencoder_sha256` must be that of the set's autoencoder.

    Raises ManifestError, StoreError or ValueError with one line for the user.
    """
    manifest = Manifest.load(uri)
    if manifest.task != "image_text":
        raise ValueError(f"{uri} holds no images")
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(
            f"{uri} was encoded with tokenizer {manifest.tokenizer_sha256}; the given one is "
            f"{tokenizer.sha256}; give the former as --tokenizer"
        )
    if autoencoder_sha256 and manifest.autoencoder_sha256 != autoencoder_sha256:
        raise ValueError(
            f"{uri} was encoded with autoencoder {manifest.autoencoder_sha256}; the given one is "
            f"{autoencoder_sha256}; give the former as --autoencoder"
        )
    reader = SourceReader(Source(manifest.dataset, manifest, 1.0))
    ids: list[str] = []
    texts: list[str] = []
    latents, classes = [], []
    for number, shard in enumerate(manifest.shards):
        for rows in reader.read(number, list(range(len(shard.batches)))):
            assert rows.latents is not None
            ids += rows.ids
            texts += [tokenizer.decode(rows.text(i).tolist()) for i in range(len(rows))]
            latents.append(torch.from_numpy(from_bfloat16_bits(rows.latents)))
            classes.append(torch.from_numpy(rows.class_ids.astype("int64")))
    return Encoded(tuple(ids), torch.cat(latents), tuple(texts), torch.cat(classes)), manifest


def counts(manifest: Manifest) -> dict[str, int]:
    """What encoding counted, quarantined records by reason."""
    found = {k: v for k, v in manifest.counts.items() if k != "quarantined"}
    reasons = Counter(f"quarantined: {q.reason.split(':')[0]}" for q in manifest.quarantine)
    return found | {"quarantined": len(manifest.quarantine)} | dict(sorted(reasons.items()))


def load_images(name: str, root: Path, split: str, size: int) -> Images:
    """The readable images of a published split, `size` pixels a side, in the order of their ids.

    Raises ValueError if there is none, or the split or folder is wrong.
    """
    found: list[tuple[str, Tensor, int]] = []
    for record in tqdm(
        sources.records(name, root, split), desc=f"{root.name} {split}", leave=False
    ):
        if not isinstance(record, RawRecord) or record.image is None:
            continue
        try:
            array = decode_image(record.image, size)
        except ValueError:
            continue  # encoding has counted it
        label = -1 if record.label is None else record.label
        found.append((record.id, torch.from_numpy(array), label))
    if not found:
        raise ValueError(f"dataset {name}: no usable image in split {split} of {root}")
    found.sort(key=lambda one: one[0])
    pixels = torch.stack([one[1] for one in found]).float() / 255.0
    return Images(pixels, torch.tensor([one[2] for one in found]))


def load_prompts(root: Path, split: str, most: int) -> tuple[tuple[str, ...], ...]:
    """The first turns of up to `most` dialogues of a published split."""
    found: list[tuple[str, ...]] = []
    for record in sources.records("ultrachat", root, split):
        if isinstance(record, RawRecord) and record.turns and record.turns[:1] not in found:
            found.append(record.turns[:1])
        if len(found) == most:
            break
    return tuple(found)
