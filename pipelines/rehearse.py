"""Rehearse a large run on one CPU: `python pipelines/rehearse.py --preset mdm_7b --world-size 64`.

Prints where one GPU's memory goes, whether it fits and what to change if not, builds the real model
as one rank of the run with the real ZeRO engine and takes a step, and says what the run would cost.
"""

from mdm.launch.job import job

import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mdm.checkpoint.state import RunError
from mdm.config import Config, doc, fields_of
from mdm.model.attention import AttentionBlock
from mdm.model.decoder import Block
from mdm.planning.cost import Estimate, estimate
from mdm.planning.footprint import STATES
from mdm.planning.gpu_check import peak_flops
from mdm.planning.memory_plan import GIB, Ledger, plan, remedies, shapes_of
from mdm.planning.rehearsal import Rehearsal, rehearse
from mdm.presets import PRESETS
from mdm.train.engine import load_deepspeed_config, zero_settings
from mdm.utils.command_line import fail, parse_cli

# Training samples as published: ImageNet-1k, JourneyDB's train split, UltraChat.
ONE_EPOCH = 1_281_167 + 4_189_737 + 1_468_352
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
    peak = peak_flops(flags.gpu, 0.0)
    if peak is None:
        fail(f"rehearse: --gpu {flags.gpu} is not known")
    ledger = plan(config, flags.world_size)
    verdict = judge(ledger, memory)
    print_ledger(ledger, flags, verdict)
    runs = costs(config, flags, peak)
    print_costs(runs, flags)
    built = None
    if flags.step_tokens:
        classes = (Block, AttentionBlock)
        built = rehearse(config, flags.world_size, flags.step_tokens, classes)
        print_built(built)
    out = Path(flags.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report(ledger, verdict, runs, built), indent=1), encoding="utf-8")
    print(f"\n{out}")
    return 0


def judge(ledger: Ledger, memory: int) -> dict[str, Any]:
    """Whether the plan fits into `memory` bytes, and what to change if it does not."""
    fits = ledger.total <= memory
    ways = [] if fits else remedies(ledger.config, ledger.world_size, memory)
    return {"fits": fits, "total": ledger.total, "memory": memory, "remedies": ways}


def costs(config: Config, flags: Flags, peak: float) -> dict[str, Estimate]:
    """The preset's run, and one epoch, which is what the paper's Table 1 names."""
    runs = {
        f"{config.train.steps:,} steps": config.train.steps * config.data.global_batch,
        "one epoch of the three sets": ONE_EPOCH,
    }
    # Under ZeRO-3 weights are gathered for either pass and gradients scattered; with hpZ the
    # backward pass gathers inside a node. ZeRO-2 gathers once, after the step.
    zero = zero_settings(load_deepspeed_config(config, flags.world_size))
    times = 3 if int(zero.stage) == 3 and zero.zero_hpz_partition_size <= 1 else 2
    moved = 4 * times * shapes_of(config).total * (flags.world_size - 1) / flags.world_size
    return {
        name: estimate(
            config,
            world_size=flags.world_size,
            samples=samples,
            peak_flops=peak,
            mfu=flags.mfu,
            price=flags.price,
            text_share=flags.text_share,
            moved=moved,
            network=1e9 * flags.network,
            node_size=flags.gpus_per_node,
        )
        for name, samples in runs.items()
    }


def print_ledger(ledger: Ledger, flags: Flags, verdict: dict[str, Any]) -> None:
    """Rows in GiB, the sum, and the verdict."""
    print(f"One GPU of {flags.world_size}, in GiB:\n")
    for row in ledger.rows:
        host = f" (host {row.host / GIB:.2f})" if row.host else ""
        print(f"  {row.name:<12}{row.device / GIB:8.2f}  {row.note}{host}")
    print(f"  {'total':<12}{ledger.total / GIB:8.2f}  of {verdict['memory'] / GIB:.2f}\n")
    sys.stdout.flush()
    if verdict["fits"]:
        left = (verdict["memory"] - ledger.total) / GIB
        print(f"It fits; {left:.1f} GiB are left.")
    elif verdict["remedies"]:
        print(f"It does not fit. It would with: {'; or '.join(verdict['remedies'])}.")
    else:
        print("It does not fit, nor with checkpointing, offload, more ranks or a smaller batch.")


def print_costs(runs: dict[str, Estimate], flags: Flags) -> None:
    """Speed, GPU-hours and price of every run."""
    first = next(iter(runs.values()))
    print(
        f"\nAt an MFU of {flags.mfu:.0%} on {flags.world_size} x {flags.gpu}: "
        f"{first.tokens_per_second:,.0f} tokens/s, {first.step_seconds:.2f} s a step."
    )
    if first.communication_seconds:
        slower = first.communication_seconds > first.step_seconds
        print(
            f"Weights and gradients alone take {first.communication_seconds:.2f} s of a step at "
            f"{flags.network:g} GB/s: "
            + ("more than computing does, so this MFU is out of reach" if slower else "hidden")
            + "."
        )
    for name, run in runs.items():
        print(
            f"  {name} ({run.steps:,} of this batch): {run.gpu_hours:,.0f} GPU-hours, "
            f"${run.cost:,.0f} at ${flags.price:g} an hour"
        )
    print("  (The paper names 500,000 steps and one epoch, and neither batch, GPUs nor hours.)")


def print_built(built: Rehearsal) -> None:
    """What the rank held beside what was planned for it."""
    print(
        f"\nBuilt as one rank in {built.build_seconds:.0f} s, one step in "
        f"{built.step_seconds:.0f} s, loss {built.loss:.3f}, "
        f"{'applied' if built.applied else 'NOT applied'}; "
        f"{built.peak_rss / GIB:.2f} GiB of this machine. Held and planned, in GiB:\n"
    )
    for name in STATES:
        print(f"  {name:<12}{built.held[name] / GIB:8.2f}{planned(built.ledger, name) / GIB:8.2f}")
    limit = built.ledger.device("gathered") + built.ledger.device("persistent")
    print(
        f"  {'gathered':<12}{built.gathered / GIB:8.2f}{limit / GIB:8.2f}"
        "  at most; a first step fetches nothing ahead"
    )


def planned(ledger: Ledger, name: str) -> int:
    """Bytes planned for `name`, on the GPU and on the host."""
    return sum(row.device + row.host for row in ledger.rows if row.name == name)


def report(
    ledger: Ledger, verdict: dict[str, Any], runs: dict[str, Estimate], built: Rehearsal | None
) -> dict[str, Any]:
    """All of it as plain values; sizes in bytes."""
    found: dict[str, Any] = {
        "ledger": [dataclasses.asdict(row) for row in ledger.rows],
        "verdict": verdict,
        "runs": {name: dataclasses.asdict(run) for name, run in runs.items()},
    }
    if built is not None:
        values = dataclasses.asdict(dataclasses.replace(built, ledger=None))  # type: ignore[arg-type]
        values["planned"] = {name: planned(built.ledger, name) for name in STATES}
        found["built"] = {k: v for k, v in values.items() if k != "ledger"}
    return found


if __name__ == "__main__":
    sys.exit(main())
