"""What a shard's row holds, and its bytes: Arrow IPC files whose record batches are read alone.

Shapes: R rows of a record batch, N image tokens (rows x columns of the grid), C numbers a latent.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

Number = TypeVar("Number", np.int32, np.uint16)

SCHEMA_VERSION = 1
MAX_VOCAB_SIZE = 1 << 16  # token ids are stored as uint16


def example_schema(image_grid: tuple[int, int] | None, latent_dim: int) -> pa.Schema:
    """EXAMPLE_SCHEMA: `latents` is there only in data sets with images (`image_grid` given)."""
    fields = [
        _field("id", pa.string(), "the record's id in its data set"),
        _field("origin", pa.string(), "file, or archive::member, below the data set's root"),
        _field("class_id", pa.int32(), "index into the manifest's class_names; -1 without a class"),
        _field(
            "tokens",
            pa.list_(pa.field("item", pa.uint16(), nullable=False)),
            "token ids, EOS included",
        ),
        _field("prompt_length", pa.uint16(), "leading tokens that are a given condition"),
    ]
    if image_grid is not None:
        rows, columns = image_grid
        numbers = rows * columns * latent_dim
        fields.append(
            _field(
                "latents",
                pa.list_(pa.field("item", pa.uint16(), nullable=False), numbers),
                "first-stage latents, zero mean and unit variance per channel, as bfloat16 bits",
                dtype="bfloat16",
                shape=f"{rows * columns},{latent_dim}",
                grid=f"{rows},{columns}",
            )
        )
    return pa.schema(fields, metadata={"mdm.schema_version": str(SCHEMA_VERSION)})


def _field(name: str, kind: pa.DataType, unit: str, **more: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"unit": unit, **more})


def to_bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16 (ties to even), same shape; ValueError if not finite."""
    if not np.isfinite(values).all():
        raise ValueError("a latent is not finite")
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + rounding) >> 16).astype(np.uint16)


def from_bfloat16_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bits, same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Examples:
    """Encoded rows on their way into shards."""

    ids: Sequence[str]
    origins: Sequence[str]
    class_ids: NDArray[np.int32]  # [R]
    tokens: Sequence[NDArray[np.uint16]]  # R texts
    prompt_lengths: NDArray[np.uint16]  # [R]
    latents: NDArray[np.uint16] | None  # [R, N * C]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64]) -> "Examples":
        """The rows of these indices, in this order."""
        return Examples(
            [self.ids[i] for i in rows],
            [self.origins[i] for i in rows],
            self.class_ids[rows],
            [self.tokens[i] for i in rows],
            self.prompt_lengths[rows],
            None if self.latents is None else self.latents[rows],
        )

    @staticmethod
    def concatenate(parts: Sequence["Examples"]) -> "Examples":
        """One after the other; at least one part."""
        return Examples(
            [i for p in parts for i in p.ids],
            [o for p in parts for o in p.origins],
            np.concatenate([p.class_ids for p in parts]),
            [t for p in parts for t in p.tokens],
            np.concatenate([p.prompt_lengths for p in parts]),
            None
            if parts[0].latents is None
            else np.concatenate([p.latents for p in parts if p.latents is not None]),
        )


@dataclass(frozen=True)
class BatchInfo:
    """Where a record batch lies in its shard, and its checksum."""

    offset: int  # bytes
    length: int  # bytes
    rows: int
    xxh3: str  # 64 bits, hexadecimal


@dataclass(frozen=True)
class ShardInfo:
    """One immutable shard, named by its content."""

    key: str
    rows: int
    bytes: int
    sha256: str
    batches: Sequence[BatchInfo]


def write_shard(examples: Examples, schema: pa.Schema, batch_rows: int) -> tuple[bytes, ShardInfo]:
    """The shard's bytes and description: record batches of `batch_rows`, the last one shorter."""
    sink = pa.BufferOutputStream()
    spans: list[tuple[int, int, int]] = []
    with pa.ipc.new_file(sink, schema) as writer:
        # The header is written with the first batch: until then tell() says 0.
        offset = 8 + schema.serialize().size
        for start in range(0, len(examples), batch_rows):
            rows = np.arange(start, min(start + batch_rows, len(examples)))
            writer.write_batch(_record_batch(examples.take(rows), schema))
            spans.append((offset, sink.tell() - offset, len(rows)))
            offset = sink.tell()
    data = sink.getvalue().to_pybytes()
    view = memoryview(data)
    batches = tuple(
        BatchInfo(at, length, rows, checksum(view[at : at + length])) for at, length, rows in spans
    )
    sha256 = hashlib.sha256(data).hexdigest()
    return data, ShardInfo(f"shards/{sha256}.arrow", len(examples), len(data), sha256, batches)


def _record_batch(examples: Examples, schema: pa.Schema) -> pa.RecordBatch:
    lengths = np.fromiter((len(t) for t in examples.tokens), np.int32, len(examples))
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    tokens = np.concatenate([*examples.tokens, np.zeros(0, np.uint16)]).astype(np.uint16)
    columns = [
        pa.array(examples.ids, pa.string()),
        pa.array(examples.origins, pa.string()),
        pa.array(examples.class_ids.astype(np.int32)),
        pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(tokens), type=schema.field("tokens").type
        ),
        pa.array(examples.prompt_lengths.astype(np.uint16)),
    ]
    if examples.latents is not None:
        columns.append(
            pa.FixedSizeListArray.from_arrays(
                pa.array(examples.latents.reshape(-1)), type=schema.field("latents").type
            )
        )
    return pa.record_batch(columns, schema=schema)


def checksum(data: bytes | memoryview) -> str:
    """xxh3 of 64 bits, hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


class Rows:
    """One record batch as numpy views of its verified bytes, decoded when they are first used.

    It needs no footer. Decoding waits because it is quicker for several in a row than for each
    after its reading, which leaves the processor's caches full of other things.
    """

    def __init__(self, data: bytes | memoryview, schema: pa.Schema) -> None:
        self._data, self._schema = data, schema

    @cached_property
    def batch(self) -> pa.RecordBatch:
        """The columns of `EXAMPLE_SCHEMA`."""
        return pa.ipc.read_record_batch(pa.py_buffer(self._data), self._schema)

    @cached_property
    def class_ids(self) -> NDArray[np.int32]:
        """[R]."""
        return _view(self.batch.column(2), np.int32)

    @cached_property
    def tokens(self) -> NDArray[np.uint16]:
        """Of all texts, one after the other."""
        return _view(self.batch.column(3).values, np.uint16)

    @cached_property
    def offsets(self) -> NDArray[np.int32]:
        """[R + 1] into tokens."""
        # np.frombuffer, not to_numpy: the latter imports pandas.
        return np.frombuffer(self.batch.column(3).buffers()[1], np.int32, self.batch.num_rows + 1)

    @cached_property
    def prompt_lengths(self) -> NDArray[np.uint16]:
        """[R]."""
        return _view(self.batch.column(4), np.uint16)

    @cached_property
    def latents(self) -> NDArray[np.uint16] | None:
        """[R, N, C], bfloat16 bits."""
        if (at := self._schema.get_field_index("latents")) < 0:
            return None
        shape = self._schema.field(at).metadata[b"shape"].decode().split(",")
        bits = _view(self.batch.column(at).values, np.uint16)
        return bits.reshape(len(self), *map(int, shape))

    def __len__(self) -> int:
        rows: int = self.batch.num_rows
        return rows

    def text(self, row: int) -> NDArray[np.uint16]:
        """Token ids of one row."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    @property
    def ids(self) -> list[str]:
        """The records' ids."""
        ids: list[str] = self.batch.column(0).to_pylist()
        return ids

    @property
    def origins(self) -> list[str]:
        """Where the records came from."""
        origins: list[str] = self.batch.column(1).to_pylist()
        return origins


def _view(array: pa.Array, dtype: type[Number]) -> NDArray[Number]:
    buffer = array.buffers()[-1]
    if buffer is None or len(array) == 0:
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype, len(array))
