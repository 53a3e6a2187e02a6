"""The frozen first-stage autoencoder (diffusers' AutoencoderKL): images <-> latent tokens.

Shapes: B images, H x W pixels, f pixels a latent cell (4 or 8), C latent channels (4),
N = (H / 2f) (W / 2f) tokens of 4C numbers, row after row.
"""

from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from mdm.first_stage.folder import PATCH, FirstStage, describe
from mdm.storage.tensor_file import open_as_created

_Kl = cast(Any, AutoencoderKL)  # partly typed by diffusers

# Pixels that a CPU processes at once, so that activations stay in its caches: 64 images of 128 px
# are twice as fast one by one as all at once.
_CPU_PIXELS = 1 << 14


def build(image_size: int, channels: tuple[int, ...] = (16, 32, 64)) -> nn.Module:
    """An untrained AutoencoderKL that halves the image between its `channels` levels.

    Raises ValueError unless `image_size` is a whole number of tokens.
    """
    factor = 2 ** (len(channels) - 1)
    if image_size % (factor * PATCH):
        raise ValueError(f"image_size {image_size} is not a multiple of {factor * PATCH}")
    model: nn.Module = _Kl(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=image_size,
        mid_block_add_attention=False,
    )
    return model


def save(model: nn.Module, folder: Path, mean: list[float], std: list[float]) -> None:
    """Write a folder in diffusers' format, with each latent channel's mean and deviation."""
    vae: Any = model
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(folder, safe_serialization=True)
    for path in folder.iterdir():
        open_as_created(path)


class Autoencoder:
    """Encode and decode with a local folder in diffusers' format, without gradients."""

    def __init__(self, model: nn.Module, facts: FirstStage, device: str) -> None:
        """Wrap a model; use `load` to read a folder."""
        self._model = cast(Any, model.eval().requires_grad_(False).to(device))
        if device == "cpu":
            self._model.to(memory_format=torch.channels_last)
        self.sha256, self.image_size, self.factor = facts.sha256, facts.image_size, facts.factor
        self.grid, self.latent_dim = facts.grid, facts.latent_dim
        config = self._model.config
        channels = int(config.latent_channels)
        # Latent channels get mean 0 and deviation 1. A folder without statistics of each channel
        # has one scale and shift for all of them.
        mean = config.latents_mean or [config.shift_factor or 0.0] * channels
        std = config.latents_std or [1.0 / config.scaling_factor] * channels
        self._mean = torch.tensor(mean, device=device).view(1, channels, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, channels, 1, 1)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> Self:
        """The autoencoder of a local folder; ValueError says what is missing or damaged."""
        facts = describe(folder)
        try:
            model: nn.Module = _Kl.from_pretrained(
                folder,
                local_files_only=True,
                low_cpu_mem_usage=False,  # True needs `accelerate` and saves nothing here
            )
        except (OSError, ValueError, RuntimeError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise ValueError(f"autoencoder {folder}: {lines[0]}") from None
        return cls(model, facts, device)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latent tokens f32 [B, N, 4C] of pixels [B, 3, H, W], uint8 or floats in [0, 1].

        They are the posterior's mean, normalised by channel. Raises ValueError for other shapes, or
        if a side is not a whole number of tokens.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, not [B, 3, H, W]")
        step = self.factor * PATCH
        if pixels.shape[2] % step or pixels.shape[3] % step:
            raise ValueError(f"{pixels.shape[2]} x {pixels.shape[3]} is not a multiple of {step}")
        means = []
        for part in self._slices(pixels, pixels.shape[2] * pixels.shape[3]):
            signed = to_signed(part.to(self._mean.device))
            means.append(self._model.encode(signed).latent_dist.mode().float())
        mean = torch.cat(means)
        cells = (mean - self._mean) / self._std
        tokens: Tensor = rearrange(cells, "b c (h p) (w q) -> b (h w) (p q c)", p=PATCH, q=PATCH)
        return tokens.contiguous()

    @torch.inference_mode()
    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Pixels f32 [B, 3, H, W] in [0, 1] of latent tokens [B, N, 4C].

        `grid` gives the rows and columns of tokens; by default, those of the model's image size.
        Raises ValueError if N is not rows x columns.
        """
        rows, columns = grid or self.grid
        if latents.ndim != 3 or latents.shape[1:] != (rows * columns, self.latent_dim):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, "
                f"not [B, {rows} x {columns}, {self.latent_dim}]"
            )
        tokens = latents.to(self._mean.device).float()
        sizes = {"h": rows, "p": PATCH, "q": PATCH}
        cells = rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", **sizes)
        parts = self._slices(cells, rows * columns * (PATCH * self.factor) ** 2)
        decode = self._model.decode
        pixels = torch.cat([decode(p * self._std + self._mean).sample.float() for p in parts])
        return ((pixels + 1) / 2).clamp(0, 1)

    def _slices(self, images: Tensor, pixels: int) -> tuple[Tensor, ...]:
        """The batch in parts that the network processes at once; an image has `pixels` pixels."""
        if self._mean.device.type != "cpu":
            return (images,)
        parts: tuple[Tensor, ...] = images.split(max(1, _CPU_PIXELS // pixels))
        return parts


def to_signed(pixels: Tensor) -> Tensor:
    """Pixels, uint8 or floats in [0, 1], scaled to floats in [-1, 1]."""
    scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    return scaled * 2 - 1
