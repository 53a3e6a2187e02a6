"""One rank of a large run on one CPU: the real model in the real engine, without other ranks.

So that a step fits, kernels are torch's, blocks are checkpointed and `auto` means this CPU's
precision, whatever the preset says; the memory plan says what the preset needs on a GPU.
"""

import dataclasses
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mdm.config import Config
from mdm.loss import Loss
from mdm.planning.activations import largest_batch
from mdm.planning.footprint import count_gathered, held_bytes
from mdm.planning.memory_plan import MemoryPlan, plan
from mdm.train.ema import EMA
from mdm.train.engine import Engine, pretend_ranks, stop_ranks
from mdm.utils import precision


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
    train = dataclasses.replace(
        config.train,
        activation_checkpointing=True,
        precision=precision.resolve(config.train.precision),
    )
    return dataclasses.replace(config, model=model, train=train)


def rehearse(
    config: Config,
    world_size: int,
    tokens: int,
    leaf_classes: Sequence[type[nn.Module]] = (),
) -> Rehearsal:
    """Build `config` as one of `world_size` ranks and take a step on one text of `tokens` tokens.

    The process must not have joined a process group; it leaves the one that this makes. Raises
    RunError for settings that the engine refuses.
    """
    config = runnable_here(config)
    start = time.perf_counter()
    engine = Engine(lambda: Loss(config), config, pretend_ranks(world_size), leaf_classes)
    ema = EMA(engine.fp32_partitions(), config.train.ema, config.train.ema2)
    gathered = count_gathered(engine, leaf_classes)
    built = time.perf_counter()
    tokens = min(tokens, config.data.dialogue_length)
    text = dataclasses.replace(config.data, dialogue_length=tokens)
    batch = largest_batch(dataclasses.replace(config, data=text), 1, with_image=False)
    loss = engine.forward(batch, 0).total
    engine.backward(loss)
    before = held_bytes(engine, ema)
    engine.step(config.train.lr)
    ema.update(engine.fp32_partitions())
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
