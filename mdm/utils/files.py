"""Small JSON files of bookkeeping, read as disks leave them and written so that they stay whole.

A kill leaves half a line, a power cut a block of zero bytes, a full disk an empty file. None of
this may end a job: what cannot be used is passed over, and one line says which file, what was wrong
and how much of it. Files without which a job cannot do its work are read by `load_json`, which
raises.
"""

import contextlib
import errno
import json
import logging
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger("mdm")

# The keys that an object must have, and of which type. `float` is any finite number.
Shape = Mapping[str, type]

_told: set[str] = set()
_telling = threading.Lock()


class DamagedFileError(ValueError):
    """A file does not hold what it should; the message is one line that names it."""


def tell(message: str) -> None:
    """Log a warning, the same one once a process: some files are read again and again."""
    with _telling:
        if message in _told:
            return
        _told.add(message)
    log.warning("%s", message)


def misfit(value: Any, shape: Shape) -> str:
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
    if kind is not float:
        return isinstance(value, kind) and not (isinstance(value, bool) and kind is int)
    try:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    except OverflowError:
        return False


def parse(data: bytes, shape: Shape) -> dict[str, Any]:
    """The JSON object in `data`; ValueError says in a few words what is wrong."""
    if not data.strip(b"\0 \t\r\n"):
        raise ValueError("zero bytes" if b"\0" in data else "empty")
    if b"\0" in data:
        raise ValueError("zero bytes")
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("cut short, or not JSON") from None
    if wrong := misfit(value, shape):
        raise ValueError(wrong)
    found: dict[str, Any] = value
    return found


def parse_line(line: bytes, shape: Shape) -> tuple[dict[str, Any] | None, str]:
    """The object of one line, and what is wrong; a good one may follow a block of zero bytes."""
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
        FileNotFoundError: it is not there.
        DamagedFileError: it cannot be read, or holds no object of this shape.
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
    """The object in `path`; empty if it is not there or, which one line says, of no use."""
    try:
        return load_json(path, shape)
    except FileNotFoundError:
        return {}
    except DamagedFileError as error:
        tell(f"{error}; it is passed over")
        return {}


def read_lines(path: Path, shape: Shape | None = None) -> list[dict[str, Any]]:
    """The objects in a file of one a line, without those that one line says are damaged."""
    return _read_lines(path, shape or {})[0]


def mend_lines(path: Path, shape: Shape | None = None) -> list[dict[str, Any]]:
    """The same, and the damaged lines, once told of, are taken out of the file."""
    found, damaged = _read_lines(path, shape or {})
    if damaged:
        # If it cannot be written, the next who reads it tells of them again.
        with contextlib.suppress(OSError):
            write_lines(path, found)
    return found


def _read_lines(path: Path, shape: Shape) -> tuple[list[dict[str, Any]], bool]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], False
    except OSError as error:
        tell(f"{path} cannot be read: {error.strerror or error}; it is passed over")
        return [], path.is_dir()
    if not data:
        tell(f"{path} is empty; it is passed over")
        return [], True
    lines = data.split(b"\n")
    found, damage = [], []
    for number, line in enumerate(lines, start=1):
        value, wrong = parse_line(line, shape)
        if value is not None:
            found.append(value)
        if wrong:
            damage.append((number, wrong))
    tell_of_lines(path, damage)
    return found, bool(damage)


def tell_of_lines(path: Path, damage: Sequence[tuple[int, str]], unit: str = "line") -> None:
    """Say in one line how many lines were passed over and what was wrong with the first."""
    if damage:
        where, wrong = damage[0]
        lines = f"{len(damage)} damaged line" + ("s" if len(damage) > 1 else "")
        tell(f"{path}: {lines} passed over; {unit} {where}: {wrong}")


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all, and have it on the disk on return; raises OSError.

    Missing folders are made. A folder that has the file's place is set aside, with a line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        make_way(path)
        aside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    handle = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # not every file system can
        os.fsync(handle)
    os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value as `write_bytes` does."""
    write_bytes(path, json.dumps(value, indent=1).encode())


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write JSON values, one a line, as `write_bytes` does; no file where there are none."""
    data = "".join(json.dumps(value) + "\n" for value in values).encode()
    write_bytes(path, data)
    if not data:
        path.unlink()


def append_line(path: Path, value: Any) -> None:
    """Add a JSON value as a whole line of its own or, raising OSError, nothing."""
    make_way(path)
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        data = json.dumps(value).encode() + b"\n"
        if not ends_a_line(file.fileno(), end):
            data = b"\n" + data
        if file.write(data) != len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ends_a_line(handle: int, end: int) -> bool:
    """Whether what is appended at `end` begins a line: it does not after half a line."""
    return end == 0 or os.pread(handle, 1, end - 1) == b"\n"


def make_way(path: Path) -> None:
    """Set a folder aside that has a file's place; one line says where to."""
    if path.is_dir():
        number = 1
        while (aside := path.with_name(f"{path.name}.folder-{number}")).exists():
            number += 1
        path.rename(aside)
        tell(f"{path} was a folder; it is now {aside}")
