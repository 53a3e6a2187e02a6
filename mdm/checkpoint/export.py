"""Exports the weights of a committed checkpoint, without running ranks and without DeepSpeed."""

import logging
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from mdm.checkpoint.checkpoints import Checkpoints, Record
from mdm.checkpoint.exported import write_export
from mdm.checkpoint.snapshot import DamagedError, buffers_key, fetch, read_whole
from mdm.checkpoint.state import RunError
from mdm.config import Config, from_dict
from mdm.data.provenance import Provenance, check_tokenizer
from mdm.first_stage.tokenizer import read_model

log = logging.getLogger(__name__)


def export_checkpoint(
    checkpoint: str,
    folder: Path,
    kinds: Sequence[str] = ("ema",),
    tokenizer: str = "",
    config: Config | None = None,
) -> None:
    """Export some kinds of weights of a checkpoint that any number of ranks wrote.

    Args:
        checkpoint: folder or s3:// prefix of one checkpoint.
        folder: where the export goes.
        kinds: of `ema`, `ema2` and `raw`; the first becomes `model.safetensors`.
        tokenizer: SentencePiece model, if it is no longer where the run had it.
        config: the run's present configuration; None for the checkpoint's.

    Raises:
        RunError: the checkpoint is damaged, of another format, or lacks a kind; or the training
            data was encoded with another tokenizer.
    """
    uri, _, name = checkpoint.rstrip("/").rpartition("/")
    checkpoints = Checkpoints.at(uri or ".")
    try:
        record = checkpoints.read(name)
        config = config or from_dict(Config, record.state.config)
        provenance = Provenance.of(record.manifest["loader"])
        model = _tokenizer(tokenizer or config.tokenizer, provenance, checkpoint)
        if lacking := [kind for kind in kinds if kind not in (*record.averages, "raw")]:
            raise RunError(
                f"{checkpoint} holds no {', '.join(lacking)}; it has raw and "
                f"{', '.join(record.averages)}"
            )
        weights = {kind: _weights(checkpoints, record, kind) for kind in kinds}
    except DamagedError as error:
        raise RunError(f"{checkpoint} is not a valid checkpoint: {error}") from None
    write_export(folder, config, record.state, weights, model, provenance)


def _tokenizer(path: str, provenance: Provenance, checkpoint: str) -> bytes:
    """The bytes of the tokenizer; raises RunError unless the training data was encoded with it."""
    if provenance.tokenizer:
        whose = f"the data of {checkpoint} was encoded with"
        try:
            return check_tokenizer(path, provenance.tokenizer, whose).model()
        except ValueError as error:
            raise RunError(str(error)) from None
    exists = Path(path).is_file()
    choice = f"the export gets {path}" if exists else "the export holds none"
    log.warning("%s does not record its tokenizer: %s", checkpoint, choice)
    return read_model(path) if exists else b""


def _weights(checkpoints: Checkpoints, record: Record, kind: str) -> dict[str, Tensor]:
    store, files = checkpoints.store, record.files
    stored = "weights" if kind == "raw" else kind
    size, shapes = int(record.manifest["world_size"]), record.manifest["shapes"]
    weights = read_whole(store, record.name, size, files, stored, shapes)
    for name, other in record.manifest["tied"].items():
        weights[name] = weights[other].clone()
    key = buffers_key(record.name, 0)
    return weights | safetensors.torch.load(fetch(store, key, files[key]))
