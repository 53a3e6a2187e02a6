"""The facts about an autoencoder's folder, read without importing or loading the network."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

PATCH = 2  # latent cells a token spans, each way (Table 1)
PIXELS = "pixel patches"  # in place of the sha256 if there is no autoencoder (pixel_patches.py)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class FirstStage:
    """An autoencoder's identity and shapes."""

    sha256: str  # of configuration and weights
    image_size: int  # pixels, each way
    factor: int  # pixels a latent cell spans, each way
    grid: tuple[int, int]  # rows and columns of image tokens
    latent_dim: int  # numbers a token


def describe(folder: str | Path) -> FirstStage:
    """The facts about a folder in diffusers' format; ValueError says what is missing or wrong."""
    folder = Path(folder)
    digest = hashlib.sha256()
    try:
        for name in ("config.json", WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(f"no {name}")
            digest.update((folder / name).read_bytes())
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (kind := config.get("_class_name")) != "AutoencoderKL":
            raise ValueError(f"config.json describes {kind}, not AutoencoderKL")
        size = int(config["sample_size"])
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        latent_dim = int(config["latent_channels"]) * PATCH * PATCH
    except KeyError as error:
        raise ValueError(f"autoencoder {folder}: config.json has no {error}") from None
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"autoencoder {folder}: {error}") from None
    side = size // factor // PATCH
    return FirstStage(digest.hexdigest(), size, factor, (side, side), latent_dim)
