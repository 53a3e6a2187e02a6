"""The encode job against a plain loop in one process that does the same work without its safety.

The loop reads, decodes, tokenizes, encodes with diffusers' own autoencoder and writes the same
rows. It finds no duplicates, writes no receipts and cannot resume. The peers are this loop with one
thread and with one thread a core. The same loop with our wrapper of the autoencoder is not a peer;
it shows how much of the ratio is due to the wrapper.

The loops encode only the first third of the images, which is enough to measure their rate. The job
encodes all of them, and its start-up is included, which is negligible for a real data set.
"""

import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange

from benchmarks.encoding import SIZE, Inputs
from benchmarks.timing import Result
from mdm import sources
from mdm.data.schema import Samples, sample_schema, to_bfloat16_bits, write_shard
from mdm.first_stage.autoencoder import Autoencoder, to_signed
from mdm.first_stage.folder import PATCH
from mdm.first_stage.image import decode_image
from mdm.first_stage.tokenizer import EOS
from mdm.preprocess import encode
from mdm.report.card import card_page
from mdm.sources.record import RawRecord
from mdm.storage import open_store

IMAGES = 12_000
LOOPED = 4000  # images that the plain loops encode
CHANNELS = (32, 64, 64)


class Plain:
    """diffusers' autoencoder, used as in its documentation."""

    def __init__(self, folder: Path) -> None:
        model: Any = AutoencoderKL
        self._model = model.from_pretrained(folder, low_cpu_mem_usage=False).eval()

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents [B, N, 4C] of pixels u8 [B, 3, H, W]; assumes mean 0 and deviation 1."""
        mean = self._model.encode(to_signed(pixels)).latent_dist.mode()
        patches: torch.Tensor = rearrange(
            mean, "b c (h p) (w q) -> b (h w) (p q c)", p=PATCH, q=PATCH
        )
        return patches


def loop(inputs: Inputs, out: Path, threads: int, kind: type[Plain] | None = Plain) -> float:
    """Images per second of the plain loop; if `kind` is None, it uses our wrapper."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    began = time.perf_counter()
    flags = inputs.flags(out)
    units = sources.get("imagenet").units(inputs.root, "train", unit_bytes=flags.unit_bytes)
    ours, tokenizer = Autoencoder.load(inputs.autoencoder), inputs.tokens()
    model = ours if kind is None else kind(inputs.autoencoder)
    schema = sample_schema(ours.grid, ours.latent_dim)
    store = open_store(str(out))
    parts: list[Samples] = []
    batch: list[tuple[RawRecord, np.ndarray]] = []

    def flush() -> None:
        if not batch:
            return
        latents = model.encode(torch.from_numpy(np.stack([p for _, p in batch])))
        parts.append(
            Samples(
                [r.id for r, _ in batch],
                [r.origin for r, _ in batch],
                np.array([r.label for r, _ in batch], np.int32),
                [np.array([*tokenizer.encode(r.text or ""), EOS], np.uint16) for r, _ in batch],
                np.zeros(len(batch), np.uint16),
                to_bfloat16_bits(latents.numpy().reshape(len(batch), -1)),
            )
        )
        batch.clear()

    def write() -> None:
        if parts:
            data, info = write_shard(Samples.concatenate(parts), schema, flags.batch_rows)
            store.put(info.key, data)
            parts.clear()

    records = (r for unit in units for r in sources.get("imagenet").read(unit))
    for record in islice(records, LOOPED):
        assert isinstance(record, RawRecord)
        assert record.image is not None
        batch.append((record, decode_image(record.image, SIZE)))
        if len(batch) == flags.encode_batch:
            flush()
            if sum(map(len, parts)) >= flags.shard_rows:
                write()
    flush()
    write()
    torch.set_num_threads(before)
    return LOOPED / (time.perf_counter() - began)


def run() -> Result:
    """Images per second, including the start of Ray and the survey for duplicates."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = Inputs(folder, IMAGES, CHANNELS)
        peers = {
            f"plain loop, {threads} thread{'s' * (threads > 1)}": loop(
                inputs, folder / f"loop{threads}", threads
            )
            for threads in sorted({1, cores})
        }
        wrapped = loop(inputs, folder / "wrapped", cores, None)
        summary = encode.run(inputs.flags(folder / "out"), card_page)
    stages = summary["stage_seconds"]
    useful = stages["decode"] + stages["encode"]
    return Result(
        "encode",
        "images/s",
        IMAGES / summary["seconds"],
        peers,
        f"{IMAGES} JPEGs of 320 x 256 to {SIZE} px, autoencoder of {CHANNELS}, {cores} cores, "
        "local folder, Ray's start and duplicate search included",
        lower_is_better=False,
        more={
            "share_not_decoding_or_encoding": 1 - useful / (cores * summary["seconds"]),
            "core_seconds": stages,
            "seconds": summary["seconds"],
            "plain loop with our wrapper, all threads": wrapped,
            "ratio_to_one_thread": IMAGES / summary["seconds"] / peers["plain loop, 1 thread"],
        },
    )
