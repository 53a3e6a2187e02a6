"""Runs a command so that none of its processes outlives it, or the process that started it.

    python mdm/launch/processes.py PARENT_PID COMMAND [ARGUMENT ...]

Launchers and daemons start processes in sessions of their own, where neither a closed terminal nor
a killed parent reaches them. This process adopts them (as Linux's child subreaper) and ends them
all: after the command has ended, on SIGTERM or SIGINT, and when its parent dies in whatever way.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

# For jobs on CPUs; the Makefile says why threads spin that long.
CPU_ENV = {"DS_ACCELERATOR": "cpu", "GOMP_SPINCOUNT": "5000"}
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent dies (Linux only)."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans (Linux only)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def _end(processes: list[psutil.Process], signum: int, grace: float) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)
    psutil.wait_procs(processes, timeout=grace)


def end_descendants() -> None:
    """Send SIGTERM to all descendants, and SIGKILL to those still there after a few seconds."""
    here = psutil.Process()
    _end(here.children(recursive=True), signal.SIGTERM, grace=5.0)
    # Children of the processes killed here are adopted only now.
    for _ in range(20):
        if not (left := here.children(recursive=True)):
            return
        _end(left, signal.SIGKILL, 1.0)


def _ignore_signals() -> None:
    for signum in _STOPPING:
        signal.signal(signum, signal.SIG_IGN)


class _Stopped(Exception):
    """A signal asked this process to end."""


def keep(parent: int, command: list[str]) -> int:
    """Run `command` to its end and return its exit code (128 + signal if one ended it)."""

    def stop(signum: int, frame: object) -> None:
        _ignore_signals()  # the death of a parent with threads is signalled more than once
        raise _Stopped(signum)

    for signum in _STOPPING:
        signal.signal(signum, stop)
    code = 1
    try:
        adopt_orphans()
        die_with_parent(signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            return 128 + signal.SIGTERM
        code = subprocess.Popen(
            command, start_new_session=True, preexec_fn=lambda: die_with_parent(signal.SIGKILL)
        ).wait()
    except _Stopped as stopped:
        code = -int(stopped.args[0])
    except FileNotFoundError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error.strerror}\n")
        code = 127
    _ignore_signals()  # nothing may interrupt what follows
    end_descendants()
    return code if code >= 0 else 128 - code


def supervised(
    command: Sequence[str], *, env: Mapping[str, str], **streams: Any
) -> "subprocess.Popen[str]":
    """Start `command` under a process that ends all of the command's processes on SIGTERM.

    `env` adds to this process's environment. The calling thread must outlive the command.
    """
    keeper = [sys.executable, __file__, str(os.getpid()), *command]
    return subprocess.Popen(keeper, env=os.environ | env, text=True, encoding="utf-8", **streams)


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))
