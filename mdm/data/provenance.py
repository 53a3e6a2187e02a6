"""Whether a run's tokenizer and autoencoder are those that its data was encoded with."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from mdm.config import Config
from mdm.data.mixture import Mixture, Source
from mdm.first_stage.folder import PIXELS, describe
from mdm.first_stage.tokenizer import Tokenizer


@dataclass(frozen=True)
class Provenance:
    """The sha256 of what the training data was encoded with."""

    tokenizer: str = ""  # empty if it was not recorded
    autoencoder: str = ""  # empty for text alone, or if it was not recorded

    @classmethod
    def of(cls, loader_state: Mapping[str, Any]) -> "Provenance":
        """What a loader's state says; states of earlier versions say nothing."""
        keys = ("tokenizer_sha256", "autoencoder_sha256")
        return cls(*(loader_state.get(key) or "" for key in keys))


def check_fit(mixture: Mixture, config: Config) -> None:
    """ValueError, naming both sides, unless tokenizer, autoencoder and labels fit all sources."""
    check_labels(mixture.sources)
    owner = f"data set {mixture.sources[0].name!r} was encoded with"
    tokenizer = check_tokenizer(config.tokenizer, mixture.tokenizer_sha256, owner)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"--tokenizer {config.tokenizer} has {tokenizer.vocab_size} pieces, model.vocab_size "
            f"is {config.model.vocab_size}"
        )
    if mixture.autoencoder_sha256 is not None:
        owner = f"data set {mixture.images[0].name!r} was encoded with"
        check_autoencoder(config.autoencoder, mixture.autoencoder_sha256, owner)


def check_labels(sources: tuple[Source, ...]) -> None:
    """ValueError if two sources name different classes by the same label."""
    for first, second in combinations(sources, 2):
        pairs = zip(first.manifest.class_names, second.manifest.class_names, strict=False)
        for label, (one, other) in enumerate(pairs):
            if one != other:
                raise ValueError(
                    f"{first.name!r} and {second.name!r} cannot be mixed: class {label} is "
                    f"{one!r} and {other!r}; encode both with the same list of classes"
                )


def check_tokenizer(path: str, sha256: str, owner: str) -> Tokenizer:
    """The tokenizer at `path`; ValueError unless it has the sha256 that `owner` requires.

    `owner` begins the message: `data set 'a' was encoded with`.
    """
    if not path:
        raise ValueError(
            f"{owner} the tokenizer of sha256 {sha256}, but none is given; give it as --tokenizer"
        )
    try:
        tokenizer = Tokenizer(path)
    except ValueError as error:
        raise ValueError(
            f"{error}; {owner} the one of sha256 {sha256}, give that file as --tokenizer"
        ) from None
    if tokenizer.sha256 != sha256:
        raise ValueError(
            f"tokenizer {path} has sha256 {tokenizer.sha256}, but {owner} {sha256}; "
            "give that file as --tokenizer"
        )
    return tokenizer


def check_autoencoder(folder: str, sha256: str, owner: str) -> None:
    """ValueError unless `folder` holds the autoencoder of the sha256 that `owner` requires."""
    if sha256 == PIXELS:
        if folder:
            raise ValueError(
                f"autoencoder {folder} is given, but {owner} pixel patches, which need none; "
                'give --autoencoder ""'
            )
        return
    if not folder:
        raise ValueError(
            f"{owner} the autoencoder of sha256 {sha256}, but none is given; "
            "give its folder as --autoencoder"
        )
    try:
        given = describe(Path(folder)).sha256
    except ValueError as error:
        raise ValueError(
            f"{error}; {owner} the one of sha256 {sha256}, give that folder as --autoencoder"
        ) from None
    if given != sha256:
        raise ValueError(
            f"autoencoder {folder} has sha256 {given}, but {owner} {sha256}; "
            "give that folder as --autoencoder"
        )
