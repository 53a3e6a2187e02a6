"""How much work a step is, and how fast and how evenly the ranks do it.

Floating-point operations are those of the decoder's blocks, the scan's products included, forward
and backward (three times forward, two a multiply-accumulate). Embeddings, the vocabulary, repeated
forwards of self-conditioning and recomputed activations do not count: MFU is of useful work.
"""

import resource
import time
from functools import lru_cache

import torch

from mdm.config import Config, ModelConfig
from mdm.data.batch import Batch
from mdm.model.count import trunk_macs
from mdm.model.sequence import Layout
from mdm.utils.ranks import World, exchange

# Dense bf16 peak of one device in 1e12 FLOP/s, by a part of its name; from the makers' data sheets.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
}


def peak_tflops(config: Config) -> float:
    """A rank's peak: as configured, or by the GPU's name; 0 where it is not known."""
    if config.train.peak_tflops or not torch.cuda.is_available():
        return config.train.peak_tflops
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)


@lru_cache(maxsize=64)
def step_flops(model: ModelConfig, text: int, images: int) -> int:
    """Floating-point operations of one sample's forward and backward."""
    return 3 * 2 * sum(trunk_macs(model, Layout.of(model, text, images).length))


class Throughput:
    """Work since the last line of metrics; every rank's share of a step has the same shape."""

    def __init__(self, config: Config, world: World) -> None:
        self._model, self._size = config.model, world.size
        self._peak = peak_tflops(config)
        self._clear()

    def _clear(self) -> None:
        self._tokens = self._images = self._flops = 0

    def add(self, batch: Batch) -> None:
        """Count one step: of packed texts, rows as this rank has them."""
        rows = batch.tokens.shape[0] * self._size
        text = batch.tokens.shape[1]
        image = 0 if batch.latents is None else batch.latents.shape[1]
        self._tokens += rows * (text + image)
        images = image // (self._model.image_height * self._model.image_width)
        self._images += rows * images
        self._flops += rows * step_flops(self._model, text, images)

    def rates(self, seconds: float) -> dict[str, float]:
        """Rates over the last `seconds`; then none. `mfu` only where the peak is known."""
        tflops = self._flops / seconds / self._size / 1e12
        found = {
            "tokens_per_second": self._tokens / seconds,
            "images_per_second": self._images / seconds,
            "tflops_per_rank": tflops,
        }
        if self._peak:
            found["mfu"] = tflops / self._peak
        self._clear()
        return found


class Ranks:
    """How evenly the ranks work: seconds that each was busy on its host, data, and memory.

    Ranks wait for each other within every step, so wall time cannot tell the slow ones; the
    processor time of the main thread can, and the time that it waited for data.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._busy, self._waited = time.thread_time(), 0.0

    def measure(self, waited: float) -> dict[str, float]:
        """Skew and memory since the last call, over all ranks; all must call.

        Args:
            waited: seconds that this rank has waited for data in all.
        """
        busy, now = time.thread_time() - self._busy, waited - self._waited
        self._busy, self._waited = time.thread_time(), waited
        cuda = self._device.type == "cuda"
        held = torch.cuda.max_memory_allocated(self._device) / 2**30 if cuda else 0.0
        # Linux counts ru_maxrss in KiB.
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows = exchange([busy + now, now, rss, held], self._device)
        spent = [row[0] for row in rows]
        mean = sum(spent) / len(spent)
        found = {
            "ranks/skew": max(spent) / mean - 1.0 if mean else 0.0,
            "ranks/slowest": float(spent.index(max(spent))),
            "ranks/longest_data_wait": max(row[1] for row in rows),
            "ranks/peak_rss_gib": max(row[2] for row in rows),
        }
        if cuda:
            found["ranks/peak_gpu_gib"] = max(row[3] for row in rows)
        return found
