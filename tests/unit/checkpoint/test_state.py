import dataclasses

import pytest

from mdm.checkpoint.state import RunError, TrainState, check_resumable, flatten, resolve_precision
from mdm.utils.saved_config import to_dict
from tests.helpers import small_config


def test_a_state_survives_json(tmp_path):
    state = TrainState(step=3, samples_seen=24, seconds={"data": 0.5}, config={"a": {"b": 1}})
    assert TrainState.from_json(state.to_json()) == state


def test_nested_keys_are_joined_by_dots():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}


def test_length_and_reporting_may_change(tmp_path):
    config = small_config(tmp_path)
    state = TrainState(config=to_dict(config), world_size=2)
    train = dataclasses.replace(config.train, steps=99, log_every=7, keep=5)
    check_resumable(state, dataclasses.replace(config, train=train, run_dir="elsewhere"), "x")


def test_files_may_move_and_a_change_of_threads_is_a_notice(tmp_path):
    config = small_config(tmp_path)
    state = TrainState(config=to_dict(config), world_size=2)
    moved = dataclasses.replace(
        config,
        tokenizer="elsewhere.model",
        autoencoder="elsewhere",
        data=dataclasses.replace(config.data, root="s3://elsewhere"),
        train=dataclasses.replace(config.train, deepspeed="elsewhere.json"),
    )
    assert check_resumable(state, moved, "x") == []
    threads = dataclasses.replace(config, train=dataclasses.replace(config.train, threads=3))
    (notice,) = check_resumable(state, threads, "x")
    assert notice.startswith("train.threads was 1 and is 3: ")


def test_a_state_of_another_version_is_read(tmp_path):
    """Missing fields get the present value, with a notice; unknown ones are ignored."""
    config = small_config(tmp_path)
    values = TrainState(step=3, config=to_dict(config)).to_json() | {"unknown": 1}
    del values["deepspeed"], values["config"]["train"]["ema2"]
    state = TrainState.from_json(values)
    assert (state.step, state.deepspeed) == (3, {})
    (notice,) = check_resumable(state, config, "step-00000003")
    assert notice == "step-00000003 does not record train.ema2; 0.0 holds from now on"


def test_any_other_change_is_refused_and_named(tmp_path):
    config = small_config(tmp_path)
    state = TrainState(config=to_dict(config), world_size=2)
    train = dataclasses.replace(config.train, lr=0.5)
    with pytest.raises(RunError, match=r"seed was 1 and is 9; train\.lr was 0\.01 and is 0\.5"):
        check_resumable(state, dataclasses.replace(config, train=train, seed=9), "x")


def test_a_window_keeps_its_mean_on_another_number_of_ranks():
    """A window holds sums over ranks of each rank's mean: more ranks, larger sums."""
    state = TrainState(world_size=2, window={"text": {"steps": 3, "total": 12.0}})
    assert state.on_ranks(2) is state
    other = state.on_ranks(3)
    assert other.world_size == 3
    assert other.window == {"text": {"steps": 3, "total": 18.0}}


@pytest.mark.parametrize("began_in", ["bf16", "fp32"])
def test_auto_keeps_the_precision_in_which_a_run_began(began_in, tmp_path):
    """Whichever precision is fast on the device on which it continues."""
    began = small_config(tmp_path, precision=began_in)
    state = TrainState(config=to_dict(began))
    auto = small_config(tmp_path, precision="auto")
    for device_type in ("cpu", "cuda"):
        assert resolve_precision(auto, state, device_type) == began
        check_resumable(state, resolve_precision(auto, state, device_type), "x")


def test_an_explicit_precision_is_compared_and_never_replaced(tmp_path):
    state = TrainState(config=to_dict(small_config(tmp_path, precision="bf16")))
    given = small_config(tmp_path, precision="fp32")
    assert resolve_precision(given, None, "cpu") is given
    assert resolve_precision(given, state, "cpu") is given
    with pytest.raises(RunError, match=r"train\.precision was 'bf16' and is 'fp32'"):
        check_resumable(state, given, "x")
