"""Error of every solver by number of evaluations, on a mixture with a closed-form denoiser.

The error is the Wasserstein-1 distance between 65,536 samples and the quantiles of the data, which
has standard deviation 1. The peers are diffusers' schedulers with a cosine schedule, given the same
estimates. The floor is the distance of as many samples drawn from the data itself.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Result
from mdm.diffusion import schedule
from mdm.diffusion.sampler import SOLVERS, make_solver
from mdm.report.charts import solver_chart
from tests.mixture import Mixture, normal_quantiles

N, AT = 65_536, 20
EVALUATIONS = (5, 10, 20, 40, 80)
DATA = Mixture()
OUT = Path("runs/bench")


def distance(x: Tensor) -> float:
    """The Wasserstein-1 distance to the data."""
    exact = DATA.quantile((torch.arange(N, dtype=torch.float64) + 0.5) / N)
    return float((x.sort().values - exact).abs().mean())


def ours(name: str, evaluations: int) -> float:
    """The error of one of our solvers."""
    generator = torch.Generator().manual_seed(0)

    def noise(i: int) -> Tensor:
        return torch.randn(N, generator=generator, dtype=torch.float64)

    solver = make_solver(name, schedule.IMAGE, evaluations, noise)
    z = normal_quantiles(N)
    for i, level in enumerate(solver.levels):
        z = solver.step(i, z, DATA.estimate(z, level.sigmoid()))
    return distance(z)


def theirs(peer: str, evaluations: int) -> float:
    """The error of a diffusers scheduler with cosine betas; `peer` is `Class` or `Class option`."""
    import diffusers

    name, _, option = peer.partition(" ")
    settings: dict[str, Any] = {option: True} if option else {}
    random, over_sigmas = name == "DDPMScheduler", name not in ("DDPMScheduler", "DDIMScheduler")
    if not over_sigmas:
        settings["clip_sample"] = False
    scheduler = getattr(diffusers, name)(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", **settings
    )
    heun = name == "HeunDiscreteScheduler"  # two evaluations a step, of latents z/alpha
    scheduler.set_timesteps((evaluations + 1) // 2 if heun else evaluations)
    if over_sigmas:
        scheduler.set_begin_index(0)  # rounded times repeat, so the step cannot be inferred
    generator = {"generator": torch.Generator().manual_seed(0)} if random else {}
    z = normal_quantiles(N).unsqueeze(-1)
    if heun:
        z = z * float(scheduler.init_noise_sigma)
    for i, t in enumerate(scheduler.timesteps):
        if over_sigmas:
            abar = 1 / (1 + scheduler.sigmas[i].double() ** 2)
        else:
            abar = scheduler.alphas_cumprod[t].double()
        z_0 = DATA.estimate(z * abar.sqrt() if heun else z, abar)
        z = scheduler.step(z_0, t, z, **generator).prev_sample
    return distance(z.squeeze(-1).double())


PEERS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepScheduler use_karras_sigmas",
    "DPMSolverMultistepScheduler use_lu_lambdas",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler use_karras_sigmas",
    "DDIMScheduler",
    "DDPMScheduler",
)


def run() -> Result:
    """Measure, and write the curves to `runs/bench/sampler.svg`."""
    measured = {name: {n: ours(name, n) for n in EVALUATIONS} for name in SOLVERS}
    data_samples = DATA.quantile(
        torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    floor = distance(data_samples)
    svg = solver_chart(
        measured,
        "distance to the data by evaluations of the network",
        "Wasserstein-1 distance, standard deviations",
        {"floor: the data": floor},
    )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "sampler.svg").write_text(svg, encoding="utf-8")
    return Result(
        "sampler",
        f"Wasserstein-1 distance to the data after {AT} evaluations",
        measured["dpmpp2m"][AT],
        {name: theirs(name, AT) for name in PEERS},
        f"dpmpp2m, mixture of three Gaussians on the line, exact denoiser, {N} samples",
        floor=floor,
        more={"error_by_evaluations": measured},
    )
