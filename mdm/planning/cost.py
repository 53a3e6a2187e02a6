"""How fast and at what price a run would be: FLOPs from the decoder's sizes, at a stated MFU.

MFU counts what the model needs, three passes over its matrix products a step, and not what
checkpointing computes again.
"""

from dataclasses import dataclass

from mdm.config import Config
from mdm.model.count import trunk_macs
from mdm.planning.activations import longest


@dataclass(frozen=True)
class Sample:
    """One sample of the mixture, as long as the configuration allows."""

    tokens: float  # of the sequence that the blocks read
    flops: float  # of a training step on it


@dataclass(frozen=True)
class Estimate:
    """A run of so many steps on so many GPUs."""

    steps: int
    step_seconds: float
    tokens_per_second: float
    gpu_hours: float
    cost: float
    communication_seconds: float  # a step's weights and gradients over the network, if alone


def mean_sample(config: Config, text_share: float) -> Sample:
    """The mixture's mean sample: `text_share` of the samples are text alone."""
    # A forward pass and twice as much backward; a share of the steps makes an estimate first.
    passes = 3 + config.objective.p_self_condition
    parts = []
    for image, share in ((True, 1 - text_share), (False, text_share)):
        length = longest(config, image).length
        macs = sum(trunk_macs(config.model, length))
        parts.append((share * length, share * 2 * passes * macs))
    tokens, flops = map(sum, zip(*parts, strict=True))
    return Sample(tokens, flops)


def estimate(
    config: Config,
    *,
    world_size: int,
    samples: int,
    peak_flops: float,
    mfu: float,
    price: float,
    text_share: float,
    moved: float,
    network: float,
    node_size: int,
) -> Estimate:
    """Time and price of `samples` samples in steps of the configured global batch.

    Args:
        config: sizes and batch.
        world_size: GPUs.
        samples: of the whole run.
        peak_flops: of one GPU, FLOP/s.
        mfu: share of it that the model's own FLOPs reach.
        price: of one GPU for an hour.
        text_share: share of the samples that are text alone.
        moved: bytes of weights and gradients that a step brings from or to other ranks.
        network: bytes/s that one GPU can send to other nodes.
        node_size: GPUs of a node; a single node needs no network.
    """
    sample = mean_sample(config, text_share)
    batch = config.data.global_batch
    steps = -(-samples // batch)
    seconds = batch * sample.flops / (world_size * peak_flops * mfu)
    hours = world_size * steps * seconds / 3600
    return Estimate(
        steps=steps,
        step_seconds=seconds,
        tokens_per_second=batch * sample.tokens / seconds,
        gpu_hours=hours,
        cost=hours * price,
        communication_seconds=moved / network if world_size > node_size else 0.0,
    )
