"""The job stages of the demo, without running them."""

import pytest

from examples.demo.run import Flags, run, stages, table
from examples.demo.stages import command
from mdm.storage.lease import OtherJobError, hold_folder


def test_a_command_repeats_a_flag_for_each_item_of_a_list():
    assert command("job.py", out="o", datasets=["a=1", "b=2"], n=3)[1:] == [
        "job.py",
        "--out",
        "o",
        "--datasets=a=1",
        "--datasets=b=2",
        "--n",
        "3",
    ]


def test_flags_reach_their_job_stages(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    default = {stage.name: stage for stage in stages(Flags())}
    assert list(default["encode-journeydb"].needs) == [
        "s3",
        "ray",
    ]  # Ray inherits the store's address
    assert "--tracking" not in default["train"].command
    flags = Flags(store="file", tracking=False, ranks=4, n=7, train_flags="--train.steps 30")
    changed = {stage.name: stage for stage in stages(flags)}
    assert list(changed["encode-journeydb"].needs) == ["ray"]
    assert changed["encode-journeydb"].outputs[0] == "runs/demo/encoded/journeydb"
    train, evaluate = " ".join(changed["train"].words), " ".join(changed["evaluate"].words)
    assert "--num_accelerators 4 pipelines/pretrain.py --preset demo" in train
    assert train.endswith("--no_tracking --train.steps 30")
    assert "--n 7" in evaluate
    assert evaluate.endswith("--no_tracking")


def test_another_number_of_ranks_keeps_what_is_finished():
    two, four = (stages(Flags(ranks=ranks)) for ranks in (2, 4))
    assert [stage.words for stage in two] != [stage.words for stage in four]
    assert [stage.fingerprint("") for stage in two] == [stage.fingerprint("") for stage in four]
    longer = stages(Flags(train_flags="--train.steps 30"))
    assert [stage.fingerprint("") for stage in two] != [stage.fingerprint("") for stage in longer]


def test_the_encoding_uses_a_running_ray_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head")
    encode = next(stage for stage in stages(Flags()) if stage.name == "encode-digits")
    assert list(encode.needs) == ["s3"]


def test_the_table_adds_up():
    marker = {"seconds": 10.0, "peak_rss_gib": 1.0, "report": {}}
    lines = table(
        {
            "a": marker | {"title": "A"},
            "b": marker | {"title": "B", "seconds": 5.0, "report": {"samples_per_second": 7}},
        }
    ).splitlines()
    assert lines[2].split() == ["B", "5.0", "1.00", "7"]
    assert lines[3].split() == ["all", "15.0", "1.00"]


def test_two_demos_cannot_write_to_one_folder(tmp_path):
    with (
        hold_folder(tmp_path / "demo", "demo"),
        pytest.raises(OtherJobError, match="is being written by another job"),
    ):
        run(Flags(out=str(tmp_path / "demo")))
