"""A committed checkpoint's weights for generation, with no rank running and no DeepSpeed."""

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from mdm.config import Config, from_dict
from mdm.exported import Training, write_export
from mdm.train.checkpoint import Checkpoints, Record
from mdm.train.snapshot import DamagedError, buffers_key, fetch, read_whole
from mdm.train.state import RunError


def export_checkpoint(
    checkpoint: str,
    folder: Path,
    kinds: Sequence[str] = ("ema",),
    config: Config | None = None,
) -> None:
    """Export some kinds of weights, the first as `model.safetensors`, whatever world wrote them.

    Args:
        checkpoint: folder or s3:// prefix of one checkpoint.
        folder: where the export goes.
        kinds: of `ema`, `ema2` and `raw`.
        config: the run's configuration as it is now; None for that of the checkpoint.

    Raises:
        RunError: the checkpoint is damaged, of another format, or lacks a kind.
    """
    uri, _, name = checkpoint.rstrip("/").rpartition("/")
    checkpoints = Checkpoints.at(uri or ".")
    try:
        record = checkpoints.read(name)
        if lacking := [kind for kind in kinds if kind not in (*record.averages, "raw")]:
            raise RunError(
                f"{checkpoint} holds no {', '.join(lacking)}; it has raw and "
                f"{', '.join(record.averages)}"
            )
        weights = {kind: _weights(checkpoints, record, kind) for kind in kinds}
    except DamagedError as error:
        raise RunError(f"{checkpoint} is not a valid checkpoint: {error}") from None
    state = record.state
    training = Training(state.step, state.samples_seen, state.loss)
    write_export(folder, config or from_dict(Config, state.config), training, weights)


def _weights(checkpoints: Checkpoints, record: Record, kind: str) -> dict[str, Tensor]:
    store, files = checkpoints.store, record.files
    stored = "weights" if kind == "raw" else kind
    size, shapes = int(record.manifest["world_size"]), record.manifest["shapes"]
    weights = read_whole(store, record.name, size, files, stored, shapes)
    for name, other in record.manifest["tied"].items():
        weights[name] = weights[other].clone()
    key = buffers_key(record.name, 0)
    return weights | safetensors.torch.load(fetch(store, key, files[key]))
