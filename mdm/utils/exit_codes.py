"""Exit codes of all jobs; imports nothing, so that every job can begin with it."""

DONE = 0  # all steps are done
GAVE_UP = 1  # failed, or failed too often
MISTAKE = 2  # the user's to fix: one line says what
HALTED = 3  # by the run's stop file: do not restart before it is removed
HUNG = 70  # the watchdog ended it
ORPHANED = 71  # its supervisor is gone
REQUEUE = 75  # asked to stop, and saved: the same command continues (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C, and nothing was saved
