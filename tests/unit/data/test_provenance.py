"""A run's tokenizer and autoencoder are those of every data set that it reads."""

import dataclasses
import os
from pathlib import Path

import pytest

from mdm.config import Config, ModelConfig
from mdm.data.mixture import Mixture, MixtureStage, Source
from mdm.data.provenance import Provenance, check_fit
from mdm.first_stage.folder import PIXELS, describe
from mdm.first_stage.tokenizer import Tokenizer, train_model
from tests.data_sets import planned, write_autoencoder, write_tokenizer

MODEL = ModelConfig(vocab_size=32)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The run's own tokenizer and autoencoder."""
    folder = tmp_path_factory.mktemp("fit")
    return Config(
        model=MODEL,
        tokenizer=str(write_tokenizer(folder / "own.model")),
        autoencoder=str(write_autoencoder(folder / "autoencoder")),
    )


def source(given: Config, name: str, *, images: bool = True, **changes: object) -> Source:
    first_stage = describe(given.autoencoder).sha256 if images else None
    fields = {
        "tokenizer_sha256": Tokenizer(given.tokenizer).sha256,
        "vocab_size": 32,
        "autoencoder_sha256": first_stage,
    }
    manifest = planned([8], images=images)
    return Source(name, dataclasses.replace(manifest, **(fields | changes)))  # type: ignore[arg-type]


def test_the_tokenizer_and_autoencoder_of_the_data_fit_at_any_path(given: Config, tmp_path) -> None:
    mixture = Mixture((source(given, "a"), source(given, "text", images=False)))
    check_fit(mixture, given)
    for name in ("tokenizer", "autoencoder"):
        (tmp_path / name).symlink_to(getattr(given, name))
    moved = {name: str(tmp_path / name) for name in ("tokenizer", "autoencoder")}
    check_fit(mixture, dataclasses.replace(given, **moved))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not given", "none is given"),
        ("missing", "no such file"),
        ("dangling", "no such file"),
        ("folder", "is a directory"),
        ("pipe", "not a file"),
        ("empty", "not a SentencePiece model"),
        ("torn", "tokenizer"),
        ("another", "has sha256"),
    ],
)
def test_any_other_tokenizer_is_refused_by_name(
    given: Config, tmp_path: Path, kind: str, message: str
) -> None:
    path = tmp_path / "tokenizer.model"
    whole = Path(given.tokenizer).read_bytes()
    make = {
        "dangling": lambda: path.symlink_to(tmp_path / "gone"),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "empty": path.touch,
        "torn": lambda: path.write_bytes(whole[: len(whole) // 2]),
        "another": lambda: path.write_bytes(train_model(["one two three"] * 9, 15)),
    }
    make.get(kind, lambda: None)()
    config = dataclasses.replace(given, tokenizer="" if kind == "not given" else str(path))
    with pytest.raises(ValueError, match=message) as refusal:
        check_fit(Mixture((source(given, "a"), source(given, "b"))), config)
    refused = str(refusal.value)
    assert Tokenizer(given.tokenizer).sha256 in refused
    assert "'a'" in refused
    assert "--tokenizer" in refused
    assert "\n" not in refused
    if kind == "another":
        assert Tokenizer(path).sha256 in refused


def test_a_tokenizer_with_another_vocabulary_than_the_model_is_refused(given: Config) -> None:
    config = dataclasses.replace(given, model=dataclasses.replace(MODEL, vocab_size=64))
    with pytest.raises(ValueError, match=r"has 32 pieces, model\.vocab_size is 64"):
        check_fit(Mixture((source(given, "a"),)), config)


@pytest.mark.parametrize("kind", ["not given", "missing", "file", "half", "another"])
def test_any_other_autoencoder_is_refused_by_name(given: Config, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "autoencoder"
    if kind == "file":
        folder.touch()
    elif kind in ("half", "another"):
        write_autoencoder(folder)
        config = folder / "config.json"
        config.unlink() if kind == "half" else config.write_text(config.read_text() + "\n")
    config = dataclasses.replace(given, autoencoder="" if kind == "not given" else str(folder))
    talk = source(given, "talk", images=False)
    with pytest.raises(ValueError, match="autoencoder") as refusal:
        check_fit(Mixture((talk, source(given, "a"))), config)
    refused = str(refusal.value)
    assert describe(given.autoencoder).sha256 in refused
    assert "'a'" in refused
    assert "--autoencoder" in refused
    assert "\n" not in refused
    if kind == "another":
        assert describe(folder).sha256 in refused
    check_fit(Mixture((talk,)), config)  # text alone needs none


def test_a_data_set_of_a_later_stage_counts_too(given: Config) -> None:
    stages = (MixtureStage(0, (("talk", 1.0),)), MixtureStage(900, (("a", 1.0),)))
    talk = source(given, "talk", images=False)
    without = dataclasses.replace(given, autoencoder="")
    with pytest.raises(ValueError, match="'a' was encoded with the autoencoder"):
        check_fit(Mixture((talk, source(given, "a")), stages=stages), without)
    with pytest.raises(ValueError, match="cannot be mixed: tokenizer_sha256"):
        Mixture((talk, source(given, "a", tokenizer_sha256="another")), stages=stages)


def test_pixel_patches_need_no_autoencoder_and_take_none(given: Config) -> None:
    mixture = Mixture((source(given, "a", autoencoder_sha256=PIXELS),))
    check_fit(mixture, dataclasses.replace(given, autoencoder=""))
    with pytest.raises(ValueError, match="pixel patches, which need none"):
        check_fit(mixture, given)


def test_a_label_means_the_same_class_in_all_data_sets(given: Config) -> None:
    first = source(given, "a", class_names=("tench", "goldfish"))
    more = source(given, "b", class_names=("tench", "goldfish", "shark"))
    none = source(given, "c", class_names=())
    check_fit(Mixture((first, more, none)), given)
    shifted = source(given, "d", class_names=("goldfish",))
    with pytest.raises(ValueError, match=r"'a' and 'd' .* class 0 is 'tench' and 'goldfish'"):
        check_fit(Mixture((first, none, shifted)), given)
    with pytest.raises(ValueError, match=r"'a' and 'd' .* class 0 is 'tench' and 'goldfish'"):
        check_fit(Mixture((none, first, shifted)), given)  # neither is the mixture's first


def test_a_loaders_state_names_what_its_data_was_encoded_with() -> None:
    state = {"tokenizer_sha256": "t", "autoencoder_sha256": None}
    assert Provenance.of(state) == Provenance("t", "")
    assert Provenance.of({"step": 3}) == Provenance()
