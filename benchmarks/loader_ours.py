"""Our loader, and what its parts cost alone: copying, and plain Arrow with the same check."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader_contestant import SEED, STEPS, Batches, Contestant, collate
from benchmarks.loader_samples import BATCH, CHANNELS, CLASSES, LENGTH, SAMPLES, VOCABULARY, samples


def write_ours(to: str) -> None:
    from mdm.data.manifest import CARD, Manifest, canonical, publish
    from mdm.data.manifest_parts import quarantine_parts, shard_parts
    from mdm.data.schema import Samples, sample_schema, write_shard
    from mdm.preprocess.encode import Flags
    from mdm.storage import open_store

    fields: dict[str, Any] = Flags.__dataclass_fields__
    batch_rows, shard_rows = (int(fields[f].default) for f in ("batch_rows", "shard_rows"))
    store, schema, shards = open_store(to), sample_schema((16, 16), CHANNELS), []
    all_samples = list(samples())
    for start in range(0, SAMPLES, shard_rows):
        rows = all_samples[start : start + shard_rows]
        examples = Samples(
            [f"record-{number}" for number, *_ in rows],
            [f"file-{number}" for number, *_ in rows],
            np.array([label for *_, label in rows], np.int32),
            [text for _, _, text, _ in rows],
            np.zeros(len(rows), np.uint16),
            np.stack([latent.reshape(-1) for _, latent, _, _ in rows]),
        )
        data, info = write_shard(examples, schema, batch_rows)
        store.put(info.key, data)
        shards.append(info)
    store.put(CARD, canonical({}))
    publish(
        store,
        Manifest(
            dataset="bench",
            split="train",
            recipe_hash="bench",
            tokenizer_sha256="bench",
            autoencoder_sha256="bench",
            image_grid=(16, 16),
            latent_dim=CHANNELS,
            vocab_size=VOCABULARY,
            class_names=tuple(map(str, range(CLASSES))),
            batch_rows=batch_rows,
            shards=shard_parts(shards, batch_rows),
            quarantine=quarantine_parts(),
            counts={"examples": SAMPLES, "quarantined": 0},
            card_sha256="bench",
        ),
    )


class Ours(Contestant):
    """Also computes ids, noise keys, epochs, prompts and the order digest; verifies every byte."""

    def __init__(self, at: str, scratch: Path, window: int = 0) -> None:
        import mdm.data.loader
        from mdm.config import DataConfig

        assert mdm.data.loader  # import it now, so that it is not part of the first batch
        self.at = at
        self.window = window or DataConfig().shuffle_window
        self.loader: Any = None
        self.middle: dict[str, Any] = {}  # the loader's state in the middle of a pass

    def _loader(self) -> Any:
        from mdm.data.loader import Loader
        from mdm.data.manifest import Manifest
        from mdm.data.mixture import Mixture, Source

        self.close()
        source = Source("bench", Manifest.load(self.at))
        mixture = Mixture((source,), global_batch=BATCH, shuffle_window=self.window)
        self.loader = Loader(mixture, SEED, caption_length=LENGTH, dialogue_length=LENGTH)
        return self.loader

    def _batches(self, rows: int) -> Batches:
        while rows > 0:
            batch = next(self.loader)
            if self.loader.step == STEPS // 2:
                self.middle = self.loader.state_dict()
            # A step may span two epochs; samples of the second one are not counted.
            yield batch.tokens[:rows], batch.latents[:rows]
            rows -= BATCH

    def open(self, number: int) -> Batches:
        self._loader()
        return self._batches(SAMPLES)

    def resume(self) -> Batches:
        loader = self._loader()
        loader.load_state_dict(self.middle)
        return self._batches(BATCH)

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()


# ---- floors


class Memcpy(Contestant):
    """Copies rows of an array in memory into a batch."""

    def __init__(self, at: str, scratch: Path) -> None:
        all_samples = list(samples())
        self.latents = np.stack([latent for _, latent, _, _ in all_samples])
        self.tokens = np.zeros((SAMPLES, LENGTH), np.int64)
        for number, _, text, _ in all_samples:
            self.tokens[number, : len(text)] = text

    def open(self, number: int) -> Batches:
        order = np.random.default_rng(number).permutation(SAMPLES)
        for start in range(0, SAMPLES, BATCH):
            rows = order[start : start + BATCH]
            yield (
                torch.from_numpy(self.tokens[rows]),
                torch.from_numpy(self.latents[rows].view(np.int16)),
            )


class PlainIpc(Contestant):
    """Record batches in random order, rows shuffled over four of them; xxh3 checked."""

    def __init__(self, at: str, scratch: Path) -> None:
        from mdm.data.manifest import Manifest

        self.manifest = Manifest.load(at)

    def open(self, number: int) -> Batches:
        import xxhash

        from mdm.data.schema import RecordBatch

        store, random = self.manifest.store(), np.random.default_rng(number)
        places = list(self.manifest.batches())
        order = random.permutation(len(places))
        pending: list[dict[str, Any]] = []
        for start in range(0, len(order), 4):
            window = []
            for at in order[start : start + 4]:
                shard, _, info = places[at]
                data = store.read_range(self.manifest.shards[shard].key, info.offset, info.length)
                if xxhash.xxh3_64_hexdigest(data) != info.xxh3:
                    raise RuntimeError("damaged")
                rows = RecordBatch(data, self.manifest.schema)
                assert rows.latents is not None
                latents = rows.latents.view(np.int16)
                window += [
                    {"tokens": rows.text(i), "latents": latents[i], "class_id": rows.class_ids[i]}
                    for i in range(len(rows))
                ]
            pending += [window[i] for i in random.permutation(len(window))]
            while len(pending) >= BATCH:
                yield collate(pending[:BATCH])
                del pending[:BATCH]
        if pending:
            yield collate(pending)
