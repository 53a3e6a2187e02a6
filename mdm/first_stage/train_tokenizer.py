"""Train a SentencePiece tokenizer on the texts of data sets, and measure it."""

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mdm import sources
from mdm.config import doc
from mdm.first_stage import corpus
from mdm.first_stage.tokenizer import UNK, Tokenizer, train_model
from mdm.utils.files import write_json


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """Flags."""

    datasets: tuple[str, ...] = doc(
        (
            "imagenet=runs/demo/data/digits",
            "journeydb=runs/demo/data/journeydb",
            "ultrachat=runs/demo/data/dialogues",
        ),
        "name=folder; repeat it for each data set; their training splits make the corpus",
    )
    out: str = doc("runs/demo/tokenizer", "folder for tokenizer.model and tokenizer.json")
    vocab_size: int = doc(32_000, "pieces, the special ones among them")
    repeats: bool = doc(False, "count a repeated text every time: for few words used often")

    def __post_init__(self) -> None:
        if self.vocab_size < 8:
            raise ValueError(f"vocab_size is {self.vocab_size}; the special pieces alone need 5")
        sources.parse_datasets(self.datasets)


def texts(datasets: Sequence[str]) -> Iterator[str]:
    """Every text of the training splits."""
    for name, root in sources.parse_datasets(datasets):
        for split in sources.training_splits(name, root):
            split_texts = sources.get(name).texts(root, split)
            yield from tqdm(split_texts, desc=f"{name} {split}", unit=" texts")


def measure(tokenizer: Tokenizer, lines: Iterator[str]) -> dict[str, float]:
    """Tokens per word and the share of unknown tokens over `lines`."""
    words = tokens = unknown = 0
    for line in lines:
        ids = tokenizer.encode(line)
        words += len(line.split())
        tokens += len(ids)
        unknown += ids.count(UNK)
    return {
        "words": words,
        "tokens_per_word": tokens / max(words, 1),
        "unknown_rate": unknown / max(tokens, 1),
    }


def train(config: TrainTokenizerConfig) -> dict[str, Any]:
    """Write the model and its report; ValueError if a data set or the corpus is unusable."""
    started = time.perf_counter()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".corpus-") as folder:
        cleaned = corpus.build(texts(config.datasets), Path(folder), config.repeats)
        if not cleaned.train_lines:
            raise ValueError(f"{' '.join(config.datasets)}: no usable text for a tokenizer")
        model = train_model(cleaned.lines("train.txt"), config.vocab_size)
        partial = Path(folder) / "tokenizer.model"
        partial.write_bytes(model)
        tokenizer = Tokenizer(partial)
        report = {
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
            "lines": cleaned.read,
            "dropped": dict(cleaned.dropped),
            "train_lines": cleaned.train_lines,
            "held_out_lines": cleaned.held_out_lines,
            "held_out": measure(tokenizer, cleaned.lines("held_out.txt")),
            "seconds": round(time.perf_counter() - started, 2),
        }
        shutil.move(partial, out / "tokenizer.model")
    write_json(out / "tokenizer.json", report)
    return report
