import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdm.data.schema import (
    RecordBatch,
    checksum,
    from_bfloat16_bits,
    sample_schema,
    to_bfloat16_bits,
    write_shard,
)
from tests.data_sets import samples


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126)))
def test_bfloat16_bits_are_those_of_torch(values: list[float]) -> None:
    array = np.array(values, np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16)
    bits = to_bfloat16_bits(array)
    assert np.array_equal(bits.view(np.int16), expected.view(torch.int16).numpy())
    assert np.array_equal(from_bfloat16_bits(bits), expected.float().numpy())


def test_latents_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        to_bfloat16_bits(np.array([1.0, np.nan], np.float32))


@pytest.mark.parametrize("images", [True, False])
def test_every_bit_of_a_shard_is_read_back_from_byte_ranges(images: bool) -> None:
    rows = samples(21, images=images)
    schema = sample_schema((2, 2) if images else None, 16)
    data, info = write_shard(rows, schema, 8)
    assert [b.rows for b in info.batches] == [8, 8, 5]
    assert (info.rows, info.bytes) == (21, len(data))
    first = 0
    for batch in info.batches:
        part = data[batch.offset : batch.offset + batch.length]
        assert checksum(part) == batch.xxh3
        read = RecordBatch(part, schema)
        span = slice(first, first + batch.rows)
        assert read.ids == rows.ids[span]
        assert read.origins == rows.origins[span]
        assert np.array_equal(read.class_ids, rows.class_ids[span])
        assert np.array_equal(read.prompt_lengths, rows.prompt_lengths[span])
        for i in range(batch.rows):
            assert np.array_equal(read.text(i), rows.tokens[first + i])
        if images:
            assert np.array_equal(read.latents.reshape(batch.rows, -1), rows.latents[span])
        first += batch.rows


def test_a_shard_is_a_plain_arrow_file_with_units() -> None:
    schema = sample_schema((2, 2), 16)
    data, _ = write_shard(samples(21), schema, 8)
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    assert table.num_rows == 21
    assert table.schema.equals(schema, check_metadata=True)
    assert schema.field("latents").metadata[b"shape"] == b"4,16"
    assert all(b"unit" in f.metadata for f in schema)


def test_equal_samples_give_equal_bytes() -> None:
    schema = sample_schema((2, 2), 16)
    assert write_shard(samples(21), schema, 8) == write_shard(samples(21), schema, 8)
