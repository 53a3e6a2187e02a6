"""Exit codes of the jobs."""

DONE = 0  # all steps are done
GAVE_UP = 1  # failed, or failed too often
MISTAKE = 2  # for a person to mend: one line says what
HALTED = 3  # the stop file of the run asks for it: nobody should start it again before it is gone
HUNG = 70  # the watchdog ended it
ORPHANED = 71  # its supervisor is gone
REQUEUE = 75  # told to stop, and saved: the same command goes on (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C, and nothing was saved
