"""List what a step consumed, or which steps consume a sample.

`--step N` lists the samples of step N: id, record, origin, shard, row, and for packed ones the row
that they share. `--sample ID` takes a sample id (source:row), a record's own id or its origin, and
lists the steps below `--steps` that use it. Give the run's values for the other flags.
"""

from mdm.launch.job import job

import json
import sys
from dataclasses import asdict, dataclass, field

from mdm.config import DataConfig, MixtureStageConfig, SourceConfig, doc
from mdm.data.manifest import ManifestError
from mdm.data.mixture import Mixture, open_mixture
from mdm.data.order import SampleOrder
from mdm.data.trace import find, locate, packs_of, uses
from mdm.storage import StoreError
from mdm.utils.command_line import parse_cli


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    data: str = field(metadata={"help": "folder or s3:// prefix of the encoded data sets"})
    sources: tuple[SourceConfig, ...] = field(
        metadata={"help": "the run's name:weight,name:weight; names are folders of --data"}
    )
    mixture_stages: tuple[MixtureStageConfig, ...] = doc(
        (), "the run's step=name:weight,...;step=..."
    )
    seed: int = doc(0, "the run's seed")
    global_batch: int = doc(64, "samples per step over all ranks; packed: rows")
    texts_per_row: int = doc(1, "text-only samples per row; above 1 they are packed")
    dialogue_length: int = doc(48, "text tokens of a packed row of text alone")
    images_per_row: int = doc(1, "samples with an image per row; above 1 they are packed")
    caption_length: int = doc(16, "longest text in tokens beside an image")
    shuffle_window: int = doc(4, "record batches shuffled together")
    step: int = doc(-1, "step to explain")
    sample: str = doc("", "sample to look for")
    steps: int = doc(10_000, "list the uses of --sample below this step")

    def __post_init__(self) -> None:
        if (self.step >= 0) == bool(self.sample):
            raise ValueError("give either --step N or --sample ID")


def explain_step(mixture: Mixture, flags: Flags) -> None:
    """Print one line of JSON per sample."""
    draw = SampleOrder(mixture, flags.seed).draw(flags.step)
    print(f"step {flags.step}: {draw.task}, {len(draw.ids)} samples", file=sys.stderr)
    length = flags.dialogue_length if draw.task == "text" else flags.caption_length
    packs = packs_of(mixture, draw, length)
    for trace in locate(mixture, draw.ids, draw.epochs.tolist(), packs):
        print(json.dumps(asdict(trace), ensure_ascii=False))


def explain_sample(mixture: Mixture, flags: Flags) -> None:
    """Print the sample's place, then one line of JSON per use."""
    known = flags.sample.rpartition(":")[0] in {s.name for s in mixture.sources}
    samples = [flags.sample] if known else find(mixture, flags.sample)
    if not samples:
        raise ValueError(f"no data set of the mixture has a record {flags.sample!r}")
    for trace in locate(mixture, samples):
        print(json.dumps(asdict(trace), ensure_ascii=False))
        for step, epoch in uses(mixture, flags.seed, trace.id, flags.steps):
            print(json.dumps({"id": trace.id, "step": step, "epoch": epoch}))


@job("explain", ManifestError, StoreError, ValueError)
def main() -> None:
    """Explain a step or a sample."""
    flags = parse_cli(Flags, description=__doc__)
    mixture = open_mixture(
        DataConfig(
            root=flags.data,
            sources=flags.sources,
            global_batch=flags.global_batch,
            shuffle_window=flags.shuffle_window,
            mixture_stages=flags.mixture_stages,
            texts_per_row=flags.texts_per_row,
            images_per_row=flags.images_per_row,
        )
    )
    (explain_step if flags.step >= 0 else explain_sample)(mixture, flags)


if __name__ == "__main__":
    sys.exit(main())
