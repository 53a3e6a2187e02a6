"""The loader from S3 with a cold cache beside four peers, as `loader_local` from a folder.

The server is a real one on this machine: it takes its share of the same cores.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from mdm.storage import open_store
from mdm.storage.server import S3Server
from tests.benchmarks.loader_samples import BATCH, SAMPLES
from tests.benchmarks.loading import in_turn, result, written
from tests.benchmarks.timing import Result

FORMATS = {
    "ours": "arrow",
    "LitData": "litdata",
    "MosaicML Streaming": "mosaicml",
    "WebDataset": "webdataset",
    "HF datasets, parquet": "parquet",
}


def upload(folder: Path, uri: str) -> str:
    """All files of a folder; the URI."""
    store = open_store(uri)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    return uri


def run() -> Result:
    """Samples a second."""
    folders = {form: written(form) for form in FORMATS.values()}
    with TemporaryDirectory() as name, S3Server(Path(name), bucket="bench") as server:
        saved = dict(os.environ)
        os.environ.update(server.env, AWS_ALLOW_HTTP="true")  # asked for by LitData
        try:
            uris = {form: upload(folder, f"s3://bench/{form}") for form, folder in folders.items()}
            found = in_turn({who: uris[form] for who, form in FORMATS.items()})
        finally:
            os.environ.clear()
            os.environ.update(saved)
    setting = f"{SAMPLES} samples, batches of {BATCH}, in process, S3 on this machine, cold"
    return result("loader_s3", found, (), setting)
