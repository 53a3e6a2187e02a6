"""The tokenizer's corpus (Appendix D): the texts of all sets, cleaned, shuffled and split.

Lines are distributed over a few hundred files by their hash, so duplicates end up in the same file,
and the files in order, each sorted by hash, are one fixed shuffle. Only one file is held in memory,
and the order of the input does not matter.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

MIN_CHARACTERS = 2
# SentencePiece silently ignores longer lines, so they are cut between words.
MAX_BYTES = 4000
BUCKETS = 256
HELD_OUT = 20  # one line in so many is held out for measurements


@dataclass
class Corpus:
    """Lines on disk below `folder`, and counts of the input lines: read, dropped, written."""

    folder: Path
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    train_lines: int = 0
    held_out_lines: int = 0

    def lines(self, file: str) -> Iterator[str]:
        """The lines of `train.txt`, shuffled, or of `held_out.txt`, for measurements."""
        with (self.folder / file).open(encoding="utf-8", newline="\n") as lines:
            yield from (line.rstrip("\n") for line in lines)


def build(texts: Iterable[str], folder: Path, repeats: bool = False) -> Corpus:
    """Clean, deduplicate, shuffle and split `texts` into `folder`.

    Lines shorter than MIN_CHARACTERS, without a letter or digit, or repeated in any case are
    dropped and counted by reason. With `repeats`, those repeated are kept.
    """
    corpus = Corpus(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"part-{index:03d}" for index in range(BUCKETS)]
    with ExitStack() as stack:
        files = [stack.enter_context(part.open("w", encoding="utf-8")) for part in parts]
        for text in texts:
            for line in _cut(" ".join(text.split())):
                corpus.read += 1
                if reason := _problem(line):
                    corpus.dropped[reason] += 1
                else:
                    files[_hash(line) % BUCKETS].write(line + "\n")
    with (
        (folder / "train.txt").open("w", encoding="utf-8") as train,
        (folder / "held_out.txt").open("w", encoding="utf-8") as held_out,
    ):
        for part in parts:
            seen: set[int] = set()
            for key, line in sorted((_hash(line), line) for line in corpus.lines(part.name)):
                if key in seen and not repeats:
                    corpus.dropped["duplicate"] += 1
                    continue
                seen.add(key)
                if key // BUCKETS % HELD_OUT == 0:
                    held_out.write(line + "\n")
                    corpus.held_out_lines += 1
                else:
                    train.write(line + "\n")
                    corpus.train_lines += 1
            part.unlink()
    return corpus


def _problem(line: str) -> str:
    if len(line) < MIN_CHARACTERS:
        return f"shorter than {MIN_CHARACTERS} characters"
    return "" if any(map(str.isalnum, line)) else "no letter or digit"


def _cut(line: str) -> Iterator[str]:
    """`line` in parts of at most MAX_BYTES, cut between words if possible."""
    if len(line.encode()) <= MAX_BYTES:
        yield line
        return
    piece = ""
    for word in line.split(" "):
        # A character has at most four bytes; an endless word is cut anywhere.
        for start in range(0, len(word), MAX_BYTES // 4):
            part = word[start : start + MAX_BYTES // 4]
            glue = " " if piece and not start else ""
            if len((piece + glue + part).encode()) > MAX_BYTES:
                yield piece
                piece, glue = "", ""
            piece += glue + part
    if piece:
        yield piece


def _hash(line: str) -> int:
    folded = line.casefold().encode()
    return int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest(), "little")
