"""A folder of exported weights, complete in itself but for the first stage it names.

config.json                the run's configuration
model.safetensors          weights by `state_dict` name; `model.<kind>.safetensors` for others
tokenizer.model            the run's tokenizer
README.md                  the model card
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from json import dumps
from pathlib import Path

from torch import Tensor

from mdm.config import Config, to_dict
from mdm.data.storage import LocalStore
from mdm.data.tensor_file import save_tensors

TOKENIZER = "tokenizer.model"
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
    folder: Path, config: Config, training: Training, weights: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write `folder` whole or not at all; an older one is replaced.

    Args:
        folder: where to.
        config: the run's configuration; its tokenizer is copied.
        training: for the card.
        weights: by kind, then by `state_dict` name; the first kind is `model.safetensors`.
    """
    work = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tokenizer = Path(config.tokenizer)
    model = tokenizer.read_bytes() if tokenizer.is_file() else b""
    write_files(work, config, training, weights, model)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)


def write_files(
    folder: Path,
    config: Config,
    training: Training,
    weights: Mapping[str, Mapping[str, Tensor]],
    tokenizer: bytes,
) -> None:
    """The files of an export, into a folder that exists; `tokenizer` is the `.model` file's."""
    store, parameters = LocalStore(folder), 0
    for i, (kind, tensors) in enumerate(weights.items()):
        name = f"model.{kind}.safetensors" if i else "model.safetensors"
        save_tensors(folder / name, tensors)
        parameters = sum(t.numel() for t in tensors.values())
    store.put("config.json", dumps(to_dict(config), indent=1).encode())
    if tokenizer:
        store.put(TOKENIZER, tokenizer)
    card = model_card(config, training, list(weights), parameters)
    store.put("README.md", card.encode())


def model_card(config: Config, training: Training, kinds: list[str], parameters: int) -> str:
    """The README.md of an export, in the form that model hubs read."""
    model, first, *others = config.model, *kinds
    files = [f"- `model.safetensors`: {KINDS[first]}, fp32"]
    files += [f"- `model.{kind}.safetensors`: {KINDS[kind]}, fp32" for kind in others]
    loss = "" if training.loss is None else f", last training loss {training.loss:.4f}"
    sources = ", ".join(f"{s.name} ({s.weight:g})" for s in config.data.sources) or "not recorded"
    averages = f"{config.train.ema:g}"
    if config.train.ema2:
        averages += f" and {config.train.ema2:g}"
    return f"""---
library_name: mdm
license: apache-2.0
tags: [mamba2, diffusion, multimodal, text-to-image, image-to-text]
---

# Multi-Modal Diffusion Mamba

One {model.decoder} decoder of {model.n_layer} blocks of width {model.d_model}, {parameters:,}
numbers in all, for pictures of {model.image_height} x {model.image_width} latent tokens and texts
of up to {model.text_length} tokens out of {model.vocab_size:,}.

## Files

{chr(10).join(files)}
- `config.json`: the whole configuration of the run
- `tokenizer.model`: SentencePiece

The first-stage autoencoder is not part of it: `{config.autoencoder or "none"}`.

## Training

{training.step:,} steps, {training.samples_seen:,} samples{loss}; global batch
{config.data.global_batch}, seed {config.seed}, decay of the averages {averages}.
Data sets and their shares: {sources}.

## Use

```python
from mdm.generate import MDM

model = MDM.from_pretrained("this folder")
pictures = model.text_to_image(["a caption"])
```

Outputs repeat what the training data holds, its errors and biases included; nothing filters them.
"""
