"""Speed and price of a run: FLOPs from the decoder's sizes, at a stated MFU.

MFU counts what the model needs, three passes over its matrix products a step, but not what
checkpointing computes again.
"""

from dataclasses import dataclass

from mdm.config import Config
from mdm.diffusion.levels import self_condition_shares
from mdm.model.count import trunk_macs
from mdm.planning.activations import longest
from mdm.planning.memory_plan import shapes_of
from mdm.train.deepspeed_config import load_deepspeed_config, zero_settings


@dataclass(frozen=True)
class Cluster:
    """The machines that a run is meant for, what they cost, and what they train on."""

    world_size: int
    gpus_per_node: int
    gpu: str
    mfu: float  # share of the GPU's bf16 peak that the model's own FLOPs reach
    price: float  # dollars for one GPU and hour
    network: float  # GB/s that one GPU can send to other nodes
    text_share: float  # of the samples that are text alone


@dataclass(frozen=True)
class Estimate:
    """A run of so many steps on the GPUs of a cluster."""

    steps: int
    step_seconds: float
    tokens_per_second: float
    gpu_hours: float
    cost: float
    communication_seconds: float  # a step's weights and gradients over the network, if alone


def estimate(config: Config, cluster: Cluster, samples: int, peak_flops: float) -> Estimate:
    """Time and price of a run of `samples`; `peak_flops` are one GPU's, in FLOP/s."""
    ranks, batch = cluster.world_size, config.data.global_batch
    # A forward pass and twice as much backward; a share of the steps makes an estimate first.
    passes = 3 + self_condition_shares(config.objective.p_self_condition)[0]
    tokens = flops = 0.0  # of the mean sample, at full length
    for with_image, share in ((True, 1 - cluster.text_share), (False, cluster.text_share)):
        length = longest(config, with_image).length
        tokens += share * length
        flops += share * 2 * passes * sum(trunk_macs(config.model, length))
    steps = -(-samples // batch)
    seconds = batch * flops / (ranks * peak_flops * cluster.mfu)
    hours = ranks * steps * seconds / 3600
    # ZeRO-3 gathers weights for each pass and scatters gradients; with hpZ the backward pass
    # gathers inside a node. ZeRO-2 gathers once, after the step.
    zero = zero_settings(load_deepspeed_config(config, ranks))
    times = 3 if int(zero.stage) == 3 and zero.zero_hpz_partition_size <= 1 else 2
    moved = 4 * times * shapes_of(config).total * (ranks - 1) / ranks
    is_one_node = ranks <= cluster.gpus_per_node
    return Estimate(
        steps=steps,
        step_seconds=seconds,
        tokens_per_second=batch * tokens / seconds,
        gpu_hours=hours,
        cost=hours * cluster.price,
        communication_seconds=0.0 if is_one_node else moved / (1e9 * cluster.network),
    )
