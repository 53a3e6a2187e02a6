"""Export a committed checkpoint's weights for generation; any world size may have written it.

`python pipelines/export.py --checkpoint runs/demo/train/checkpoints/step-00003600 --out DIR`

The checkpoint may be in S3. `--out` gets config.json, model.safetensors, the tokenizer and a model
card, and loads with `Generator.from_pretrained(DIR)`, without DeepSpeed.
"""

from mdm.launch.job import job

import sys
from dataclasses import dataclass, field
from pathlib import Path

from mdm.checkpoint.export import KINDS, export_checkpoint
from mdm.config import doc
from mdm.storage import StoreError
from mdm.utils.command_line import parse_cli


@dataclass(frozen=True)
class Flags:
    """What to export, and where."""

    checkpoint: str = field(metadata={"help": "folder or s3:// prefix of one checkpoint"})
    out: str = field(metadata={"help": "folder to write"})
    weights: str = doc(
        "ema",
        "ema: averaged weights; ema2: the second average; raw: those of the last step. Of several, "
        "separated by commas, the first becomes model.safetensors, others model.<name>.safetensors",
    )
    tokenizer: str = doc("", "SentencePiece .model file, if the run's has moved")

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"--weights names {kind!r}; choose from {', '.join(KINDS)}")

    @property
    def kinds(self) -> list[str]:
        """The kinds of weights to export."""
        return self.weights.split(",")


@job("export", StoreError, ValueError)
def main() -> None:
    """Run the job."""
    flags = parse_cli(Flags, description=__doc__ or "")
    export_checkpoint(flags.checkpoint, Path(flags.out), flags.kinds, flags.tokenizer)


if __name__ == "__main__":
    sys.exit(main())
