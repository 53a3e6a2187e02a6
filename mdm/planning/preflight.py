"""Checks before a long run: versions, configuration, memory, disk, storage, network, slow nodes.

All ranks take part; a rank that fails is named.
"""

import hashlib
import os
import platform
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed

from mdm.checkpoint.checkpoints import uri_of
from mdm.config import Config
from mdm.planning.memory_plan import GIB, MemoryPlan, changes_that_fit, plan, shapes_of
from mdm.storage import StoreError, open_store
from mdm.utils.ranks import World, gather_to_all
from mdm.utils.saved_config import fingerprint

PACKAGES = ("torch", "deepspeed", "numpy", "pyarrow", "boto3")
SLOW = 0.75  # of the median rate: a slower rank delays all others
STATE_BYTES = 20  # of a checkpoint a parameter: fp32 weights, two moments, average, and spare
PROBE = b"preflight" * 1000


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    passed: bool
    detail: str
    warning: bool = False  # passed, but a person should look at it

    @property
    def verdict(self) -> str:
        """One word."""
        if not self.passed:
            return "FAILED"
        return "WARNING" if self.warning else "ok"


def preflight(config: Config, world: World, device: torch.device) -> list[Check]:
    """All checks, the same on every rank; all ranks must call, after `start_ranks`.

    Raises RunError for settings that the engine refuses.
    """
    checks = [_versions(), _configuration(config), _memory(config, world, device), _disk(config)]
    for uri in dict.fromkeys((config.data.root, uri_of(config))):
        checks.append(_storage(uri, world))
    checks.append(_all_reduce(world, device))
    return [*checks, judge_rates(gather_to_all((matmul_rate(device), socket.gethostname())))]


def table(checks: Sequence[Check]) -> str:
    """The checks as aligned lines."""
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{c.verdict:<7} {c.name:<{width}}  {c.detail}" for c in checks)


def _same(name: str, value: Any, show: Callable[[Any], str] = str) -> Check:
    """Passes if all ranks have the same value; else it names the ranks in the minority."""
    values = gather_to_all(value)
    usual = statistics.mode(values)
    others = [f"rank {rank} has {show(v)}" for rank, v in enumerate(values) if v != usual]
    detail = show(usual) + ("" if not others else f", but {'; '.join(others)}")
    return Check(name, not others, detail)


def _versions() -> Check:
    versions = (("python", platform.python_version()), *((p, version(p)) for p in PACKAGES))
    return _same("versions", versions, lambda pairs: ", ".join(" ".join(pair) for pair in pairs))


def _configuration(config: Config) -> Check:
    """Compares a digest of the configuration and of its DeepSpeed JSON."""
    path = Path(config.train.deepspeed)
    text = path.read_bytes() if path.exists() else b""
    digest = hashlib.sha256(fingerprint(config).encode() + text)
    return _same("configuration", digest.hexdigest())


def _memory(config: Config, world: World, device: torch.device) -> Check:
    """Whether the memory plan fits the rank with the least memory."""
    on_gpu, host = device.type == "cuda", socket.gethostname()
    if on_gpu:  # not run: no GPU
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = psutil.virtual_memory().total // gather_to_all(host).count(host)
    memory, host = min(gather_to_all((memory, host)))
    return judge_memory(plan(config, world.size), memory, host, on_gpu)


def judge_memory(memory_plan: MemoryPlan, memory: int, host: str, on_gpu: bool) -> Check:
    """Fails if the plan needs more than the `memory` bytes that a rank has on `host`.

    On a CPU that is a warning only: the plan is for a GPU, and limits of the CPU are not known.
    """
    detail = f"a rank needs {memory_plan.total / GIB:,.1f} GiB, {memory / GIB:,.1f} are on {host}"
    if memory_plan.total <= memory:
        return Check("memory", True, detail)
    changes = changes_that_fit(memory_plan, memory) or ["more memory: no single change suffices"]
    detail += f"; it would fit with {', or '.join(changes)}"
    if not on_gpu:
        detail += " (planned for a GPU: on this CPU it may be less)"
    return Check("memory", not on_gpu, detail, warning=not on_gpu)


def _disk(config: Config) -> Check:
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    # One more than is kept: the next is written before the oldest is removed.
    needed = STATE_BYTES * shapes_of(config).total * (config.train.keep + 1)
    least = min(gather_to_all((free, socket.gethostname())))
    detail = f"{least[0] / 1e9:,.1f} GB free on {least[1]}, checkpoints need {needed / 1e9:,.1f}"
    return Check(f"disk {folder}", least[0] >= needed, detail)


def _storage(uri: str, world: World) -> Check:
    """Each rank writes an object of its own, reads it back and deletes it."""
    key = f"preflight/{socket.gethostname()}-{world.rank}-{os.getpid()}"
    start, problem = time.perf_counter(), ""
    try:
        store = open_store(uri)
        store.put(key, PROBE)
        if store.get(key) != PROBE:
            problem = "the object read back differs from the one written"
        store.delete(key)
    except (StoreError, OSError, ValueError) as error:
        problem = str(error)
    seconds = time.perf_counter() - start
    results = gather_to_all((problem, seconds))
    broken = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(results) if error]
    slowest = max(s for _, s in results)
    detail = "; ".join(broken) or f"all ranks wrote, read and deleted in {slowest:.2f} s"
    return Check(f"storage {uri}", not broken, detail)


def _all_reduce(world: World, device: torch.device) -> Check:
    numbers = torch.full((2**22,), float(world.rank + 1), device=device)
    torch.distributed.all_reduce(numbers.clone())  # the first call makes the connections
    start = time.perf_counter()
    torch.distributed.all_reduce(numbers)
    right = bool((numbers == world.size * (world.size + 1) / 2).all())
    results = gather_to_all((right, time.perf_counter() - start))
    agreed, slowest = all(right for right, _ in results), max(seconds for _, seconds in results)
    detail = f"{numbers.nbytes / 1e6:.0f} MB over {world.size} ranks in {1000 * slowest:.1f} ms"
    return Check("all-reduce", agreed, detail + ("" if agreed else ", with a WRONG sum"))


def judge_rates(rates: Sequence[tuple[float, str]]) -> Check:
    """Fails for ranks far below the median; `rates` has each rank's FLOP/s and host."""
    median = statistics.median_high(rate for rate, _ in rates)
    slow = [
        f"rank {rank} on {host} reaches {rate / median:.0%} of that"
        for rank, (rate, host) in enumerate(rates)
        if rate < SLOW * median
    ]
    detail = f"median {median / 1e12:.3f} TFLOP/s a rank" + "".join(f"; {s}" for s in slow)
    return Check("slow nodes", not slow, detail)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of bf16 matrix products (fp32 on a CPU), measured for about a second."""
    on_cpu = device.type == "cpu"
    n = 512 if on_cpu else 8192
    a = torch.randn(n, n, device=device, dtype=torch.float32 if on_cpu else torch.bfloat16)

    def multiply() -> None:
        (a @ a)[0, 0].item()  # waits for the device

    for _ in range(3):
        multiply()
    start, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < 1:
        multiply()
        count += 1
    return 2 * n**3 * count / taken
