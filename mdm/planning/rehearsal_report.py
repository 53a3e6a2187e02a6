"""What a rehearsal says: the memory plan, the verdict, the price of the run, what was built."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mdm.config import Config
from mdm.planning.cost import Estimate, estimate
from mdm.planning.footprint import STATES
from mdm.planning.memory_plan import GIB, MemoryPlan, remedies, shapes_of
from mdm.planning.rehearsal import Rehearsal
from mdm.train.deepspeed_config import load_deepspeed_config, zero_settings

# Training samples as published: ImageNet-1k, JourneyDB's train split, UltraChat.
ONE_EPOCH = 1_281_167 + 4_189_737 + 1_468_352


@dataclass(frozen=True)
class Cluster:
    """The machines that a run is meant for, and what they cost."""

    world_size: int
    gpus_per_node: int
    gpu: str
    mfu: float  # share of the GPU's bf16 peak that the model's own FLOPs reach
    price: float  # dollars for one GPU and hour
    network: float  # GB/s that one GPU can send to other nodes
    text_share: float  # of the samples that are text alone


def judge(memory_plan: MemoryPlan, memory: int) -> dict[str, Any]:
    """Whether the plan fits into `memory` bytes, and what to change if it does not."""
    fits = memory_plan.total <= memory
    ways = [] if fits else remedies(memory_plan.config, memory_plan.world_size, memory)
    return {"fits": fits, "total": memory_plan.total, "memory": memory, "remedies": ways}


def costs(config: Config, cluster: Cluster, peak: float) -> dict[str, Estimate]:
    """The preset's run, and one epoch, which is what the paper's Table 1 names."""
    runs = {
        f"{config.train.steps:,} steps": config.train.steps * config.data.global_batch,
        "one epoch of the three sets": ONE_EPOCH,
    }
    # Under ZeRO-3 weights are gathered for either pass and gradients scattered; with hpZ the
    # backward pass gathers inside a node. ZeRO-2 gathers once, after the step.
    zero = zero_settings(load_deepspeed_config(config, cluster.world_size))
    times = 3 if int(zero.stage) == 3 and zero.zero_hpz_partition_size <= 1 else 2
    moved = 4 * times * shapes_of(config).total * (cluster.world_size - 1) / cluster.world_size
    return {
        name: estimate(
            config,
            world_size=cluster.world_size,
            samples=samples,
            peak_flops=peak,
            mfu=cluster.mfu,
            price=cluster.price,
            text_share=cluster.text_share,
            moved=moved,
            network=1e9 * cluster.network,
            node_size=cluster.gpus_per_node,
        )
        for name, samples in runs.items()
    }


def plan_text(memory_plan: MemoryPlan, verdict: Mapping[str, Any]) -> str:
    """Rows in GiB, the sum, and the verdict."""
    lines = [f"One GPU of {memory_plan.world_size}, in GiB:", ""]
    for row in memory_plan.rows:
        host = f" (host {row.host / GIB:.2f})" if row.host else ""
        lines.append(f"  {row.name:<12}{row.device / GIB:8.2f}  {row.note}{host}")
    total, memory = memory_plan.total / GIB, verdict["memory"] / GIB
    lines += [f"  {'total':<12}{total:8.2f}  of {memory:.2f}", ""]
    if verdict["fits"]:
        lines.append(f"It fits; {memory - total:.1f} GiB are left.")
    elif verdict["remedies"]:
        lines.append(f"It does not fit. It would with: {'; or '.join(verdict['remedies'])}.")
    else:
        lines.append(
            "It does not fit, nor with checkpointing, offload, more ranks or a smaller batch."
        )
    return "\n".join(lines)


def costs_text(runs: Mapping[str, Estimate], cluster: Cluster) -> str:
    """Speed, GPU-hours and price of every run."""
    first = next(iter(runs.values()))
    lines = [
        f"At an MFU of {cluster.mfu:.0%} on {cluster.world_size} x {cluster.gpu}: "
        f"{first.tokens_per_second:,.0f} tokens/s, {first.step_seconds:.2f} s a step."
    ]
    if first.communication_seconds:
        is_slower = first.communication_seconds > first.step_seconds
        lines.append(
            f"Weights and gradients alone take {first.communication_seconds:.2f} s of a step at "
            f"{cluster.network:g} GB/s: "
            + ("more than computing does, so this MFU is out of reach" if is_slower else "hidden")
            + "."
        )
    for name, run in runs.items():
        lines.append(
            f"  {name} ({run.steps:,} of this batch): {run.gpu_hours:,.0f} GPU-hours, "
            f"${run.cost:,.0f} at ${cluster.price:g} an hour"
        )
    lines.append("  (The paper names 500,000 steps and one epoch, and no batch, GPUs or hours.)")
    return "\n".join(lines)


def built_text(built: Rehearsal) -> str:
    """What the rank held beside what was planned for it."""
    limit = built.memory_plan.device("gathered") + built.memory_plan.device("persistent")
    lines = [
        f"Built as one rank in {built.build_seconds:.0f} s, one step in "
        f"{built.step_seconds:.0f} s, loss {built.loss:.3f}, "
        f"{'applied' if built.applied else 'NOT applied'}; "
        f"{built.peak_rss / GIB:.2f} GiB of this machine. Held and planned, in GiB:",
        "",
    ]
    for name in STATES:
        amount = planned(built.memory_plan, name) / GIB
        lines.append(f"  {name:<12}{built.held[name] / GIB:8.2f}{amount:8.2f}")
    lines.append(
        f"  {'gathered':<12}{built.gathered / GIB:8.2f}{limit / GIB:8.2f}"
        "  at most; a first step fetches nothing ahead"
    )
    return "\n".join(lines)


def planned(memory_plan: MemoryPlan, name: str) -> int:
    """Bytes planned for `name`, on the GPU and on the host."""
    return sum(row.device + row.host for row in memory_plan.rows if row.name == name)


def report(
    memory_plan: MemoryPlan,
    verdict: dict[str, Any],
    runs: dict[str, Estimate],
    built: Rehearsal | None,
) -> dict[str, Any]:
    """All of it as plain values; sizes in bytes."""
    found: dict[str, Any] = {
        "ledger": [dataclasses.asdict(row) for row in memory_plan.rows],
        "verdict": verdict,
        "runs": {name: dataclasses.asdict(run) for name, run in runs.items()},
    }
    if built is not None:
        values = dataclasses.asdict(dataclasses.replace(built, memory_plan=None))  # type: ignore[arg-type]
        values["planned"] = {name: planned(built.memory_plan, name) for name in STATES}
        found["built"] = {k: v for k, v in values.items() if k != "memory_plan"}
    return found
