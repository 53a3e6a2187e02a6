"""The loader from a local folder beside four peers: samples a second, CPU, first batch, resume.

A pass over 20,000 samples in random order, collated to torch tensors in batches of 64, files in
the page cache. Ours verifies every byte and makes ids, noise keys and the order's digest besides.
"""

from tests.benchmarks.loader_samples import BATCH, SAMPLES
from tests.benchmarks.loading import in_turn, result, written
from tests.benchmarks.timing import Result

FORMATS = {
    "ours": "arrow",
    "ours, one window": "arrow",
    "memcpy": "arrow",
    "plain Arrow IPC": "arrow",
    "HF datasets": "huggingface",
    "LitData": "litdata",
    "MosaicML Streaming": "mosaicml",
    "WebDataset": "webdataset",
}


def run() -> Result:
    """Samples a second."""
    found = in_turn({name: str(written(form)) for name, form in FORMATS.items()})
    setting = f"{SAMPLES} samples, batches of {BATCH}, in process, local folder"
    return result("loader_local", found, ("memcpy",), setting)
