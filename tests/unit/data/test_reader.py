import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdm.config import DataConfig
from mdm.data import reader
from mdm.data.cache import NodeCache
from mdm.data.loader import Loader
from mdm.data.mixture import Mixture, Source
from mdm.data.reader import RecordBatchCache, SourceReader, keys_of, open_cache, open_readers
from mdm.data.text import fit, fit_all
from mdm.first_stage.tokenizer import PAD
from mdm.storage import S3Store, StoreError, StoreOptions
from tests.data_sets import encoded
from tests.unit.data.test_loader import LENGTHS, same, take


@pytest.fixture
def remote(s3: str, monkeypatch: pytest.MonkeyPatch) -> Mixture:
    """50 + 21 rows on S3, in record batches of 8; a request brings three of them."""
    manifest = encoded(s3, [50, 21])
    monkeypatch.setattr(reader, "REQUEST_BYTES", 3 * manifest.shards[0].batches[0].length)
    return Mixture((Source("images", manifest, 1.0),), global_batch=24, shuffle_window=2)


class Counted(S3Store):
    """The real store; it records the requested ranges."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri, StoreOptions())
        self.ranges: list[tuple[str, int, int]] = []

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        self.ranges.append((key, offset, length))
        return super().read_range(key, offset, length)


def counted(mixture: Mixture, cache: NodeCache | None) -> tuple[SourceReader, Counted]:
    source_reader = open_readers(mixture, cache)[0]
    source_reader.store = store = Counted(mixture.sources[0].manifest.location)
    return source_reader, store


def rows_of(source_reader: SourceReader, batches: list[int]) -> list[str]:
    return [
        i
        for run in source_reader.runs(0, batches)
        for rows in source_reader.read(0, run)
        for i in rows.ids
    ]


def test_record_batches_read_before_come_from_the_disk(remote: Mixture, tmp_path: Path) -> None:
    plain, all_ranges = counted(remote, None)
    expected = rows_of(plain, [0, 1, 2, 3, 4, 5, 6])
    assert len(all_ranges.ranges) == 1  # adjacent: one request
    first, store = counted(remote, NodeCache(tmp_path, 10**6))
    assert rows_of(first, [1]) == expected[8:16]
    info = remote.sources[0].manifest.shards[0]
    end = info.batches[2].offset + info.batches[2].length
    assert store.ranges == [(info.key, info.batches[0].offset, end - info.batches[0].offset)]
    assert rows_of(first, [0, 2]) == expected[:8] + expected[16:24]  # they came along
    assert len(store.ranges) == 1
    again, store = counted(remote, NodeCache(tmp_path, 10**6))  # another run on this node
    assert rows_of(again, [0, 1, 2, 6]) == expected[:24] + expected[48:]
    assert len(store.ranges) == 1  # the last cache file is shorter


def test_a_small_cache_keeps_single_record_batches(remote: Mixture, tmp_path: Path) -> None:
    batches = remote.sources[0].manifest.shards[0].batches
    source_reader, store = counted(remote, NodeCache(tmp_path, 5 * batches[0].length))
    rows_of(source_reader, [1, 3])
    assert [r[2] for r in store.ranges] == [batches[1].length, batches[3].length]
    rows_of(source_reader, [1, 3])
    assert len(store.ranges) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_cache_files_are_fetched_again(
    remote: Mixture, tmp_path: Path, damage: str
) -> None:
    source_reader, store = counted(remote, NodeCache(tmp_path, 10**6))
    expected = rows_of(source_reader, [1])
    (file,) = (tmp_path / "files").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes({"flip": data, "cut": data[: len(data) // 3], "empty": b""}[damage])
    assert rows_of(source_reader, [1]) == expected
    assert len(store.ranges) == 2
    assert rows_of(source_reader, [1]) == expected  # and kept again
    assert len(store.ranges) == 2


def test_threads_and_processes_fetch_a_cache_file_once(remote: Mixture, tmp_path: Path) -> None:
    location = remote.sources[0].manifest.location
    source_reader, store = counted(remote, NodeCache(tmp_path / "threads", 10**6))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: rows_of(source_reader, [0]), range(8)))
    assert len(store.ranges) == 1
    assert all(f == found[0] for f in found)
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as ranks:
        args = [(location, str(tmp_path / "ranks"), reader.REQUEST_BYTES)] * 2
        fetched = ranks.starmap(_read_all, args)
    assert sum(fetched) == 4  # requests for the two shards of 7 and 3 record batches


def _read_all(location: str, folder: str, request_bytes: int) -> int:
    """Reads everything through the node's cache as a rank does; the number of its requests."""
    reader.REQUEST_BYTES = request_bytes
    manifest = reader.Manifest.load(location)
    mixture = Mixture((Source("images", manifest, 1.0),), global_batch=24, shuffle_window=2)
    source_reader, store = counted(mixture, NodeCache(folder, 10**6))
    with ThreadPoolExecutor(4) as pool:
        every = [(s, [b]) for s, b, _ in manifest.batches()]
        assert (
            sum(len(r) for rows in pool.map(lambda a: source_reader.read(*a), every) for r in rows)
            == 71
        )
    return len(store.ranges)


def test_batches_are_the_same_through_a_cache_that_is_full(
    remote: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    cache = NodeCache(tmp_path, 10**6)
    with (
        Loader(remote, 7, **LENGTHS) as plain,
        Loader(remote, 7, **LENGTHS, node_cache=cache) as loader,
    ):
        start = zip(take(plain, 2), take(loader, 2), strict=True)
        assert all(same(a, b) for a, b in start)
        monkeypatch.setattr(os, "posix_fallocate", fails)
        for path in (tmp_path / "files").iterdir():
            path.unlink(missing_ok=True)  # a prefetch may still be writing its temporary file
        rest = zip(take(plain, 12), take(loader, 12), strict=True)
        assert all(same(a, b) for a, b in rest)


def test_a_cache_smaller_than_the_working_set_is_refused_with_both_sizes(
    remote: Mixture, tmp_path: Path
) -> None:
    needed = 2 * 2 * remote.sources[0].manifest.shards[0].batches[0].length
    small = DataConfig(cache_dir=str(tmp_path), cache_gb=1e-6)
    with pytest.raises(ValueError, match=rf"1e-06 \(1000 bytes\) but .* take {needed} bytes"):
        open_cache(remote, small)
    enough = DataConfig(cache_dir=str(tmp_path), cache_gb=needed / 1e9)
    assert open_cache(remote, enough).limit == needed


@given(
    st.lists(
        st.tuples(st.lists(st.integers(5, 60), min_size=1, max_size=12), st.integers(0, 11)),
        min_size=1,
        max_size=6,
    ),
    st.integers(2, 9),
)
def test_texts_keep_their_end_and_the_reply_before_the_prompt(
    texts: list[tuple[list[int], int]], length: int
) -> None:
    prompts = np.array([min(p, len(t) - 1) for t, p in texts])
    offsets = np.cumsum([0, *(len(t) for t, _ in texts)])
    tokens = np.array([i for t, _ in texts for i in t], np.uint16)
    fitted, kept = fit_all(tokens, offsets[:-1], offsets[1:], prompts, length)
    for row, ((text, _), prompt) in enumerate(zip(texts, prompts.tolist(), strict=True)):
        reply, given = text[prompt:], text[:prompt]
        if len(text) > length:
            longest = length - bool(given)
            reply = reply if len(reply) <= longest else [*reply[: longest - 1], reply[-1]]
            given = given[len(given) - (length - len(reply)) :] if given else []
        expected = [*given, *reply]
        assert fitted[row].tolist() == [*expected, *[PAD] * (length - len(expected))]
        assert kept[row] == len(given)
        one, left = fit(np.array(text, np.uint16), prompt, length)
        assert (one.tolist(), left) == (expected, len(given))


def first_shard(*batches: int) -> list[int]:
    """Keys of record batches of the first source's first shard."""
    zeros = np.zeros(len(batches), np.int64)
    return keys_of(zeros, zeros, np.array(batches)).tolist()  # type: ignore[no-any-return]


def test_data_that_fits_in_memory_is_read_in_large_requests(remote: Mixture) -> None:
    source_reader = open_readers(remote, None, 10**6)[0]
    source_reader.store = store = Counted(remote.sources[0].manifest.location)
    cache = RecordBatchCache([source_reader], 10**6, 1, 4)
    wanted = cache.request(first_shard(1, 4))
    assert [len(cache.wait(p)) for p in wanted.values()] == [8, 8]
    assert len(store.ranges) == 2
    again = cache.request(first_shard(*range(6)))
    expected, _ = counted(remote, None)
    assert [i for p in again.values() for i in cache.wait(p).ids] == rows_of(
        expected, list(range(6))
    )
    assert len(store.ranges) == 2  # they came along
    cache.close()


def test_a_damaged_record_batch_does_not_affect_its_neighbours(tmp_path: Path) -> None:
    manifest = encoded(str(tmp_path), [50])
    info = manifest.shards[0]
    path = tmp_path / info.key
    data = bytearray(path.read_bytes())
    data[info.batches[1].offset + info.batches[1].length // 2] ^= 0x10
    path.write_bytes(data)
    mixture = Mixture((Source("images", manifest, 1.0),), global_batch=24, shuffle_window=2)
    cache = RecordBatchCache(open_readers(mixture, None, 10**6), 10**6, 1, 2)
    one, two, three = cache.request(first_shard(0, 1, 2)).values()
    assert [len(cache.wait(pending)) for pending in (one, three)] == [8, 8]
    with pytest.raises(StoreError, match="record batch 1 of"):
        cache.wait(two)
    assert [len(cache.wait(p)) for p in cache.request(first_shard(2)).values()] == [8]
    cache.close()
