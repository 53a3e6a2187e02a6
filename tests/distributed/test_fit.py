"""What `pretrain.py` reads may move but not change: real runs on the digits of `make learn`."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.digits import data as learn_data
from mdm.checkpoint.checkpoints import ASIDE, MARKER, Checkpoints
from mdm.checkpoint.export import export_checkpoint
from mdm.checkpoint.exported import read_provenance
from mdm.checkpoint.state import RunError
from mdm.data.manifest import MANIFEST, MANIFEST_SHA256
from mdm.first_stage.tokenizer import train_model
from tests.helpers import ROOT

pytestmark = pytest.mark.distributed
ENV = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
SMALL = [
    *("--preset", "learn", "--model.kernel", "torch", "--model.n_layer", "2"),
    *("--model.d_model", "64", "--model.d_state", "16", "--data.global_batch", "16"),
    *("--train.threads", "1", "--train.warmup", "2", "--train.decay", "constant"),
    *("--train.log_every", "1", "--train.checkpoint_every", "2", "--train.keep", "9"),
]
CPU = ROOT / "deepspeed_configs/cpu.json"


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any], mark: Path) -> None:
    """Change a JSON file and write its sha256 into `mark`, as whoever wrote it would have."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    mark.write_text(hashlib.sha256(path.read_bytes()).hexdigest())


class Runs:
    """A folder of runs on the digits, in one process, and the flags of those to come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        learn_data.write(self.data)
        self.flags: list[list[str]] = []
        self.job = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/distributed/fit_job.py")],
            env=ENV,
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def add(self, name: str, steps: int, **flags: str | Path) -> None:
        values = {"data.root": self.data / "encoded", "tokenizer": self.data / "tokenizer.model"}
        values |= {key.replace("__", "."): value for key, value in flags.items()}
        words = [word for k, v in values.items() for word in (f"--{k}", str(v))]
        run_dir = str(self.folder / name)
        self.flags.append([*SMALL, "--train.steps", str(steps), "--run_dir", run_dir, *words])

    def run(self) -> list[tuple[int, str]]:
        """Exit code and output of each."""
        assert self.job.stdin is not None
        assert self.job.stdout is not None
        ended = []
        for flags in self.flags:
            print(json.dumps(flags), file=self.job.stdin, flush=True)
            said: list[str] = []
            while not (code := re.fullmatch(r"exit code (\d+)", said[-1] if said else "")):
                line = self.job.stdout.readline()
                assert line, "".join(said)
                said.append(line.removesuffix("\n"))
            ended.append((int(code[1]), "\n".join(said[:-1])))
        self.flags = []
        return ended

    def losses(self, name: str) -> list[tuple[int, float, float]]:
        rows = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, rows)]

    def checkpoint(self, name: str) -> Path:
        return self.folder / name / "checkpoints" / "step-00000002"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    """`whole` had 4 steps; of `half`, 2 are done."""
    runs = Runs(tmp_path_factory.mktemp("fit"))
    runs.add("whole", 4)
    runs.add("half", 2)
    assert [code for code, _ in runs.run()] == [0, 0]
    yield runs
    runs.job.communicate()  # its input ends, and so does it


def test_unchanged_files_in_other_places_go_on_bit_for_bit(runs):
    """Data in a copy, the tokenizer behind a link, the DeepSpeed JSON written in another way."""
    moved = runs.folder / "moved"
    shutil.copytree(runs.data, moved)
    (moved / "link.model").symlink_to(moved / "tokenizer.model")
    values = json.loads(CPU.read_text())
    zero = dict(reversed(values.pop("zero_optimization").items()))
    zero["reduce_scatter"] = True  # DeepSpeed's default, spelled out
    (moved / "ds.json").write_text(json.dumps({**values, "zero_optimization": zero}, indent=7))
    shutil.copytree(runs.folder / "half", runs.folder / "on")
    where = {"data__root": moved / "encoded", "tokenizer": moved / "link.model"}
    runs.add("on", 4, **where, train__deepspeed=moved / "ds.json")
    ((code, said),) = runs.run()
    assert code == 0, said
    assert "goes on from step-00000002" in said
    assert "DeepSpeed settings" not in said
    assert runs.losses("on") == runs.losses("whole")
    exports = [(runs.folder / name / "export/model.safetensors") for name in ("on", "whole")]
    assert exports[0].read_bytes() == exports[1].read_bytes()


def files_of(folder: Path) -> dict[Path, int]:
    """Each file with its time; folders change where a lease comes and goes."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_what_does_not_fit_ends_it_before_anything_is_touched(runs):
    other = runs.folder / "other.model"
    other.write_bytes(train_model(["one two three", "four five six seven eight nine"] * 9, 26))
    again = runs.folder / "again"
    shutil.copytree(runs.data, again)
    folder = again / "encoded/digits"
    change = lambda manifest: manifest.update(recipe_hash="another")  # noqa: E731
    rewrite(folder / MANIFEST, change, folder / MANIFEST_SHA256)
    wide = runs.folder / "wide.json"
    wide.write_text(json.dumps(json.loads(CPU.read_text()) | {"communication_data_type": "fp16"}))
    before = files_of(runs.folder / "half")
    runs.add("new", 4, tokenizer=runs.folder / "none.model")
    runs.add("new", 4, autoencoder=runs.folder)
    runs.add("half", 4, tokenizer=other, resume="none")
    runs.add("half", 4, data__root=again / "encoded")
    runs.add("half", 4, train__deepspeed=wide)
    absent, needless, foreign, changed, computed = runs.run()
    for code, said in (absent, needless, foreign, changed, computed):
        assert code == 2, said
        assert len(said.strip().splitlines()) == 1, said
        assert said.strip().startswith("pretrain: ")
    sha256 = hashlib.sha256((runs.data / "tokenizer.model").read_bytes()).hexdigest()
    for said in (absent[1], foreign[1]):
        assert sha256 in said
        assert "'digits'" in said
        assert "--tokenizer" in said
    assert hashlib.sha256(other.read_bytes()).hexdigest() in foreign[1]
    assert "need none" in needless[1]
    assert "manifests 'digits'" in changed[1]
    assert "communication_data_type was None and is 'fp16'" in computed[1]
    assert not (runs.folder / "new").exists()
    assert files_of(runs.folder / "half") == before
    assert not list(runs.folder.rglob(ASIDE))


def test_starting_over_sets_the_former_checkpoints_aside(runs):
    shutil.copytree(runs.folder / "half", runs.folder / "anew")
    runs.add("anew", 4, resume="none")
    ((code, said),) = runs.run()
    assert code == 0, said
    assert "goes on from" not in said
    assert runs.losses("anew") == runs.losses("whole")
    assert (runs.checkpoint("anew") / ASIDE).read_text() == "started over with --resume none"


def test_an_earlier_versions_checkpoint_goes_on_with_what_may_change_said_once(runs):
    shutil.copytree(runs.folder / "half", runs.folder / "old")
    checkpoint = runs.checkpoint("old")

    def age(manifest: dict[str, Any]) -> None:
        del manifest["state"]["deepspeed"], manifest["loader"]["tokenizer_sha256"]
        manifest["state"] |= {"field_of_another_version": 1}
        del manifest["state"]["config"]["train"]["ema2"]

    rewrite(checkpoint / "manifest.json", age, checkpoint / MARKER)
    runs.add("old", 3, train__threads="2")
    runs.add("old", 4, train__threads="2", train__deepspeed="deepspeed_configs/zero2.json")
    (first, told), (second, later) = runs.run()
    assert (first, second) == (0, 0), told + later
    assert "train.threads was 1 and is 2" in told
    assert "does not record its DeepSpeed settings" in told
    assert "does not record train.ema2; 0.0 holds from now on" in told
    assert "does not record" not in later
    assert "threads" not in later
    assert "DeepSpeed settings changed: " in later
    assert "zero_optimization.stage was 3 and is 2" in later
    assert [step for step, _, _ in runs.losses("old")] == [1, 2, 3, 4]


def test_an_export_holds_the_tokenizer_of_its_data_or_is_refused(runs, tmp_path, caplog):
    sha256 = hashlib.sha256((runs.data / "tokenizer.model").read_bytes()).hexdigest()
    live = runs.folder / "whole/export"
    assert read_provenance(live).tokenizer == sha256
    assert read_provenance(live).autoencoder == "pixel patches"
    shutil.copytree(runs.folder / "half", tmp_path / "half")
    checkpoint = tmp_path / "half/checkpoints/step-00000002"
    kept = tmp_path / "kept.model"
    (runs.data / "tokenizer.model").rename(kept)
    try:
        with pytest.raises(RunError, match=f"no such file.*{sha256}.*--tokenizer"):
            export_checkpoint(str(checkpoint), tmp_path / "out")
        (runs.data / "tokenizer.model").write_bytes(kept.read_bytes() + b"\x08")
        with pytest.raises(RunError, match=sha256):
            export_checkpoint(str(checkpoint), tmp_path / "out")
    finally:
        kept.replace(runs.data / "tokenizer.model")
    assert not (tmp_path / "out").exists()
    link = tmp_path / "link.model"
    link.symlink_to(runs.data / "tokenizer.model")
    export_checkpoint(str(checkpoint), tmp_path / "out", tokenizer=str(link))
    assert (tmp_path / "out/tokenizer.model").read_bytes() == link.read_bytes()
    assert not caplog.messages

    def age(manifest: dict[str, Any]) -> None:
        del manifest["loader"]["tokenizer_sha256"]

    rewrite(checkpoint / "manifest.json", age, checkpoint / MARKER)
    export_checkpoint(str(checkpoint), tmp_path / "old")
    assert len(caplog.messages) == 1
    assert "does not record its tokenizer" in caplog.messages[0]
    assert read_provenance(tmp_path / "old").tokenizer == ""
    assert Checkpoints.at(str(tmp_path / "half/checkpoints")).latest_valid()[0] is not None


def test_one_node_without_the_tokenizer_ends_all(runs, tmp_path):
    """Two nodes of one rank: the path is relative, and the second one's folder does not hold it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runs.add("nodes", 4, tokenizer="tokenizer.model", train__deepspeed=CPU)
    (flags,), runs.flags = runs.flags, []
    ranks = []
    for rank, folder in enumerate((runs.data, tmp_path)):
        env = ENV | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        env |= {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        command = [sys.executable, str(ROOT / "pipelines/pretrain.py"), *flags]
        ranks.append(
            subprocess.Popen(command, env=env, cwd=folder, text=True, stderr=subprocess.PIPE)
        )
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    lines = [line for line in said[0].splitlines() if line.startswith("pretrain: ")]
    assert len(lines) == 1
    assert f"rank 1 on {socket.gethostname()}: tokenizer tokenizer.model: no such" in lines[0]
    assert not (runs.folder / "nodes").exists()
