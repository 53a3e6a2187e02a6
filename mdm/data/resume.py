"""A loader's state: what was consumed, of which data, in which shares, and what may change."""

from collections.abc import Mapping
from typing import Any

from mdm.data import packing
from mdm.data.order import SampleOrder

STATE_VERSION = 2


class ResumeError(ValueError):
    """A saved state belongs to other data; the message names both values."""


def state_dict(
    order: SampleOrder, lengths: Mapping[str, int], step: int, order_digest: str
) -> dict[str, Any]:
    """The state before `step`, as JSON, the same on every rank; `lengths` are the tasks'."""
    return {
        **_fixed(order, lengths),
        "step": step,
        "order_digest": order_digest,
        "stages": [s.to_json() for s in order.mixture.stages],
        **_by_source(order, step),
        # They follow from the manifests; exports read them without any data.
        "tokenizer_sha256": order.mixture.tokenizer_sha256,
        "autoencoder_sha256": order.mixture.autoencoder_sha256,
    }


def check(state: dict[str, Any], order: SampleOrder, lengths: Mapping[str, int]) -> None:
    """Checks that `order` draws the steps before the saved one as they were drawn.

    Mixture stages that begin at the saved step or later may change, and so may data sets that only
    they read.

    Raises:
        ResumeError: it does not; the message names the saved and the present value.
    """
    for key, value in _fixed(order, lengths).items():
        if state.get(key) != value:
            raise ResumeError(
                f"cannot resume: the checkpoint was made with data {key} {state.get(key)}, "
                f"this run has {value}"
            )
    step = int(state["step"])
    saved: list[dict[str, Any]] = [s for s in state["stages"] if s["step"] < step]
    present = [s.to_json() for s in order.mixture.stages if s.step < step]
    if saved != present:
        raise ResumeError(
            f"cannot resume at step {step}: the steps before it were drawn in the mixture stages "
            f"{saved}, this run has {present}; configure those again, later stages may change"
        )
    used = {name for stage in saved for name in stage["weights"]}
    for key, values in _by_source(order, step).items():
        for name in sorted(used):
            if state[key].get(name) != values[name]:
                raise ResumeError(
                    f"cannot resume: the checkpoint was made with data {key} {name!r}: "
                    f"{state[key].get(name)}, this run has {values[name]}"
                )


def _fixed(order: SampleOrder, lengths: Mapping[str, int]) -> dict[str, Any]:
    """What must not change during a run."""
    mixture, packed = order.mixture, dict[str, Any]()
    if mixture.texts_per_row > 1:
        packed |= {"texts_per_row": mixture.texts_per_row, "length": lengths["text"]}
    if mixture.images_per_row > 1:
        packed |= {"images_per_row": mixture.images_per_row, "caption": lengths["image_text"]}
    if packed:
        packed["algorithm"] = packing.ALGORITHM
    return {
        "version": STATE_VERSION,
        "seed": order.seed,
        "global_batch": mixture.global_batch,
        "window": mixture.shuffle_window,
        "packing": packed or None,
    }


def _by_source(order: SampleOrder, step: int) -> dict[str, dict[str, Any]]:
    names = [s.name for s in order.mixture.sources]
    sha256s = [s.manifest.sha256 for s in order.mixture.sources]
    return {
        "manifests": dict(zip(names, sha256s, strict=True)),
        "cursors": dict(zip(names, order.consumed(step).tolist(), strict=True)),
    }
