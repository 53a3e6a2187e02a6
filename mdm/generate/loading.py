"""The parts of a generator, loaded from an export and a first-stage folder."""

import dataclasses
from pathlib import Path

from safetensors.torch import load_file

from mdm.config import Config
from mdm.data.provenance import Provenance, check_autoencoder
from mdm.first_stage.autoencoder import Autoencoder
from mdm.first_stage.folder import PIXELS
from mdm.model.mdm import MDM


def load_model(folder: Path, config: Config, compiled: bool = False) -> MDM:
    """The model of an export, its blocks `compiled` if those of the run were.

    Raises:
        ValueError: the weights belong to another configuration.
    """
    # Whichever kernel the run was trained with, torch computes the same scans.
    kernel = "compiled" if compiled and config.model.kernel == "compiled" else "torch"
    model = MDM(dataclasses.replace(config.model, kernel=kernel))
    weights = load_file(folder / "model.safetensors")
    # The loss saves more than the model.
    model_weights = {k: v for k, v in weights.items() if k.startswith(("network.", "vae."))}
    try:
        model.load_state_dict(model_weights)
    except RuntimeError as error:
        raise ValueError(f"{folder}: weights of another configuration: {error}") from None
    return model


def load_first_stage(path: str, provenance: Provenance, folder: Path) -> Autoencoder | None:
    """The autoencoder at `path`, None if the training data held no images.

    Raises:
        ValueError: it did not encode the training data of the export `folder`.
    """
    if provenance.autoencoder == PIXELS:
        raise ValueError(
            f"{folder} was trained on pixel patches, which no autoencoder decodes; "
            "generate with examples/digits/learn.py"
        )
    if provenance.autoencoder:
        check_autoencoder(path, provenance.autoencoder, f"the data of {folder} was encoded with")
    elif provenance.tokenizer and not (Path(path) / "config.json").is_file():
        return None
    return Autoencoder.load(path)
