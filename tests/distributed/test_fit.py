"""The input files of a run may move but not change: real runs on the digits of `make learn`."""

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
from mdm.checkpoint.checkpoints import ASIDE, MARKER
from mdm.checkpoint.export import export_checkpoint, read_provenance
from mdm.checkpoint.state import RunError
from mdm.data.manifest import MANIFEST, MANIFEST_SHA256
from mdm.first_stage.tokenizer import train_model
from tests.helpers import ROOT, newest_valid

pytestmark = pytest.mark.distributed
ENV = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
SMALL = [
    *("--preset", "learn", "--model.kernel", "torch", "--model.n_layer", "2"),
    *("--model.d_model", "64", "--model.d_state", "16", "--data.global_batch", "16"),
    *("--train.threads", "1", "--train.warmup", "2", "--train.decay", "constant"),
    *("--train.log_every", "1", "--train.checkpoint_every", "2", "--train.keep", "9"),
]
CPU = ROOT / "deepspeed_configs/cpu_small_model.json"  # of the preset


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any], mark: Path) -> None:
    """Change a JSON file and write its new sha256 into `mark`, as its writer does."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    mark.write_text(hashlib.sha256(path.read_bytes()).hexdigest())


class Runs:
    """A folder of runs on the digits: `add` collects their flags, `run` runs them all."""

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
        arguments = [x for key, value in values.items() for x in (f"--{key}", str(value))]
        run_dir = str(self.folder / name)
        self.flags.append([*SMALL, "--train.steps", str(steps), "--run_dir", run_dir, *arguments])

    def run(self) -> list[tuple[int, str]]:
        """Run everything that was added; returns exit code and output of each run."""
        assert self.job.stdin is not None
        assert self.job.stdout is not None
        results = []
        for flags in self.flags:
            print(json.dumps(flags), file=self.job.stdin, flush=True)
            lines: list[str] = []
            while not (code := re.fullmatch(r"exit code (\d+)", lines[-1] if lines else "")):
                line = self.job.stdout.readline()
                assert line, "".join(lines)
                lines.append(line.removesuffix("\n"))
            results.append((int(code[1]), "\n".join(lines[:-1])))
        self.flags = []
        return results

    def losses(self, name: str) -> list[tuple[int, float, float]]:
        rows = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, rows)]

    def checkpoint(self, name: str) -> Path:
        return self.folder / name / "checkpoints" / "step-00000002"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    """`whole` is a run of 4 steps; `half` has taken 2 of them."""
    runs = Runs(tmp_path_factory.mktemp("fit"))
    runs.add("whole", 4)
    runs.add("half", 2)
    assert [code for code, _ in runs.run()] == [0, 0]
    yield runs
    runs.job.communicate()  # closes stdin, which ends the process


def test_a_run_resumes_bit_for_bit_from_moved_but_unchanged_files(runs):
    """The data are copied, the tokenizer is a link, the DeepSpeed JSON is formatted differently."""
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
    ((code, output),) = runs.run()
    assert code == 0, output
    assert "continues from step-00000002" in output
    assert "DeepSpeed settings" not in output
    assert runs.losses("on") == runs.losses("whole")
    exports = [(runs.folder / name / "export/model.safetensors") for name in ("on", "whole")]
    assert exports[0].read_bytes() == exports[1].read_bytes()


def files_of(folder: Path) -> dict[Path, int]:
    """The modification time of each file; folders are left out, since leases change theirs."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_changed_files_are_refused_before_anything_is_written(runs):
    other = runs.folder / "other.model"
    other.write_bytes(train_model(["one two three", "four five six seven eight nine"] * 9, 26))
    again = runs.folder / "again"
    shutil.copytree(runs.data, again)
    folder = again / "encoded/digits"
    change = lambda manifest: manifest.update(recipe_hash="another")  # noqa: E731
    rewrite(folder / MANIFEST, change, folder / MANIFEST_SHA256)
    fp16_config = runs.folder / "wide.json"
    fp16_config.write_text(
        json.dumps(json.loads(CPU.read_text()) | {"communication_data_type": "fp16"})
    )
    before = files_of(runs.folder / "half")
    runs.add("new", 4, tokenizer=runs.folder / "none.model")
    runs.add("new", 4, autoencoder=runs.folder)
    runs.add("half", 4, tokenizer=other, resume="none")
    runs.add("half", 4, data__root=again / "encoded")
    runs.add("half", 4, train__deepspeed=fp16_config)
    refusals = runs.run()
    for code, output in refusals:
        assert code == 2, output
        assert len(output.strip().splitlines()) == 1, output
        assert output.strip().startswith("pretrain: ")
    missing_tokenizer, needless_autoencoder, other_tokenizer, other_data, other_settings = (
        output for _, output in refusals
    )
    sha256 = hashlib.sha256((runs.data / "tokenizer.model").read_bytes()).hexdigest()
    for output in (missing_tokenizer, other_tokenizer):
        assert sha256 in output
        assert "'digits'" in output
        assert "--tokenizer" in output
    assert hashlib.sha256(other.read_bytes()).hexdigest() in other_tokenizer
    assert "need none" in needless_autoencoder
    assert "manifests 'digits'" in other_data
    assert "communication_data_type was None and is 'fp16'" in other_settings
    assert not (runs.folder / "new").exists()
    assert files_of(runs.folder / "half") == before
    assert not list(runs.folder.rglob(ASIDE))


def test_starting_over_sets_earlier_checkpoints_aside(runs):
    shutil.copytree(runs.folder / "half", runs.folder / "anew")
    runs.add("anew", 4, resume="none")
    ((code, output),) = runs.run()
    assert code == 0, output
    assert "continues from" not in output
    assert runs.losses("anew") == runs.losses("whole")
    assert (runs.checkpoint("anew") / ASIDE).read_text() == "started over with --resume none"


def test_a_checkpoint_of_an_earlier_version_resumes_and_reports_changes_once(runs):
    shutil.copytree(runs.folder / "half", runs.folder / "old")
    checkpoint = runs.checkpoint("old")

    def make_old(manifest: dict[str, Any]) -> None:
        del manifest["state"]["deepspeed"], manifest["loader"]["tokenizer_sha256"]
        manifest["state"] |= {"field_of_another_version": 1}
        del manifest["state"]["config"]["train"]["ema2"]

    rewrite(checkpoint / "manifest.json", make_old, checkpoint / MARKER)
    runs.add("old", 3, train__threads="2")
    runs.add("old", 4, train__threads="2", train__deepspeed="deepspeed_configs/zero2.json")
    (first_code, first_output), (second_code, second_output) = runs.run()
    assert (first_code, second_code) == (0, 0), first_output + second_output
    assert "train.threads was 1 and is 2" in first_output
    assert "does not record its DeepSpeed settings" in first_output
    assert "does not record train.ema2; 0.0 holds from now on" in first_output
    assert "does not record" not in second_output
    assert "threads" not in second_output
    assert "DeepSpeed settings changed: " in second_output
    assert "zero_optimization.stage was 3 and is 2" in second_output
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

    def make_old(manifest: dict[str, Any]) -> None:
        del manifest["loader"]["tokenizer_sha256"]

    rewrite(checkpoint / "manifest.json", make_old, checkpoint / MARKER)
    export_checkpoint(str(checkpoint), tmp_path / "old")
    assert len(caplog.messages) == 1
    assert "does not record its tokenizer" in caplog.messages[0]
    assert read_provenance(tmp_path / "old").tokenizer == ""
    assert newest_valid(tmp_path / "half/checkpoints")[0] is not None


def test_a_tokenizer_missing_on_one_node_ends_all_nodes(runs, tmp_path):
    """Two nodes of one rank; the path is relative, and missing in the second node's folder."""
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
    outputs = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    lines = [line for line in outputs[0].splitlines() if line.startswith("pretrain: ")]
    assert len(lines) == 1
    assert f"rank 1 on {socket.gethostname()}: tokenizer tokenizer.model: no such" in lines[0]
    assert not (runs.folder / "nodes").exists()
