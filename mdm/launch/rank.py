"""How one rank of a run ends: its exit code, one line that says why, a report to its supervisor."""

from mdm.launch.job import one_line

import sys
import time
from collections.abc import Callable

from mdm.checkpoint.state import RunError
from mdm.data.resume import ResumeError
from mdm.storage import StoreError
from mdm.train.engine import stop_ranks
from mdm.train.heartbeat import report_end
from mdm.train.pretraining import RankError
from mdm.utils.exit_codes import GAVE_UP, MISTAKE
from mdm.utils.ranks import World


def run_rank(name: str, world: World, run: Callable[[], int]) -> int:
    """The exit code of `run`, one rank's part of the job `name`; reported with the reason."""
    try:
        code = run()
        report_end(code)
        return code
    except RankError as error:
        return _end_alone(name, world, MISTAKE, str(error))
    except (StoreError, OSError) as error:  # in the middle of the run
        return _end_alone(name, world, GAVE_UP, one_line(error))
    except (RunError, ResumeError, SystemExit) as error:  # the same on every rank
        if isinstance(error, SystemExit) and not error.code:  # --help
            raise
        reason = "" if isinstance(error, SystemExit) else str(error)
        code = int(getattr(error, "code", MISTAKE))
        report_end(code, reason)
        if not world.is_main:
            time.sleep(3)  # the launcher ends all ranks once one has ended: let rank 0 print first
        elif reason:
            sys.stderr.write(f"{name}: {reason}\n")
        return code
    except Exception as error:
        report_end(GAVE_UP, f"{type(error).__name__}: {error}")
        raise
    finally:
        stop_ranks()


def _end_alone(name: str, world: World, code: int, reason: str) -> int:
    """The exit code of a rank that ends for a reason of its own."""
    report_end(code, reason)
    sys.stderr.write(f"{name}: rank {world.rank}: {reason}\n")
    return code
