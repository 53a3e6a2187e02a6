"""adaLN-single (PixArt, Chen et al. 2024): noise levels and labels modulate every block."""

from torch import Tensor

MODULATIONS = 3  # shift, scale and gate


def modulated(x: Tensor, modulation: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Shift and scale x [..., d] by modulation [..., 3 d]; also the factor of what a block adds.

    A modulation of 0, as at the start, changes nothing.
    """
    if modulation is None:
        return x, 1.0
    shift, scale, gate = modulation.chunk(MODULATIONS, -1)
    return x * (1 + scale) + shift, 1 + gate
