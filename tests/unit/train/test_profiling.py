import gzip
import json

import pytest
import torch

from mdm.launch import rank
from mdm.train import pretraining
from mdm.train.profiling import Profile, parse_steps
from mdm.utils.ranks import World
from pipelines import pretrain


@pytest.mark.parametrize(
    ("text", "steps"), [("", []), ("4", [4]), ("10:13", [10, 11, 12]), ("0:1", [0])]
)
def test_steps_are_parsed(text, steps):
    assert list(parse_steps(text)) == steps


@pytest.mark.parametrize("text", ["a", "3:3", "5:2", "-1", "1:x"])
def test_text_that_is_no_step_is_refused(text):
    with pytest.raises(ValueError, match=text):
        parse_steps(text)


def trace(folder) -> set[str]:
    (path,) = folder.glob("*.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {event["name"] for event in events}


def test_only_chosen_steps_are_traced(tmp_path):
    profile = Profile(range(2, 4), tmp_path, World(rank=1, size=2))
    acts = [torch.sin, torch.cos, torch.tan, torch.exp, torch.sqrt]
    for number, act in enumerate(acts):
        with profile.step(number):
            act(torch.ones(3))
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "steps-2-3-rank1.json.gz",
        "steps-2-3-rank1.txt",
    ]
    names = trace(tmp_path)
    assert {"aten::tan", "aten::exp"} <= names
    assert names.isdisjoint({"aten::sin", "aten::cos", "aten::sqrt"})
    assert "aten::tan" in (tmp_path / "steps-2-3-rank1.txt").read_text()


def test_a_resumed_run_traces_the_remaining_steps(tmp_path):
    profile = Profile(range(2, 5), tmp_path, World())
    with profile.step(4):
        torch.tan(torch.ones(3))
    assert "aten::tan" in trace(tmp_path)


def test_a_failing_step_leaves_its_trace(tmp_path):
    profile = Profile(range(1), tmp_path, World())
    with pytest.raises(RuntimeError, match="shape"), profile.step(0):
        torch.tan(torch.ones(3)).view(2)
    assert "aten::tan" in trace(tmp_path)


def run_out_of_memory(tmp_path, monkeypatch, capsys, *flags: str) -> str:
    def train(*args, **kwargs):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.1 GiB in all."
        )

    monkeypatch.setattr(pretraining, "train", train)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(pretrain, "start_ranks", lambda threads: World(rank=3, size=8))
    monkeypatch.setattr(rank, "stop_ranks", lambda: None)
    argv = ["pretrain.py", "--preset", "mdm_7b", "--run_dir", str(tmp_path), *flags]
    monkeypatch.setattr("sys.argv", argv)
    assert pretrain.main() == 2
    return capsys.readouterr().err


def test_out_of_memory_names_the_value_to_change(tmp_path, monkeypatch, capsys):
    off = "--train.no_activation_checkpointing"
    message = run_out_of_memory(tmp_path, monkeypatch, capsys, off)
    assert message.startswith(
        "pretrain: rank 3: CUDA out of memory; try --train.activation_checkpointing, or "
        "--train.deepspeed deepspeed_configs/zero3_offload.json, or 16 ranks"
    )
    assert message.count("\n") == 1
    message = run_out_of_memory(
        tmp_path,
        monkeypatch,
        capsys,
        "--train.activation_checkpointing",
        "--train.deepspeed=deepspeed_configs/zero3_offload.json",
        "--data.global_batch=1",
    )
    assert "GPUs with more memory" in message


def test_the_profile_flag_is_checked(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--preset", "demo", "--profile", "9:3"])
    assert pretrain.main() == 2
    assert "'9:3' holds no step" in capsys.readouterr().err
