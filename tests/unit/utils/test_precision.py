import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdm.checkpoint.state import TrainState
from mdm.utils.precision import autocast, describe, resolve
from tests.helpers import ROOT

QUESTION = "from mdm.utils.precision import describe, resolve; print(describe(resolve('auto')))"


def answer(**env: str) -> str:
    """What a process of its own makes of `auto`."""
    return subprocess.run(
        [sys.executable, "-c", QUESTION],
        env={**os.environ, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="hides units of x86 processors")
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])  # nothing of bf16; emulated by halves
def test_auto_is_fp32_where_the_cpu_has_no_bf16_units(isa):
    assert re.fullmatch(r"fp32: this CPU \(\w+\) has no bf16 units", answer(ONEDNN_MAX_CPU_ISA=isa))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the flags of x86 processors")
@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="the units are hidden")
def test_auto_is_bf16_exactly_where_the_processor_lists_bf16_instructions():
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    listed = {"avx512_bf16", "amx_bf16"} & set(flags)
    assert resolve("auto") == ("bf16" if listed else "fp32")


def test_cuda_computes_in_bf16():
    assert resolve("auto", "cuda") == "bf16"
    assert describe("bf16", "cuda") == "bf16, which CUDA computes in"


def test_a_slower_precision_is_reported():
    assert describe("fp32", "cuda") == "fp32: CUDA is faster in bf16"


def test_a_given_precision_is_used_and_an_unknown_one_refused():
    assert [resolve(p) for p in ("bf16", "fp32")] == ["bf16", "fp32"]
    with pytest.raises(ValueError, match="precision is 'fp16'; choose one of auto, bf16, fp32"):
        resolve("fp16")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_autocast_sets_the_type_of_products(precision, dtype):
    x = torch.ones(4, 4)
    with autocast(precision):
        assert (x @ x).dtype == dtype


def test_autocast_is_entered_in_one_place():
    places = [
        str(path.relative_to(ROOT))
        for top in ("mdm", "pipelines", "examples", "tests")
        for path in (ROOT / top).rglob("*.py")
        if re.search(r"torch\.(cpu\.amp\.|amp\.)?autocast\(", path.read_text())
    ]
    assert places == ["mdm/utils/precision.py"]


def test_a_state_without_a_recorded_precision_is_of_bf16():
    state = TrainState.from_json({"step": 3, "config": {"train": {"lr": 0.1}}})
    assert state.config["train"]["precision"] == "bf16"
