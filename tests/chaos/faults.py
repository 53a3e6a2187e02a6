"""Faults that tests and drills share: a wrong clock, a full disk, a spoilt network."""

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
    """These variables for as long as it lasts."""
    saved = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def wrong_clock(folder: Path, seconds: int) -> dict[str, str]:
    """The environment of a process whose clock is wrong by that much."""
    library = folder / "skewed_clock.so"
    source = Path(__file__).with_name("skewed_clock.c")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True
    )
    return {"LD_PRELOAD": str(library), "CLOCK_SKEW": str(seconds)}


def find_target(driver: int, name: str, rng: random.Random) -> psutil.Process | None:
    """A process of the encode job of this driver by what it is; None where there is none now."""
    try:
        family = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return None
    found = [p for p in family if _is(p, name)]
    return rng.choice(found) if found else None


def _is(process: psutil.Process, name: str) -> bool:
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
    """SIGKILL the target once it is there; False if the job ended before."""
    if target == "S3 server":
        server.kill()
        time.sleep(rng.uniform(0, 2))
        server.start()
        return True
    while psutil.pid_exists(driver):
        if psutil.Process(driver).status() == psutil.STATUS_ZOMBIE:
            return False
        found = psutil.Process(driver) if target == "driver" else find_target(driver, target, rng)
        if found is not None:
            found.kill()
            return True
        time.sleep(0.05)
    return False
