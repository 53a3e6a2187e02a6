"""Writes what `make learn-text` trains and measures on: the tokenizer, rows of tokens, a data set.

Documents are joined, each with EOS at its end, and cut into rows of ROW tokens, as is usual for
language models: every row is full, a document may begin or end anywhere in it, and no model is
told how long a text is. All models see the same rows. The project's trainer reads them as an
encoded data set of texts; a quarter of these begin with a prompt, so that the model learns to
continue a text.

Shapes: R rows, M tokens of a row.
"""

from mdm.launch.job import job

import itertools
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.text import corpus
from examples.text.corpus import Document
from examples.text.prose import ALPHABET
from mdm.config import doc
from mdm.data.manifest import Manifest, publish
from mdm.data.manifest_parts import quarantine_parts, shard_parts
from mdm.data.schema import Samples, sample_schema, write_shard
from mdm.first_stage.tokenizer import EOS, UNK, Tokenizer, train_model
from mdm.storage import open_store
from mdm.utils.command_line import parse_cli
from mdm.utils.files import write_json

ROW = 124  # tokens; 128 with the four that frame a text in the model's sequence
VOCAB_SIZE = 1000
PROMPTS = 4  # one row in so many begins with a prompt
BATCH_ROWS = 128
DATASET = "text"
REPORT = "data.json"


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    out: str = doc("runs/learn-text/data", "folder to write")
    limit: int = doc(0, "documents of the corpus; 0: all")


@dataclass(frozen=True)
class Rows:
    """Full rows of tokens."""

    tokens: NDArray[np.int64]  # [R, M]
    characters: NDArray[np.int64]  # [R], of the text that a row's tokens decode to
    files: NDArray[np.int64]  # [R], the file that a row begins in

    def take(self, most: int) -> "Rows":
        """The first rows; all for 0."""
        return Rows(*(column[: most or None] for column in vars(self).values()))

    def save(self, path: Path) -> None:
        """Write all arrays into one file."""
        np.savez(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "Rows":
        """What `save` wrote."""
        with np.load(path) as arrays:
            return cls(**arrays)


def write(folder: Path, limit: int = 0) -> dict[str, Any]:
    """Write the tokenizer, `train.npz`, `held_out.npz` and the encoded data set into `folder`.

    Returns the description of the corpus that `data.json` holds.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    documents = corpus.read()[: limit or None]
    train = [document for document in documents if not document.is_held_out]
    held_out = [document for document in documents if document.is_held_out]
    path = folder / "tokenizer.model"
    path.write_bytes(train_model(_lines(train), VOCAB_SIZE))
    tokenizer = Tokenizer(path)
    counts: dict[str, Any] = {}
    for name, part in (("train", train), ("held_out", held_out)):
        rows, unknown = wrap(part, tokenizer)
        rows.save(folder / f"{name}.npz")
        counts[name] = {
            "documents": len(part),
            "documents_with_unknown_characters": unknown,
            "rows": len(rows.tokens),
            "tokens": rows.tokens.size,
            "characters": int(rows.characters.sum()),
            "characters_per_token": int(rows.characters.sum()) / rows.tokens.size,
        }
        if name == "train":
            encode(rows.tokens, tokenizer, folder / "encoded" / DATASET)
    report = {"sources": corpus.summary(documents), "vocab_size": VOCAB_SIZE, "row": ROW, **counts}
    write_json(folder / REPORT, report)
    return report


def wrap(documents: Iterable[Document], tokenizer: Tokenizer) -> tuple[Rows, int]:
    """The documents as full rows of ROW tokens; the last, partial row is dropped.

    A document with a character that the tokenizer does not know is left out, because its tokens
    would not determine it. Returns the rows and how many such documents there are.
    """
    stream: list[int] = []
    ends: list[tuple[int, int]] = []  # (tokens, characters) up to each end of a row
    starts: list[int] = []  # the file that each row begins in
    files: dict[str, int] = {}
    characters = unknown = 0
    for document in documents:
        ids = encode_document(document, tokenizer)
        if UNK in ids:
            unknown += 1
            continue
        file = files.setdefault(f"{document.source}/{document.file}", len(files))
        first = len(stream)
        stream += ids
        while (end := ROW * len(ends)) < len(stream):
            ends.append((end, characters + len(tokenizer.decode(ids[: end - first]))))
            starts.append(file)
        characters += len(tokenizer.decode(ids))
    rows = len(stream) // ROW
    if len(ends) == rows:  # the last row ends with the last document
        ends.append((len(stream), characters))
    counts = np.array([b - a for (_, a), (_, b) in itertools.pairwise(ends)], np.int64)[:rows]
    tokens = np.array(stream[: rows * ROW], np.int64).reshape(rows, ROW)
    return Rows(tokens, counts, np.array(starts[:rows], np.int64)), unknown


def encode_document(document: Document, tokenizer: Tokenizer) -> list[int]:
    """Ids of a document, with the marks of the speakers if it is a dialogue, and EOS."""
    if len(document.turns) == 1:
        return [*tokenizer.encode(document.turns[0]), EOS]
    return tokenizer.encode_dialogue(document.turns)[0]


def encode(tokens: NDArray[np.int64], tokenizer: Tokenizer, folder: Path) -> None:
    """Write rows [R, M] as an encoded data set, with prompts of up to half a row."""
    n = len(tokens)
    random = np.random.Generator(np.random.Philox(key=1))
    lengths = random.integers(1, ROW // 2 + 1, n)
    prompts = np.where(random.random(n) < 1 / PROMPTS, lengths, 0)
    samples = Samples(
        ids=[f"row-{i:06d}" for i in range(n)],
        origins=[f"row {i}" for i in range(n)],
        class_ids=np.full(n, -1, np.int32),
        tokens=[row.astype(np.uint16) for row in tokens],
        prompt_lengths=prompts.astype(np.uint16),
        latents=None,
    )
    store = open_store(str(folder))
    data, shard = write_shard(samples, sample_schema(None, 0), BATCH_ROWS)
    store.put(shard.key, data)
    publish(
        store,
        Manifest(
            dataset=DATASET,
            split="train",
            recipe_hash=f"documents in rows of {ROW} tokens, prompts in one of {PROMPTS}",
            tokenizer_sha256=tokenizer.sha256,
            autoencoder_sha256=None,
            image_grid=None,
            latent_dim=0,
            vocab_size=tokenizer.vocab_size,
            class_names=(),
            batch_rows=BATCH_ROWS,
            shards=shard_parts([shard], BATCH_ROWS),
            quarantine=quarantine_parts(),
            counts={"examples": shard.rows},
            card_sha256="",
        ),
    )


def _lines(documents: Sequence[Document]) -> list[str]:
    """What the tokenizer is trained on: lines, and enough of every character.

    SentencePiece leaves out the rarest characters, .05 % of a corpus, and texts that have one.
    """
    lines = [line for doc in documents for turn in doc.turns for line in turn.split("\n")]
    most = sum(map(len, lines)) // 1000
    return lines + [" ".join(sorted(ALPHABET - {" "}))] * most


@job("text_data", ValueError, PackageNotFoundError)
def main() -> None:
    """Write the data and print its size."""
    flags = parse_cli(Flags, description=__doc__ or "")
    report = write(Path(flags.out), flags.limit)
    for source in report["sources"]:
        sides = ", ".join(f"{source[s]['characters']:,} {s}" for s in ("train", "held_out"))
        print(f"{source['package']} {source['version']} ({source['licence']}): {sides}")
    for side in ("train", "held_out"):
        print(f"{side}: {report[side]}")


if __name__ == "__main__":
    sys.exit(main())
