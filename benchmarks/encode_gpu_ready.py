"""Does a fast encoder have to wait for data? A fake encoder sleeps as long as a GPU would compute.

A batch takes `LOAD` times as long as all cores together need to decode it. Decoding can therefore
keep up, and the benchmark shows whether the job stages around it do. The encoder is idle whenever
it does not sleep, between its first batch and its last.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import ray
import torch

from benchmarks.encoding import Inputs
from benchmarks.timing import Result
from mdm import sources
from mdm.preprocess import ray_executor
from mdm.preprocess.encoding import Chunk, decode_group, encode_chunk
from mdm.preprocess.ray_executor import GroupEncoder, Place
from mdm.preprocess.recipe import Recipe
from mdm.preprocess.survey import Group, plan
from mdm.sources.record import Unit
from mdm.storage import StoreOptions

IMAGES = 6000
LOAD = 1.6  # encoder seconds for each second of decoding on all cores


class SleepingNetwork:
    """Stands in for the network: returns zeros after a delay."""

    def __init__(self, recipe: Recipe, seconds: float) -> None:
        assert recipe.image_grid is not None
        self._shape = (recipe.image_grid[0] * recipe.image_grid[1], recipe.latent_dim)
        self._seconds = seconds

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(self._seconds)
        return torch.zeros(len(pixels), *self._shape)


class FakeEncoder:
    """The encoder actor with the sleeping network; it records when it was busy."""

    def __init__(self, recipe: Recipe, seconds: float) -> None:
        self._recipe = recipe
        self._network = SleepingNetwork(recipe, seconds)
        self._times: list[tuple[float, float, int]] = []  # begin, end, images

    def encode(self, chunk: Chunk) -> Chunk:
        images = 0 if chunk.pixels is None else len(chunk.pixels)
        began = time.perf_counter()
        encoded = encode_chunk(chunk, self._recipe, cast(Any, self._network))
        if images:
            self._times.append((began, time.perf_counter(), images))
        return encoded

    def busy(self) -> float:
        return sum(end - begin for begin, end, _ in self._times)

    def times(self) -> list[tuple[float, float, int]]:
        return self._times


def decode_seconds(inputs: Inputs, recipe: Recipe, units: list[Unit], chunks: int = 6) -> float:
    """Median seconds that one core needs to decode a batch."""
    group = Group(0, tuple(units), tuple({} for _ in units))
    times, began = [], time.perf_counter()
    for number, _ in enumerate(decode_group(group, recipe, inputs.tokens())):
        now = time.perf_counter()
        times.append(now - began)
        began = now
        if number == chunks:
            break
    return sorted(times)[len(times) // 2]


def run() -> Result:
    """The encoder's idle share; the peer is a loop that decodes and encodes in turn."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = Inputs(folder, IMAGES, (8, 8, 8))
        units = sources.get("imagenet").units(inputs.root, "train", unit_bytes=4 << 20)
        recipe = inputs.recipe(units)
        decode = decode_seconds(inputs, recipe, units)
        seconds = LOAD * decode / cores
        groups = plan(units, [IMAGES // len(units)] * len(units), [{}] * len(units), 512)
        place = Place(str(folder / "out"), StoreOptions(), str(inputs.tokenizer), "")
        with ray_executor.cluster():
            fake: Any = ray.remote(num_cpus=0)(FakeEncoder).remote(recipe, seconds)
            encoder = GroupEncoder(recipe, place, cores, lambda: fake)
            for _ in encoder.run(groups, IMAGES, lambda _: None):
                pass
            times = ray.get(fake.times.remote())
    # Leave out the first batches, which wait for the decoders to start.
    times = times[4:]
    span = times[-1][1] - times[0][0]
    asleep = seconds * len(times)
    full = sum(images for *_, images in times) / (recipe.encode_batch * len(times))
    return Result(
        "encode_gpu_ready",
        "idle share",
        max(1e-3, 1 - asleep / span),
        {"decode, then encode, in one loop": decode / (decode + seconds)},
        f"batches of {recipe.encode_batch} take {1e3 * seconds:.0f} ms, {LOAD} times as long as "
        f"{cores} cores need to decode them",
        more={
            "batches": len(times),
            "batches_filled": full,
            "decode_ms_a_batch_and_core": 1e3 * decode,
            "encoder_ms_a_batch": 1e3 * seconds,
        },
    )
