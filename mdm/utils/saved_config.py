"""Configurations as the JSON of checkpoints and exports, those of former versions included."""

import dataclasses
import hashlib
import json
import typing
from typing import Any, TypeVar

from mdm.config import suggest
from mdm.utils.fields import check

T = TypeVar("T")

# Former name -> present one, of configuration keys and of flags. `present_keys` reads
# the former ones; for a flag, the command line answers with the present one.
RENAMED = {
    "data.stages": "data.mixture_stages",
    "data.window": "data.shuffle_window",
    "guard.black_boxes": "guard.replay_boxes",
    "train.pictures": "train.images",
    "meet": "rendezvous",  # of supervise.py
    "pictures": "images",  # of generate.py
    "stages": "mixture_stages",  # of explain.py, as the next one
    "window": "shuffle_window",
}

# Keys that a former version did not save, with the values that reproduce what it did.
FORMER_VALUES = {
    "model.adaln": False,
    "model.silent": False,
    "model.text_summary": "tokens",
    "model.text_head": "latent",
    "objective.answer_prompts": False,
    "objective.image_candidates": "latents",
    "objective.image_weight": "v_capped",
    "train.precision": "bf16",  # in which every shipped configuration trained
}

# Settings of former versions whose weights mean something else now: value and reason.
REFUSED = {
    "scan_mode": ("separate", "two of its six mixers read other orders now"),
    "decoder": ("transformer", "attention has rotary positions now"),
    "long_skip": (True, "long skips read normalised streams now"),
}


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain dict of a config, as JSON would hold it."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def fingerprint(config: Any) -> str:
    """sha256 over the sorted JSON of a config."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def present_keys(values: dict[str, Any], section: str = "") -> dict[str, Any]:
    """The nested dict of a whole config, or of a section, as this version would have saved it.

    Former keys get their present names, and missing ones the values of `FORMER_VALUES`.

    Raises:
        ValueError: weights of this config do not fit the present model.
    """
    present = _missing(values, section)
    for key, value in values.items():
        name = RENAMED.get(f"{section}{key}", key).rpartition(".")[2]
        nested = isinstance(value, dict)
        present[name] = present_keys(value, f"{section}{key}.") if nested else value
    return present


def _missing(values: dict[str, Any], section: str) -> dict[str, Any]:
    """What the version that saved this section did without saving it."""
    former = {
        key.removeprefix(section): value
        for key, value in FORMER_VALUES.items()
        if section and key.startswith(section)
    }
    if section == "model." and "text_head" not in values:
        for key, (value, reason) in REFUSED.items():
            check(
                values.get(key) != value,
                f"saved by a former version with model.{key} {value}: {reason}; train it anew, or "
                "use it with the version that trained it",
            )
    return {key: value for key, value in former.items() if key not in values}


def from_dict(cls: type[T], values: dict[str, Any], section: str = "") -> T:
    """The config that `to_dict` wrote, in this version or a former one.

    Args:
        cls: class of the config, or of the section.
        values: nested dict.
        section: its key with a dot after it; empty for the whole.

    Raises:
        ValueError: an unknown key, which the message names, a wrong value, or a model of a former
            version that the present one cannot run.
    """
    hints = typing.get_type_hints(cls)
    fields = _missing(values, section)
    for key, value in values.items():
        name = key if key in hints else RENAMED.get(section + key, key).rpartition(".")[2]
        check(name in hints, f"unknown key {section + key!r}{suggest(key, hints)}")
        fields[name] = _from_json(hints[name], value, f"{section}{name}.")
    return cls(**fields)


def _from_json(kind: Any, value: Any, section: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, section)
    if typing.get_origin(kind) is tuple:
        return tuple(_from_json(typing.get_args(kind)[0], item, section) for item in value)
    return value
