"""The objective gives the same on any number of ranks; a failed assertion fails the job.

Every rank first computes the whole global batch alone, then its share together with the others.
"""

import dataclasses

import torch
import torch.distributed as dist

from mdm.data.batch import Batch
from mdm.diffusion import noise
from mdm.loss import Loss, LossTerms
from mdm.train.metrics import sums_by_conditioning
from tests.golden.test_losses import CONFIG, batch
from tests.unit import test_packed_samples as packed_samples

GLOBAL_BATCH = 6
STEPS = (0, 1, 3)  # two with images and text, one with text only
PACKS = [[1], [2, 3, 5], [0, 4]]  # ranks hold different numbers of these samples


def make_objective() -> Loss:
    torch.manual_seed(0)
    weights = dataclasses.replace(CONFIG.objective, text_warp=True)
    objective = Loss(dataclasses.replace(CONFIG, objective=weights))
    torch.nn.init.normal_(objective.network.image_out.weight, std=0.1)
    return objective


def share(whole: Batch, part: slice) -> Batch:
    fields = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
    per_sample = {k: v for k, v in fields.items() if isinstance(v, tuple | torch.Tensor)}
    return Batch(**fields | {k: v[:GLOBAL_BATCH][part] for k, v in per_sample.items()})


def random_draws(objective: Loss, part: Batch) -> list[torch.Tensor]:
    """Noise levels, kept classes, and the noise of text and image."""
    n = 0 if part.latents is None else part.latents.shape[1]
    draws = noise.draw(CONFIG.seed, part.keys, part.epochs, n, part.tokens.shape[1], 16)
    tensors = [*objective.draw_levels(draws.uniforms, part), draws.text]
    return tensors if draws.image is None else [*tensors, draws.image]


def take_steps(
    objective: Loss, part: slice
) -> list[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]]:
    """The random draws and loss terms of every step; gradients accumulate in the objective."""
    rows = []
    for step in STEPS:
        own = share(batch(step), part)
        draws, terms = random_draws(objective, own), objective(own, step)
        terms.total.backward()
        scalars = [t.detach() for t in terms if t.dim() == 0]
        rows.append((draws, torch.stack(scalars), sums_by_conditioning(terms)))
    return rows


def take_packed_step(rank: int, size: int) -> tuple[Loss, LossTerms]:
    """A step on a rank's rows of images and texts."""
    objective = packed_samples.objective(estimate=1.0, text_warp=True).train()
    whole, count = packed_samples.packed(1, PACKS), len(PACKS)
    rows = slice(rank * count // size, (rank + 1) * count // size)
    terms = objective(packed_samples.rank_of(whole, rows, size), 0)
    terms.total.backward()
    return objective, terms


def main() -> None:
    torch.set_num_threads(1)
    on_one_rank = make_objective()
    expected = take_steps(on_one_rank, slice(None))
    packed_on_one, packed_terms = take_packed_step(0, 1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    part = slice(rank * GLOBAL_BATCH // size, (rank + 1) * GLOBAL_BATCH // size)
    on_all_ranks = make_objective()
    results = take_steps(on_all_ranks, part)
    for ours, whole in zip(results, expected, strict=True):
        (draws, terms, sums), (whole_draws, whole_terms, whole_sums) = ours, whole
        for own, of_all in zip(draws, whole_draws, strict=True):
            assert torch.equal(own, of_all[part])
        dist.all_reduce(terms)
        torch.testing.assert_close(terms / size, whole_terms, rtol=1e-5, atol=1e-6)
        dist.all_reduce(sums)
        torch.testing.assert_close(sums, whole_sums, rtol=1e-5, atol=1e-6)
    check_state(on_all_ranks, on_one_rank)
    assert not torch.equal(on_one_rank.text_warp.loss, make_objective().text_warp.loss)
    packed_on_all, terms = take_packed_step(rank, size)
    for ours, whole in zip(terms[:-2], packed_terms[:-2], strict=True):
        dist.all_reduce(mean := ours.detach().clone())
        torch.testing.assert_close(mean / size, whole.detach(), rtol=1e-5, atol=1e-6)
    check_state(packed_on_all, packed_on_one)
    dist.destroy_process_group()


def check_state(on_all_ranks: Loss, on_one_rank: Loss) -> None:
    """Gradients and buffers are those of one rank."""
    size = dist.get_world_size()
    single = dict(on_one_rank.named_parameters())
    for name, p in on_all_ranks.named_parameters():
        assert (p.grad is None) == (single[name].grad is None), name
        if p.grad is not None:
            dist.all_reduce(p.grad)
            torch.testing.assert_close(p.grad / size, single[name].grad, rtol=1e-3, atol=1e-5)
    buffers = zip(on_all_ranks.named_buffers(), on_one_rank.buffers(), strict=True)
    for (name, ours), whole in buffers:
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6, msg=name)


if __name__ == "__main__":
    main()
