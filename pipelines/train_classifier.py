"""Train the independent classifier that judges the demo's images on real images, and measure it.

Writes `classifier.safetensors` and `classifier.json`: its accuracy on held-out images, as they
are and through the autoencoder, and how many other images it takes for a class.
"""

from mdm.launch.job import job

import json
import sys
from pathlib import Path

from mdm.evaluate.train_classifier import Flags, run
from mdm.storage import StoreError
from mdm.storage.lease import hold_folder
from mdm.utils.command_line import parse_cli


@job("train_classifier", StoreError, ValueError)
def main() -> None:
    """Train and print the report."""
    flags = parse_cli(Flags, description=__doc__ or "")
    with hold_folder(Path(flags.out), "train_classifier.py"):
        report = run(flags)
    print(json.dumps({k: round(v, 4) for k, v in report.items()}))


if __name__ == "__main__":
    sys.exit(main())
