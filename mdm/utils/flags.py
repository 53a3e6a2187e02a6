"""How flags are spelled, and their values where tyro's own way is not enough."""

import dataclasses
import re
import typing
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tyro.constructors import PrimitiveConstructorSpec

from mdm.config import MixtureStageConfig, SourceConfig
from mdm.utils.uri import folder_of

BOOLEANS = ("true", "false")  # values of the former spelling, `--plan true`


def flag_types(cls: Any, prefix: str = "") -> dict[str, Any]:
    """The name of each flag, without its hyphens -> the type of its field."""
    types: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(kind)
        types |= flag_types(kind, f"{prefix}{name}.") if nested else {prefix + name: kind}
    return types


def negative(key: str) -> str:
    """The flag that turns the boolean flag `key` off."""
    section, dot, name = key.rpartition(".")
    return f"{section}{dot}no_{name}"


def key_of(word: str) -> str:
    """The name of the flag in `--name`, `--na-me` or `--name=value`; "" if it is no flag."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""


def respell(args: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """`args` as tyro expects them: no value after a boolean, all values of a list together."""
    words, plain = deque(args), list[str]()
    lists: dict[str, list[str]] = {}
    while words:
        word = words.popleft()
        key, (_, equals, value) = key_of(word), word.partition("=")
        if types.get(key) == tuple[str, ...]:
            values = lists.setdefault(key, [])
            values += [value] if equals else []
            while words and not words[0].startswith("--"):
                values.append(words.popleft())
        elif types.get(key) is bool and (equals or (words and words[0].lower() in BOOLEANS)):
            value = (value if equals else words.popleft()).lower()
            plain.append({"true": f"--{key}", "false": f"--{negative(key)}"}.get(value, word))
        else:
            plain += [f"--{key}", value] if key == "preset" and equals else [word]
    for key, values in lists.items():
        plain += [f"--{key}={values[0]}" if values else f"--{key}", *values[1:]]
    return plain


def read_sources(text: str) -> tuple[SourceConfig, ...]:
    """The data sets of `name:weight,name:weight`; ValueError if it is not written so."""
    # A name may contain commas and colons: it ends where a weight and a comma follow.
    pairs = re.findall(r"(.+?):([^:,]*)(?:,|$)", text, re.DOTALL)
    if sum(len(name) + len(weight) + 2 for name, weight in pairs) < len(text):
        raise ValueError(f"{text!r} is not name:weight,name:weight")
    return tuple(SourceConfig(name, float(weight)) for name, weight in pairs)


def read_stages(text: str) -> tuple[MixtureStageConfig, ...]:
    """The mixture stages of `step=name:weight,...;step=...`; ValueError if it is not written so."""
    stages = [item.partition("=") for item in re.split(r";(?=\s*\d+=|\s*$)", text) if item]
    if not all(step.strip().isdigit() and equals for step, equals, _ in stages):
        raise ValueError(f"{text!r} is not step=name:weight,name:weight;step=...")
    return tuple(
        MixtureStageConfig(int(step), read_sources(sources)) for step, _, sources in stages
    )


def show_sources(sources: Iterable[SourceConfig]) -> str:
    """The text that `read_sources` reads."""
    return ",".join(f"{source.name}:{source.weight:g}" for source in sources)


def _spec(nargs: Literal[1, "*"], metavar: str, read: Any, show: Any) -> Any:
    return PrimitiveConstructorSpec(nargs, metavar, read, lambda _: True, show)


# Type of a field -> how tyro reads and shows it. A file:// URI is the folder that it names.
SPECS: dict[Any, Any] = {
    str: _spec(1, "STR", lambda words: folder_of(words[0]), lambda text: [text]),
    tuple[str, ...]: _spec(
        "*", "STR", lambda words: tuple(map(folder_of, filter(None, words))), list
    ),
    tuple[SourceConfig, ...]: _spec(
        1, "NAME:WEIGHT,...", lambda words: read_sources(words[0]), lambda s: [show_sources(s)]
    ),
    tuple[MixtureStageConfig, ...]: _spec(
        1,
        "STEP=NAME:WEIGHT,...;...",
        lambda words: read_stages(words[0]),
        lambda stages: [";".join(f"{s.step}={show_sources(s.sources)}" for s in stages)],
    ),
}
