"""Rows of record batches into batches, the steps at hand together.

First all are read, then decoded, then copied, each latent once: what is done for many in a row
finds its code in the processor's caches, and what costs by the call is paid once for several steps.

Shapes: S samples of some steps, one after the other; B of them of one step and rank; R rows of a
record batch; N image tokens, C numbers a latent; M text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdm.config import ModelConfig
from mdm.data import packing
from mdm.data.batch import Batch, sample_keys
from mdm.data.manifest_parts import starts
from mdm.data.mixture import Mixture
from mdm.data.order import Draw, layout_of
from mdm.data.reader import Pending, RowCache, keys_of
from mdm.data.text import fit_all
from mdm.first_stage.tokenizer import PAD
from mdm.storage.buffers import BUFFERS
from mdm.utils.ranks import World


@dataclass(frozen=True)
class Plan:
    """A step whose record batches have been asked for."""

    draw: Draw  # of all ranks
    share: Draw  # B samples: what this rank reads
    keys: NDArray[np.int64]  # [B] the record batch of each
    rows: NDArray[np.int64]  # [B] its row there
    pending: dict[int, Pending]  # by key

    @property
    def is_ready(self) -> bool:
        """Whether nothing has to be waited for."""
        return all(pending.run.done() for pending in self.pending.values())


class _Columns(NamedTuple):
    """What the rows hold, in the order of the samples."""

    tokens: NDArray[np.int64]  # [S, M]
    prompts: NDArray[np.int64]  # [S] tokens
    class_ids: NDArray[np.int64]  # [S]
    latents: Tensor | None  # bf16 [S, N, C]


class Collator:
    """Makes one rank's batches of what the ranks draw; `lengths` are M of each task."""

    def __init__(
        self,
        mixture: Mixture,
        cache: RowCache,
        lengths: dict[str, int],
        world: World,
        model: ModelConfig | None = None,
    ) -> None:
        self.world, self._model = world, model
        self._lengths = lengths
        self._cache = cache
        self._layouts = [layout_of(s) for s in mixture.sources]
        self._rows = mixture.global_batch
        self._packs = mixture.texts_per_row > 1

    def ask(self, draw: Draw) -> Plan:
        """What this rank reads of a draw; the reading begins."""
        # Which rank has a packed text is decided by the lengths of all: every rank reads them.
        share = draw if self._is_packed(draw) else draw.share(self.world)
        if len(self._layouts) == 1:
            shards, batches, rows = self._layouts[0].locate(share.rows)
        else:
            shards, batches, rows = (np.empty_like(share.rows) for _ in range(3))
            for source in np.flatnonzero(np.bincount(share.sources)).tolist():
                at = share.sources == source
                shards[at], batches[at], rows[at] = self._layouts[source].locate(share.rows[at])
        keys = keys_of(share.sources, shards, batches)
        return Plan(draw, share, keys, rows, self._cache.ask(dict.fromkeys(keys.tolist())))

    def collate(self, plans: Sequence[Plan]) -> list[Batch]:
        """This rank's batch of each of these steps.

        Raises:
            StoreError: its data cannot be read.
            ValueError: a batch does not fit the model, with both values.
        """
        made: dict[int, Batch] = {}
        for task in dict.fromkeys(plan.draw.task for plan in plans):
            places = [at for at, plan in enumerate(plans) if plan.draw.task == task]
            own = [plans[at] for at in places]
            columns = self._columns(own, self._lengths[task])
            if self._is_packed(own[0].draw):
                batches = self._packed(own, columns)
            else:
                batches = _batches(own, columns)
            if self._model is not None:  # here, on the CPU: a step must not wait for its GPU
                for batch in batches:
                    batch.check(self._model)
            made.update(zip(places, batches, strict=True))
        return [made[at] for at in range(len(plans))]

    def _is_packed(self, draw: Draw) -> bool:
        return self._packs and draw.task == "text"

    def _columns(self, plans: Sequence[Plan], length: int) -> _Columns:
        keys = np.concatenate([plan.keys for plan in plans])
        rows = np.concatenate([plan.rows for plan in plans])
        pending = {key: asked for plan in plans for key, asked in plan.pending.items()}
        needed, which = np.unique(keys, return_inverse=True)
        held = [self._cache.wait(pending[key]) for key in needed.tolist()]
        # Of all rows that are held, one record batch after the other: where each is, and its text.
        at = starts([len(found) for found in held])[which] + rows
        text = starts([len(found.tokens) for found in held])[which]
        tokens, prompts = fit_all(
            np.concatenate([found.tokens for found in held]),
            text + np.concatenate([found.offsets[:-1] for found in held])[at],
            text + np.concatenate([found.offsets[1:] for found in held])[at],
            np.concatenate([found.prompt_lengths for found in held])[at].astype(np.int64),
            length,
        )
        class_ids = np.concatenate([found.class_ids for found in held])[at].astype(np.int64)
        images = [found.latents for found in held if found.latents is not None]
        latents = _gathered(images, which, rows) if images else None
        return _Columns(tokens, prompts, class_ids, latents)

    def _packed(self, plans: Sequence[Plan], columns: _Columns) -> list[Batch]:
        """This rank's rows of each step's packed texts."""
        made, start = [], 0
        for plan in plans:
            own = slice(start, start + len(plan.share.ids))
            made.append(self._pack(plan.draw, *(column[own] for column in columns[:3])))
            start = own.stop
        return made

    def _pack(
        self,
        draw: Draw,
        tokens: NDArray[np.int64],
        prompts: NDArray[np.int64],
        class_ids: NDArray[np.int64],
    ) -> Batch:
        lengths = (tokens != PAD).sum(1).tolist()
        packs = packing.plan(lengths, tokens.shape[1], self._rows)
        own = packing.share(packs, self.world.rank, self.world.size)
        texts = [text[:length] for text, length in zip(tokens, lengths, strict=True)]
        packed = packing.fill(own, texts, prompts.tolist(), tokens.shape[1])
        places = np.array([place for pack in own for place in pack], np.int64)
        mine = draw.take(places)
        return Batch(
            ids=tuple(mine.ids),
            keys=sample_keys(mine.ids),
            epochs=torch.from_numpy(mine.epochs),
            class_ids=torch.from_numpy(class_ids[places]),
            tokens=torch.from_numpy(packed.tokens),
            prompt=torch.from_numpy(packed.prompt),
            latents=None,
            text_of=torch.from_numpy(packed.text_of),
            average_over=len(draw.ids) // self.world.size,
        )


def _gathered(
    parts: list[NDArray[np.uint16]], which: NDArray[np.int64], rows: NDArray[np.int64]
) -> Tensor:
    """bf16 [S, N, C]: row `rows[i]` of part `which[i]`, each [R, N, C], copied once."""
    size = parts[0][0].nbytes
    views = [part.reshape(-1).data.cast("B") for part in parts]
    gathered = BUFFERS.take(size * len(rows))
    to, start = gathered.data, 0
    # In the order of the samples, which beats numpy's scattering of each part.
    for part, row in zip(which.tolist(), rows.tolist(), strict=True):
        to[start : start + size] = views[part][row * size : (row + 1) * size]
        start += size
    return torch.from_numpy(gathered).view(torch.bfloat16).view(-1, *parts[0].shape[1:])


def _batches(plans: Sequence[Plan], columns: _Columns) -> list[Batch]:
    """Each step's slice of the columns."""
    tokens, prompts, class_ids, latents = columns
    ids = [tuple(plan.share.ids) for plan in plans]
    sizes = [len(some) for some in ids]
    parts = zip(
        ids,
        sample_keys([i for some in ids for i in some]).split(sizes),
        torch.from_numpy(np.concatenate([plan.share.epochs for plan in plans])).split(sizes),
        torch.from_numpy(class_ids).split(sizes),
        torch.from_numpy(tokens).split(sizes),
        torch.from_numpy(np.arange(tokens.shape[1]) < prompts[:, None]).split(sizes),
        [None] * len(plans) if latents is None else latents.split(sizes),
        strict=True,
    )
    return [
        Batch(
            ids=some,
            keys=keys,
            epochs=epochs,
            class_ids=classes,
            tokens=texts,
            prompt=prompt,
            latents=images,
        )
        for some, keys, epochs, classes, texts, prompt, images in parts
    ]
