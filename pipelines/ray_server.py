"""A small Ray cluster on loopback, shared by several encode jobs that would each start their own.

Prints the `export NAME=VALUE` lines that connect a job to it, and serves until SIGINT or SIGTERM.
"""

from mdm.launch.job import job

import os
import secrets
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass

from mdm.utils.command_line import parse_cli

# Ray reads these when it is imported. Only jobs that have the token may connect.
os.environ.pop("RAY_ADDRESS", None)
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

from mdm.preprocess import ray_executor


@dataclass(frozen=True)
class Flags:
    """This job has no flags: it uses all cores."""


@job("ray_server", ray_executor.RayFailedError)
def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parse_cli(Flags, description=__doc__ or "")
    with suppress(KeyboardInterrupt), ray_executor.cluster():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # replaces Ray's handler
        print(f"export RAY_ADDRESS={ray_executor.address()}")
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            print(f"export {name}={os.environ[name]}")
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
