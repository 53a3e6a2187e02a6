"""The solvers against those of diffusers, and against distributions with known solutions."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from mdm.diffusion import schedule
from mdm.diffusion.sampler import (
    SOLVERS,
    Ancestral,
    DPMSolverPP2M,
    Heun,
    log_snr_grid,
    make_solver,
)
from tests.mixture import Mixture, normal_quantiles

MIXTURE = Mixture()
old_numpy = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")


def solve(solver, z, estimate):
    for i, level in enumerate(solver.levels):
        z = solver.step(i, z, estimate(z, level.sigmoid()))
    return z


def step_noise(shape, seed=0, dtype=torch.float64):
    """New noise for every call, reproducible by seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda i: torch.randn(shape, generator=generator, dtype=dtype)


def build_solver(name, grid, noise=None):
    return {
        "dpmpp2m": lambda: DPMSolverPP2M(grid),
        "eq9": lambda: Heun(grid),
        "ddpm": lambda: Ancestral(grid, noise),
    }[name]()


class Net(torch.nn.Module):
    """A small random fp32 network that replaces the decoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(9, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8)
        )

    @torch.no_grad()
    def forward(self, z, abar):
        level = abar.logit().float().expand(len(z), 1)
        return 2 * self.layers(torch.cat([z, level / 5], -1))


@old_numpy
def test_dpmpp2m_equals_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    grid = log_snr_grid(schedule.IMAGE, 12)
    theirs = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        prediction_type="sample",
        lower_order_final=False,
        final_sigmas_type="zero",
    )
    theirs.set_timesteps(12)
    theirs.sigmas = torch.cat([(-grid / 2).exp(), torch.zeros(1, dtype=torch.float64)])
    net, start = Net(), torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    z = start
    for t, level in zip(theirs.timesteps, grid, strict=True):
        z = theirs.step(net(z, level.sigmoid()), t, z).prev_sample
    torch.testing.assert_close(solve(DPMSolverPP2M(grid), start, net), z, rtol=1e-5, atol=1e-5)


@old_numpy
def test_eq9_equals_diffusers_heun():
    from diffusers import HeunDiscreteScheduler

    grid = log_snr_grid(schedule.IMAGE, 10)
    theirs = HeunDiscreteScheduler(prediction_type="sample")
    theirs.set_timesteps(10)
    s = torch.cat([(-grid / 2).exp(), torch.zeros(1, dtype=torch.float64)])
    theirs.sigmas = torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]])
    net, start = Net(), torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    ours = Heun(grid)
    y = start / ours.alpha[0].float()  # diffusers' latents are z/alpha
    assert len(theirs.timesteps) == len(ours.levels) == 19
    for t, level, alpha in zip(theirs.timesteps, ours.levels, ours.alpha, strict=True):
        y = theirs.step(net(alpha.float() * y, level.sigmoid()), t, y).prev_sample
    torch.testing.assert_close(solve(ours, start, net), y, rtol=1e-4, atol=1e-5)


@old_numpy
def test_ddpm_equals_diffusers():
    from diffusers import DDPMScheduler

    grid = log_snr_grid(schedule.IMAGE, 12)
    theirs = DDPMScheduler(num_train_timesteps=12, prediction_type="sample", clip_sample=False)
    theirs.set_timesteps(12)
    theirs.alphas_cumprod = grid.sigmoid().flip(0)
    net, start = Net(), torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    z, generator = start, torch.Generator().manual_seed(3)
    for t, level in zip(theirs.timesteps, grid, strict=True):
        z_0 = net(z.float(), level.sigmoid())
        z = theirs.step(z_0, t, z, generator=generator).prev_sample.float()
    ours = Ancestral(grid, step_noise((50, 8), seed=3, dtype=torch.float32))
    torch.testing.assert_close(solve(ours, start, net), z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "steps"), [("dpmpp2m", 60), ("eq9", 60), ("ddpm", 400)])
def test_solvers_reproduce_a_mixture(name, steps):
    grid = torch.linspace(-12.0, 12.0, steps, dtype=torch.float64)
    z = normal_quantiles(20_000)
    x = solve(build_solver(name, grid, step_noise(z.shape)), z, MIXTURE.estimate)
    # The components hardly overlap, so cut between them.
    for w, m, s, low, high in zip(
        MIXTURE.weights, MIXTURE.means, MIXTURE.stds, (-9, -0.4, 0.85), (-0.4, 0.85, 9), strict=True
    ):
        u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        exact = MIXTURE.quantile(u)
        sampled, true = (v[(v > low) & (v < high)] for v in (x, exact))
        assert len(sampled) / len(x) == pytest.approx(len(true) / len(exact), abs=0.01)
        assert sampled.mean().item() == pytest.approx(true.mean().item(), abs=0.02)
        assert sampled.std().item() == pytest.approx(true.std().item(), abs=0.02)
        assert true.mean().item() == pytest.approx(m, abs=0.06)
        assert len(true) / len(exact) == pytest.approx(w, abs=0.02)
        assert true.std().item() == pytest.approx(s, abs=0.06)


def flow_error(name, steps):
    """Mean distance from the exact flow, with the same last estimate."""
    grid = log_snr_grid(schedule.IMAGE, steps)
    z = normal_quantiles(500)
    start, end = grid[0].sigmoid(), grid[-1].sigmoid()
    exact = MIXTURE.estimate(MIXTURE.flow(z, start, end), end)
    return float((solve(build_solver(name, grid), z, MIXTURE.estimate) - exact).abs().mean())


@pytest.mark.parametrize("name", ["dpmpp2m", "eq9"])
def test_error_is_of_second_order_in_the_step(name):
    coarse, fine, finest = (flow_error(name, 1 + n) for n in (80, 160, 320))
    assert 3.2 < coarse / fine < 5.0
    assert 3.5 < fine / finest < 4.6


def test_error_without_the_previous_estimate_is_of_first_order():
    class Euler(DPMSolverPP2M):
        def step(self, i, z, z_0):
            self.previous = None
            return super().step(i, z, z_0)

    def error(steps):
        grid = log_snr_grid(schedule.IMAGE, steps)
        z = normal_quantiles(500)
        end = grid[-1].sigmoid()
        exact = MIXTURE.estimate(MIXTURE.flow(z, grid[0].sigmoid(), end), end)
        return float((solve(Euler(grid), z, MIXTURE.estimate) - exact).abs().mean())

    assert 1.7 < error(161) / error(321) < 2.3


def test_eq9_solves_the_ode_with_correct_signs():
    beta, mean, std = 12.0, 0.8, 0.3  # constant beta: abar = exp(-beta t)
    data = Mixture((1.0,), (mean,), (std,))

    def alpha_bar(t):
        return np.exp(-beta * t)

    def x_0(t, z):
        return data.estimate(torch.from_numpy(z), float(alpha_bar(t))).numpy()

    def correct(t, z):
        abar = alpha_bar(t)
        return -beta / 2 * z + beta / 2 * (z - abar**0.5 * x_0(t, z)) / (1 - abar)

    def printed(t, z):  # Eq. 58
        abar = alpha_bar(t)
        return -beta / 2 * (z - abar**0.5 * x_0(t, z)) / (1 - abar)

    z, end = normal_quantiles(200), 1e-5
    exact, wrong = (
        solve_ivp(f, (1.0, end), z.numpy(), rtol=1e-9, atol=1e-9).y[:, -1]
        for f in (correct, printed)
    )
    assert wrong.std() > 100
    assert exact.std() == pytest.approx(std, abs=0.01)
    ends = torch.tensor([alpha_bar(1.0), alpha_bar(end)]).logit()
    grid = torch.linspace(*ends.tolist(), 300, dtype=torch.float64)
    x = solve(Heun(grid), z, data.estimate)
    np.testing.assert_allclose(x, exact, atol=2e-3)


def test_solvers_use_at_most_the_given_number_of_evaluations():
    for steps in (5, 20, 21):
        for name in SOLVERS:
            levels = make_solver(name, schedule.TEXT, steps, step_noise((1,))).levels
            assert steps - 1 <= len(levels) <= steps
            assert (levels.diff() >= 0).all()
            assert levels[0] == pytest.approx(-7)
            assert levels[-1] == pytest.approx(4)


@pytest.mark.parametrize("name", ["dpmpp2m", "ddpm"])
def test_a_single_step_is_the_estimate_from_pure_noise(name):
    solver = make_solver(name, schedule.TEXT, 1, step_noise((1,)))
    assert solver.levels.tolist() == [schedule.TEXT.log_snr_range()[1]]
    assert solver.step(0, torch.tensor([3.0]), torch.tensor([0.5])) == 0.5


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="takes 0 steps; at least 1"):
        log_snr_grid(schedule.TEXT, 0)
    with pytest.raises(ValueError, match="eq9 needs at least 3"):
        make_solver("eq9", schedule.TEXT, 2, step_noise((1,)))
