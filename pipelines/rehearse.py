"""Rehearse a large run on one CPU: `python pipelines/rehearse.py --preset mdm_7b --world_size 64`.

Prints what uses one GPU's memory, whether it fits and what to change if not, and what the run would
cost; then builds the real model as one rank of the run with the real ZeRO engine and takes a step.
"""

from mdm.launch.job import job

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mdm.checkpoint.state import RunError
from mdm.config import Config, config_of, doc
from mdm.planning import rehearsal
from mdm.planning.cost import Cluster
from mdm.planning.memory_plan import GIB, plan
from mdm.presets import PRESETS
from mdm.utils.command_line import fail, parse_cli
from mdm.utils.fields import NOT_NEGATIVE, POSITIVE, SHARE, check_fields
from mdm.utils.files import write_json
from mdm.utils.gpu import peak_flops

UNITS = {"": 1, "GB": 10**9, "GiB": GIB, "MB": 10**6, "MiB": 2**20}


@dataclass(frozen=True)
class Flags(Config):
    """A run's configuration, the machines that it is meant for, and what they cost."""

    preset: str = doc("", f"required, one of {', '.join(PRESETS)}: what the other flags change")
    world_size: int = doc(64, "GPUs of the run", POSITIVE)
    gpus_per_node: int = doc(8, "GPUs that share a node", POSITIVE)
    gpu_memory: str = doc(
        "80GiB", "memory of one GPU in GiB, GB, MiB or MB; a bare number is bytes"
    )
    gpu: str = doc("H100", "its name, for its dense bf16 peak")
    mfu: float = doc(0.4, "share of that peak that the model's own FLOPs reach", SHARE)
    price: float = doc(2.5, "dollars per GPU and hour")
    network: float = doc(50.0, "GB/s that one GPU can send to other nodes", POSITIVE)
    text_share: float = doc(0.2, "share of steps on text alone", SHARE)
    step_tokens: int = doc(16, "text tokens of the rank's step; 0: take no step", NOT_NEGATIVE)
    threads: int = doc(2, "CPU threads", POSITIVE)
    out: str = doc("runs/rehearsal/report.json", "file of the report")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        parse_size(self.gpu_memory)
        if not self.mfu:
            raise ValueError("--mfu is 0; it must be positive")


def parse_size(text: str) -> int:
    """Bytes of `80GiB`."""
    size = re.fullmatch(r"([\d.]+)\s*(\w*)", text)
    if size is None or size[2] not in UNITS:
        raise ValueError(f"--gpu_memory {text!r} is no size; write 80GiB, 80GB or 81920MiB")
    return int(float(size[1]) * UNITS[size[2]])


@job("rehearse", RunError)
def main() -> None:
    """Run the job."""
    flags = parse_cli(Flags, description=__doc__ or "", presets=PRESETS)
    config = config_of(flags)
    torch.set_num_threads(flags.threads)
    memory = parse_size(flags.gpu_memory)
    peak = peak_flops(flags.gpu)
    if peak is None:
        fail(f"rehearse: --gpu {flags.gpu} is not known")
    memory_plan = plan(config, flags.world_size)
    verdict = rehearsal.judge(memory_plan, memory)
    print(rehearsal.plan_text(memory_plan, verdict), flush=True)
    cluster = Cluster(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(Cluster)})
    runs = rehearsal.costs(config, cluster, peak)
    print(f"\n{rehearsal.costs_text(runs, cluster)}", flush=True)
    built = None
    if flags.step_tokens:
        built = rehearsal.rehearse(config, flags.world_size, flags.step_tokens)
        print(f"\n{rehearsal.built_text(built)}")
    write_json(Path(flags.out), rehearsal.report(memory_plan, verdict, runs, built))
    print(f"\n{flags.out}")


if __name__ == "__main__":
    sys.exit(main())
