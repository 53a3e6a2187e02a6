"""The checks before a run starts or continues, with one result for all ranks."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from mdm.checkpoint.checkpoints import Record
from mdm.checkpoint.state import RunError, TrainState, flatten
from mdm.config import Config
from mdm.data.loader import Loader
from mdm.first_stage.tokenizer import read_model
from mdm.storage import StoreError
from mdm.train.deepspeed_config import ALLOWED, load_deepspeed_config, zero_settings
from mdm.train.outcome import EXPORT, SAMPLES, SNAPSHOTS
from mdm.utils.ranks import World, gather_to_all

T = TypeVar("T")

# DeepSpeed settings that change what a step computes. All others say where state is kept and how it
# is transferred, and may change between two attempts.
COMPUTES = (
    "communication_data_type",
    "zero_optimization.zero_quantized",
    "zero_optimization.zenflow",
    "zero_optimization.compute_grad_norm",
    "zero_optimization.load_from_fp32_weights",
)


class Prepared(NamedTuple):
    """What the checks have opened, and lines to log about allowed changes."""

    loader: Loader
    deepspeed: dict[str, Any]  # the content of the DeepSpeed JSON
    tokenizer: bytes  # the `.model` file, on the rank that exports
    lines: list[str]


def prepare(
    config: Config,
    world: World,
    make_loader: Callable[[Config, World], Loader],
    record: Record | None,
    path: str,
) -> Prepared:
    """Open the data and check that the run can start, or continue from `record` at `path`.

    All ranks must call, before anything is built or written. Raises RunError on every rank if data,
    tokenizer, autoencoder or settings do not fit on any.
    """

    def check() -> Prepared:
        check_folders(Path(config.run_dir))
        values = load_deepspeed_config(config, world.size)
        settings = {key: value for key, value in values.items() if key in ALLOWED}
        loader = make_loader(config, world)
        lines = []
        if record:
            lines = check_settings(record.state, settings, config, path)
            untouched = loader.state_dict()
            loader.load_state_dict(record.manifest["loader"])
            loader.load_state_dict(untouched)  # `record` may turn out to be damaged
        exports = world.is_main and Path(config.tokenizer).is_file()
        tokenizer = read_model(config.tokenizer) if exports else b""
        return Prepared(loader, settings, tokenizer, lines)

    prepared = on_every_rank(check, world)
    check_same({"deepspeed": prepared.deepspeed, "data": prepared.loader.state_dict()})
    return prepared


def check_folders(run_dir: Path) -> None:
    """ValueError if there is a file where the run will later write a folder."""
    for name in (EXPORT, SNAPSHOTS, SAMPLES):
        if (path := run_dir / name).exists() and not path.is_dir():
            raise ValueError(
                f"{path} is a file where the run writes a folder; move it away, or give another "
                "--run_dir"
            )


def on_every_rank(task: Callable[[], T], world: World) -> T:
    """The result of `task` on this rank, once it has succeeded on all; all ranks must call.

    Raises RunError on every rank if `task` fails on any, which the message names unless all failed
    alike.
    """
    failure = ""
    try:
        result = task()
    except (ValueError, OSError, StoreError) as error:
        failure = str(error) or type(error).__name__
    failures = gather_to_all((failure, socket.gethostname()))
    for rank, (message, host) in enumerate(failures):
        if message:
            differ = any(other != message for other, _ in failures)
            raise RunError(f"rank {rank} on {host}: {message}" if differ else message)
    return result


def check_same(values: dict[str, Any]) -> None:
    """RunError on every rank unless these plain values are the same on all; all must call."""
    rows = gather_to_all((flatten(values), socket.gethostname()))
    first, main = rows[0]
    for rank, (row, host) in enumerate(rows):
        for key in sorted(first.keys() | row.keys()):
            if first.get(key) != row.get(key):
                raise RunError(
                    f"{key} is {row.get(key)!r} for rank {rank} on {host} and "
                    f"{first.get(key)!r} for rank 0 on {main}; give all nodes the same files"
                )


def check_settings(state: TrainState, now: dict[str, Any], config: Config, path: str) -> list[str]:
    """RunError if DeepSpeed settings changed that change what a step computes.

    Returns lines to log about other changes. Spelling out a default is no change.
    """
    file = config.train.deepspeed
    if not state.deepspeed:
        return [f"{path} does not record its DeepSpeed settings; those of {file} hold from now on"]
    saved, present = _resolved(state.deepspeed), _resolved(now)
    changed = {
        key: f"{key} was {saved.get(key)!r} and is {present.get(key)!r}"
        for key in sorted(saved.keys() | present.keys())
        if saved.get(key) != present.get(key)
    }
    if refused := [line for key, line in changed.items() if key.startswith(COMPUTES)]:
        raise RunError(
            f"{path} was made with other DeepSpeed settings: {'; '.join(refused)}. Restore the "
            f"former ones in {file}, give another --run_dir, or --resume none to start over"
        )
    return [f"DeepSpeed settings changed: {'; '.join(changed.values())}"] if changed else []


def _resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings one by one, including defaults."""
    try:
        zero = zero_settings(settings).model_dump(mode="json")
    except ValidationError:  # of another version of DeepSpeed
        return flatten(settings)
    return flatten(settings | {"zero_optimization": zero})
