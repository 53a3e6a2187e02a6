"""Command lines made of dataclasses, by tyro.

The flags of a job are the fields of its dataclass, nested ones joined by a dot (`--train.lr 1e-3`);
hyphens may stand for underscores. A boolean takes no value (`--plan`, `--no_plan`; the former
spelling `--plan true` is accepted), and a flag with several values may be repeated. A mistake ends
the job with one line that names the value and the choices, and exit code 2.
"""

import dataclasses
import functools
import re
import sys
import typing
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
from tyro import _errors as errors  # no public hook; pyproject.toml pins the version of tyro
from tyro.constructors import ConstructorRegistry

from mdm.config import RENAMED, suggest
from mdm.utils.flag_values import SPECS

T = TypeVar("T")

BOOLEANS = ("true", "false")  # after a flag that needs no value


def fail(message: str) -> NoReturn:
    """End a job over a user's mistake: one line on stderr, exit code 2."""
    print(message, file=sys.stderr)  # noqa: T201
    sys.exit(2)


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


def _key(word: str) -> str:
    """The name of the flag in `--name`, `--na-me` or `--name=value`; "" if it is no flag."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""


def _respell(args: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """`args` as tyro expects them: no value after a boolean, all values of a list together."""
    words, plain = deque(args), list[str]()
    lists: dict[str, list[str]] = {}
    while words:
        word = words.popleft()
        key, (_, equals, value) = _key(word), word.partition("=")
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


def _explain(event: errors.ParseErrorEvent, types: Mapping[str, Any]) -> None:
    """End the job with one line in place of tyro's box."""
    unknown: list[str] = getattr(event, "tokens", getattr(event, "unrecognized_tokens", []))
    key = next(filter(None, map(_key, unknown)), "")
    if RENAMED.get(key) in types:
        message = f"--{key} is now --{RENAMED[key]}"
    elif key:
        message = f"unknown flag --{key}{suggest('--' + key, ['--' + name for name in types])}"
    elif unknown:
        message = f"unexpected argument {unknown[0]!r}"
    elif isinstance(event, errors.MissingArgs):
        names = ", ".join(missing.arg.display_name() for missing in event.missing_arguments)
        message = f"required: {names}"
    elif isinstance(event, errors.BadValue):
        message = f"{event.argument.display_name()} needs a value"
    elif isinstance(event, errors.InstantiationFailure):
        message = " ".join(event.message.split())
        if event.argument:  # of the reasons why no type of a union fits, the first
            flag, metavar = event.argument.display_name(), event.argument.lowered.metavar
            message = f"{flag} takes {metavar}: {event.message.splitlines()[0]}"
    else:
        return
    fail(f"{event.prog}: {message} (--help lists the flags)")


def parse_cli(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    presets: Mapping[str, Any] | None = None,
) -> T:
    """A `cls` from the command line.

    Args:
        cls: A dataclass. A field without a default is a flag that must be given.
        argv: The words of the command line; by default those of this process.
        description: What `--help` says about the job.
        presets: If given, `cls` is a subclass of their class with a field `preset`: the flag
            `--preset NAME` must be given and picks the values that the other flags change.

    Raises:
        SystemExit: After `--help`; with code 2, after one line about a mistake.
    """
    prog, types = Path(sys.argv[0]).name, flag_types(cls)
    words = sys.argv[1:] if argv is None else argv
    args = _respell([w for w in words if not re.match("--local[_-]rank=", w)], types)  # DeepSpeed's
    default: Any = tyro.MISSING_NONPROP
    if presets is not None:
        name = next((args[i] for i in range(1, len(args)) if args[i - 1] == "--preset"), "")
        if name not in presets and not {"-h", "--help"} & set(args):
            problem = f"unknown preset {name!r}{suggest(name, presets)}" if name else "no --preset"
            fail(f"{prog}: {problem} (presets: {', '.join(presets)})")
        if name in presets:
            default = cls(**vars(presets[name]), preset=name)
    registry = ConstructorRegistry()
    registry.primitive_rule(lambda info: SPECS.get(info.type))
    with errors.on_parse_error(functools.partial(_explain, types=types)):
        return tyro.cli(
            cls,
            args=args,
            prog=prog,
            description=description,
            default=default,
            use_underscores=True,
            registry=registry,
        )
