"""What may change in the DeepSpeed JSON between two attempts at one run."""

import json
from pathlib import Path
from typing import Any

import pytest

from mdm.checkpoint.state import RunError, TrainState
from mdm.train.beginning import check_folders, check_settings
from tests.helpers import ROOT, small_config

FILES = sorted((ROOT / "deepspeed_configs").glob("*.json"))


def settings(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_where_state_is_kept_and_how_it_is_transferred_may_change(
    path: Path, tmp_path: Path
) -> None:
    """From ZeRO-3 in one bucket to any other file of the project: one line tells so."""
    state = TrainState(deepspeed=settings(ROOT / "deepspeed_configs/cpu.json"))
    config = small_config(tmp_path, deepspeed=str(path))
    lines = check_settings(state, settings(path), config, "x")
    assert len(lines) == (path.stem != "cpu")
    if path.stem == "zero2":
        assert "zero_optimization.stage was 3 and is 2" in lines[0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("communication_data_type", "bf16", "communication_data_type was None and is 'bf16'"),
        (
            "zero_optimization",
            {"stage": 3, "zero_quantized_gradients": True},
            "zero_quantized_gradients was False and is True",
        ),
    ],
)
def test_what_a_step_computes_may_not_change(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    former = {"zero_optimization": {"stage": 3}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(former | {key: value}))
    config = small_config(tmp_path, deepspeed=str(path))
    with pytest.raises(RunError, match=message) as refusal:
        check_settings(TrainState(deepspeed=former), settings(path), config, "run/step-00000004")
    assert "run/step-00000004 was made with other DeepSpeed settings" in str(refusal.value)
    assert str(path) in str(refusal.value)
    back = TrainState(deepspeed=settings(path))  # and neither may it change back
    path.write_text(json.dumps(former))
    with pytest.raises(RunError, match="other DeepSpeed settings"):
        check_settings(back, settings(path), config, "x")


def test_spelling_out_a_default_is_no_change(tmp_path: Path) -> None:
    former = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}}
    now = {"zero_optimization": {"zero_quantized_gradients": False, "stage": 3}}
    assert check_settings(TrainState(deepspeed=former), now, small_config(tmp_path), "x") == []


@pytest.mark.parametrize("name", ["export", "snapshots", "samples"])
def test_a_file_where_the_run_writes_a_folder_is_refused_before_the_first_step(
    name: str, tmp_path: Path
) -> None:
    check_folders(tmp_path)
    (tmp_path / name).mkdir()
    check_folders(tmp_path)
    (tmp_path / name).rmdir()
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name} is a file where the run writes a folder; move"):
        check_folders(tmp_path)
