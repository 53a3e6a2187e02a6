"""Small JSON files, read however a crash left them and written so that they are never half-written.

A kill leaves half a line, a power cut a block of zero bytes, a full disk an empty file. None of
these may end a job: `read_json` and `read_lines` skip what they cannot use and warn once, naming
the file and the damage. Files that a job cannot do without are read by `load_json`, which raises.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger("mdm")

# The keys that an object must have, and their types. `float` means any finite number.
Shape = Mapping[str, type]


class DamagedFileError(ValueError):
    """A file does not hold what it should; the message is one line that names it."""


@cache
def warn_once(message: str) -> None:
    """Log a warning once in the life of the process; some files are read again and again."""
    log.warning("%s", message)


def mismatch(value: Any, shape: Shape) -> str:
    """Why a JSON value is not an object of this shape; empty if it is one."""
    if not isinstance(value, dict):
        return f"a {type(value).__name__}, not an object"
    for key, kind in shape.items():
        if key not in value:
            return f"no {key!r}"
        if not _is_a(value[key], kind):
            return f"{key!r} is not a {'finite number' if kind is float else kind.__name__}"
    return ""


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def parse(data: bytes, shape: Shape) -> dict[str, Any]:
    """The JSON object in `data`; raises ValueError with a few words on what is wrong."""
    if b"\0" in data:
        raise ValueError("zero bytes")
    if not data.strip():
        raise ValueError("empty")
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("cut short, or not JSON") from None
    if problem := mismatch(value, shape):
        raise ValueError(problem)
    return dict(value)


def parse_line(line: bytes, shape: Shape) -> tuple[dict[str, Any] | None, str]:
    """A line's object and its damage; an undamaged object may follow a block of zero bytes."""
    rest = line.strip(b"\0 \t\r\n")
    if not rest:
        return None, "zero bytes" if b"\0" in line else ""
    try:
        return parse(rest, shape), "zero bytes before it" if b"\0" in line else ""
    except ValueError as error:
        return None, str(error)


def load_json(path: Path, shape: Shape | None = None) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file cannot be read, or holds no object of this shape.
    """
    try:
        return parse(path.read_bytes(), shape or {})
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from None


def read_json(path: Path, shape: Shape | None = None) -> dict[str, Any]:
    """The object in `path`; empty if there is no such file or, with a warning, if it is damaged."""
    try:
        return load_json(path, shape)
    except FileNotFoundError:
        return {}
    except DamagedFileError as error:
        warn_once(f"{error}; it is ignored")
        return {}


def read_lines(
    path: Path, shape: Shape | None = None, *, repair: bool = False
) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; one warning says how many damaged lines it skipped.

    A last line without its newline was cut short while it was written, and counts as damaged. With
    `repair` the file is rewritten without its damaged lines, if it can be written.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        warn_once(f"{path} cannot be read: {error.strerror or error}; it is ignored")
        if repair:
            set_folder_aside(path)
        return []
    if not data:
        warn_once(f"{path} is empty; it is ignored")
    records: list[dict[str, Any]] = []
    damage = []
    *lines, tail = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        value, problem = parse_line(line, shape or {})
        if value is not None:
            records.append(value)
        if problem:
            damage.append((number, problem))
    if tail:
        damage.append((len(lines) + 1, "zero bytes" if b"\0" in tail else "cut short"))
    _warn_of_lines(path, damage)
    if repair and (damage or not data):
        # If the file cannot be written, the next reader warns again.
        with contextlib.suppress(OSError):
            write_lines(path, records)
    return records


def _warn_of_lines(path: Path, damage: list[tuple[int, str]]) -> None:
    if damage:
        lines = f"{len(damage)} damaged line" + ("s" if len(damage) > 1 else "")
        warn_once(f"{path}: {lines} skipped; line {damage[0][0]}: {damage[0][1]}")


def write_bytes(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write `path` whole or not at all; with `sync`, so that it survives a power cut.

    Missing parent folders are made; a folder at `path` is set aside. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of several hosts that share the folder, each has a temporary file of its own.
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        set_folder_aside(path)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    if sync:
        handle = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(handle)
        os.close(handle)


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    """Write a JSON value as `write_bytes` does."""
    write_bytes(path, json.dumps(value, indent=1).encode(), sync=sync)


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write JSON values, one a line, as `write_bytes` does; without values there is no file."""
    data = "".join(json.dumps(value) + "\n" for value in values).encode()
    write_bytes(path, data)
    if not data:
        path.unlink()


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a JSON object as one line, in one write; a torn last line is cut off first.

    A folder at `path` is set aside. Raises OSError if the write fails; nothing of it stays.
    """
    set_folder_aside(path)
    data = json.dumps(record).encode() + b"\n"
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            end = path.read_bytes().rfind(b"\n") + 1
            file.truncate(end)
        if file.write(data) != len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def set_folder_aside(path: Path) -> None:
    """Rename a folder that lies where a file should; a warning says where it went."""
    if path.is_dir():
        number = 1
        while (aside := path.with_name(f"{path.name}.folder-{number}")).exists():
            number += 1
        path.rename(aside)
        warn_once(f"{path} was a folder; it is now {aside}")
