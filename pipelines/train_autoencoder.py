"""Train a small AutoencoderKL on the training images of one or more data sets.

Writes a folder in diffusers' format, `autoencoder.json` (figures) and `reconstructions.png`
(held-out images above their reconstructions).
"""

from mdm.launch.job import job

import json
import sys
from pathlib import Path

from mdm.first_stage.train_autoencoder import TrainAutoencoderConfig, train
from mdm.storage import StoreError
from mdm.storage.lease import hold_folder
from mdm.utils.command_line import parse_cli


@job("train_autoencoder", StoreError, ValueError)
def main(argv: list[str] | None = None) -> None:
    """Train, and print the figures."""
    config = parse_cli(TrainAutoencoderConfig, argv, description=__doc__ or "")
    with hold_folder(Path(config.out), "train_autoencoder.py"):
        report = train(config)
    print(json.dumps({k: v for k, v in report.items() if k != "losses"}))


if __name__ == "__main__":
    sys.exit(main())
