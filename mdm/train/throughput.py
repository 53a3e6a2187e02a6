"""The work of a step, and how fast and how evenly the ranks do it.

Floating-point operations are those of the decoder's blocks with their scans, forward and backward
(three times forward, two for each multiply-accumulate). Embeddings, the vocabulary, repeated
forward passes of self-conditioning and recomputed activations do not count: MFU is that of useful
work.
"""

import resource
import time
from functools import lru_cache

import torch

from mdm.config import Config, ModelConfig
from mdm.data.batch import Batch
from mdm.model.count import trunk_macs
from mdm.model.sequence import Layout
from mdm.utils.gpu import peak_flops
from mdm.utils.ranks import World, exchange


@lru_cache(maxsize=64)
def step_flops(model: ModelConfig, text: int, images: int) -> int:
    """Floating-point operations of one sample's forward and backward."""
    return 3 * 2 * sum(trunk_macs(model, Layout.of(model, text, images).length))


class Throughput:
    """Work since the last line of metrics; all ranks' shares of a step have the same shape."""

    def __init__(self, config: Config, world: World) -> None:
        self._model, self._size = config.model, world.size
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self._peak = peak_flops(name, config.train.peak_tflops)  # of one rank
        self._tokens = self._images = self._flops = 0

    def add(self, batch: Batch) -> None:
        """Count one step with this rank's `batch`; packed rows count as if they were full."""
        rows, samples = (n * self._size for n in (len(batch.tokens), batch.average_over))
        samples = samples or rows
        text = batch.tokens.shape[1]
        image = 0 if batch.latents is None else batch.latents.shape[1]
        self._tokens += rows * (text + image)
        images = image // (self._model.image_height * self._model.image_width)
        self._images += samples * images
        self._flops += rows * step_flops(self._model, text, images)

    def rates(self, seconds: float) -> dict[str, float]:
        """Rates over the last `seconds`, and reset; `mfu` only if the GPU's peak is known."""
        flops = self._flops / seconds / self._size
        rates = {
            "tokens_per_second": self._tokens / seconds,
            "images_per_second": self._images / seconds,
            "tflops_per_rank": flops / 1e12,
        }
        if self._peak:
            rates["mfu"] = flops / self._peak
        self._tokens = self._images = self._flops = 0
        return rates


class Ranks:
    """How evenly the ranks work.

    Ranks wait for each other in every step, so wall time does not reveal a slow one. The processor
    time of its main thread does, and the time that it waits for data.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._busy, self._waited = time.thread_time(), 0.0

    def measure(self, waited: float) -> dict[str, float]:
        """Skew and memory since the last call, over all ranks; all must call.

        `waited` are the seconds in total that this rank has waited for data.
        """
        busy, now = time.thread_time() - self._busy, waited - self._waited
        self._busy, self._waited = time.thread_time(), waited
        cuda = self._device.type == "cuda"
        held = torch.cuda.max_memory_allocated(self._device) / 2**30 if cuda else 0.0
        # Linux counts ru_maxrss in KiB.
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows = exchange([busy + now, now, rss, held], self._device)
        spent, waits, peaks, held_by_gpu = zip(*rows, strict=True)
        mean = sum(spent) / len(spent)
        metrics = {
            "ranks/skew": max(spent) / mean - 1.0 if mean else 0.0,
            "ranks/slowest": float(spent.index(max(spent))),
            "ranks/longest_data_wait": max(waits),
            "ranks/peak_rss_gib": max(peaks),
        }
        if cuda:
            metrics["ranks/peak_gpu_gib"] = max(held_by_gpu)
        return metrics
