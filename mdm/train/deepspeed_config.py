"""The DeepSpeed configuration of a run: the JSON of `--train.deepspeed` plus what `Config` owns.

The JSON sets ZeRO and offload. A key that `Config` owns is refused in it.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mdm.checkpoint.state import RunError
from mdm.config import Config
from mdm.train.workarounds import DeepSpeedZeroConfig, deepspeed
from mdm.utils import precision

ALLOWED = ("zero_optimization", "aio", "communication_data_type", "comms_logger")
OWNED_BY_CONFIG = {
    "train_batch_size": "--data.global_batch",
    "train_micro_batch_size_per_gpu": "--data.global_batch",
    "gradient_accumulation_steps": "--data.global_batch",
    "gradient_clipping": "--train.grad_clip",
    "optimizer": "--train.lr, --train.beta1, --train.beta2, --train.weight_decay",
    "scheduler": "--train.warmup, --train.decay",
    "seed": "--seed",
    "torch_autocast": "--train.precision",
    "bf16": "--train.precision, which keeps parameters in fp32",
    "fp16": "--train.precision, which keeps parameters in fp32",
}


def load_deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the JSON of `train.deepspeed` plus what `config` owns.

    Raises RunError if the file is missing or not allowed, or the ranks cannot share the batch
    evenly.
    """
    path = Path(config.train.deepspeed)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"--train.deepspeed {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"--train.deepspeed {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RunError(f"--train.deepspeed {path} holds a {type(values).__name__}, not an object")
    _check(values, path)
    if config.data.global_batch % world_size:
        raise RunError(
            f"data.global_batch {config.data.global_batch} is not a multiple of {world_size} ranks"
        )
    device = deepspeed.accelerator.get_accelerator().device_name()  # cpu or cuda
    return values | {
        "train_batch_size": config.data.global_batch,
        "train_micro_batch_size_per_gpu": config.data.global_batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.grad_clip,
        "torch_autocast": {
            "enabled": precision.resolve(config.train.precision, device) == precision.BF16,
            "dtype": "bfloat16",
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def _check(values: dict[str, Any], path: Path) -> None:
    """RunError for a key that is unknown or owned by `Config`, and for a wrong value."""
    for key in values:
        if key in OWNED_BY_CONFIG:
            raise RunError(
                f"{path} sets {key!r}, which is owned by {OWNED_BY_CONFIG[key]}; remove it"
            )
        if key not in ALLOWED:
            raise RunError(f"{path} sets unknown key {key!r}; it may hold {', '.join(ALLOWED)}")

    for key in ("zero_optimization", "aio", "comms_logger"):
        if not isinstance(values.get(key, {}), dict):
            raise RunError(f"{path}: {key} is {values[key]!r}, not an object")
    kind = values.get("communication_data_type")
    if kind not in (None, "fp32", "fp16", "bf16"):
        raise RunError(f"{path}: communication_data_type is {kind!r}; choose fp32, fp16 or bf16")
    stage = values.get("zero_optimization", {}).get("stage")
    if stage not in (2, 3):
        raise RunError(f"{path}: zero_optimization.stage is {stage!r}; the engine supports 2 and 3")
    try:
        zero_settings(values)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise RunError(f"{path}: zero_optimization.{field}: {error.errors()[0]['msg']}") from error


def zero_settings(values: dict[str, Any]) -> Any:
    """The `zero_optimization` of a DeepSpeed configuration, with DeepSpeed's defaults."""
    return DeepSpeedZeroConfig(**values["zero_optimization"])
