"""A real S3 server (SeaweedFS) on loopback, for the demo, the tests and a first try.

`python pipelines/s3_server.py --dir DIR` prints variables to export and serves until interrupted.
"""

from mdm.launch.job import job

import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field

from mdm.config import doc
from mdm.storage import StoreError
from mdm.storage.server import S3Server
from mdm.utils.command_line import parse_cli


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    dir: str = field(metadata={"help": "folder of the objects"})
    port: int = doc(0, "port of the S3 endpoint; 0 picks a free one")
    bucket: str = doc("mdm-demo", "bucket to create")


@job("s3_server", StoreError)
def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    flags = parse_cli(Flags, description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt), S3Server(flags.dir, flags.port, flags.bucket) as server:
        for name, value in server.env.items():
            print(f"export {name}={value}", flush=True)
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
