"""Whether a run's tokenizer and autoencoder are those that its data was encoded with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

from mdm.config import Config
from mdm.data.mixture import Mixture, Source
from mdm.first_stage.folder import PIXELS, FirstStage, describe
from mdm.first_stage.tokenizer import Tokenizer

F = TypeVar("F", Tokenizer, FirstStage)


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
    return _checked("tokenizer", path, sha256, owner, Tokenizer)


def check_autoencoder(folder: str, sha256: str, owner: str) -> None:
    """ValueError unless `folder` holds the autoencoder of the sha256 that `owner` requires."""
    if sha256 != PIXELS:
        _checked("autoencoder", folder, sha256, owner, describe)
    elif folder:
        raise ValueError(
            f"autoencoder {folder} is given, but {owner} pixel patches, which need none; "
            'give --autoencoder ""'
        )


def _checked(kind: str, path: str, sha256: str, owner: str, load: Callable[[str], F]) -> F:
    advice = f"give that {'file' if kind == 'tokenizer' else 'folder'} as --{kind}"
    if not path:
        raise ValueError(f"{owner} the {kind} of sha256 {sha256}, but none is given; {advice}")
    try:
        loaded = load(path)
    except ValueError as error:
        raise ValueError(f"{error}; {owner} the one of sha256 {sha256}, {advice}") from None
    if loaded.sha256 != sha256:
        raise ValueError(
            f"{kind} {path} has sha256 {loaded.sha256}, but {owner} {sha256}; {advice}"
        )
    return loaded
