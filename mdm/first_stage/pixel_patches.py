"""Pixel patches in place of an autoencoder, for images that are small enough without one.

Shapes: B images of S x S grey values, P pixels a patch each way, N = (S / P)^2 tokens of P^2.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class PixelPatches:
    """Grey images <-> tokens of mean 0 and deviation 1; `decode` is that of `Autoencoder`.

    It enlarges images to `shown` pixels a side, the size that people and the classifier need.
    """

    def __init__(self, size: int, patch: int, mean: float, std: float, shown: int = 32) -> None:
        if size % patch:
            raise ValueError(f"images of {size} pixels cannot be divided into patches of {patch}")
        self.patch, self.mean, self.std, self.shown = patch, mean, std, shown
        self.grid = (size // patch, size // patch)
        self.latent_dim = patch * patch

    def encode(self, grey: Tensor) -> Tensor:
        """Tokens f32 [B, N, P^2] of grey values [B, S, S] in [0, 1]."""
        values = (grey.float() - self.mean) / self.std
        sizes = {"p": self.patch, "q": self.patch}
        tokens: Tensor = rearrange(values, "b (h p) (w q) -> b (h w) (p q)", **sizes)
        return tokens.contiguous()

    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Pixels f32 [B, 3, shown, shown] in [0, 1] of tokens [B, N, P^2].

        Raises ValueError if N is not rows x columns of `grid`.
        """
        rows, columns = grid or self.grid
        if latents.shape[1:] != (rows * columns, self.latent_dim):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, "
                f"not [B, {rows} x {columns}, {self.latent_dim}]"
            )
        values = latents.float() * self.std + self.mean
        sizes = {"h": rows, "p": self.patch}
        grey = rearrange(values, "b (h w) (p q) -> b 1 (h p) (w q)", **sizes).clamp(0, 1)
        shown = (self.shown, self.shown)
        large = F.interpolate(grey, shown, mode="bilinear", align_corners=False)
        return large.expand(-1, 3, -1, -1).contiguous()


def fitted(grey: Tensor, patch: int) -> PixelPatches:
    """Patches with the mean and deviation of `grey` [B, S, S]."""
    std, mean = torch.std_mean(grey.float())
    return PixelPatches(grey.shape[-1], patch, float(mean), float(std))
