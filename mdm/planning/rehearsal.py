"""One rank of a large run on one CPU: the real model in the real engine, with nobody else there.

The kernels are torch's, the blocks are checkpointed and `auto` is this CPU's precision, whatever
the preset says, so that a step fits here; what the preset needs of a GPU is in the memory plan.
"""

import dataclasses
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mdm.config import Config
from mdm.data.batch import Batch
from mdm.loss import Loss
from mdm.planning.activations import largest_batch
from mdm.planning.footprint import held_bytes, watch_gathered
from mdm.planning.memory_plan import MemoryPlan, plan
from mdm.train.ema import EMA
from mdm.train.engine import Engine, pretend_ranks, stop_ranks
from mdm.utils import precision


@dataclass(frozen=True)
class Rehearsal:
    """What one rank held and took."""

    memory_plan: MemoryPlan  # planned for the configuration as it was run here
    held: dict[str, int]  # bytes by the names of `held_bytes`
    gathered: int  # bytes of parameters whole at once, at the most
    build_seconds: float
    step_seconds: float
    loss: float
    applied: bool  # whether the step changed the weights
    peak_rss: int  # bytes of this process at the most


def runnable_here(config: Config) -> Config:
    """`config` as a CPU can run it: same shapes, states and engine."""
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

    The process must be in no group before, and is in none after. Raises RunError for settings that
    the engine refuses.
    """
    config = runnable_here(config)
    start = time.perf_counter()
    engine = Engine(lambda: Loss(config), config, pretend_ranks(world_size), leaf_classes)
    ema = EMA(engine.fp32_partitions(), config.train.ema, config.train.ema2)
    gathered = watch_gathered(engine, leaf_classes)
    built = time.perf_counter()
    batch = shortened(largest_batch(config, 1, with_image=False), tokens)
    loss = engine.forward(batch, 0).total
    engine.backward(loss)
    before = held_bytes(engine, ema)
    engine.step(config.train.lr)
    ema.update(engine.fp32_partitions())
    # Adam's moments are made by the step; gradients and buckets are whole before it.
    held = before | {"optimizer": held_bytes(engine, ema)["optimizer"]}
    found = Rehearsal(
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
    return found


def shortened(batch: Batch, tokens: int) -> Batch:
    """Texts of `batch` cut to `tokens` tokens."""
    short = slice(None), slice(0, tokens)
    return dataclasses.replace(batch, tokens=batch.tokens[short], prompt=batch.prompt[short])
