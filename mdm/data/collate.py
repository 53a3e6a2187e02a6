"""Collates rows of record batches into training batches, several ready steps at a time.

All record batches are read, then decoded, then copied, each latent once: doing one kind of work
many times in a row keeps its code in the processor's caches, and costs per call are paid once for
several steps.

Shapes: S samples of several steps, one step after the other; B samples of one step and rank; R rows
of a record batch; N image tokens, C latent width; M text tokens.
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
from mdm.data.reader import Pending, RecordBatchCache, keys_of
from mdm.data.text import fit_all
from mdm.first_stage.tokenizer import PAD
from mdm.storage import buffers
from mdm.utils.ranks import World


@dataclass(frozen=True)
class Plan:
    """A step whose record batches have been requested."""

    draw: Draw  # of all ranks
    share: Draw  # B samples: what this rank reads
    keys: NDArray[np.int64]  # [B] the record batch of each
    rows: NDArray[np.int64]  # [B] its row there
    pending: dict[int, Pending]  # by key

    @property
    def is_ready(self) -> bool:
        """Whether all its data has arrived."""
        return all(pending.done() for pending in self.pending.values())


class _Columns(NamedTuple):
    """The contents of the rows, in the order of the samples."""

    tokens: NDArray[np.int64]  # [S, M]
    prompt: NDArray[np.bool_]  # [S, M]
    class_ids: NDArray[np.int64]  # [S]
    which: NDArray[np.int64]  # [S] the record batch, of those at hand
    rows: NDArray[np.int64]  # [S] the row there

    def of(self, at: slice) -> "_Columns":
        """The contents of consecutive samples, as views."""
        tokens, prompt, *others = self
        return _Columns(tokens[at], prompt[at], *(column[at] for column in others))


class _Share(NamedTuple):
    """What this rank holds of a step, but for its latents; see `Batch`."""

    draw: Draw  # B samples
    columns: _Columns  # of B samples; tokens and prompt of R rows
    text_of: NDArray[np.int64] | None
    average_over: int


class Collator:
    """Builds one rank's batches from the draws of all ranks, and validates them on the CPU.

    Args:
        mixture: the data sets.
        cache: holds their record batches.
        lengths: M of each task.
        world: this rank and the number of ranks.
        model: what every batch must fit; None skips the validation.
    """

    def __init__(
        self,
        mixture: Mixture,
        cache: RecordBatchCache,
        lengths: dict[str, int],
        world: World,
        model: ModelConfig | None = None,
    ) -> None:
        self.world, self._model = world, model
        self._lengths = lengths
        self._cache = cache
        self._layouts = [layout_of(s) for s in mixture.sources]
        self._mixture = mixture

    def request(self, draw: Draw) -> Plan:
        """What this rank reads of a draw; starts reading it."""
        # Which rank gets a packed sample depends on the lengths of all: every rank reads them.
        share = draw if self._is_packed(draw.task) else draw.share(self.world)
        shards, batches, rows = (np.empty_like(share.rows) for _ in range(3))
        for source in np.flatnonzero(np.bincount(share.sources)).tolist():
            at = share.sources == source
            shards[at], batches[at], rows[at] = self._layouts[source].locate(share.rows[at])
        keys = keys_of(share.sources, shards, batches)
        return Plan(draw, share, keys, rows, self._cache.request(dict.fromkeys(keys.tolist())))

    def collate(self, plans: Sequence[Plan]) -> list[Batch]:
        """This rank's batch of each of these steps.

        Raises:
            StoreError: its data cannot be read.
            ValueError: a batch does not fit the model; the message names the sample and the values.
        """
        by_place: dict[int, Batch] = {}
        for task in dict.fromkeys(plan.draw.task for plan in plans):
            of_task = {at: plan for at, plan in enumerate(plans) if plan.draw.task == task}
            batches = self._collate(task, list(of_task.values()))
            by_place |= dict(zip(of_task, batches, strict=True))
        return [by_place[at] for at in range(len(plans))]

    def _is_packed(self, task: str) -> bool:
        return self._mixture.per_row(task) > 1

    def _collate(self, task: str, plans: Sequence[Plan]) -> list[Batch]:
        """This rank's batch of each of these steps of one task."""
        columns, images = self._columns(plans, self._lengths[task])
        ends = np.cumsum([len(plan.share.ids) for plan in plans]).tolist()
        of_plans = zip(plans, [0, *ends[:-1]], ends, strict=True)
        shares = [self._share(plan, columns.of(slice(at, end))) for plan, at, end in of_plans]
        latents: Sequence[Tensor | None] = [None] * len(shares)
        if images:
            held = [share.columns for share in shares]
            which, rows = (np.concatenate([getattr(c, n) for c in held]) for n in ("which", "rows"))
            gathered = _gathered(images, which, rows)
            latents = gathered.split([len(share.draw.ids) for share in shares])
        return [self._batch(share, own) for share, own in zip(shares, latents, strict=True)]

    def _columns(
        self, plans: Sequence[Plan], length: int
    ) -> tuple[_Columns, list[NDArray[np.uint16]]]:
        """The contents of all that these plans read, and the latents of their record batches."""
        keys = np.concatenate([plan.keys for plan in plans])
        rows = np.concatenate([plan.rows for plan in plans])
        pending = {key: p for plan in plans for key, p in plan.pending.items()}
        needed, which = np.unique(keys, return_inverse=True)
        held = [self._cache.wait(pending[key]) for key in needed.tolist()]
        # In the concatenation of these record batches: where each row is, and where its text is.
        at = starts([len(batch) for batch in held])[which] + rows
        text = starts([len(batch.tokens) for batch in held])[which]
        tokens, prompts = fit_all(
            np.concatenate([batch.tokens for batch in held]),
            text + np.concatenate([batch.offsets[:-1] for batch in held])[at],
            text + np.concatenate([batch.offsets[1:] for batch in held])[at],
            np.concatenate([batch.prompt_lengths for batch in held])[at].astype(np.int64),
            length,
        )
        class_ids = np.concatenate([batch.class_ids for batch in held])[at].astype(np.int64)
        images = [batch.latents for batch in held if batch.latents is not None]
        prompt = np.arange(length) < prompts[:, None]
        return _Columns(tokens, prompt, class_ids, which.astype(np.int64), rows), images

    def _share(self, plan: Plan, columns: _Columns) -> _Share:
        """This rank's part of a step, given the contents of all that its plan reads."""
        if not self._is_packed(plan.draw.task):
            return _Share(plan.share, columns, None, 0)
        lengths, length = (columns.tokens != PAD).sum(1).tolist(), columns.tokens.shape[1]
        grid = self._mixture.image_grid if plan.draw.task == "image_text" else None
        packs = packing.plan(lengths, length, self._mixture.global_batch, packing.beside(grid))
        packs = packing.share(packs, self.world.rank, self.world.size)
        texts = [text[:size] for text, size in zip(columns.tokens, lengths, strict=True)]
        rows = packing.fill(packs, texts, columns.prompt.sum(1).tolist(), length)
        tokens, prompt, text_of = rows
        own = np.array([place for pack in packs for place in pack], np.int64)
        per_sample = (column[own] for column in columns[2:])
        own_columns = _Columns(tokens, prompt, *per_sample)
        average_over = len(plan.share.ids) // self.world.size
        return _Share(plan.share.take(own), own_columns, text_of, average_over)

    def _batch(self, share: _Share, latents: Tensor | None) -> Batch:
        draw, columns, text_of, average_over = share
        batch = Batch(
            ids=tuple(draw.ids),
            keys=sample_keys(draw.ids),
            epochs=torch.from_numpy(draw.epochs.copy()),
            class_ids=torch.from_numpy(columns.class_ids),
            tokens=torch.from_numpy(columns.tokens),
            prompt=torch.from_numpy(columns.prompt),
            latents=latents,
            text_of=None if text_of is None else torch.from_numpy(text_of),
            average_over=average_over,
        )
        if self._model is not None:
            batch.check(self._model)
        return batch


def _gathered(
    parts: list[NDArray[np.uint16]], which: NDArray[np.int64], rows: NDArray[np.int64]
) -> Tensor:
    """bf16 [S, N, C]: row `rows[i]` of part `which[i]`, each [R, N, C], copied once."""
    size = parts[0][0].nbytes
    views = [part.reshape(-1).data.cast("B") for part in parts]
    gathered = buffers.take(size * len(rows))
    to, start = gathered.data, 0
    # In the order of the samples, which is faster than letting numpy scatter each part.
    for part, row in zip(which.tolist(), rows.tolist(), strict=True):
        to[start : start + size] = views[part][row * size : (row + 1) * size]
        start += size
    return torch.from_numpy(gathered).view(torch.bfloat16).view(-1, *parts[0].shape[1:])
