"""What jobs write has the permissions that the umask leaves, whatever library wrote it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mdm.checkpoint.export import write_export
from mdm.checkpoint.state import TrainState
from mdm.data.provenance import Provenance
from mdm.evaluate import classifier
from mdm.first_stage.tokenizer import Tokenizer
from mdm.train import replay_box
from pipelines import train_tokenizer
from tests.data_sets import encoded, write_autoencoder, write_tokenizer, write_ultrachat
from tests.helpers import MemoryLoader, small_config


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    former = os.umask(request.param)
    yield request.param
    os.umask(former)


def test_every_file_and_folder_has_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    config = small_config(out)
    write_tokenizer(out / "tokenizer.model")
    weights = {"ema": {"a": torch.zeros(3)}, "raw": {"a": torch.ones(3)}}
    write_export(out / "export", config, TrainState(), weights, b"", Provenance())
    write_autoencoder(out / "autoencoder")
    judge = classifier.Classifier(2)
    judge(torch.zeros(1, 3, 32, 32))
    classifier.save(judge, out / "classifier", {"accuracy": 1.0})
    batch = next(MemoryLoader(config, type("World", (), {"rank": 0, "size": 1})()))
    replay_box.write(out, config, 1, {}, batch, weights["raw"])
    encoded(str(out / "encoded"), [8])
    texts = write_ultrachat(tmp_path / "raw", [["hello there", f"answer {n}"] for n in range(40)])
    flags = [f"--datasets=ultrachat={texts}", f"--out={out / 'trained'}", "--vocab_size=28"]
    assert train_tokenizer.main(flags) == 0
    assert Tokenizer(out / "trained" / "tokenizer.model").vocab_size == 28
    found = {path: path.stat().st_mode & 0o777 for path in out.rglob("*")}
    assert len([path for path in found if path.suffix == ".safetensors"]) == 5
    wrong = {
        str(path.relative_to(out)): oct(mode)
        for path, mode in found.items()
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}
