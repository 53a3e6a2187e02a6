"""mamba_ssm's own Triton kernels on CPU tensors, under Triton's interpreter.

The interpreter is chosen when Triton is first imported and the patches below stay, so whoever calls
`load` does it in a process of its own, started with `ENVIRONMENT`.
"""

import contextlib
import importlib.util
import os
import sys
import types

import torch

ENVIRONMENT = {"TRITON_INTERPRET": "1"}


def load() -> None:
    """Make `mamba_ssm.ops.triton` and `mamba_ssm.modules` importable without CUDA."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "start this process with ENVIRONMENT"
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None, "mamba_ssm is not installed: `make setup` does it"
    # The package's own __init__ imports a CUDA extension; its submodules do not need it.
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["mamba_ssm"] = package

    from triton.runtime.autotuner import Autotuner

    torch.cuda.device = lambda index: contextlib.nullcontext()
    properties = types.SimpleNamespace(multi_processor_count=1)
    torch.cuda.get_device_properties = lambda *_: properties
    Autotuner._bench = lambda *_, **__: [1.0, 1.0, 1.0]  # no tile is quicker than another here
