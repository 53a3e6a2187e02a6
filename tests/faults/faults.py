"""Faults that tests and drills share: environment variables, a wrong clock, kills."""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mdm.storage.server import S3Server

TARGETS = ("driver", "worker", "encoder", "raylet", "gcs_server", "S3 server")


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set these environment variables within the block."""
    saved = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def wrong_clock(folder: Path, seconds: int) -> dict[str, str]:
    """Environment variables that shift the wall clock of a process by `seconds`."""
    library = folder / "skewed_clock.so"
    source = Path(__file__).with_name("skewed_clock.c")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True
    )
    return {"LD_PRELOAD": str(library), "CLOCK_SKEW": str(seconds)}


def find_target(driver: int, name: str, rng: random.Random) -> psutil.Process | None:
    """A random process of this kind among the driver's children; None if there is none now."""
    try:
        children = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return None
    matching = [p for p in children if _is_kind(p, name)]
    return rng.choice(matching) if matching else None


def _is_kind(process: psutil.Process, name: str) -> bool:
    try:
        title = " ".join(process.cmdline()[:1])
    except psutil.Error:
        return False
    if name == "worker":
        return title.startswith("ray::") and "Encoder" not in title
    if name == "encoder":
        return title.startswith("ray::") and "Encoder" in title
    return title.endswith("/" + name)


def kill(target: str, driver: int, server: S3Server, rng: random.Random) -> bool:
    """Send SIGKILL to the target as soon as it exists; False if the job ended before that."""
    if target == "S3 server":
        server.kill()
        time.sleep(rng.uniform(0, 2))
        server.start()
        return True
    while psutil.pid_exists(driver):
        process = psutil.Process(driver)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        victim = process if target == "driver" else find_target(driver, target, rng)
        if victim is not None:
            victim.kill()
            return True
        time.sleep(0.05)
    return False
