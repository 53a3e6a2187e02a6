"""What determines the bytes of an encoded data set, and its hash."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from mdm.data.manifest import canonical
from mdm.data.schema import MAX_VOCAB_SIZE
from mdm.sources.record import Unit

# To be raised whenever the same input would give other bytes.
CODE_VERSION = 5


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the bytes of an encoded data set."""

    dataset: str
    split: str
    inputs_sha256: str  # of the units' fingerprints
    tokenizer_sha256: str
    vocab_size: int
    autoencoder_sha256: str | None
    image_size: int | None  # pixels a side; None for text alone
    image_grid: tuple[int, int] | None
    latent_dim: int
    text_length: int
    min_chars: int
    shard_rows: int
    batch_rows: int
    encode_batch: int
    encoder_threads: int
    device: str
    text_filters: bool = True  # drop low-quality texts
    near_duplicates: bool = True  # drop near duplicates, not only exact ones
    code_version: int = CODE_VERSION

    def __post_init__(self) -> None:
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} pieces, shards hold up to {MAX_VOCAB_SIZE}"
            )
        if self.text_length < 4:
            raise ValueError(f"text_length is {self.text_length}; at least 4 tokens are needed")
        for name in ("min_chars", "shard_rows", "batch_rows", "encode_batch", "encoder_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    @property
    def hash(self) -> str:
        """sha256 of all fields."""
        return hashlib.sha256(canonical(dataclasses.asdict(self))).hexdigest()

    @property
    def work(self) -> str:
        """Prefix of this recipe's surveys and receipts."""
        return f"work/{self.hash[:16]}"


def inputs_sha256(units: Sequence[Unit]) -> str:
    """sha256 over the units' fingerprints, in order."""
    return hashlib.sha256("\n".join(u.fingerprint for u in units).encode()).hexdigest()
