"""Properties of the engine that need several ranks; a failed assertion fails the job."""

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from mdm.train.ema import EMA
from mdm.train.engine import Engine, start_ranks, stop_ranks
from mdm.train.workarounds import GatheredParameters
from tests.helpers import ROOT, MemoryLoader, Mixer, SmallLoss, small_config


def full_weights(engine: Engine) -> dict[str, torch.Tensor]:
    with GatheredParameters(list(engine.module.parameters())):
        return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def main() -> None:
    json_name, run_dir = sys.argv[1], Path(sys.argv[2])
    path = str(ROOT / "deepspeed_configs" / json_name)
    config = small_config(run_dir, 12, deepspeed=path, precision="bf16")
    world = start_ranks(1)
    engine = Engine(lambda: SmallLoss(config), config, world, (Mixer,))
    loader = MemoryLoader(config, world)
    ema = EMA(engine.shards.partitions(), 0.99)
    reference = full_weights(engine)
    output_dtypes: dict[str, torch.dtype] = {}

    def record_dtype(name):
        def hook(module, inputs, output):
            output_dtypes[name] = output.dtype

        return hook

    engine.module.text_out.register_forward_hook(record_dtype("text_out"))
    for step in range(5):
        terms = engine.forward(next(loader), step)
        engine.backward(terms.total)
        engine.step(1e-2)
        assert engine.was_step_applied
        # The reference: the same EMA, over gathered weights.
        decay = min(0.99, (1 + step) / (10 + step))
        now = full_weights(engine)
        for name, value in reference.items():
            value.lerp_(now[name], 1.0 - decay)
        ema.update(engine.shards.partitions())

    # Linear layers ran in bf16. Every parameter and partition is fp32, including those of the scan.
    assert output_dtypes["text_out"] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in engine.shards.partitions() + ema.shadows["ema"])
    islands = [n for n, p in engine.module.named_parameters() if n.split(".")[-1] in ISLANDS]
    assert len(islands) == 6
    assert all(p.dtype == torch.float32 for p in engine.module.parameters())
    assert engine.module.running_mean.dtype == torch.float32
    # Their fp32 master weights equal the weights in forward: nothing was rounded to bf16.
    raw = engine.shards.gather(engine.shards.partitions())
    now = full_weights(engine)
    if world.is_main:
        assert all(torch.equal(raw[n], now[n]) for n in islands)
        moved = now["blocks.0.A_log"]
        assert not torch.equal(moved, moved.bfloat16().float())

    averaged = engine.shards.gather(ema.shadows["ema"])
    if world.is_main:
        assert averaged.keys() == engine.module.state_dict().keys()
        for name, value in reference.items():
            assert torch.equal(averaged[name], value), name
    else:
        assert averaged == {}

    # A text-only step has no gradient for the image head, not even that of the step before.
    while (batch := next(loader)).latents is not None:
        pass
    engine.backward(engine.forward(batch, 5).total)
    stale = safe_get_full_grad(engine.module.image_out.weight)
    assert stale is None or not stale.any()
    assert safe_get_full_grad(engine.module.text_out.weight).any()
    engine.step(1e-2)

    # A gradient that is not finite on one rank skips the step on all ranks.
    before = full_weights(engine)
    terms = engine.forward(next(loader), 6)
    engine.backward(terms.total * (torch.inf if world.rank == world.size - 1 else 1.0))
    engine.step(1e-2)
    assert not engine.was_step_applied
    after = full_weights(engine)
    assert all(torch.equal(before[n], after[n]) for n in before)

    # What is loaded is what the next forward reads, also where ZeRO-3 keeps parameters whole.
    for flat in engine.shards.live()["weights"]:
        flat.mul_(0.5)
    engine.restored(engine.shards.optimizer_steps)
    loaded = full_weights(engine)
    assert all(torch.equal(0.5 * after[n], loaded[n]) for n in after)


ISLANDS = ("A_log", "dt_bias", "D")

if __name__ == "__main__":
    main()
    stop_ranks()
