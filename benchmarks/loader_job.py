"""One contestant of the loader benchmarks, in a process of its own.

    python loader_job.py write FORMAT TO                # write its data set with its own writer
    python loader_job.py read CONTESTANT FROM SCRATCH   # read it; prints one line of JSON

It runs under the project's Python and under that of the peers, so packages are imported where they
are used.
"""

import gc
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks.loader_contestant import Contestant
from benchmarks.loader_others import (
    HuggingFace,
    HuggingFaceParquet,
    LitData,
    MosaicML,
    WebDataset,
    write_huggingface,
    write_huggingface_parquet,
    write_litdata,
    write_mosaicml,
    write_webdataset,
)
from benchmarks.loader_ours import Memcpy, Ours, PlainIpc, write_ours
from benchmarks.loader_samples import SAMPLES, Check

PASSES = 1  # that are timed, after one that is checked and gives the time of the first batch

CONTESTANTS: dict[str, Callable[[str, Path], Contestant]] = {
    "ours": Ours,
    "ours, one window": lambda at, scratch: Ours(at, scratch, window=1 << 20),
    "memcpy": Memcpy,
    "plain Arrow IPC": PlainIpc,
    "HF datasets": HuggingFace,
    "HF datasets, parquet": HuggingFaceParquet,
    "LitData": LitData,
    "MosaicML Streaming": MosaicML,
    "WebDataset": WebDataset,
}
WRITERS: dict[str, Callable[[str], None]] = {
    "arrow": write_ours,
    "huggingface": write_huggingface,
    "parquet": write_huggingface_parquet,
    "litdata": write_litdata,
    "mosaicml": write_mosaicml,
    "webdataset": write_webdataset,
}


# ---- measuring


def cpu_seconds() -> float:
    """CPU seconds of this process and its children, ended and alive."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in _children(os.getpid()):
        try:
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # the child has just ended
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _children(pid: int) -> Iterable[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        for child in children:
            yield child
            yield from _children(child)


def peak_mib() -> float:
    """Peak memory of this process, which is where batches are assembled."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read(name: str, at: str, scratch: Path) -> dict[str, float | None]:
    """The figures of one contestant."""
    torch.set_num_threads(1)
    contestant = CONTESTANTS[name](at, scratch)
    check, first = Check(), None
    before = peak_mib()
    began = time.perf_counter()
    for tokens, latents in contestant.open(0):
        first = first or time.perf_counter() - began
        two = latents[:, 0, :2]
        bits = two.view(torch.int16) if two.dtype == torch.bfloat16 else two
        check.add(tokens[:, :2].numpy(), bits.numpy())
    check.finish()
    times, cpu = [], []
    for number in range(1, 1 + PASSES):
        gc.collect()
        spent, began = cpu_seconds(), time.perf_counter()
        count = sum(len(tokens) for tokens, _ in contestant.open(number))
        times.append(time.perf_counter() - began)
        cpu.append(cpu_seconds() - spent)
        if count != SAMPLES:
            raise RuntimeError(f"{name}: {count} samples")
    resume = None
    if contestant.resume is not None:
        began = time.perf_counter()
        next(contestant.resume())
        resume = time.perf_counter() - began
    contestant.close()
    return {
        "samples_per_second": SAMPLES / sorted(times)[PASSES // 2],
        "cpu_us_per_sample": 1e6 * sorted(cpu)[PASSES // 2] / SAMPLES,
        "first_batch_s": first,
        "resume_s": resume,
        "peak_rss_mib": peak_mib(),
        "rss_before_mib": before,
    }


def main() -> None:
    mode, name, at = sys.argv[1:4]
    if mode == "write":
        WRITERS[name](at)
        return
    scratch = Path(sys.argv[4])
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        print(json.dumps(read(name, at, scratch)), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    # Some peers leave threads running that keep a finished process from exiting.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
