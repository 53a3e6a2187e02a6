"""Rehearse a large run on one CPU: `python pipelines/rehearse.py --preset mdm_7b --world-size 64`.

Prints where one GPU's memory goes, whether it fits and what to change if not, builds the real model
as one rank of the run with the real ZeRO engine and takes a step, and says what the run would cost.
"""

from mdm.launch.job import job

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mdm.checkpoint.state import RunError
from mdm.config import Config, doc, fields_of
from mdm.model.attention import AttentionBlock
from mdm.model.decoder import Block
from mdm.planning.cost import Cluster
from mdm.planning.memory_plan import GIB, plan
from mdm.planning.rehearsal import (
    built_text,
    costs,
    costs_text,
    judge,
    plan_text,
    rehearse,
    report,
)
from mdm.presets import PRESETS
from mdm.utils.command_line import fail, parse_cli
from mdm.utils.files import write_json
from mdm.utils.gpu import peak_flops

UNITS = {"": 1, "GB": 10**9, "GiB": GIB, "MB": 10**6, "MiB": 2**20}


@dataclass(frozen=True)
class Flags(Config):
    """A run's configuration, the machines that it is meant for, and what they cost."""

    world_size: int = doc(64, "GPUs of the run")
    gpus_per_node: int = doc(8, "GPUs that share a node")
    gpu_memory: str = doc("80GiB", "memory of one GPU; GB and MiB are units too")
    gpu: str = doc("H100", "its name, for its dense bf16 peak")
    mfu: float = doc(0.4, "share of that peak that the model's own FLOPs reach")
    price: float = doc(2.5, "dollars for one GPU and hour")
    network: float = doc(50.0, "GB/s that one GPU can send to other nodes")
    text_share: float = doc(0.2, "share of the samples that are text alone")
    step_tokens: int = doc(16, "tokens of the text that the rank takes a step on; 0: plan only")
    threads: int = doc(2, "CPU threads")
    out: str = doc("runs/rehearsal/report.json", "where the report goes")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.gpu_memory)
        if not 0 < self.mfu <= 1 or not 0 <= self.text_share <= 1:
            raise ValueError(
                f"--mfu {self.mfu} and --text_share {self.text_share} are shares, up to 1"
            )
        for name in ("world_size", "gpus_per_node", "network", "threads"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be positive")
        if self.step_tokens < 0:
            raise ValueError(f"--step_tokens is {self.step_tokens}; it must not be negative")


def parse_size(text: str) -> int:
    """Bytes of `80GiB`."""
    found = re.fullmatch(r"([\d.]+)\s*(\w*)", text)
    if found is None or found[2] not in UNITS:
        raise ValueError(f"--gpu_memory {text!r} is no size; write 80GiB, 80GB or 81920MiB")
    return int(float(found[1]) * UNITS[found[2]])


@job("rehearse", RunError)
def main() -> int:
    """Run the job; returns its exit code."""
    presets = {name: Flags(**fields_of(preset)) for name, preset in PRESETS.items()}  # type: ignore[arg-type]
    argv = [
        re.sub(r"^--[\w.-]+", lambda m: "--" + m[0][2:].replace("-", "_"), w) for w in sys.argv[1:]
    ]
    flags = parse_cli(Flags, argv, description=__doc__ or "", presets=presets)
    config = Config(**fields_of(flags))  # type: ignore[arg-type]
    torch.set_num_threads(flags.threads)
    memory = parse_size(flags.gpu_memory)
    peak = peak_flops(flags.gpu)
    if peak is None:
        fail(f"rehearse: --gpu {flags.gpu} is not known")
    memory_plan = plan(config, flags.world_size)
    verdict = judge(memory_plan, memory)
    print(plan_text(memory_plan, verdict), flush=True)
    cluster = Cluster(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(Cluster)})
    runs = costs(config, cluster, peak)
    print(f"\n{costs_text(runs, cluster)}", flush=True)
    built = None
    if flags.step_tokens:
        classes = (Block, AttentionBlock)
        built = rehearse(config, flags.world_size, flags.step_tokens, classes)
        print(f"\n{built_text(built)}")
    write_json(Path(flags.out), report(memory_plan, verdict, runs, built))
    print(f"\n{flags.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
