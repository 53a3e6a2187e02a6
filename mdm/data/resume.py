"""A loader's state: what was consumed, of what, in which shares; and whether a run continues it."""

from typing import Any

from mdm.data import packing
from mdm.data.mixture import Mixture
from mdm.data.order import Order

STATE_VERSION = 2


class ResumeError(ValueError):
    """A saved state belongs to other data; the message names both values."""


def state_dict(order: Order, dialogue_length: int, step: int, order_digest: str) -> dict[str, Any]:
    """The state before `step`, as JSON, the same on every rank."""
    return {
        **_fixed(order, dialogue_length),
        "step": step,
        "order_digest": order_digest,
        "stages": [s.to_json() for s in order.mixture.stages],
        "manifests": {s.name: s.manifest.sha256 for s in order.mixture.sources},
        # Follow from the manifests; for exports, which see no data.
        "tokenizer_sha256": order.mixture.tokenizer_sha256,
        "autoencoder_sha256": order.mixture.autoencoder_sha256,
        "cursors": _cursors(order, step),
    }


def check(state: dict[str, Any], order: Order, dialogue_length: int) -> None:
    """ResumeError, naming both values, unless `order` has drawn the saved steps as they were.

    Stages that begin at the saved step or later may change, with data sets that only they read.
    """
    for key, value in _fixed(order, dialogue_length).items():
        if state.get(key) != value:
            raise ResumeError(
                f"cannot resume: the checkpoint was made with data {key} {state.get(key)}, "
                f"this run has {value}"
            )
    step = int(state["step"])
    stages: list[dict[str, Any]] = [s.to_json() for s in order.mixture.stages]
    saved: list[dict[str, Any]] = [s for s in state["stages"] if s["step"] < step]
    present = [s for s in stages if s["step"] < step]
    if saved != present:
        raise ResumeError(
            f"cannot resume at step {step}: the steps before it were drawn in the stages {saved}, "
            f"this run says {present}; give those again, stages from step {step} on may change"
        )
    used = {name for stage in saved for name in stage["weights"]}
    now: dict[str, dict[str, Any]] = {
        "manifests": {s.name: s.manifest.sha256 for s in order.mixture.sources},
        "cursors": _cursors(order, step),
    }
    for key, values in now.items():
        for name in sorted(used):
            if state[key].get(name) != values[name]:
                raise ResumeError(
                    f"cannot resume: the checkpoint was made with data {key} {name!r}: "
                    f"{state[key].get(name)}, this run has {values[name]}"
                )


def _fixed(order: Order, dialogue_length: int) -> dict[str, Any]:
    """What stays for the length of a run."""
    mixture: Mixture = order.mixture
    packed = {
        "texts_per_row": mixture.texts_per_row,
        "length": dialogue_length,
        "algorithm": packing.ALGORITHM,
    }
    return {
        "version": STATE_VERSION,
        "seed": order.seed,
        "global_batch": mixture.global_batch,
        "window": mixture.window,
        "packing": packed if mixture.texts_per_row > 1 else None,
    }


def _cursors(order: Order, step: int) -> dict[str, int]:
    consumed = order.consumed(step).tolist()
    return {s.name: n for s, n in zip(order.mixture.sources, consumed, strict=True)}
