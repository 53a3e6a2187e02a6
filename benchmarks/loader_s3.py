"""Our loader and four peers on S3 with a cold cache; otherwise like `loader_local`.

The S3 server runs on this machine and shares its cores.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.loader_samples import BATCH, SAMPLES
from benchmarks.loading import data_folder, in_turn, result
from benchmarks.timing import Result
from mdm.storage import open_store
from mdm.storage.server import S3Server

FORMATS = {
    "ours": "arrow",
    "LitData": "litdata",
    "MosaicML Streaming": "mosaicml",
    "WebDataset": "webdataset",
    "HF datasets, parquet": "parquet",
}


def upload(folder: Path, uri: str) -> str:
    """Upload all files of a folder; returns the URI."""
    store = open_store(uri)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    return uri


def run() -> Result:
    """Samples per second."""
    folders = {form: data_folder(form) for form in FORMATS.values()}
    with TemporaryDirectory() as folder, S3Server(Path(folder), bucket="bench") as server:
        saved = dict(os.environ)
        os.environ.update(server.env, AWS_ALLOW_HTTP="true")  # LitData needs it
        try:
            uris = {form: upload(path, f"s3://bench/{form}") for form, path in folders.items()}
            figures = in_turn({name: uris[form] for name, form in FORMATS.items()})
        finally:
            os.environ.clear()
            os.environ.update(saved)
    setting = f"{SAMPLES} samples, batches of {BATCH}, in process, S3 on this machine, cold"
    return result("loader_s3", figures, (), setting)
