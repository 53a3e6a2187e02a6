"""Error against evaluations of every solver, on a mixture whose exact answer is known.

The error is the Wasserstein-1 distance between 65,536 samples and the data's quantiles, data with
standard deviation 1. The peers are diffusers' schedulers at their own settings, on the same
estimates. A random sampler's floor is the distance of that many true samples.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdm.diffusion import schedule
from mdm.diffusion.sampler import make_solver
from mdm.evaluate.solvers import Curves, chart, curves
from tests.mixture import Mixture, normal_quantiles

N, AT = 65_536, 20
DATA = Mixture()
OUT = Path("runs/bench")


def distance(x: Tensor) -> float:
    """Wasserstein-1 to the data."""
    exact = DATA.quantile((torch.arange(N, dtype=torch.float64) + 0.5) / N)
    return float((x.sort().values - exact).abs().mean())


def ours(name: str, evaluations: int) -> float:
    """The error of a solver of ours."""
    generator = torch.Generator().manual_seed(0)

    def noise(i: int) -> Tensor:
        return torch.randn(N, generator=generator, dtype=torch.float64)

    solver = make_solver(name, schedule.IMAGE, evaluations, noise)
    z = normal_quantiles(N)
    for i, level in enumerate(solver.levels):
        z = solver.step(i, z, DATA.estimate(z, level.sigmoid()))
    return distance(z)


def theirs(name: str, evaluations: int) -> float:
    """The error of a scheduler of diffusers, cosine betas, everything else by default."""
    import diffusers

    scheduler = getattr(diffusers, name)(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        **({"clip_sample": False} if name in ("DDPMScheduler", "DDIMScheduler") else {}),
    )
    steps = (evaluations + 1) // 2 if name == "HeunDiscreteScheduler" else evaluations
    scheduler.set_timesteps(steps)
    table = scheduler.alphas_cumprod.double()
    in_y = name == "HeunDiscreteScheduler"  # its latents are z/alpha
    z = normal_quantiles(N)
    if in_y:
        z = z * float(scheduler.init_noise_sigma)
    generator = torch.Generator().manual_seed(0)
    extra = {"generator": generator} if name == "DDPMScheduler" else {}
    for t in scheduler.timesteps:
        if t == int(t):
            abar = table[int(t)]
        else:  # schedulers over sigma interpolate it between steps
            s = ((1 - table) / table).sqrt()
            low = int(t)
            abar = 1 / (1 + (s[low] + (float(t) - low) * (s[low + 1] - s[low])) ** 2)
        latent = z * abar.sqrt() if in_y else z
        said = DATA.estimate(latent, abar)
        z = scheduler.step(said.unsqueeze(-1), t, z.unsqueeze(-1), **extra).prev_sample.squeeze(-1)
    return distance(z.double())


PEERS = (
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
)


def run() -> dict[str, Any]:
    """Measure; also writes the curves as `runs/bench/sampler.svg`."""
    measured: Curves = curves(ours)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "sampler.svg").write_text(
        chart(measured, "distance to the data against evaluations", log=True)
    )
    peers = {name: 1 / theirs(name, AT) for name in PEERS}
    best = 1 / measured["dpmpp2m"][AT]
    true = DATA.quantile(
        torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    return {
        "name": "sampler",
        "unit": f"1 / Wasserstein-1 distance to the data after {AT} evaluations, solver dpmpp2m",
        "ours": best,
        "peers": peers,
        "ratio": best / max(peers.values()),
        "setting": {
            "data": "mixture of three Gaussians on the line, exact denoiser, float64",
            "samples": N,
            "error": measured,
            "error_of_true_samples": distance(true),
        },
    }
