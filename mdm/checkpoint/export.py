"""Exports: folders of weights, complete except for the autoencoder that they name.

config.json                the run's configuration
model.safetensors          weights by `state_dict` name; `model.<kind>.safetensors` for other kinds.
                           Their metadata hold the sha256 of tokenizer and autoencoder
tokenizer.model            the run's tokenizer
README.md                  the model card
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from json import dumps, loads
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdm.checkpoint.checkpoints import Checkpoints, Record
from mdm.checkpoint.snapshot import DamagedError, buffers_key, fetch, read_whole
from mdm.checkpoint.state import RunError, TrainState
from mdm.config import Config
from mdm.data.provenance import Provenance, check_tokenizer
from mdm.first_stage.tokenizer import read_model
from mdm.storage import LocalStore
from mdm.storage.tensor_file import save_tensors
from mdm.utils.files import DamagedFileError, load_json
from mdm.utils.saved_config import from_dict, to_dict

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.model"
_PROVENANCE = "provenance"
KINDS = {
    "ema": "averaged weights",
    "ema2": "weights of the second average",
    "raw": "weights of the last step",
}


def write_export(
    folder: Path,
    config: Config,
    state: TrainState,
    weights: Mapping[str, Mapping[str, Tensor]],
    tokenizer: bytes,
    provenance: Provenance,
    *,
    replace: bool = True,
) -> None:
    """Write an export.

    Args:
        folder: where to.
        config: the run's configuration.
        state: the run's progress, for the model card.
        weights: by kind, then by `state_dict` name; the first kind is `model.safetensors`.
        tokenizer: the `.model` file's bytes; empty for none.
        provenance: what the training data was encoded with.
        replace: write `folder` whole or not at all, and replace an older one; False writes the
            files one by one into a folder that exists.
    """
    work = folder.with_name(folder.name + ".tmp") if replace else folder
    if replace:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    # safetensors writes metadata in any order: a single entry keeps the file's bytes the same.
    metadata = {_PROVENANCE: dumps(asdict(provenance))} if provenance.tokenizer else None
    for name, tensors in zip(_weight_files(list(weights)), weights.values(), strict=True):
        save_tensors(work / name, tensors, metadata)
    store = LocalStore(work)
    store.put("config.json", dumps(to_dict(config), indent=1).encode())
    if tokenizer:
        store.put(TOKENIZER, tokenizer)
    store.put("README.md", _model_card(config, state, weights, provenance).encode())
    if replace:
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)


def _weight_files(kinds: Sequence[str]) -> list[str]:
    """The file of each kind of weights; the first is the one that `from_pretrained` loads."""
    return ["model.safetensors", *(f"model.{kind}.safetensors" for kind in kinds[1:])]


def missing_files(folder: Path, config: Config, kinds: Sequence[str]) -> list[str]:
    """Names of the files that an export of these kinds of weights lacks, or holds incompletely."""
    missing = []
    for name in _weight_files(kinds):
        try:
            with safe_open(folder / name, "pt"):  # its header says how long it must be
                pass
        except (OSError, SafetensorError):
            missing.append(name)
    try:
        load_json(folder / "config.json", {"model": dict})
    except (FileNotFoundError, DamagedFileError):
        missing.append("config.json")
    if Path(config.tokenizer).is_file() and not (folder / TOKENIZER).is_file():
        missing.append(TOKENIZER)
    return missing


def read_provenance(folder: Path) -> Provenance:
    """What the training data of an export was encoded with; empty where it is not recorded.

    Raises ValueError if the weights cannot be read.
    """
    path = folder / "model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return Provenance(**loads(metadata.get(_PROVENANCE, "{}")))
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


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
            return check_tokenizer(path, provenance.tokenizer, whose).file
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


def _model_card(
    config: Config,
    state: TrainState,
    weights: Mapping[str, Mapping[str, Tensor]],
    provenance: Provenance,
) -> str:
    """The README.md of an export, in the form that model hubs read."""
    model, kinds = config.model, list(weights)
    named = zip(_weight_files(kinds), kinds, strict=True)
    files = [f"- `{name}`: {KINDS[kind]}, fp32" for name, kind in named]
    parameters = sum(t.numel() for t in weights[kinds[0]].values())
    loss = "" if state.loss is None else f", last training loss {state.loss:.4f}"
    sources = ", ".join(f"{s.name} ({s.weight:g})" for s in config.data.sources) or "not recorded"
    decays = " and ".join(f"{decay:g}" for decay in (config.train.ema, config.train.ema2) if decay)
    first_stage = f"`{config.autoencoder or 'none'}`"
    if provenance.autoencoder:
        first_stage += f", sha256 `{provenance.autoencoder}`"
    return f"""---
library_name: mdm
license: apache-2.0
tags: [mamba2, diffusion, multimodal, text-to-image, image-to-text]
---

# Multi-Modal Diffusion Mamba

One {model.decoder} decoder of {model.n_layer} blocks of width {model.d_model}, {parameters:,}
numbers in all, for images of {model.image_height} x {model.image_width} latent tokens and texts
of up to {model.text_length} tokens out of {model.vocab_size:,}.

## Files

{chr(10).join(files)}
- `config.json`: the whole configuration of the run
- `tokenizer.model`: SentencePiece

The first-stage autoencoder is not part of it: {first_stage}.

## Training

{state.step:,} steps, {state.samples_seen:,} samples{loss}; global batch
{config.data.global_batch}, seed {config.seed}, decay of the averages {decays}.
Data sets and their shares: {sources}.

## Use

```python
from mdm.generate import Generator

model = Generator.from_pretrained("this folder")
images = model.text_to_image(["a caption"])
```

Outputs repeat what the training data holds, its errors and biases included; nothing filters them.
"""
