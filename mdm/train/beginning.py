"""What must hold on every rank before a run begins or goes on: one answer for all of them."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from mdm.checkpoint.checkpoints import Record
from mdm.checkpoint.state import RunError, TrainState, flatten
from mdm.config import Config
from mdm.first_stage.tokenizer import read_model
from mdm.storage import StoreError
from mdm.train.deepspeed_config import ALLOWED, load_deepspeed_config, zero_settings
from mdm.train.outcome import EXPORT, SAMPLES, SNAPSHOTS
from mdm.train.run import Loader
from mdm.utils.ranks import World, gather_to_all

T = TypeVar("T")

# DeepSpeed settings that change what a step computes. All others say where state lies and how it
# travels, and may change between two attempts.
COMPUTES = (
    "communication_data_type",
    "zero_optimization.zero_quantized",
    "zero_optimization.zenflow",
    "zero_optimization.compute_grad_norm",
    "zero_optimization.load_from_fp32_weights",
)


class Begun(NamedTuple):
    """What the checks have opened, and what is to be said of allowed changes."""

    loader: Loader
    deepspeed: dict[str, Any]  # what the DeepSpeed JSON holds
    tokenizer: bytes  # the `.model` file, on the rank that exports
    said: list[str]


def prepare(
    config: Config,
    world: World,
    make_loader: Callable[[Config, World], Loader],
    record: Record | None,
    path: str,
) -> Begun:
    """Open the data and check that the run may begin, or go on from `record` at `path`.

    All ranks must call, before anything is built or written.

    Raises:
        RunError: on every rank, if data, tokenizer, autoencoder or settings do not fit on any.
    """

    def check() -> Begun:
        check_folders(Path(config.run_dir))
        settings = deepspeed_settings(config, world)
        loader = make_loader(config, world)
        said: list[str] = []
        if record:
            said = check_settings(record.state, settings, config, path)
            untouched = loader.state_dict()
            loader.load_state_dict(record.manifest["loader"])
            loader.load_state_dict(untouched)  # the record may prove damaged
        model = b""
        if world.is_main and Path(config.tokenizer).is_file():
            model = read_model(config.tokenizer)
        return Begun(loader, settings, model, said)

    begun = on_every_rank(check, world)
    check_same({"deepspeed": begun.deepspeed, "data": begun.loader.state_dict()})
    return begun


def check_folders(run_dir: Path) -> None:
    """ValueError where a file has the place of a folder that the run will write at its end."""
    for name in (EXPORT, SNAPSHOTS, SAMPLES):
        if (path := run_dir / name).exists() and not path.is_dir():
            raise ValueError(
                f"{path} is a file where the run writes a folder; move it away, or give another "
                "--run_dir"
            )


def on_every_rank(do: Callable[[], T], world: World) -> T:
    """What `do` gives on this rank, once it has given something on all; all ranks must call.

    Raises:
        RunError: on every rank, if `do` fails on any; the message names the rank unless all
            say the same.
    """
    refusal = ""
    try:
        made = do()
    except (ValueError, OSError, StoreError) as error:
        refusal = str(error) or type(error).__name__
    heard = gather_to_all((refusal, socket.gethostname()))
    for rank, (said, host) in enumerate(heard):
        if said:
            alone = any(other != said for other, _ in heard)
            raise RunError(f"rank {rank} on {host}: {said}" if alone else said)
    return made


def check_same(values: dict[str, Any]) -> None:
    """RunError on every rank unless these plain values are the same on all; all must call."""
    heard = gather_to_all((flatten(values), socket.gethostname()))
    first, main = heard[0]
    for rank, (found, host) in enumerate(heard):
        for key in sorted(first.keys() | found.keys()):
            if first.get(key) != found.get(key):
                raise RunError(
                    f"{key} is {found.get(key)!r} for rank {rank} on {host} and "
                    f"{first.get(key)!r} for rank 0 on {main}; give all nodes the same files"
                )


def deepspeed_settings(config: Config, world: World) -> dict[str, Any]:
    """What the run's DeepSpeed JSON holds; RunError if it is missing or not allowed."""
    values = load_deepspeed_config(config, world.size)
    return {key: value for key, value in values.items() if key in ALLOWED}


def check_settings(state: TrainState, now: dict[str, Any], config: Config, path: str) -> list[str]:
    """RunError where DeepSpeed settings changed that change what a step computes.

    Returns what is to be said of other changes. A default that is spelled out changes nothing.
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
    if refused := [said for key, said in changed.items() if key.startswith(COMPUTES)]:
        raise RunError(
            f"{path} was made with other DeepSpeed settings: {'; '.join(refused)}. Give the former "
            f"ones in {file}, another --run_dir, or --resume none to start over"
        )
    return [f"DeepSpeed settings changed: {'; '.join(changed.values())}"] if changed else []


def _resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings one by one, defaults included."""
    try:
        zero = zero_settings(settings).model_dump(mode="json")
    except ValidationError:  # of another version of DeepSpeed
        return flatten(settings)
    return flatten(settings | {"zero_optimization": zero})
