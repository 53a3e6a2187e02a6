"""A small Ray on loopback for several encode jobs, which otherwise start one each.

Prints `export RAY_ADDRESS=...` and serves until SIGINT or SIGTERM.
"""

from pipelines.start import job

import signal
import sys
from contextlib import suppress
from dataclasses import dataclass

from mdm.cli import parse_cli
from pipelines import encode_on_ray


@dataclass(frozen=True)
class Flags:
    """This job has no flags: it takes all cores."""


@job("ray_server", encode_on_ray.RayFailedError)
def main() -> int:
    """Serve until SIGINT or SIGTERM."""
    parse_cli(Flags, description=__doc__ or "", default=Flags())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt), encode_on_ray.cluster():
        print(f"export RAY_ADDRESS={encode_on_ray.address()}", flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
