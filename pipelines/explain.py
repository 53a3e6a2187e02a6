"""Say what a step consumed, or which steps consume a sample.

`--step N` lists the samples of step N: id, record, origin, shard, row. `--sample ID` takes a
sample id (source:row) or a record's own id, and lists the steps below `--steps` that use it.
"""

import json
import sys
from dataclasses import asdict, dataclass, field

from tqdm import tqdm

from mdm.config import DataConfig, SourceConfig, doc, fail, parse_cli
from mdm.data.manifest import ManifestError
from mdm.data.mixture import Mixture, open_mixture
from mdm.data.order import Order
from mdm.data.storage import StoreError
from mdm.data.trace import find, locate, uses


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    data: str = field(metadata={"help": "folder or s3:// prefix of the encoded data sets"})
    sources: tuple[SourceConfig, ...] = field(
        metadata={"help": "the run's name:weight,name:weight; names are folders of --data"}
    )
    seed: int = doc(0, "the run's seed")
    global_batch: int = doc(64, "samples a step, over all ranks")
    window: int = doc(4, "record batches shuffled together")
    step: int = doc(-1, "step to explain")
    sample: str = doc("", "sample to look for")
    steps: int = doc(10_000, "how many steps to search for --sample")

    def __post_init__(self) -> None:
        if (self.step >= 0) == bool(self.sample):
            raise ValueError("give either --step N or --sample ID")


def explain_step(mixture: Mixture, flags: Flags) -> None:
    """One line of JSON a sample."""
    draw = Order(mixture, flags.seed).draw(flags.step)
    print(f"step {flags.step}: {draw.task}, {len(draw.ids)} samples", file=sys.stderr)
    for trace in locate(mixture, draw.ids, draw.epochs.tolist()):
        print(json.dumps(asdict(trace), ensure_ascii=False))


def explain_sample(mixture: Mixture, flags: Flags) -> None:
    """The sample's place, then one line of JSON a use."""
    known = flags.sample.rpartition(":")[0] in {s.name for s in mixture.sources}
    samples = [flags.sample] if known else find(mixture, flags.sample)
    if not samples:
        raise ValueError(f"no data set of the mixture has a record {flags.sample!r}")
    for trace in locate(mixture, samples):
        print(json.dumps(asdict(trace), ensure_ascii=False))
        for step, epoch in tqdm(uses(mixture, flags.seed, trace.id, flags.steps), leave=False):
            print(json.dumps({"id": trace.id, "step": step, "epoch": epoch}))


def main() -> int:
    """Explain a step or a sample."""
    flags = parse_cli(Flags, description=__doc__)
    try:
        mixture = open_mixture(
            DataConfig(
                root=flags.data,
                sources=flags.sources,
                global_batch=flags.global_batch,
                window=flags.window,
            )
        )
        (explain_step if flags.step >= 0 else explain_sample)(mixture, flags)
    except (ManifestError, StoreError, ValueError) as error:
        fail(f"explain: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
