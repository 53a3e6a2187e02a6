import errno
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from mdm.data.cache import NodeCache


def names(cache: NodeCache) -> set[str]:
    return {p.name for p in (cache.folder / "files").iterdir()}


def size(cache: NodeCache) -> int:
    return sum(p.stat().st_size for p in (cache.folder / "files").iterdir())


def test_ranges_are_read_back_even_after_a_restart(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    assert cache.read("a", 0, 4) is None
    cache.put("a", [b"0123", memoryview(b"4567")])
    for again in (cache, NodeCache(tmp_path, 1000)):
        assert again.read("a", 2, 4) == b"2345"
        assert again.read("a", 6, 4) == b"67"  # fewer bytes than requested: the caller will see
    cache.drop("a")
    assert cache.read("a", 0, 4) is None


def test_the_least_recently_used_files_are_dropped_and_the_limit_holds(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    for i in range(10):
        cache.put(f"f{i}", [bytes(100)])
        time.sleep(0.002)  # times of files are no finer than the kernel's clock
    assert size(cache) == 1000
    assert cache.read("f0", 0, 1) is not None
    cache.put("new", [bytes(100)])
    assert names(cache) == {"f0", *(f"f{i}" for i in range(3, 10)), "new"}  # two gone: ROOM
    for i in range(50):
        cache.put(f"g{i}", [bytes(90)])
        assert size(cache) <= 1000


def test_a_lower_limit_holds_from_the_start_and_partial_files_are_removed(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    for i in range(10):
        cache.put(f"f{i}", [bytes(100)])
    (cache.folder / "files" / ".tmp-killed").write_bytes(bytes(500))
    (cache.folder / "bytes").write_text("")  # cut short by a crash
    smaller = NodeCache(tmp_path, 350)
    assert size(smaller) == 300
    assert ".tmp-killed" not in names(smaller)
    smaller.put("more", [bytes(50)])
    assert size(smaller) == 350


def test_a_lock_excludes_others_and_is_released_when_its_process_dies(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, held))
    holder.start()
    assert held.wait(60)
    entered = threading.Event()

    def enter() -> None:
        with cache.lock("a"):
            entered.set()

    waiter = threading.Thread(target=enter)
    waiter.start()
    assert not entered.wait(0.3)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    assert entered.wait(60)
    waiter.join()
    holder.join()


def _hold(folder: Path, held: threading.Event) -> None:
    with NodeCache(folder, 1000).lock("a"):
        held.set()
        time.sleep(600)


def test_a_full_disk_costs_the_cache_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = NodeCache(tmp_path, 1 << 20)
    cache.put("before", [b"here"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            for i in range(3):
                cache.put(f"large{i}", [bytes(4000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cache.is_full
    assert [r.message for r in caplog.records if "takes no more" in r.message] == [
        caplog.records[0].message
    ]
    assert str(tmp_path) in caplog.records[0].message
    assert names(cache) == {"before"}  # no partial files remain
    assert cache.read("before", 0, 4) == b"here"


def test_a_disk_that_is_full_from_the_start_costs_the_cache_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str, **options: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    NodeCache(tmp_path, 1000).put("before", [b"here"])
    monkeypatch.setattr(Path, "write_text", full)
    cache = NodeCache(tmp_path, 1000)
    assert cache.is_full
    assert "takes no more (No space left on device)" in caplog.text
    cache.put("more", [b"x"])
    assert cache.read("before", 0, 4) == b"here"
    assert cache.read("more", 0, 1) is None


def test_a_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data.cache_dir .*file/below cannot be used: Not a dir"):
        NodeCache(tmp_path / "file" / "below", 1000)
