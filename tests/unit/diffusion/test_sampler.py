"""The solver against diffusers' and against a distribution whose answer is known."""

import pytest
import torch

from mdm.diffusion import schedule
from mdm.diffusion.sampler import DPMSolverPP2M, log_snr_grid


def solve(z, grid, estimate):
    solver = DPMSolverPP2M(grid)
    for i in range(len(grid)):
        z = solver.step(i, z, estimate(z, grid[i].sigmoid()))
    return z


def gaussian(mean: float, std: float):
    """E[z_0 | z_t] for data N(mean, std^2)."""

    def estimate(z, abar):
        gain = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar)
        return mean + gain * (z - abar.sqrt() * mean)

    return estimate


def test_gaussian_data_come_back():
    torch.manual_seed(0)
    z = torch.randn(20_000, dtype=torch.float64)
    grid = log_snr_grid(schedule.IMAGE, 40, low=-12.0, high=12.0)
    x = solve(z, grid, gaussian(0.8, 0.3))
    assert x.mean().item() == pytest.approx(0.8, abs=0.01)
    assert x.std().item() == pytest.approx(0.3, abs=0.01)


def test_second_order_beats_first_order():
    torch.manual_seed(0)
    z = torch.randn(1000, dtype=torch.float64)
    estimate = gaussian(0.8, 0.3)
    grid = log_snr_grid(schedule.IMAGE, 20, low=-12.0, high=12.0)
    exact = 0.8 + 0.3 * z  # the probability-flow map of a Gaussian
    second = (solve(z, grid, estimate) - exact).abs().mean()
    first = z
    for i in range(len(grid)):
        step = DPMSolverPP2M(grid)  # no memory: every step is the first
        first = step.step(i, first, estimate(first, grid[i].sigmoid()))
    assert second < 0.25 * (first - exact).abs().mean()


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_equals_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    grid = log_snr_grid(schedule.IMAGE, 12)
    theirs = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=False,
        final_sigmas_type="zero",
    )
    theirs.set_timesteps(12)
    sigmas = (-grid / 2).exp()
    theirs.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    estimate = gaussian(0.4, 0.7)
    torch.manual_seed(0)
    z = ours = torch.randn(50, dtype=torch.float64)
    solver = DPMSolverPP2M(grid)
    for i, t in enumerate(theirs.timesteps):
        # diffusers takes the noise and turns it into z_0 by its own sigma.
        abar = grid[i].sigmoid()
        eps = (z - abar.sqrt() * estimate(z, abar)) / (1 - abar).sqrt()
        z = theirs.step(eps, t, z).prev_sample
        ours = solver.step(i, ours, estimate(ours, abar))
    torch.testing.assert_close(ours, z, rtol=1e-5, atol=1e-5)


def test_one_step_is_refused():
    with pytest.raises(ValueError, match="takes 1 steps"):
        log_snr_grid(schedule.TEXT, 1)
