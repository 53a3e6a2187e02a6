"""`pretrain.py`, with the last rank on a core that it shares with busy processes."""

import multiprocessing
import os
import sys

from pipelines import pretrain


def spin() -> None:
    while os.getppid() != 1:
        pass


if __name__ == "__main__":
    cores = sorted(os.sched_getaffinity(0))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    busy_processes = []
    if rank == size - 1:
        busy_processes = [multiprocessing.Process(target=spin, daemon=True) for _ in range(6)]
        for process in busy_processes:
            process.start()
    code = pretrain.main()
    for process in busy_processes:
        process.kill()
        process.join()
    sys.exit(code)
