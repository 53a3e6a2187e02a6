"""A folder of exported weights, complete in itself but for the first stage it names.

config.json                the run's configuration
model.safetensors          weights by `state_dict` name; `model.<kind>.safetensors` for others.
                           Their metadata hold the sha256 of tokenizer and autoencoder
tokenizer.model            the run's tokenizer
README.md                  the model card
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from json import dumps, loads
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdm.config import Config, to_dict
from mdm.data.provenance import Provenance
from mdm.storage import LocalStore
from mdm.storage.tensor_file import save_tensors
from mdm.utils.files import DamagedFileError, load_json

TOKENIZER = "tokenizer.model"
_PROVENANCE = "provenance"
KINDS = {
    "ema": "averaged weights",
    "ema2": "weights of the second average",
    "raw": "weights of the last step",
}


@dataclass(frozen=True)
class Training:
    """What a model card says about how the weights came about."""

    step: int = 0
    samples_seen: int = 0
    loss: float | None = None


def write_export(
    folder: Path,
    config: Config,
    training: Training,
    weights: Mapping[str, Mapping[str, Tensor]],
    tokenizer: bytes,
    provenance: Provenance,
) -> None:
    """Write `folder` whole or not at all; an older one is replaced.

    Args:
        folder: where to.
        config: the run's configuration.
        training: for the card.
        weights: by kind, then by `state_dict` name; the first kind is `model.safetensors`.
        tokenizer: the `.model` file's bytes; empty for none.
        provenance: what the training data was encoded with.
    """
    work = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_files(work, config, training, weights, tokenizer, provenance)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)


def missing_files(folder: Path, config: Config, kinds: Sequence[str]) -> list[str]:
    """What an export of these kinds of weights lacks, or holds only a part of."""
    missing = []
    for i, kind in enumerate(kinds):
        name = f"model.{kind}.safetensors" if i else "model.safetensors"
        try:
            with safe_open(folder / name, "pt"):  # its header tells how long it must be
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


def write_files(
    folder: Path,
    config: Config,
    training: Training,
    weights: Mapping[str, Mapping[str, Tensor]],
    tokenizer: bytes,
    provenance: Provenance,
) -> None:
    """The files of an export, into a folder that exists; as `write_export` takes them."""
    store, parameters = LocalStore(folder), 0
    # One entry alone: safetensors writes several in any order.
    metadata = {_PROVENANCE: dumps(asdict(provenance))} if provenance.tokenizer else None
    for i, (kind, tensors) in enumerate(weights.items()):
        name = f"model.{kind}.safetensors" if i else "model.safetensors"
        save_tensors(folder / name, tensors, metadata)
        parameters = sum(t.numel() for t in tensors.values())
    store.put("config.json", dumps(to_dict(config), indent=1).encode())
    if tokenizer:
        store.put(TOKENIZER, tokenizer)
    card = model_card(config, training, list(weights), parameters, provenance)
    store.put("README.md", card.encode())


def read_provenance(folder: Path) -> Provenance:
    """What the training data of an export was encoded with; empty where it does not say.

    ValueError if the weights cannot be read.
    """
    path = folder / "model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return Provenance(**loads(metadata.get(_PROVENANCE, "{}")))
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def model_card(
    config: Config, training: Training, kinds: list[str], parameters: int, provenance: Provenance
) -> str:
    """The README.md of an export, in the form that model hubs read."""
    model, first, *others = config.model, *kinds
    files = [f"- `model.safetensors`: {KINDS[first]}, fp32"]
    files += [f"- `model.{kind}.safetensors`: {KINDS[kind]}, fp32" for kind in others]
    loss = "" if training.loss is None else f", last training loss {training.loss:.4f}"
    sources = ", ".join(f"{s.name} ({s.weight:g})" for s in config.data.sources) or "not recorded"
    averages = f"{config.train.ema:g}"
    if config.train.ema2:
        averages += f" and {config.train.ema2:g}"
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

{training.step:,} steps, {training.samples_seen:,} samples{loss}; global batch
{config.data.global_batch}, seed {config.seed}, decay of the averages {averages}.
Data sets and their shares: {sources}.

## Use

```python
from mdm.generate import Generator

model = Generator.from_pretrained("this folder")
images = model.text_to_image(["a caption"])
```

Outputs repeat what the training data holds, its errors and biases included; nothing filters them.
"""
