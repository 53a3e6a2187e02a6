"""What a checkpoint holds besides weights, and which configurations may continue it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mdm.config import Config
from mdm.utils.exit_codes import GAVE_UP, MISTAKE
from mdm.utils.precision import AUTO, resolve
from mdm.utils.ranks import from_main
from mdm.utils.saved_config import present_keys, to_dict

# Fields that may change between two attempts at one run: they control its length and reporting,
# never what a step computes (except that a longer cosine intentionally changes later rates), or
# they name a place whose content is compared instead.
MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoints",
    "train.keep",  # and all that begin with it
    "train.snapshots",
    "train.images",
    "data.mixture_stages",  # future ones; the loader refuses changes to those already consumed
    "data.root",  # the loader compares manifests
    "tokenizer",  # compared with the manifests
    "autoencoder",  # compared with the manifests
    "train.deepspeed",  # the content of the file is compared
    "train.threads",
    "data.cache_dir",
    "data.cache_gb",
    "train.activation_checkpointing",
    "train.hang_seconds",
    "train.peak_tflops",
    "run_dir",
    "experiment",
    "guard.",  # all of it: after a spike one wants to change it
)


class RunError(ValueError):
    """A run cannot start or continue, for a reason that the user can fix: one line."""

    code = MISTAKE


class Diverged(RunError):
    """The run cannot continue by itself, whatever it skips."""

    code = GAVE_UP


@dataclass
class TrainState:
    """The progress of a run, counted in `samples_seen`."""

    step: int = 0
    samples_seen: int = 0
    # Seconds of committed work, by part of the step; without work lost to kills.
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
    deepspeed: dict[str, Any] = field(default_factory=dict)  # the content of the DeepSpeed JSON

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `state.json` holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """The state that `to_json` of any version wrote; missing fields get their defaults."""
        values = values | {"config": present_keys(values.get("config", {}))}
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def on_ranks(self, size: int) -> "TrainState":
        """The state for `size` ranks: each rank adds its own mean to the sums of `window`."""
        if size == self.world_size:
            return self
        window = {
            task: {k: v if k == "steps" else v * size / self.world_size for k, v in row.items()}
            for task, row in self.window.items()
        }
        return dataclasses.replace(self, world_size=size, window=window)


def resolve_precision(config: Config, state: TrainState | None, device_type: str) -> Config:
    """`config` with precision `auto` replaced by that of `state`, or else this machine's.

    All ranks must call: the measurement of rank 0 decides for all.
    """
    if config.train.precision != AUTO:
        return config
    if state:
        precision = state.config["train"]["precision"]
    else:
        precision = from_main(resolve(AUTO, device_type))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as a flat one, with keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_resumable(state: TrainState, config: Config, path: str) -> list[str]:
    """Raise RunError unless `config` continues `state` exactly, on any number of ranks.

    Returns notices about changes that are allowed.
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
    notices = [
        f"{path} does not record {key}; {now[key]!r} holds from now on"
        for key in sorted(now.keys() - saved.keys())
    ]
    key = "train.threads"
    if key in saved and saved[key] != now[key]:
        notices.append(
            f"{key} was {saved[key]} and is {now[key]}: the CPU may add in another order, so that "
            "losses agree but not to the last bit"
        )
    return notices
