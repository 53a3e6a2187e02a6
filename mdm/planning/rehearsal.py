"""One rank of a large run on one CPU, and the report: memory plan, verdict, price, what was held.

The real model is built in the real engine, without other ranks. So that a step fits, kernels are
torch's, blocks are checkpointed and `auto` means this CPU's precision, whatever the preset says;
the memory plan says what the preset needs on a GPU.
"""

import dataclasses
import math
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mdm.config import Config
from mdm.loss import Loss
from mdm.model.attention import AttentionBlock
from mdm.model.decoder import Block
from mdm.planning.activations import largest_batch
from mdm.planning.cost import Cluster, Estimate, estimate, samples_per_step
from mdm.planning.footprint import STATES, count_gathered, held_bytes
from mdm.planning.memory_plan import GIB, MemoryPlan, changes_that_fit, plan
from mdm.train.ema import EMA
from mdm.train.engine import Engine, pretend_ranks, stop_ranks
from mdm.utils import precision

# Training samples as published: ImageNet-1k, JourneyDB's train split, UltraChat.
ONE_EPOCH = 1_281_167 + 4_189_737 + 1_468_352


@dataclass(frozen=True)
class Rehearsal:
    """Memory and time of one rank."""

    memory_plan: MemoryPlan  # for the configuration as it was run here
    held: dict[str, int]  # bytes by the names of `held_bytes`
    gathered: int  # peak bytes of whole parameters
    build_seconds: float
    step_seconds: float
    loss: float
    applied: bool  # whether the step changed the weights
    peak_rss: int  # peak bytes of this process


def runnable_here(config: Config) -> Config:
    """`config` as a CPU can run it, with the same shapes, states and engine."""
    model = dataclasses.replace(config.model, kernel="torch")
    here = precision.resolve(config.train.precision)
    train = dataclasses.replace(config.train, activation_checkpointing=True, precision=here)
    return dataclasses.replace(config, model=model, train=train)


def rehearse(config: Config, world_size: int, tokens: int) -> Rehearsal:
    """Build `config` as one of `world_size` ranks and take a step on one text of `tokens` tokens.

    The process must not have joined a process group; it leaves the one that this makes. Raises
    RunError for settings that the engine refuses.
    """
    config, leaf_classes = runnable_here(config), (Block, AttentionBlock)
    start = time.perf_counter()
    engine = Engine(lambda: Loss(config), config, pretend_ranks(world_size), leaf_classes)
    ema = EMA(engine.shards.partitions(), config.train.ema, config.train.ema2)
    gathered = count_gathered(engine, leaf_classes)
    built = time.perf_counter()
    tokens = min(tokens, config.data.dialogue_length)
    text = dataclasses.replace(config.data, dialogue_length=tokens, texts_per_row=1)
    batch = largest_batch(dataclasses.replace(config, data=text), 1, with_image=False)
    loss = engine.forward(batch, 0).total
    engine.backward(loss)
    before = held_bytes(engine, ema)
    engine.step(config.train.lr)
    ema.update(engine.shards.partitions())
    # The step makes Adam's moments, and frees gradients and buckets.
    held = before | {"optimizer": held_bytes(engine, ema)["optimizer"]}
    result = Rehearsal(
        memory_plan=plan(config, world_size),
        held=held,
        gathered=gathered.bytes,
        build_seconds=built - start,
        step_seconds=time.perf_counter() - built,
        loss=float(loss.detach()),
        applied=engine.was_step_applied,
        # Linux counts ru_maxrss in KiB.
        peak_rss=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    del engine, loss
    stop_ranks()
    return result


def judge(memory_plan: MemoryPlan, memory: int) -> dict[str, Any]:
    """Whether the plan fits into `memory` bytes, and what to change if it does not."""
    fits = memory_plan.total <= memory
    remedies = [] if fits else changes_that_fit(memory_plan, memory)
    return {"fits": fits, "total": memory_plan.total, "memory": memory, "remedies": remedies}


def costs(config: Config, cluster: Cluster, peak: float) -> dict[str, Estimate]:
    """The preset's run, and one epoch, which is what the paper's Table 1 names."""
    steps = config.train.steps
    epoch = math.ceil(ONE_EPOCH / samples_per_step(config, cluster))
    return {
        f"{steps:,} steps": estimate(config, cluster, steps, peak),
        "one epoch of the three sets": estimate(config, cluster, epoch, peak),
    }


def plan_text(memory_plan: MemoryPlan, verdict: Mapping[str, Any]) -> str:
    """The rows in GiB, their sum, and the verdict."""
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
        changes = "checkpointing, offload, more ranks or a smaller batch"
        lines.append(f"It does not fit, nor with {changes}.")
    return "\n".join(lines)


def costs_text(runs: Mapping[str, Estimate], cluster: Cluster) -> str:
    """Speed, GPU-hours and price of each run."""
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
            + ("longer than computing, so this MFU is out of reach." if is_slower else "hidden.")
        )
    for name, run in runs.items():
        lines.append(
            f"  {name} ({run.steps:,} of this batch): {run.gpu_hours:,.0f} GPU-hours, "
            f"${run.cost:,.0f} at ${cluster.price:g} an hour"
        )
    lines.append("  (The paper names 500,000 steps and one epoch, and no batch, GPUs or hours.)")
    return "\n".join(lines)


def built_text(built: Rehearsal) -> str:
    """What the rank held, beside what the memory plan says."""
    limit = built.memory_plan.device("gathered") + built.memory_plan.device("persistent")
    applied = "applied" if built.applied else "NOT applied"
    lines = [
        f"Built as one rank in {built.build_seconds:.0f} s, one step in "
        f"{built.step_seconds:.0f} s, loss {built.loss:.3f}, {applied}; "
        f"{built.peak_rss / GIB:.2f} GiB of this machine. Held and planned, in GiB:\n"
    ]
    rows = [(name, built.held[name], planned(built.memory_plan, name)) for name in STATES]
    for name, held, amount in (*rows, ("gathered", built.gathered, limit)):
        lines.append(f"  {name:<12}{held / GIB:8.2f}{amount / GIB:8.2f}")
    return "\n".join(lines) + "  at most; a first step fetches nothing ahead"


def planned(memory_plan: MemoryPlan, name: str) -> int:
    """Planned bytes of `name`, on the GPU and on the host."""
    return sum(row.device + row.host for row in memory_plan.rows if row.name == name)


def report(
    memory_plan: MemoryPlan,
    verdict: dict[str, Any],
    runs: dict[str, Estimate],
    built: Rehearsal | None,
) -> dict[str, Any]:
    """The whole report as plain values; sizes in bytes."""
    values: dict[str, Any] = {
        "ledger": [dataclasses.asdict(row) for row in memory_plan.rows],
        "verdict": verdict,
        "runs": {name: dataclasses.asdict(run) for name, run in runs.items()},
    }
    if built is not None:
        states = {name: planned(built.memory_plan, name) for name in STATES}
        values["built"] = vars(built) | {"planned": states}
        del values["built"]["memory_plan"]
    return values
