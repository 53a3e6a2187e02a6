"""What a checkpoint carries beside weights, and when it may be continued."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mdm.config import Config, rename_keys, to_dict
from mdm.utils.exit_codes import GAVE_UP, MISTAKE
from mdm.utils.precision import AUTO, BF16, resolve
from mdm.utils.ranks import from_main

# Fields that may change between two attempts at one run: they steer its length and its reporting,
# never what a step computes (a longer cosine changes later rates, which is what is asked for); or
# they say where something lies whose content is compared instead.
MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoints",
    "train.keep",
    "train.keep_every",
    "train.keep_best",
    "train.snapshots",
    "train.images",
    "data.mixture_stages",  # those to come; the loader refuses a change of what was consumed
    "data.root",  # manifests are compared by the loader,
    "tokenizer",  # these two with the manifests,
    "autoencoder",
    "train.deepspeed",  # and this by what it holds
    "train.threads",
    "data.cache_dir",
    "data.cache_gb",
    "train.activation_checkpointing",
    "train.hang_seconds",
    "train.peak_tflops",
    "run_dir",
    "experiment",
    "guard.",  # all of it: after a spike it is what one wants to change
)


class RunError(ValueError):
    """A run that cannot start or go on, for a reason that its user can mend: one line."""

    code = MISTAKE


class Diverged(RunError):
    """The run cannot go on by itself, whatever is skipped."""

    code = GAVE_UP


@dataclass
class TrainState:
    """Where a run stands. Progress is counted in `samples_seen`."""

    step: int = 0
    samples_seen: int = 0
    # Seconds of committed work, by part of the step; what a kill threw away is not in it.
    seconds: dict[str, float] = field(default_factory=dict)
    time_to_first_batch: float = 0.0
    tracking_id: str | None = None
    world_size: int = 1
    order_digest: str = ""
    loss: float | None = None  # mean of the last line of metrics
    # Sums of loss terms since the last line of metrics, by task.
    window: dict[str, dict[str, float]] = field(default_factory=dict)
    # The guard's history, see `mdm.train.guard`.
    guard: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # what the DeepSpeed JSON held

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `state.json` holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """The state that `to_json` wrote, in whatever version; what it lacks has its default."""
        # Before `train.precision` was recorded, every shipped configuration trained in bf16.
        values = values | {"config": rename_keys(values.get("config", {}))}
        values["config"].get("train", {}).setdefault("precision", BF16)
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def on_ranks(self, size: int) -> "TrainState":
        """The state as `size` ranks continue it: each adds its own mean to a window's sums."""
        if size == self.world_size:
            return self
        window = {
            task: {k: v if k == "steps" else v * size / self.world_size for k, v in row.items()}
            for task, row in self.window.items()
        }
        return dataclasses.replace(self, world_size=size, window=window)


def settled(config: Config, state: TrainState | None, device_type: str) -> Config:
    """`config` with `auto` precision resolved: as the run of `state` began, else for this machine.

    All ranks must call: rank 0's measurement decides for all.
    """
    if config.train.precision != AUTO:
        return config
    if state:
        precision = state.config["train"]["precision"]
    else:
        precision = from_main(resolve(AUTO, device_type))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_resumable(state: TrainState, config: Config, path: str) -> list[str]:
    """Raise `RunError` unless `config` continues `state` exactly, on however many ranks.

    Returns what is to be said of changes that are allowed.
    """
    saved, now = flatten(state.config), flatten(to_dict(config))
    differing = [
        f"{key} was {value!r} and is {now.get(key)!r}"
        for key, value in sorted(saved.items())
        if not key.startswith(MAY_CHANGE) and value != now.get(key)
    ]
    if differing:
        raise RunError(
            f"{path} was made with another configuration: {'; '.join(differing)}. "
            "Give the former values, another --run_dir, or --resume none to start over"
        )
    said = [
        f"{path} does not record {key}; {now[key]!r} holds from now on"
        for key in sorted(now.keys() - saved.keys())
    ]
    key = "train.threads"
    if key in saved and saved[key] != now[key]:
        said.append(
            f"{key} was {saved[key]} and is {now[key]}: sums on the CPU may be taken in another "
            "order, so that losses agree but not to the last bit"
        )
    return said
