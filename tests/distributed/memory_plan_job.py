"""Real ranks use the planned memory; activation checkpointing changes no bit of the result.

A failed assertion fails the job.
"""

import json
import logging
import sys
from pathlib import Path

import torch

from mdm.config import Config, DataConfig, ModelConfig, TrainConfig
from mdm.loss import Loss
from mdm.model.decoder import Block
from mdm.planning.activations import largest_batch
from mdm.planning.footprint import STATES, count_gathered, held_bytes, saved_activations
from mdm.planning.memory_plan import plan
from mdm.train.ema import EMA
from mdm.train.engine import Engine, start_ranks, stop_ranks

GLOBAL_BATCH, STEPS = 8, 3


def config_of(folder: Path, checkpointed: bool, stage: int = 3) -> Config:
    zero = {
        "stage": stage,
        "reduce_bucket_size": 20_000,
        "allgather_bucket_size": 20_000,
        "stage3_prefetch_bucket_size": 20_000,
        "stage3_param_persistence_threshold": 1000,
        "stage3_max_live_parameters": 400_000,
        "stage3_max_reuse_distance": 200_000,
        "memory_efficient_linear": False,
        "contiguous_gradients": True,
        "overlap_comm": False,
    }
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return Config(
        model=ModelConfig(
            d_model=64,
            n_layer=6,
            d_state=16,
            headdim=16,
            chunk_size=32,
            scan_mode="separate",
            vocab_size=300,
            n_classes=10,
            image_height=4,
            image_width=4,
            text_length=24,
        ),
        data=DataConfig(global_batch=GLOBAL_BATCH, caption_length=24, dialogue_length=24),
        train=TrainConfig(
            deepspeed=str(path), activation_checkpointing=checkpointed, precision="bf16"
        ),
        run_dir=str(folder),
    )


def deviations(rows: dict[str, tuple[int, int]]) -> list[str]:
    """The rows whose (held, planned) bytes differ by more than a tenth."""
    return [
        f"{name}: held {held:,}, planned {planned:,}"
        for name, (held, planned) in rows.items()
        if abs(held - planned) > 0.1 * planned
    ]


def take_steps(config: Config, world) -> tuple[list[float], list[torch.Tensor]]:
    """Take three steps and compare memory in the last; returns losses and this rank's weights."""
    engine = Engine(lambda: Loss(config), config, world, (Block,))
    whole = engine.shards.gather(engine.shards.partitions())
    torch.manual_seed(config.seed)
    if world.is_main:  # weights built part by part equal those of a module built at once
        for name, value in Loss(config).state_dict().items():
            assert torch.equal(whole[name], value), name
    ema = EMA(engine.shards.partitions(), 0.99)
    gathered = count_gathered(engine, (Block,))
    memory_plan, losses = plan(config, world.size), []
    torch.manual_seed(world.rank)
    batch = largest_batch(config, GLOBAL_BATCH // world.size)
    for step in range(STEPS):
        with saved_activations(engine.module) as saved:
            loss = engine.forward(batch, 4 * step).total  # no self-conditioning in these steps
        engine.backward(loss)
        held = held_bytes(engine, ema)
        engine.step(1e-2)
        assert engine.was_step_applied
        ema.update(engine.shards.partitions())
        losses.append(float(loss.detach()))
    checked = STATES if engine.stage == 3 else ("optimizer", "ema")
    rows = {name: (held[name], memory_plan.device(name)) for name in checked}
    if engine.stage == 3:  # an upper bound, but a tight one
        limit = memory_plan.device("gathered") + memory_plan.device("persistent")
        assert 0.7 * limit < gathered.bytes <= limit, (gathered.bytes, limit)
    else:
        rows["parameters"] = held["whole"], memory_plan.device("parameters")
        # Stage 2 keeps the gradient of the parameter that the end of a rank's share cuts whole, on
        # both sides: once more in all than the shares.
        beyond = torch.tensor(held["gradients"] - memory_plan.device("gradients"))
        torch.distributed.all_reduce(beyond)
        assert int(beyond) in {4 * p.numel() for p in engine.module.parameters()}, int(beyond)
    activations = memory_plan.device("activations") + memory_plan.device("heads")
    rows["activations"] = saved.bytes, activations
    logging.warning("stage %s: %s", engine.stage, rows)
    assert not deviations(rows), deviations(rows)
    return losses, [p.clone() for p in engine.shards.partitions()]


def main() -> None:
    world = start_ranks(1)
    folder = Path(sys.argv[1]) / str(world.rank)
    folder.mkdir()
    results = [take_steps(config_of(folder, on), world) for on in (False, True)]
    (losses, weights), (checkpointed_losses, checkpointed_weights) = results
    assert losses == checkpointed_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, checkpointed_weights, strict=True))
    take_steps(config_of(folder, False, stage=2), world)


if __name__ == "__main__":
    main()
    stop_ranks()
