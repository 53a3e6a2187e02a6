"""A linear layer that stays in fp32 under autocast."""

import torch.nn.functional as F
from torch import Tensor, nn

from mdm.utils.precision import fp32


class Fp32Linear(nn.Linear):
    """x W^T + b in fp32 whatever the autocast.

    DeepSpeed's autocast gathers and reduces the weights of plain `nn.Linear` modules in bf16; it
    goes by the exact class, so those of this one travel in fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> f32 [..., out]."""
        with fp32(x.device):
            return F.linear(x.float(), self.weight.float(), self.bias)
