"""Weights for generation: `config.json` and `model.safetensors`, written whole or not at all."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mdm.config import Config, from_dict, to_dict
from mdm.train.checkpoint import Checkpoint, sync_folder, why_invalid, write_synced
from mdm.train.engine import read_offline
from mdm.train.state import RunError


def write_export(folder: Path, config: Config, weights: dict[str, Tensor]) -> None:
    """Write `folder` with the weights by `state_dict` name; an older folder is replaced."""
    work = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, work / "model.safetensors")
    write_synced(work / "config.json", json.dumps(to_dict(config), indent=1).encode())
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
    sync_folder(folder.parent)


def export_checkpoint(checkpoint: Path, folder: Path, ema: bool = True) -> None:
    """Export a committed checkpoint's averaged (or raw) weights, whatever world size wrote it."""
    reason = why_invalid(checkpoint)
    if reason:
        raise RunError(f"{checkpoint} is not a valid checkpoint: {reason}")
    config = from_dict(Config, Checkpoint(checkpoint).state.config)
    write_export(folder, config, read_offline(checkpoint / ("ema" if ema else "main")))
