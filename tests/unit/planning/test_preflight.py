"""The checks of `--preflight` that need no ranks."""

import dataclasses

import pytest

from mdm.config import Config, DataConfig, ModelConfig
from mdm.planning.memory_plan import GIB, MemoryPlan, explain_out_of_memory, plan
from mdm.planning.preflight import Check, judge_memory, judge_rates, table
from mdm.utils.ranks import World


@pytest.fixture(scope="module")
def memory_plan() -> MemoryPlan:
    sizes = {"d_model": 64, "n_layer": 4, "d_state": 16, "headdim": 16, "text_length": 128}
    model = ModelConfig(vocab_size=300, image_height=4, image_width=4, **sizes)
    data = DataConfig(global_batch=256, caption_length=128, dialogue_length=128)
    return plan(Config(model=model, data=data), 2)


def test_a_plan_that_fits_passes(memory_plan):
    check = judge_memory(memory_plan, memory_plan.total, "node-1", on_gpu=True)
    assert check.verdict == "ok"


def test_a_gpu_that_is_too_small_fails_with_both_sizes_and_the_way_out(memory_plan):
    memory = memory_plan.total - 1
    check = judge_memory(memory_plan, memory, "node-1", on_gpu=True)
    assert check.verdict == "FAILED"
    total = f"{memory_plan.total / GIB:,.1f}"
    assert f"a rank needs {total} GiB, {memory / GIB:,.1f} are on node-1" in check.detail
    assert "it would fit with --train.activation_checkpointing, or " in check.detail
    assert "--data.global_batch 128" in check.detail


def test_without_a_change_that_suffices_the_message_asks_for_more_memory(memory_plan):
    check = judge_memory(memory_plan, GIB, "node-1", on_gpu=True)  # less than CUDA itself takes
    assert check.detail.endswith("it would fit with more memory: no single change suffices")


def test_a_cpu_with_too_little_memory_is_a_warning(memory_plan):
    check = judge_memory(memory_plan, memory_plan.total - 1, "node-1", on_gpu=False)
    assert check.passed
    assert check.verdict == "WARNING"
    assert "it would fit with --train.activation_checkpointing" in check.detail


def test_the_table_shows_each_verdict():
    checks = [Check("a", True, "x"), Check("long", False, "y"), Check("b", True, "z", warning=True)]
    assert table(checks).splitlines() == ["ok      a     x", "FAILED  long  y", "WARNING b     z"]


def test_a_rank_far_below_the_median_rate_is_slow():
    rates = [(1.0e12, "a"), (0.95e12, "b"), (0.5e12, "c"), (1.1e12, "d")]
    check = judge_rates(rates)
    assert not check.passed
    assert check.detail == "median 1.000 TFLOP/s a rank; rank 2 on c reaches 50% of that"
    assert judge_rates(rates[:2]).passed


def test_an_out_of_memory_error_names_each_kind_of_change_once(memory_plan):
    error = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
    train = dataclasses.replace(memory_plan.config.train, gather="trunk")
    config = dataclasses.replace(memory_plan.config, train=train)
    message = explain_out_of_memory(error, config, World(size=2))
    offload = "deepspeed_configs/zero3_offload.json"
    assert message == (
        "CUDA out of memory; try --train.activation_checkpointing, or --train.gather block, "
        f"or --train.deepspeed {offload}, or 4 ranks, or --data.global_batch 128; "
        "pipelines/rehearse.py shows what each of them saves"
    )
