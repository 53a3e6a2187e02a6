"""Keep a training job running through kills, hangs, NaN losses and lost nodes.

    python pipelines/supervise.py -- deepspeed pipelines/pretrain.py --preset mdm_7b
    python pipelines/supervise.py -- torchrun --nproc-per-node 8 pipelines/pretrain.py ...

Everything after `--` is the command of one attempt, to which a fresh port is added each time. When
an attempt fails, the supervisor ends all its processes, removes what they left in /dev/shm and
starts the next one. `--restarts` limits the failures in a row without progress.

On several machines, start the same line on each of them with the same hostfile and a shared
rendezvous folder. An attempt runs on the nodes that are present, at least `--min_nodes`:

    srun python pipelines/supervise.py --hostfile hosts --rendezvous /nfs/mdm --min_nodes 3 -- ...

To stop: SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to this process (all ranks save, then 75), or a file
named STOP in the run's folder (all ranks save, then 3).

Exit codes: 0 done, as the run's done.json confirms; 1 too many failures; 2 a mistake that one line
explains; 3 stopped by the file STOP: do not requeue; 75 stopped by a signal after saving: requeue.
"""

from mdm.launch.job import job

import sys

from mdm.launch.supervisor import Flags, Supervisor
from mdm.utils.command_line import fail, parse_cli


@job("supervise")
def main() -> int:
    """Run the job; returns its exit code."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    command = words[end + 1 :]
    flags = parse_cli(Flags, words[:end], description=__doc__ or "")
    if not command:
        fail("supervise.py: no command: give it after `--` (--help shows examples)")
    return Supervisor(flags, command).run()


if __name__ == "__main__":
    sys.exit(main())
