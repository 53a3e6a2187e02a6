"""Encode a published data set into verified Arrow shards and a manifest, on Ray.

Interrupted anywhere, the same command continues from its receipts and writes the same manifest.
On a cluster, set RAY_ADDRESS; without it, Ray runs on this machine while the job runs.
`--plan` predicts what a run would write and how long it would take, and writes nothing.
"""

from mdm.launch.job import job

import json
import sys
from pathlib import Path

from mdm.data.manifest import ManifestError
from mdm.preprocess.encode import Flags, run
from mdm.preprocess.ray_executor import RayFailedError
from mdm.report.card import card_page
from mdm.sources.record import describe_fully
from mdm.storage import StoreError
from mdm.storage.lease import OtherJobError
from mdm.utils.command_line import fail, parse_cli
from mdm.utils.files import write_json


@job("encode", ManifestError, StoreError, ValueError, advice=": run it again to go on from here")
def main() -> int:
    """Encode and print the summary as one line of JSON."""
    flags = parse_cli(Flags, description=__doc__)
    try:
        summary = run(flags, card_page)
    except OtherJobError as error:
        print(f"encode: {error}", file=sys.stderr)
        return 1
    except (OSError, MemoryError) as error:
        fail(f"encode: {', '.join([describe_fully(error), *getattr(error, '__notes__', [])])}")
    except RayFailedError as error:
        fail(f"encode: {error}; run it again to go on from here")
    print(json.dumps(summary))
    if flags.report:
        write_json(Path(flags.report), summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
