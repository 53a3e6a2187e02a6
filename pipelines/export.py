"""Export a committed checkpoint's weights for generation, whatever world size wrote it.

`python pipelines/export.py --checkpoint runs/demo/train/checkpoints/step-00004000 --out DIR`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from mdm.config import doc, fail, parse_cli
from mdm.train.export import export_checkpoint
from mdm.train.state import RunError


@dataclass(frozen=True)
class Flags:
    """What to export, and to where."""

    checkpoint: str
    out: str
    weights: str = doc("ema", "ema: averaged weights; raw: the last step's")

    def __post_init__(self) -> None:
        if self.weights not in ("ema", "raw"):
            raise ValueError(f"--weights is {self.weights!r}; choose ema or raw")


def main() -> int:
    """Run the job; returns its exit code."""
    flags = parse_cli(Flags, description=__doc__ or "")
    try:
        export_checkpoint(Path(flags.checkpoint), Path(flags.out), ema=flags.weights == "ema")
    except RunError as error:
        fail(f"export: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
