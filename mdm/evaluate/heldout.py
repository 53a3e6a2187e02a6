"""What an evaluation compares with: encoded samples, real images and prompts."""

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
    """The samples of an encoded split: `latents` f32 [n, N, C], `class_ids` i64 [n], -1: none."""

    latents: Tensor
    texts: tuple[str, ...]
    class_ids: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Tensor) -> "Encoded":
        """The samples at the indices `rows` i64 [k]."""
        texts = tuple(self.texts[i] for i in rows.tolist())
        return Encoded(self.latents[rows], texts, self.class_ids[rows])


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
    """Indices i64 [≤ n] of samples: the first of every class, then the second of every class, ...

    Samples without a class are left out. Those of a class keep their order.
    """
    seen: Counter[int] = Counter()
    rounds = []  # (how many of its class come before it, class, index)
    for index, class_id in enumerate(class_ids.tolist()):
        if class_id >= 0:
            rounds.append((seen[class_id], class_id, index))
            seen[class_id] += 1
    return torch.tensor([index for _, _, index in sorted(rounds)[:n]], dtype=torch.int64)


def load_encoded(
    uri: str, tokenizer: Tokenizer, autoencoder_sha256: str
) -> tuple[Encoded, Manifest]:
    """All samples of the image set encoded at `uri`, every record batch verified, and its manifest.

    Raises ManifestError, StoreError or ValueError with one line for the user, also if the set was
    encoded with another tokenizer or autoencoder.
    """
    manifest = Manifest.load(uri)
    if manifest.task != "image_text":
        raise ValueError(f"{uri} holds no images")
    for kind, encoded_with, given in (
        ("tokenizer", manifest.tokenizer_sha256, tokenizer.sha256),
        ("autoencoder", manifest.autoencoder_sha256, autoencoder_sha256),
    ):
        if encoded_with != given:
            raise ValueError(
                f"{uri} was encoded with {kind} {encoded_with}; the given one is {given}; "
                f"give the former as --{kind}"
            )
    reader = SourceReader(Source(manifest.dataset, manifest, 1.0))
    texts: list[str] = []
    latents, classes = [], []
    for number, shard in enumerate(manifest.shards):
        for rows in reader.read(number, list(range(len(shard.batches)))):
            assert rows.latents is not None
            texts += [tokenizer.decode(rows.text(i).tolist()) for i in range(len(rows))]
            latents.append(torch.from_numpy(from_bfloat16_bits(rows.latents)))
            classes.append(torch.from_numpy(rows.class_ids.astype("int64")))
    return Encoded(torch.cat(latents), tuple(texts), torch.cat(classes)), manifest


def counts(manifest: Manifest) -> dict[str, int]:
    """The counts of encoding, with quarantined records by reason."""
    others = {k: v for k, v in manifest.counts.items() if k != "quarantined"}
    reasons = Counter(f"quarantined: {q.reason.split(':')[0]}" for q in manifest.quarantine)
    return others | {"quarantined": len(manifest.quarantine)} | dict(sorted(reasons.items()))


def load_images(name: str, root: Path, split: str, size: int) -> Images:
    """The readable images of a published split, `size` pixels a side, sorted by id.

    Raises ValueError if there is none, or the split or folder is wrong.
    """
    images: list[tuple[str, Tensor, int]] = []
    records = sources.records(name, root, split)
    for record in tqdm(records, desc=f"{root.name} {split}", leave=False):
        if not isinstance(record, RawRecord) or record.image is None:
            continue
        try:
            array = decode_image(record.image, size)
        except ValueError:
            continue  # encoding has quarantined it
        label = -1 if record.label is None else record.label
        images.append((record.id, torch.from_numpy(array), label))
    if not images:
        raise ValueError(f"dataset {name}: no usable image in split {split} of {root}")
    images.sort(key=lambda entry: entry[0])
    _, pixels, labels = zip(*images, strict=True)
    return Images(torch.stack(pixels).float() / 255.0, torch.tensor(labels))


def load_prompts(root: Path, split: str, most: int) -> tuple[tuple[str, ...], ...]:
    """The distinct first turns of a published split's dialogues, at most `most`."""
    prompts: dict[tuple[str, ...], None] = {}  # a set that keeps order
    for record in sources.records("ultrachat", root, split):
        if isinstance(record, RawRecord) and record.turns:
            prompts[record.turns[:1]] = None
        if len(prompts) == most:
            break
    return tuple(prompts)
