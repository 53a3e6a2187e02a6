"""Command lines made of the fields of dataclasses.

Every job's flags are the fields of its dataclass, nested ones joined by a dot (`--train.lr 1e-3`).
Unknown flags, presets and values end the job with one line that names the value and the choices,
never with a stack trace.
"""

import argparse
import dataclasses
import re
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from mdm.config import SourceConfig, StageConfig, suggest
from mdm.utils.uri import folder_of

T = TypeVar("T")


def _parse(kind: Any, text: str) -> Any:
    if kind == tuple[StageConfig, ...]:
        stages = [item.partition("=") for item in re.split(r";(?=\s*\d+=|\s*$)", text) if item]
        if not all(step.strip().isdigit() and equals for step, equals, _ in stages):
            raise ValueError(f"{text!r} is not step=name:weight,name:weight;step=...")
        return tuple(
            StageConfig(int(step), _parse(tuple[SourceConfig, ...], sources))
            for step, _, sources in stages
        )
    if kind == tuple[SourceConfig, ...]:
        # A name may hold commas and colons: it ends where a weight and a comma follow.
        pairs = re.findall(r"(.+?):([^:,]*)(?:,|$)", text, re.DOTALL)
        if sum(len(name) + len(weight) + 2 for name, weight in pairs) < len(text):
            raise ValueError(f"{text!r} is not name:weight,name:weight")
        return tuple(SourceConfig(name, float(weight)) for name, weight in pairs)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() == "true"
    return folder_of(text) if kind is str else kind(text)


def _show(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        return " ".join(value)
    if isinstance(value, tuple) and value and isinstance(value[0], SourceConfig):
        return ",".join(f"{s.name}:{s.weight:g}" for s in value)
    if isinstance(value, tuple) and value and isinstance(value[0], StageConfig):
        return ";".join(f"{s.step}={_show(s.sources)}" for s in value)
    return repr(value)


def _flags(cls: type, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Flag name -> (type, help) for every leaf field."""
    hints = typing.get_type_hints(cls)
    found: dict[str, tuple[Any, str]] = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found |= _flags(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = (hints[f.name], f.metadata.get("help", ""))
    return found


def _get(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = getattr(config, part)
    return config


def _replace(config: Any, changes: dict[str, Any]) -> Any:
    """`config` with dotted paths replaced, all at once, so that checks see the final values."""
    own = {k: v for k, v in changes.items() if "." not in k}
    for head in {k.split(".", 1)[0] for k in changes if "." in k}:
        below = {k.split(".", 1)[1]: v for k, v in changes.items() if k.startswith(head + ".")}
        own[head] = _replace(getattr(config, head), below)
    return dataclasses.replace(config, **own)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flag = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized") and flag.startswith("--"):
            known = [s for a in self._actions for s in a.option_strings]
            message = f"unknown flag {flag}{suggest(flag, known)}"
        fail(f"{self.prog}: {message} (--help lists the flags)")


def fail(message: str) -> NoReturn:
    """End a job over a user's mistake: one line on stderr, exit code 2."""
    print(message, file=sys.stderr)  # noqa: T201
    sys.exit(2)


def _is_list(kind: Any) -> bool:
    """Whether each occurrence of a flag gives one more item."""
    return bool(kind == tuple[str, ...])


def _metavar(kind: Any) -> str:
    if _is_list(kind):
        return "ITEM"
    if isinstance(kind, types.UnionType):  # such as float | None
        kind = typing.get_args(kind)[0]
    return kind.__name__.upper() if isinstance(kind, type) else "LIST"


def parse_cli(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    presets: dict[str, T] | None = None,
    default: T | None = None,
) -> T:
    """A `cls` from command-line flags named after its fields.

    With `presets`, `--preset NAME` picks the values that the other flags change. Fields without
    a default are required. A mistake prints one line and exits with code 2.
    """
    parser = _OneLineParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it
    if presets is not None:
        parser.add_argument(
            "--preset", required=True, metavar="NAME", help=f"one of {', '.join(presets)}"
        )
    flags = _flags(cls)
    required = set()
    if presets is None and default is None:
        required = {f.name for f in dataclasses.fields(typing.cast(Any, cls)) if _required(f)}
    for path, (kind, text) in flags.items():
        if default is not None:
            text = f"{text} (default {_show(_get(default, path))})"
        elif presets is None and path not in required:
            text = f"{text} (default {_show(cls.__dataclass_fields__[path].default)})"  # type: ignore[attr-defined]
        parser.add_argument(
            f"--{path}",
            metavar=_metavar(kind),
            action="append" if _is_list(kind) else "store",
            required=path in required,
            help=text.replace("%", "%%"),
        )
    parsed = vars(parser.parse_args(argv))
    base: Any = default
    if presets is not None:
        name = parsed["preset"]
        if name not in presets:
            fail(
                f"{parser.prog}: unknown preset {name!r}{suggest(name, presets)} "
                f"(presets: {', '.join(presets)})"
            )
        base = presets[name]
    try:
        changes = {
            path: _parse_flag(path, kind, parsed[path])
            for path, (kind, _) in flags.items()
            if parsed[path] is not None
        }
        return typing.cast(T, cls(**changes) if base is None else _replace(base, changes))
    except ValueError as error:
        fail(f"{parser.prog}: {error}")


def _parse_flag(path: str, kind: Any, text: str | list[str]) -> Any:
    if isinstance(text, list):
        return tuple(_parse_flag(path, str, item) for item in text if item)
    try:
        return _parse(kind, text)
    except ValueError as error:
        raise ValueError(f"--{path} {text!r} is not valid: {error}") from None


def _required(f: Any) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
