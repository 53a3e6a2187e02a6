"""Our loader and four peers on a local folder: samples per second, CPU, first batch, resume.

Each makes a pass over 20,000 samples in random order, collated to torch tensors in batches of 64,
from files in the page cache. Ours also verifies every byte and computes ids, noise keys and the
order digest.
"""

from benchmarks.loader_samples import BATCH, SAMPLES
from benchmarks.loading import data_folder, in_turn, result
from benchmarks.timing import Result

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
    """Samples per second."""
    figures = in_turn({name: str(data_folder(form)) for name, form in FORMATS.items()})
    setting = f"{SAMPLES} samples, batches of {BATCH}, in process, local folder"
    return result("loader_local", figures, ("memcpy",), setting)
