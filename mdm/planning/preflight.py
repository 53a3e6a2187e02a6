"""Checks before a long run: storage, disk, versions, configuration, network, and slow nodes.

All ranks take part; a rank that fails is named.
"""

import hashlib
import os
import platform
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from mdm.checkpoint.checkpoints import uri_of
from mdm.config import Config, fingerprint
from mdm.planning.memory_plan import shapes_of
from mdm.storage import StoreError, open_store
from mdm.utils.ranks import World, gather_to_all

PACKAGES = ("torch", "deepspeed", "numpy", "pyarrow", "boto3")
SLOW = 0.75  # of the median rate: below it a rank holds all others up
STATE_BYTES = 20  # of a checkpoint for a parameter: fp32 weights, two moments, average, and room
PROBE = b"preflight" * 1000


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    passed: bool
    detail: str


def preflight(config: Config, world: World, device: torch.device) -> list[Check]:
    """All checks, the same on every rank; all ranks call, after `start_ranks`."""
    found = [_versions(), _configuration(config), _disk(config)]
    for uri in dict.fromkeys((config.data.root, uri_of(config))):
        found.append(_storage(uri, world))
    return [*found, _all_reduce(world, device), _speed(device)]


def table(checks: Sequence[Check]) -> str:
    """The checks as aligned lines."""
    width = max(len(check.name) for check in checks)
    return "\n".join(
        f"{'ok' if c.passed else 'FAILED':<7} {c.name:<{width}}  {c.detail}" for c in checks
    )


def _same(name: str, value: Any, show: Callable[[Any], str] = str) -> Check:
    """Passed if all ranks have one value; else it names those that differ from the commonest."""
    values = gather_to_all(value)
    usual, _ = Counter(values).most_common(1)[0]
    others = [f"rank {rank} has {show(v)}" for rank, v in enumerate(values) if v != usual]
    detail = show(usual) + ("" if not others else f", but {'; '.join(others)}")
    return Check(name, not others, detail)


def _versions() -> Check:
    found = (("python", platform.python_version()), *((p, version(p)) for p in PACKAGES))
    return _same("versions", found, lambda pairs: ", ".join(" ".join(pair) for pair in pairs))


def _configuration(config: Config) -> Check:
    """The configuration and the text of its DeepSpeed JSON, as one digest."""
    path = Path(config.train.deepspeed)
    text = path.read_bytes() if path.exists() else b""
    digest = hashlib.sha256(fingerprint(config).encode() + text)
    return _same("configuration", digest.hexdigest())


def _disk(config: Config) -> Check:
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    # One more than is kept: the next is written before the oldest goes.
    parameters = shapes_of(config).total
    needed = STATE_BYTES * parameters * (config.train.keep + 1)
    least = min(gather_to_all((free, socket.gethostname())))
    detail = f"{least[0] / 1e9:,.1f} GB free on {least[1]}, checkpoints need {needed / 1e9:,.1f}"
    return Check(f"disk {folder}", least[0] >= needed, detail)


def _storage(uri: str, world: World) -> Check:
    """Every rank writes an object of its own, reads it back and deletes it."""
    key = f"preflight/{socket.gethostname()}-{world.rank}-{os.getpid()}"
    start, problem = time.perf_counter(), ""
    try:
        store = open_store(uri)
        store.put(key, PROBE)
        if store.get(key) != PROBE:
            problem = "read back something else than was written"
        store.delete(key)
    except (StoreError, OSError, ValueError) as error:
        problem = str(error)
    seconds = time.perf_counter() - start
    results = gather_to_all((problem, seconds))
    broken = [f"rank {rank}: {said}" for rank, (said, _) in enumerate(results) if said]
    slowest = max(s for _, s in results)
    detail = "; ".join(broken) or f"written, read and deleted by all in {slowest:.2f} s"
    return Check(f"storage {uri}", not broken, detail)


def _all_reduce(world: World, device: torch.device) -> Check:
    numbers = torch.full((2**22,), float(world.rank + 1), device=device)
    torch.distributed.all_reduce(numbers.clone())  # the first one makes connections
    start = time.perf_counter()
    torch.distributed.all_reduce(numbers)
    right = bool((numbers == world.size * (world.size + 1) / 2).all())
    seconds = time.perf_counter() - start
    slowest = max(gather_to_all(seconds))
    agreed = all(gather_to_all(right))
    size = numbers.numel() * numbers.element_size() / 1e6
    return Check(
        "all-reduce",
        agreed,
        f"{size:.0f} MB over {world.size} ranks in {1000 * slowest:.1f} ms"
        + ("" if agreed else ", with a WRONG sum"),
    )


def _speed(device: torch.device) -> Check:
    rates = gather_to_all((matmul_rate(device), socket.gethostname()))
    return judge_rates(rates)


def judge_rates(rates: Sequence[tuple[float, str]]) -> Check:
    """Names the ranks whose rate (in FLOP/s, with their host) lies far below the median."""
    median = statistics.median_high(rate for rate, _ in rates)
    slow = [
        f"rank {rank} on {host} reaches {rate / median:.0%} of that"
        for rank, (rate, host) in enumerate(rates)
        if rate < SLOW * median
    ]
    detail = f"median {median / 1e12:.3f} TFLOP/s a rank" + "".join(f"; {s}" for s in slow)
    return Check("slow nodes", not slow, detail)


def matmul_rate(device: torch.device, seconds: float = 1.0) -> float:
    """FLOP/s of bf16 products of matrices on `device`, over about `seconds`."""
    on_cpu = device.type == "cpu"
    n = 512 if on_cpu else 8192
    a = torch.randn(n, n, device=device, dtype=torch.float32 if on_cpu else torch.bfloat16)
    for _ in range(3):
        a @ a
    _wait(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ a
        _wait(device)
        count += 1
    return 2 * n**3 * count / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":  # not run: no GPU
        torch.cuda.synchronize(device)
