"""Train the SentencePiece unigram tokenizer (Appendix D) on dialogues, captions and class names."""

from mdm.launch.job import job

import json
import sys
from pathlib import Path

from mdm.first_stage.train_tokenizer import TrainTokenizerConfig, train
from mdm.storage import StoreError
from mdm.storage.lease import hold_folder
from mdm.utils.command_line import parse_cli


@job("train_tokenizer", StoreError, ValueError)
def main(argv: list[str] | None = None) -> None:
    """Train, and print the report."""
    config = parse_cli(TrainTokenizerConfig, argv, description=__doc__ or "")
    with hold_folder(Path(config.out), "train_tokenizer.py"):
        report = train(config)
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
