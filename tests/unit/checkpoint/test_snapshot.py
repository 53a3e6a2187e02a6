"""m ranks read what n ranks wrote: each number in its place, each byte checked."""

import pytest
import torch

from mdm.checkpoint import snapshot
from mdm.checkpoint.snapshot import (
    DamagedError,
    Piece,
    Snapshot,
    fetch,
    overlaps,
    read_whole,
    within,
)
from mdm.storage import open_store

FULL = {"a": torch.randn(13), "b": torch.randn(4, 5), "c": torch.randn(1), "d": torch.randn(70)}
SHAPES = {name: list(value.shape) for name, value in FULL.items()}


def zero3(world: int, rank: int) -> tuple[list[Piece], list[torch.Tensor]]:
    """A rank's equal part of each parameter, padded with nines."""
    pieces, flats, at = [], [], 0
    for name, value in FULL.items():
        n = -(-value.numel() // world)
        start = min(rank * n, value.numel())
        length = min(n, value.numel() - start)
        flat = torch.full((n,), 9.0)
        flat[:length] = value.flatten()[start : start + length]
        pieces += [Piece(name, start, length, at)] if length else []
        flats.append(flat)
        at += n
    return pieces, flats


def zero2(world: int, rank: int) -> tuple[list[Piece], list[torch.Tensor]]:
    """A rank's equal part of all parameters laid end to end."""
    whole = torch.cat([value.flatten() for value in FULL.values()])
    size = -(-len(whole) // world)
    pieces, offset = [], 0
    for name, value in FULL.items():
        first, last = max(offset, rank * size), min(offset + value.numel(), (rank + 1) * size)
        if first < last:
            pieces.append(Piece(name, first - offset, last - first, first - rank * size))
        offset += value.numel()
    padded = torch.nn.functional.pad(whole, (0, size * world - len(whole)), value=9.0)
    return pieces, [padded[rank * size : (rank + 1) * size]]


def write_shares(store, layout, world: int) -> dict:
    files = {}
    for rank in range(world):
        pieces, flats = layout(world, rank)
        live = {"weights": flats, "ema": [2 * flat for flat in flats]}
        share = Snapshot(live, pieces)
        share.take(live)
        files |= share.write(store, "step", rank)
    return files


@pytest.mark.parametrize("layout", [zero2, zero3])
@pytest.mark.parametrize("before", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_what_any_other_number_wrote(
    tmp_path, monkeypatch, before, layout
):
    monkeypatch.setattr(snapshot, "PART", 7)
    store = open_store(str(tmp_path))
    files = write_shares(store, layout, before)
    for after in (1, 2, 3, 4, 7):
        for other in (zero2, zero3):
            for rank in range(after):
                pieces, flats = other(after, rank)
                share = Snapshot({"weights": flats, "ema": flats}, pieces)
                share.read(store, "step", before, files)
                expected = torch.zeros(share.length)
                for name, start, length, offset in pieces:
                    part = FULL[name].flatten()[start : start + length]
                    expected[offset : offset + length] = part
                assert torch.equal(share.host["weights"], expected)
                assert torch.equal(share.host["ema"], 2 * expected)
    whole = read_whole(store, "step", before, files, "weights", SHAPES)
    assert all(torch.equal(whole[name], FULL[name]) for name in FULL)


def test_a_snapshot_is_a_copy_that_restores_the_live_tensors(tmp_path):
    pieces, flats = zero3(2, 0)
    before = [flat.clone() for flat in flats]
    share = Snapshot({"weights": flats}, pieces)
    share.take({"weights": flats})
    for flat in flats:
        flat.zero_()
    share.give({"weights": flats})
    assert all(torch.equal(a, b) for a, b in zip(flats, before, strict=True))
    assert share.nbytes == 4 * sum(flat.numel() for flat in flats)


def test_a_parameter_that_no_rank_wrote_is_an_error(tmp_path):
    store = open_store(str(tmp_path))
    files = write_shares(store, zero3, 2)
    share = Snapshot({"weights": [torch.empty(3)]}, [Piece("unknown", 0, 3, 0)])
    with pytest.raises(KeyError, match="holds 0 of the 3 numbers"):
        share.read(store, "step", 2, files)


def test_a_damaged_object_is_named_with_its_damage(tmp_path):
    store = open_store(str(tmp_path))
    files = write_shares(store, zero3, 1)
    key = "step/rank-00000/ema.0000"
    data = store.get(key)
    pieces, flats = zero3(1, 0)
    share = Snapshot({"weights": flats, "ema": flats}, pieces)
    for damaged, words in (
        (data[:-1], f"{key} has {len(data) - 1} bytes instead of {len(data)}"),
        (bytes([data[0] ^ 1]) + data[1:], f"{key} has changed since it was committed"),
    ):
        store.put(key, damaged)
        with pytest.raises(DamagedError, match=words):
            share.read(store, "step", 1, files)
    store.delete(key)
    with pytest.raises(DamagedError, match=f"{key} is missing"):
        fetch(store, key, files[key])


def test_copies_cover_the_overlap_of_two_shares_and_can_be_cut():
    copies = overlaps([Piece("a", 4, 6, 10)], [Piece("a", 0, 6, 0), Piece("a", 8, 9, 20)])
    assert copies == [(10, 4, 2), (14, 20, 2)]
    assert within(copies, 8, 11) == [(2, 4, 1)]
    assert within(copies, 11, 20) == [(0, 5, 1), (3, 20, 2)]
