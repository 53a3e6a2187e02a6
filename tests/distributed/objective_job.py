"""The objective on any number of ranks equals that on one; a failed assertion fails the job.

Every rank first computes the whole global batch alone, then its share of it with the others.
"""

import dataclasses

import torch
import torch.distributed as dist

from mdm.data.batch import Batch
from mdm.diffusion import noise
from mdm.loss import Loss
from tests.golden.test_losses import CONFIG, batch

GLOBAL_BATCH = 6
STEPS = (0, 1, 3)  # two of pictures and text, one of text alone


def made() -> Loss:
    torch.manual_seed(0)
    weights = dataclasses.replace(CONFIG.objective, text_warp=True)
    objective = Loss(dataclasses.replace(CONFIG, objective=weights))
    torch.nn.init.normal_(objective.network.image_out.weight, std=0.1)
    return objective


def share(whole: Batch, part: slice) -> Batch:
    fields = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
    per_sample = {k: v for k, v in fields.items() if isinstance(v, tuple | torch.Tensor)}
    return Batch(**fields | {k: v[:GLOBAL_BATCH][part] for k, v in per_sample.items()})


def drawn(objective: Loss, part: Batch) -> list[torch.Tensor]:
    """Noise levels, kept classes, noise of picture and text."""
    n = 0 if part.latents is None else part.latents.shape[1]
    draws = noise.draw(CONFIG.seed, part.keys, part.epochs, n, part.tokens.shape[1], 16)
    found = [*objective.draw_levels(draws.uniforms, part), draws.text]
    return found if draws.image is None else [*found, draws.image]


def learn(
    objective: Loss, part: slice
) -> list[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]]:
    """Draws and loss terms of every step; gradients add up in the objective."""
    rows = []
    for step in STEPS:
        own = share(batch(step), part)
        draws, terms = drawn(objective, own), objective(own, step)
        terms.total.backward()
        *scalars, sums = [t.detach() for t in terms]
        rows.append((draws, torch.stack(scalars), sums))
    return rows


def main() -> None:
    torch.set_num_threads(1)
    alone = made()
    expected = learn(alone, slice(None))
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    part = slice(rank * GLOBAL_BATCH // size, (rank + 1) * GLOBAL_BATCH // size)
    together = made()
    found = learn(together, part)
    for ours, whole in zip(found, expected, strict=True):
        (draws, terms, sums), (whole_draws, whole_terms, whole_sums) = ours, whole
        for own, of_all in zip(draws, whole_draws, strict=True):
            assert torch.equal(own, of_all[part])
        dist.all_reduce(terms)
        torch.testing.assert_close(terms / size, whole_terms, rtol=1e-5, atol=1e-6)
        dist.all_reduce(sums)
        torch.testing.assert_close(sums, whole_sums, rtol=1e-5, atol=1e-6)
    single = dict(alone.named_parameters())
    for name, p in together.named_parameters():
        assert (p.grad is None) == (single[name].grad is None), name
        if p.grad is not None:
            dist.all_reduce(p.grad)
            torch.testing.assert_close(p.grad / size, single[name].grad, rtol=1e-3, atol=1e-5)
    for (name, ours), whole in zip(together.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(alone.text_warp.loss, made().text_warp.loss)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
