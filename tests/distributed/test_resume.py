"""Kill and stop two real DeepSpeed ranks, damage checkpoints: the run resumes bit for bit."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mdm.checkpoint.checkpoints import MARKER, Checkpoints, Record
from mdm.checkpoint.export import export_checkpoint
from mdm.checkpoint.snapshot import read_whole
from mdm.storage.server import S3Server
from mdm.train.writer import RUN_LEASE
from tests.helpers import newest_valid, run_ranks

pytestmark = pytest.mark.distributed
JOB = Path(__file__).with_name("train_job.py")
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")


def run_training(run_dir: Path, ranks: int = 2, **options) -> tuple[int, str]:
    return run_ranks(JOB, ranks, str(run_dir), json.dumps(options))


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def newest_checkpoint(uri: str | Path) -> tuple[Checkpoints, Record]:
    record, _ = newest_valid(uri)
    assert record is not None
    return Checkpoints.at(str(uri)), record


def saved_tensors(uri: str | Path, kinds: tuple[str, ...] = KINDS) -> dict[str, torch.Tensor]:
    """Parameters, optimizer moments and EMA of the newest checkpoint."""
    checkpoints, record = newest_checkpoint(uri)
    size, shapes = record.manifest["world_size"], record.manifest["shapes"]
    return {
        f"{kind}/{name}": value
        for kind in kinds
        for name, value in read_whole(
            checkpoints.store, record.name, size, record.files, kind, shapes
        ).items()
    }


def assert_tensors_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


def assert_runs_equal(one: Path, other: Path, other_uri: str = "") -> None:
    """Two finished runs have equal losses, EMA, optimizer state and sample order, bit for bit."""
    assert losses(one) == losses(other)
    for folder in ("export", "snapshots/step-00000006"):
        assert_tensors_equal(weights(one / folder), weights(other / folder))
    digests = [json.loads((d / "done.json").read_text())["order_digest"] for d in (one, other)]
    assert digests[0] == digests[1]
    uris = (one / "checkpoints", other_uri or other / "checkpoints")
    assert_tensors_equal(*(saved_tensors(uri) for uri in uris))
    assert len({newest_checkpoint(uri)[1].manifest["optimizer_steps"] for uri in uris}) == 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    code, output = run_training(run_dir)
    assert code == 0, output
    return run_dir


def test_an_undisturbed_run_takes_all_steps_and_learns(undisturbed):
    assert [step for step, _, _ in losses(undisturbed)] == list(range(1, 13))
    done = json.loads((undisturbed / "done.json").read_text())
    assert done["step"] == 12
    assert done["samples_seen"] == 96
    assert done["attempts"] == 1
    assert 0 < done["time_to_first_batch"] < 120
    assert 0 < done["share_outside_model"] < 1
    assert losses(undisturbed)[-3][1] < losses(undisturbed)[0][1]


def test_killed_ranks_continue_bit_for_bit(undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    code, _ = run_training(run_dir, signal_step=8)
    assert code != 0
    assert [step for step, _, _ in losses(run_dir)] == list(range(1, 9))
    assert not (run_dir / "done.json").exists()
    assert (run_dir / RUN_LEASE).exists()
    code, output = run_training(run_dir)
    assert code == 0, output
    assert "watching for" not in output  # the kernel reports at once that the earlier job is dead
    assert not (run_dir / RUN_LEASE).exists()
    assert_runs_equal(undisturbed, run_dir)
    done = json.loads((run_dir / "done.json").read_text())
    assert done["attempts"] == 2
    assert done["goodput"] < 1


@pytest.mark.parametrize(
    ("place", "moment"),
    [("folder", "die_while_writing"), ("folder", "die_before_marker"), ("s3", "die_while_writing")],
)
def test_a_run_killed_during_a_save_resumes_from_the_checkpoint_before(
    undisturbed, tmp_path, request, place, moment
):
    run_dir = tmp_path / "run"
    uri = str(run_dir / "checkpoints") if place == "folder" else request.getfixturevalue("s3")
    code, _ = run_training(run_dir, **{moment: 12}, train={"checkpoints": uri})
    assert code != 0
    record, passed = newest_valid(uri)
    assert record is not None
    assert record.name == "step-00000006"
    assert passed == [("step-00000012", "it was never committed")]
    code, output = run_training(run_dir, train={"checkpoints": uri})
    assert code == 0, output
    assert "skipped step-00000012: it was never committed" in output
    assert_runs_equal(undisturbed, run_dir, uri)
    names = ["step-00000012.1", "step-00000006"]
    assert list(Checkpoints.at(uri).contents()) == names  # the torn checkpoint was removed


def test_a_full_disk_costs_one_save(undisturbed, tmp_path):
    """A limit on file sizes stands in for a full disk: writes fail in the same way."""
    run_dir = tmp_path / "run"
    code, output = run_training(run_dir, small_files={"5": 10_000, "8": -1}, signal_ranks=[1])
    assert code == 0, output
    line = next(line for line in output.splitlines() if "warning: step 6 is not saved" in line)
    assert "the next save tries again: rank 1: cannot write" in line
    assert "File too large" in line
    assert_runs_equal(undisturbed, run_dir)
    assert list(Checkpoints.at(str(run_dir / "checkpoints")).contents()) == ["step-00000012"]
    assert not list((run_dir / "checkpoints").rglob(".tmp-*"))


def test_a_run_continues_when_its_checkpoint_store_goes_down(undisturbed, tmp_path, monkeypatch):
    run_dir, uri = tmp_path / "run", "s3://test/gone"
    with S3Server(tmp_path / "s3", bucket="test") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        pid = server._process.pid
        code, output = run_training(
            run_dir, train={"checkpoints": uri}, kill={"8": pid}, signal_ranks=[0]
        )
        assert code == 0, output
        assert "warning: step 12 is not saved" in output
        assert losses(run_dir) == losses(undisturbed)
        assert_tensors_equal(weights(run_dir / "export"), weights(undisturbed / "export"))
    with S3Server(tmp_path / "s3", port=server.port, bucket="test"):
        # The committed checkpoint is still there.
        assert newest_checkpoint(uri)[1].name == "step-00000006"
        (run_dir / "done.json").unlink()
        code, output = run_training(run_dir, train={"checkpoints": uri})
        assert code == 0, output
        assert_runs_equal(undisturbed, run_dir, uri)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "unmarked"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(undisturbed, tmp_path, damage):
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "step-00000012"
    shard = folder / "rank-00001" / "ema.0000"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    else:
        (folder / MARKER).unlink()
    record, passed = newest_valid(tmp_path / "checkpoints")
    assert record is not None
    assert record.name == "step-00000006"
    assert len(passed) == 1
    reasons = {"truncated": "bytes instead of", "flipped": "has changed", "unmarked": "committed"}
    assert reasons[damage] in passed[0][1]


def test_training_resumes_from_the_newest_intact_checkpoint(undisturbed, tmp_path):
    """Of three checkpoints, the newest has a torn manifest, the next a flipped bit."""
    run_dir = tmp_path / "run"
    code, output = run_training(run_dir, train={"checkpoint_every": 4, "keep": 3})
    assert code == 0, output
    (run_dir / "done.json").unlink()
    (run_dir / "checkpoints" / "step-00000012" / "manifest.json").write_text("{}")
    shard = run_dir / "checkpoints" / "step-00000008" / "rank-00001" / "exp_avg.0000"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    code, output = run_training(run_dir)
    assert code == 0, output
    assert "skipped step-00000012: manifest.json is not the one" in output
    assert "skipped step-00000008: rank-00001/exp_avg.0000 has changed" in output
    assert "continues from step-00000004" in output
    assert_runs_equal(undisturbed, run_dir)


def test_sigterm_on_one_rank_saves_on_all(undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    # Rank 1 receives SIGTERM before the batch of step 4; both ranks save after that step.
    code, output = run_training(
        run_dir, signal_step=4, signal=int(signal.SIGTERM), signal_ranks=[1]
    )
    assert code != 0
    assert "exitcode  : 75" in output
    assert newest_checkpoint(run_dir / "checkpoints")[1].step == 5
    code, output = run_training(run_dir)
    assert code == 0, output
    assert_runs_equal(undisturbed, run_dir)


def test_changed_configuration_is_refused_in_one_line(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    code, output = run_training(tmp_path / "run", train={"lr": 0.5, "steps": 20})
    assert code != 0
    lines = [line for line in output.splitlines() if "train.lr was 0.01 and is 0.5" in line]
    assert len(lines) == 1
    assert "train.steps" not in lines[0]
    assert "Traceback (most recent call last)" not in output.split(lines[0])[0]


@pytest.mark.parametrize(
    ("precision", "file", "worlds", "tolerance"),
    [
        # In fp32, sums over ranks are taken in another order.
        ("fp32", "cpu.json", (2, 3, 1), 1e-6),
        ("fp32", "cpu_small_model.json", (2, 3), 1e-6),
        # Under autocast, each rank rounds the gradients of matrices to bf16 (8 bits) before they
        # are summed. Other shares of the batch round differently; at a rate of 1e-2, that shows.
        ("bf16", "zero2.json", (2, 3), 1e-2),
    ],
)
def test_another_world_size_resumes_with_the_same_state_and_samples(
    tmp_path, precision, file, worlds, tolerance
):
    undisturbed, run_dir, copies = (tmp_path / n for n in ("undisturbed", "run", "copies"))
    settings: dict[str, object] = {"ema2": 0.5, "snapshots": 0, "precision": precision}
    settings["deepspeed"] = f"deepspeed_configs/{file}"
    options = {"global_batch": 12, "save_restored_state_to": str(copies)}
    stops = [4, 8, 12][: len(worlds)]
    code, output = run_training(undisturbed, global_batch=12, train=settings)
    assert code == 0, output
    for ranks, stop in zip(worlds, stops, strict=True):
        before = None
        if copies.exists():
            before = saved_tensors(run_dir / "checkpoints", (*KINDS, "ema2"))
        # All but the last are stopped by a signal after `stop` steps, like a preempted job.
        stop_options = {"signal_step": stop - 1, "signal": int(signal.SIGTERM)} if stop < 12 else {}
        code, output = run_training(run_dir, ranks, train=settings, **options, **stop_options)
        assert (code == 0) == (stop == 12), output
        assert newest_checkpoint(run_dir / "checkpoints")[1].step == stop
        if before is not None:
            assert f"and now on {ranks}" in output
            assert_tensors_equal(saved_tensors(copies, (*KINDS, "ema2")), before)
            assert newest_checkpoint(copies)[1].manifest["world_size"] == ranks
        copies.mkdir(exist_ok=True)
    if stops[-1] == 12:
        states = [newest_checkpoint(d / "checkpoints")[1].state for d in (undisturbed, run_dir)]
        assert states[0].order_digest == states[1].order_digest
    steps, ours, norms = map(torch.tensor, zip(*losses(run_dir), strict=True))
    expected = [torch.tensor(row[: len(steps)]) for row in zip(*losses(undisturbed), strict=True)]
    assert steps.tolist() == list(range(1, stops[-1] + 1))
    # In either precision, the first step after the change starts from the same weights.
    first = stops[0] + 1
    torch.testing.assert_close(ours[:first], expected[1][:first], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours, expected[1], rtol=tolerance, atol=0)
    torch.testing.assert_close(norms, expected[2], rtol=tolerance, atol=0)


def test_a_run_keeps_the_precision_it_started_with(tmp_path, monkeypatch):
    run_dir, settings = tmp_path / "run", {"precision": "bf16", "snapshots": 0}
    code, output = run_training(run_dir, ranks=1, train=settings, signal_step=3, signal=15)
    assert "saved at step 4" in output
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    code, output = run_training(run_dir, ranks=1, train=settings | {"precision": "fp32"})
    assert code != 0
    assert output.count("train.precision was 'bf16' and is 'fp32'") == 1
    code, output = run_training(run_dir, ranks=1, train=settings | {"precision": "auto"})
    assert code == 0, output
    assert "precision: bf16, which this CPU" in output
    assert "only emulates: slow here" in output
    # Emulated or not, bf16 products are rounded to 8 bits.
    undisturbed = tmp_path / "undisturbed"
    code, output = run_training(undisturbed, ranks=1, train=settings)
    assert code == 0, output
    ours, theirs = (torch.tensor(losses(folder)) for folder in (run_dir, undisturbed))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0)


def test_an_offline_export_equals_the_export_of_the_run(undisturbed, tmp_path):
    checkpoint = str(undisturbed / "checkpoints" / "step-00000012")
    export_checkpoint(checkpoint, tmp_path / "both", ["ema", "raw"])
    assert_tensors_equal(weights(tmp_path / "both"), weights(undisturbed / "export"))
    raw = load_file(tmp_path / "both" / "model.raw.safetensors")
    export_checkpoint(checkpoint, tmp_path / "raw", ["raw"])
    assert_tensors_equal(raw, weights(tmp_path / "raw"))
    assert not torch.equal(
        raw["text_out.weight"], weights(undisturbed / "export")["text_out.weight"]
    )
    assert "12 steps, 96 samples" in (tmp_path / "both" / "README.md").read_text()
    with pytest.raises(ValueError, match="holds no ema2; it has raw and ema"):
        export_checkpoint(checkpoint, tmp_path / "other", ["ema2"])


def test_retention_keeps_only_the_newest_checkpoint(tmp_path):
    options = {"steps": 6, "checkpoint_every": 2, "keep": 1, "snapshots": 0}
    code, output = run_training(tmp_path / "run", ranks=1, train=options)
    assert code == 0, output
    kept = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000006"]
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["save_blocked_seconds"] > 0
    assert rows[-1]["save_durable_seconds"] > 0
