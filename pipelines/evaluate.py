"""Evaluate exported weights: numbers, sheets of images and texts, which MLflow gets too.

`python pipelines/evaluate.py --checkpoint runs/demo/train/export --data s3://mdm-demo/encoded`

`--data` holds the encoded data sets `digits` and `digits-val`. The job writes `metrics.json`,
`evaluation.json` and the sheets into `--out`.
"""

from mdm.launch.job import job

import json
import sys
from pathlib import Path

from mdm.report.evaluation import Flags, run
from mdm.storage import StoreError
from mdm.storage.lease import hold_folder
from mdm.utils.command_line import parse_cli


@job("evaluate", StoreError, ValueError)
def main() -> None:
    """Evaluate and print the numbers as one line of JSON."""
    flags = parse_cli(Flags, description=__doc__ or "")
    with hold_folder(Path(flags.out), "evaluate.py"):
        report = run(flags)
    print(json.dumps({k: round(v, 4) for k, v in report.items()}))


if __name__ == "__main__":
    sys.exit(main())
