"""Keep a training job going through kills, hangs, NaN storms and lost nodes.

    python pipelines/supervise.py -- deepspeed pipelines/pretrain.py --preset mdm_7b
    python pipelines/supervise.py -- torchrun --nproc-per-node 8 pipelines/pretrain.py ...

Everything after `--` is the command of one attempt; a fresh port is added to it each time. When an
attempt fails, all its processes are ended, what it left in /dev/shm is removed, and the next one
begins. `--restarts` counts failures in a row that brought the run no step further.

On several machines, start the same line on each of them, with the same hostfile and a shared folder
to meet in; each attempt is made of the nodes that are there, and of at least `--min_nodes`:

    srun python pipelines/supervise.py --hostfile hosts --meet /shared/meet --min_nodes 3 -- ...

To stop: SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to this process (all ranks save, then 75), or a file
named STOP in the run's folder (all ranks save, then 3).

Exit codes: 0 done, and the run's done.json says so; 1 the budget is used up; 2 a mistake that one
line explains; 3 ended by the file STOP: do not requeue; 75 asked to stop, and saved: requeue.
"""

from mdm.launch.job import job

import sys
from collections.abc import Iterable, Sequence

from mdm.launch.supervisor import Flags, Supervisor
from mdm.utils.command_line import fail, parse_cli


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """This program's own flags, and the command after `--`."""
    words = list(argv)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


@job("supervise")
def main(argv: Iterable[str] | None = None) -> int:
    """Run the job; returns its exit code."""
    own, command = split(list(sys.argv[1:] if argv is None else argv))
    flags = parse_cli(Flags, own, description=__doc__ or "")
    if not command:
        fail("supervise.py: no command: give it after `--` (--help shows examples)")
    return Supervisor(flags, command).run()


if __name__ == "__main__":
    sys.exit(main())
