"""Safetensors files with the permissions of any new file: the library creates private ones."""

import secrets
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mdm.storage import StoreError


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file; StoreError if that fails."""
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise StoreError(f"cannot write {path}: {error}") from None
    open_as_created(path)


def open_as_created(path: Path) -> None:
    """Gives a file the permissions of a new one under the present umask."""
    probe = path.with_name(f".tmp-{secrets.token_hex(8)}")  # reading the umask would change it
    probe.touch()
    try:
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink()
