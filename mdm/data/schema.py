"""The columns of a shard and its bytes: Arrow IPC files whose record batches can be read alone.

Shapes: R rows of a record batch, N image tokens (rows x columns of the grid), C latent width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

Number = TypeVar("Number", np.int32, np.uint16)

SCHEMA_VERSION = 1
MAX_VOCAB_SIZE = 1 << 16  # token ids are stored as uint16


def sample_schema(image_grid: tuple[int, int] | None, latent_dim: int) -> pa.Schema:
    """Arrow schema of encoded samples; only data sets with images (`image_grid`) have `latents`."""
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
    """Bits of the nearest bfloat16 (ties to even), same shape; ValueError unless all are finite."""
    if not np.isfinite(values).all():
        raise ValueError("a latent is not finite")
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + rounding) >> 16).astype(np.uint16)


def from_bfloat16_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bits, same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Samples:
    """Encoded samples that are not in a shard yet."""

    ids: Sequence[str]
    origins: Sequence[str]
    class_ids: NDArray[np.int32]  # [R]
    tokens: Sequence[NDArray[np.uint16]]  # R texts
    prompt_lengths: NDArray[np.uint16]  # [R]
    latents: NDArray[np.uint16] | None  # [R, N * C]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: NDArray[np.int64]) -> "Samples":
        """The samples at these indices, in this order."""
        return Samples(*(_taken(column, indices) for column in vars(self).values()))

    @staticmethod
    def concatenate(parts: Sequence["Samples"]) -> "Samples":
        """All parts in a row; at least one."""
        return Samples(*map(_joined, zip(*(vars(p).values() for p in parts), strict=True)))


def _taken(column: Any, indices: NDArray[np.int64]) -> Any:
    if column is None or isinstance(column, np.ndarray):
        return None if column is None else column[indices]
    return [column[i] for i in indices]


def _joined(columns: Sequence[Any]) -> Any:
    given = [column for column in columns if column is not None]
    if not given or isinstance(given[0], np.ndarray):
        return np.concatenate(given) if given else None
    return [value for column in given for value in column]


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


def write_shard(samples: Samples, schema: pa.Schema, batch_rows: int) -> tuple[bytes, ShardInfo]:
    """The shard's bytes and description: record batches of `batch_rows`, the last one shorter."""
    sink = pa.BufferOutputStream()
    ranges: list[tuple[int, int, int]] = []
    with pa.ipc.new_file(sink, schema) as writer:
        # The header is written together with the first batch: until then tell() is 0.
        offset = 8 + schema.serialize().size
        for start in range(0, len(samples), batch_rows):
            rows = np.arange(start, min(start + batch_rows, len(samples)))
            writer.write_batch(_record_batch(samples.take(rows), schema))
            ranges.append((offset, sink.tell() - offset, len(rows)))
            offset = sink.tell()
    data = sink.getvalue().to_pybytes()
    view = memoryview(data)
    batches = tuple(
        BatchInfo(at, length, rows, checksum(view[at : at + length])) for at, length, rows in ranges
    )
    sha256 = hashlib.sha256(data).hexdigest()
    return data, ShardInfo(f"shards/{sha256}.arrow", len(samples), len(data), sha256, batches)


def _record_batch(samples: Samples, schema: pa.Schema) -> pa.RecordBatch:
    offsets = np.cumsum([0, *map(len, samples.tokens)], dtype=np.int32)
    tokens = np.concatenate([*samples.tokens, np.zeros(0, np.uint16)]).astype(np.uint16)
    columns = [
        pa.array(samples.ids, pa.string()),
        pa.array(samples.origins, pa.string()),
        pa.array(samples.class_ids.astype(np.int32)),
        pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(tokens), type=schema.field("tokens").type
        ),
        pa.array(samples.prompt_lengths.astype(np.uint16)),
    ]
    if samples.latents is not None:
        kind = schema.field("latents").type
        bits = pa.array(samples.latents.reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(bits, type=kind))
    return pa.record_batch(columns, schema=schema)


def checksum(data: bytes | memoryview) -> str:
    """xxh3 of 64 bits, hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


class RecordBatch:
    """One record batch as numpy views of its verified bytes, decoded on first use.

    It needs no footer. Decoding is deferred because decoding several in a row is faster than
    decoding each right after it was read, when other data fills the processor's caches.
    """

    def __init__(self, data: bytes | memoryview, schema: pa.Schema) -> None:
        self._data, self._schema = data, schema

    @cached_property
    def batch(self) -> pa.RecordBatch:
        """The columns of `sample_schema`."""
        return pa.ipc.read_record_batch(pa.py_buffer(self._data), self._schema)

    @cached_property
    def class_ids(self) -> NDArray[np.int32]:
        """[R]."""
        return _view(self.batch.column(2), np.int32)

    @cached_property
    def tokens(self) -> NDArray[np.uint16]:
        """The tokens of all texts, concatenated."""
        return _view(self.batch.column(3).values, np.uint16)

    @cached_property
    def offsets(self) -> NDArray[np.int32]:
        """[R + 1] into `tokens`."""
        # np.frombuffer, because to_numpy imports pandas.
        return np.frombuffer(self.batch.column(3).buffers()[1], np.int32, self.batch.num_rows + 1)

    @cached_property
    def prompt_lengths(self) -> NDArray[np.uint16]:
        """[R]."""
        return _view(self.batch.column(4), np.uint16)

    @cached_property
    def latents(self) -> NDArray[np.uint16] | None:
        """[R, N, C], bfloat16 bits; None for text alone."""
        if (at := self._schema.get_field_index("latents")) < 0:
            return None
        shape = self._schema.field(at).metadata[b"shape"].decode().split(",")
        bits = _view(self.batch.column(at).values, np.uint16)
        return bits.reshape(len(self), *map(int, shape))

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def text(self, row: int) -> NDArray[np.uint16]:
        """Token ids of one row."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    @property
    def ids(self) -> list[str]:
        """The records' ids."""
        return list(self.batch.column(0).to_pylist())

    @property
    def origins(self) -> list[str]:
        """Where the records came from."""
        return list(self.batch.column(1).to_pylist())


def _view(array: pa.Array, dtype: type[Number]) -> NDArray[Number]:
    buffer = array.buffers()[-1]
    if buffer is None or len(array) == 0:
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype, len(array))
