"""Fields of a configuration: a default, a help text, and a rule for the values."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What holds for the values of a field."""

    holds: Callable[[Any], bool]
    advice: str
    choices: tuple[str, ...] = ()


POSITIVE = Rule(lambda value: value > 0, "it must be positive")
NOT_NEGATIVE = Rule(lambda value: 0 <= value < math.inf, "it must be finite and not negative")
SHARE = Rule(lambda value: 0 <= value <= 1, "a share lies between 0 and 1")
DECAY = Rule(lambda value: 0 <= value < 1, "it lies in [0, 1)")


def one_of(*choices: str) -> Rule:
    """The rule that a value is one of these."""
    advice = f"choose one of {', '.join(filter(None, choices))}"
    return Rule(lambda value: value in choices, advice, choices)


def doc(default: Any, help: str, rule: Rule | None = None) -> Any:
    """A dataclass field with a default, the sentence that `--help` prints for it, and its rule."""
    if rule and rule.choices:
        help = f"{', '.join(rule.choices)}: {help}"
    return field(default=default, metadata={"help": help, "rule": rule})


def check(ok: bool, message: str) -> None:
    """Raise ValueError with `message` unless `ok`."""
    if not ok:
        raise ValueError(message)


def check_fields(config: Any, prefix: str = "--") -> None:
    """ValueError unless every field of a dataclass, made by `doc`, keeps its rule.

    The message names the field with `prefix` before it.
    """
    for spec in dataclasses.fields(config):
        value, rule = getattr(config, spec.name), spec.metadata.get("rule")
        if rule:
            check(rule.holds(value), f"{prefix}{spec.name} is {value!r}; {rule.advice}")
