"""Score entropy (Eqs. 4-7) in log space, in fp32.

Shapes: z_t [..., d]; candidates y [..., K, d]; alpha_bar [...]; eps_hat [..., d].

All functions use one energy, with eps_y = (z_t - sqrt(abar) y) / sqrt(1 - abar):

    f(z_t, y) = -1/2 |eps_y - eps_hat|^2 + 1/2 |z_t|^2

Its exponential at eps_hat = 0 is the ratio of Theorem 1.
"""

import torch
from torch import Tensor

from mdm.utils.precision import fp32

SPREAD = 2.0  # standard deviation of the candidates' noises: the true ones have 1 at most


def log_ratio(z_t: Tensor, y: Tensor, alpha_bar: Tensor) -> Tensor:
    """Log p(y) / p(z_t) of Eq. 5, [..., K]."""
    return energy(z_t, y, alpha_bar, torch.zeros_like(z_t))


def log_ratio_vocabulary(z_t: Tensor, y: Tensor, alpha_bar: Tensor) -> Tensor:
    """`log_ratio` for candidates y [K, d] shared by all z_t, as one matrix product: [..., K]."""
    _check(z_t, y.expand(*z_t.shape[:-1], *y.shape), alpha_bar, z_t)
    z_t, y = z_t.float(), y.float()
    abar = alpha_bar.float().unsqueeze(-1)
    with fp32(z_t.device):
        products = z_t @ y.T
    squares = abar * y.square().sum(-1) - 2 * abar.sqrt() * products
    square = z_t.square().sum(-1, keepdim=True)
    return 0.5 * (square - (square + squares) / (1 - abar))


def energy(z_t: Tensor, y: Tensor, alpha_bar: Tensor, eps_hat: Tensor) -> Tensor:
    """f(z_t, y) [..., K], the energy of Eq. 17 (App.) with the learned residual eps_hat.

    Raises:
        ValueError: shapes do not match, or alpha_bar is outside [0, 1).
    """
    _check(z_t, y, alpha_bar, eps_hat)
    z_t, y, eps_hat = z_t.float(), y.float(), eps_hat.float()
    abar = alpha_bar.float()[..., None, None]
    eps_y = (z_t.unsqueeze(-2) - abar.sqrt() * y) * (1 - abar).rsqrt()
    distance = (eps_y - eps_hat.unsqueeze(-2)).square().sum(-1)
    return 0.5 * (z_t.square().sum(-1, keepdim=True) - distance)


def log_score_ratio(energies: Tensor) -> Tensor:
    """Log s_theta of Eq. 7: log-softmax over the candidates, [..., K]."""
    return energies.float().log_softmax(-1)


def score_entropy(log_s: Tensor, log_r: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Eq. 4, sum_K weight (s - r log s + r (log r - 1)), [...].

    Zero exactly where s = r. For normalised s and r and unit weights it equals KL(r || s), and for
    a one-hot r the cross-entropy. log_r may hold -inf.

    Raises:
        ValueError: log_s and log_r have different shapes.
    """
    if log_s.shape != log_r.shape:
        raise ValueError(f"log_s has shape {tuple(log_s.shape)}, log_r {tuple(log_r.shape)}")
    s, r = log_s.float().exp(), log_r.float().exp()
    # Where r = 0 only s remains: 0 * -inf counts as 0.
    r_log = torch.where(r > 0, r * (log_r.float() - 1 - log_s.float()), torch.zeros_like(r))
    return (weight * (s + r_log)).sum(-1)


def noise_cross_entropy(eps: Tensor, eps_hat: Tensor, count: int) -> Tensor:
    """-log s of the true latent among all latents that a grid of noises makes of z_t, per number.

    The noise eps_k makes the candidate y_k = (z_t - sqrt(1 - abar) eps_k) / sqrt(abar). Each of the
    d numbers takes `count` values, quantiles of N(0, `SPREAD`^2), or its true one; the softmax over
    all those candidates is the product of one softmax for each number. It must subtract the log
    density q that the candidates have: cross-entropy fits f - log q to log p(y | z_t) - log q(y),
    so without it the least loss is at eps_hat = 0 for candidates drawn from the data. As `count`
    grows, the cross-entropy becomes 1/2 (eps - eps_hat)^2 plus a constant: both are least at
    E[eps | z_t], whatever the data.

    Args:
        eps: the true noise, [...].
        eps_hat: the predicted noise, [...].
        count: candidates of each number beside the true one.

    Returns:
        [...], in nats for each number.
    """
    eps, eps_hat = eps.float(), eps_hat.float().unsqueeze(-1)
    quantiles = (torch.arange(count, device=eps.device) + 0.5) / count
    noises = SPREAD * torch.special.ndtri(quantiles).expand(*eps.shape, count)
    noises = torch.cat([eps.unsqueeze(-1), noises], -1)
    log_density = -0.5 * (noises / SPREAD).square()
    return -log_score_ratio(-0.5 * (noises - eps_hat).square() - log_density)[..., 0]


def _check(z_t: Tensor, y: Tensor, alpha_bar: Tensor, eps_hat: Tensor) -> None:
    if y.dim() != z_t.dim() + 1 or y.shape[-1] != z_t.shape[-1]:
        raise ValueError(
            f"candidates have shape {tuple(y.shape)}; z_t {tuple(z_t.shape)} needs [..., K, d]"
        )
    if eps_hat.shape != z_t.shape:
        raise ValueError(f"eps_hat has shape {tuple(eps_hat.shape)}, z_t {tuple(z_t.shape)}")
    for name, lead in (("candidates", y.shape[:-2]), ("alpha_bar", alpha_bar.shape)):
        pairs = zip(lead, z_t.shape[:-1], strict=False)
        if len(lead) not in (0, z_t.dim() - 1) or any(a not in (1, b) for a, b in pairs):
            raise ValueError(
                f"the leading shape of {name} is {tuple(lead)}; z_t {tuple(z_t.shape)} needs "
                f"{tuple(z_t.shape[:-1])}"
            )
    if alpha_bar.device.type != "cpu":  # a step must not wait for a GPU
        return
    if alpha_bar.numel() and not (alpha_bar.min() >= 0 and alpha_bar.max() < 1):  # NaN too
        raise ValueError(
            f"alpha_bar spans {alpha_bar.min():g} to {alpha_bar.max():g}; it must lie in [0, 1): "
            f"at 1 there is no noise to score"
        )
