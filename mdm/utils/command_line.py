"""Command lines made of dataclasses, by tyro.

The flags of a job are the fields of its dataclass, nested ones joined by a dot (`--train.lr 1e-3`);
hyphens may stand for underscores. A boolean takes no value (`--plan`, `--no_plan`; the former
spelling `--plan true` is accepted), and a flag with several values may be repeated. A mistake ends
the job with one line that names the value and the choices, and exit code 2.
"""

import functools
import itertools
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
from tyro import _errors as errors  # no public hook; pyproject.toml pins the version of tyro
from tyro.constructors import ConstructorRegistry

from mdm.config import suggest
from mdm.utils.flags import SPECS, flag_types, key_of, respell
from mdm.utils.saved_config import RENAMED

T = TypeVar("T")


def fail(message: str) -> NoReturn:
    """End a job over a user's mistake: one line on stderr, exit code 2."""
    print(message, file=sys.stderr)  # noqa: T201
    sys.exit(2)


def _explain(event: errors.ParseErrorEvent, types: Mapping[str, Any]) -> None:
    """End the job with one line in place of tyro's box."""
    unknown: list[str] = getattr(event, "tokens", getattr(event, "unrecognized_tokens", []))
    key = next(filter(None, map(key_of, unknown)), "")
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
        name = event.argument.display_name()
        message = f"{name} needs a value; write {name}=VALUE if it begins with a dash"
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
    """A `cls`, a dataclass, from `argv` or this process's command line.

    A field without a default is a flag that must be given. With `presets`, `cls` is a subclass of
    their class with a field `preset`: the flag `--preset NAME` must be given and picks the values
    that the other flags change. `--help` begins with `description`.

    Raises SystemExit after `--help` and, with code 2, after one line about a mistake.
    """
    prog, types = Path(sys.argv[0]).name, flag_types(cls)
    words = sys.argv[1:] if argv is None else argv
    args = respell([w for w in words if not re.match("--local[_-]rank=", w)], types)  # DeepSpeed's
    default: Any = tyro.MISSING_NONPROP
    if presets is not None:
        name = "".join([b for a, b in itertools.pairwise(args) if a == "--preset"][-1:])
        if name not in presets and not {"-h", "--help"} & set(args):
            problem = f"unknown preset {name!r}{suggest(name, presets)}" if name else "no --preset"
            fail(f"{prog}: {problem} (presets: {', '.join(presets)})")
        if name in presets:
            default = typing.cast(Any, cls)(**vars(presets[name]), preset=name)
    registry = ConstructorRegistry()
    registry.primitive_rule(lambda info: SPECS.get(info.type))
    with errors.on_parse_error(functools.partial(_explain, types=types)):
        flags: T = tyro.cli(
            cls,
            args=args,
            prog=prog,
            description=description,
            default=default,
            use_underscores=True,
            registry=registry,
        )
    return flags
