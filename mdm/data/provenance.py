"""Whether a run's tokenizer and autoencoder are those that its data was encoded with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdm.config import Config
from mdm.data.mixture import Mixture, Source
from mdm.first_stage.folder import PIXELS, describe
from mdm.first_stage.tokenizer import Tokenizer


@dataclass(frozen=True)
class Provenance:
    """The sha256 of what the training data was encoded with."""

    tokenizer: str = ""  # empty where it was not recorded
    autoencoder: str = ""  # empty for text alone, or where it was not recorded

    @classmethod
    def of(cls, loader_state: Mapping[str, Any]) -> "Provenance":
        """What a loader's state says; nothing in those of earlier versions."""
        found = (loader_state.get(f"{name}_sha256") for name in ("tokenizer", "autoencoder"))
        return cls(*(sha256 or "" for sha256 in found))


def check_fit(mixture: Mixture, config: Config) -> None:
    """ValueError, naming both sides, unless tokenizer, autoencoder and labels fit all sources."""
    check_labels(mixture.sources)
    whose = f"data set {mixture.sources[0].name!r} was encoded with"
    found = check_tokenizer(config.tokenizer, mixture.tokenizer_sha256, whose)
    if found.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"--tokenizer {config.tokenizer} has {found.vocab_size} pieces, model.vocab_size is "
            f"{config.model.vocab_size}"
        )
    if mixture.autoencoder_sha256 is not None:
        whose = f"data set {mixture.images[0].name!r} was encoded with"
        check_autoencoder(config.autoencoder, mixture.autoencoder_sha256, whose)


def check_labels(sources: tuple[Source, ...]) -> None:
    """ValueError where two sources mean different classes by the same label."""
    for i, one in enumerate(sources):
        for other in sources[:i]:
            pairs = zip(one.manifest.class_names, other.manifest.class_names, strict=False)
            for label, (name, former) in enumerate(pairs):
                if name != former:
                    raise ValueError(
                        f"{other.name!r} and {one.name!r} cannot be mixed: class {label} is "
                        f"{former!r} and {name!r}; encode both with the same list of classes"
                    )


def check_tokenizer(path: str, sha256: str, whose: str) -> Tokenizer:
    """The tokenizer at `path`; ValueError unless it is the one of `sha256`, which `whose` says."""
    if not path:
        raise ValueError(
            f"{whose} the tokenizer of sha256 {sha256}, but none is given; give it as --tokenizer"
        )
    try:
        found = Tokenizer(path)
    except ValueError as error:
        raise ValueError(
            f"{error}; {whose} the one of sha256 {sha256}, give that file as --tokenizer"
        ) from None
    if found.sha256 != sha256:
        raise ValueError(
            f"tokenizer {path} has sha256 {found.sha256}, but {whose} {sha256}; "
            "give that file as --tokenizer"
        )
    return found


def check_autoencoder(folder: str, sha256: str, whose: str) -> None:
    """ValueError unless `folder` holds the autoencoder of `sha256`, which `whose` says."""
    if sha256 == PIXELS:
        if folder:
            raise ValueError(
                f"autoencoder {folder} is given, but {whose} pixel patches, which need none; "
                'give --autoencoder ""'
            )
        return
    if not folder:
        raise ValueError(
            f"{whose} the autoencoder of sha256 {sha256}, but none is given; "
            "give its folder as --autoencoder"
        )
    try:
        found = describe(Path(folder)).sha256
    except ValueError as error:
        raise ValueError(
            f"{error}; {whose} the one of sha256 {sha256}, give that folder as --autoencoder"
        ) from None
    if found != sha256:
        raise ValueError(
            f"autoencoder {folder} has sha256 {found}, but {whose} {sha256}; "
            "give that folder as --autoencoder"
        )
