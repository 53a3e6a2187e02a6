import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mdm.config import Config, DataConfig, ModelConfig, SourceConfig
from mdm.data.batch import Batch, sample_keys
from mdm.data.loader import Loader, build_loader
from mdm.data.mixture import Mixture, Source, open_mixture
from mdm.data.order import SampleOrder, layout_of, sample_ids
from mdm.data.reader import SourceReader
from mdm.data.resume import ResumeError
from mdm.data.schema import from_bfloat16_bits
from mdm.data.text import fit
from mdm.first_stage.tokenizer import EOS, PAD
from mdm.storage import LocalStore, StoreError, join
from mdm.utils.ranks import World
from tests.data_sets import encoded, samples

LENGTHS = {"caption_length": 8, "dialogue_length": 10}
DATA = DataConfig(
    sources=(SourceConfig("images", 0.75), SourceConfig("talk", 0.25)),
    global_batch=24,
    shuffle_window=2,
)


def write(root: str) -> Mixture:
    encoded(join(root, "images"), [50, 21])
    encoded(join(root, "talk"), [40], images=False)
    return open_mixture(DataConfig(root, DATA.sources, 24, 2))


@pytest.fixture
def mixture(uri: str) -> Mixture:
    return write(uri)


@pytest.fixture
def local(tmp_path: Path) -> Mixture:
    return write(str(tmp_path))


def take(loader: Loader, n: int) -> list[Batch]:
    return [next(loader) for _ in range(n)]


def same(one: Batch, other: Batch) -> bool:
    return one.ids == other.ids and all(
        torch.equal(getattr(one, k), getattr(other, k))
        for k in ("keys", "epochs", "class_ids", "tokens", "prompt")
    )


def test_batches_hold_the_samples_of_the_order_bit_for_bit(mixture: Mixture) -> None:
    shards = {"images": [samples(50), samples(21, seed=1)], "talk": [samples(40)]}
    with Loader(mixture, 7, **LENGTHS) as loader:
        batches = take(loader, 12)
    assert {b.task for b in batches} == {"image_text", "text"}
    for step, batch in enumerate(batches):
        assert list(batch.ids) == sample_ids(mixture, 7, step, World())
        assert batch.tokens.shape == (24, 8 if batch.task == "image_text" else 10)
        for i, sample in enumerate(batch.ids):
            name, _, row = sample.partition(":")
            part, at = (0, int(row)) if int(row) < len(shards[name][0]) else (1, int(row) - 50)
            true = shards[name][part]
            length = batch.tokens.shape[1]
            text, _ = fit(true.tokens[at], 0, length)
            padded = [*text.tolist(), *[PAD] * (length - len(text))]
            assert batch.tokens[i].tolist() == padded
            assert batch.class_ids[i] == true.class_ids[at]
            assert batch.keys[i] == sample_keys([sample])
            if batch.latents is not None:
                assert batch.latents.dtype == torch.bfloat16
                moved = batch.to("cpu").latents
                assert moved is not None
                expected = from_bfloat16_bits(true.latents[at]).reshape(4, 16)
                assert expected.dtype == np.float32
                assert moved.dtype == torch.float32
                assert np.array_equal(moved[i].numpy(), expected)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 8), (8, 1)])
def test_resume_with_another_number_of_ranks_continues_exactly(
    local: Mixture, before: int, after: int
) -> None:
    def world(size: int) -> list[Loader]:
        return [Loader(local, 7, World(rank=r, size=size), **LENGTHS) for r in range(size)]

    with Loader(local, 7, **LENGTHS) as alone:
        expected = take(alone, 11)
        final = alone.state_dict()
    first = world(before)
    seen = [[next(loader) for loader in first] for _ in range(5)]
    states = [json.dumps(loader.state_dict()) for loader in first]
    assert len(set(states)) == 1  # the same on every rank, prefetched batches not counted
    second = world(after)
    for loader in second:
        loader.load_state_dict(json.loads(states[0]))
    seen += [[next(loader) for loader in second] for _ in range(6)]
    for parts, batch in zip(seen, expected, strict=True):
        assert [i for p in parts for i in p.ids] == list(batch.ids)
        assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)
        if batch.latents is not None:
            assert torch.equal(torch.cat([p.latents for p in parts]), batch.latents)
    assert [loader.state_dict() for loader in second] == [final] * after
    for loader in first + second:
        loader.close()


def test_steps_collated_together_equal_those_collated_alone(local: Mixture) -> None:
    with Loader(local, 7, World(1, 2), **LENGTHS) as loader:
        alone = [loader.collator.collate([loader.plan(step)])[0] for step in range(12)]
        together = loader.collator.collate([loader.plan(step) for step in range(12)])
    assert len({batch.task for batch in alone}) == 2
    for one, other in zip(alone, together, strict=True):
        assert same(one, other)
        assert (one.latents is None) == (other.latents is None)
        assert one.latents is None or torch.equal(one.latents, other.latents)


def test_a_running_loader_can_return_to_an_earlier_state(local: Mixture) -> None:
    with Loader(local, 7, **LENGTHS) as loader:
        take(loader, 3)
        state = loader.state_dict()
        expected = take(loader, 4)
        loader.load_state_dict(state)
        again = take(loader, 4)
    assert all(same(a, b) for a, b in zip(expected, again, strict=True))


def test_a_state_of_other_data_is_refused_with_both_values(local: Mixture) -> None:
    with Loader(local, 7, **LENGTHS) as loader, Loader(local, 8, **LENGTHS) as other:
        with pytest.raises(ResumeError, match=r"seed 7, this run has 8"):
            other.load_state_dict(loader.state_dict())
        next(loader)  # data that was not consumed yet may change
        state = loader.state_dict()
        state["manifests"] |= {"talk": "0123"}
        sha256 = local.sources[1].manifest.sha256
        with pytest.raises(ResumeError, match=rf"(?s)0123.*{sha256}"):
            loader.load_state_dict(state)


def flip(mixture: Mixture, shard: int, batch: int) -> str:
    """Flip one bit in the middle of a record batch on disk; the shard's key."""
    manifest = mixture.sources[0].manifest
    info = manifest.shards[shard]
    path = Path(manifest.location, info.key)
    data = bytearray(path.read_bytes())
    data[info.batches[batch].offset + info.batches[batch].length // 2] ^= 0x10
    path.write_bytes(data)
    return info.key


def test_a_flipped_bit_never_reaches_a_batch(local: Mixture) -> None:
    key = flip(local, 0, 1)
    expected = local.sources[0].manifest.shards[0].batches[1].xxh3
    used = []
    order, layout = SampleOrder(local, 7), layout_of(local.sources[0])
    for step in range(20):
        draw = order.draw(step)
        shards, batches, _ = layout.locate(draw.rows[draw.sources == 0])
        used.append((0, 1) in zip(shards.tolist(), batches.tolist(), strict=True))
    good = used.index(True)
    assert good  # the batches collated together with it are returned
    with Loader(local, 7, **LENGTHS) as loader:
        take(loader, good)
        with pytest.raises(StoreError, match=rf"record batch 1 of .*{key}.*{expected}"):
            next(loader)


class FlipsOnce(LocalStore):
    """A real store behind a network that flips a bit of the first answer."""

    reads = 0

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        data = bytearray(super().read_range(key, offset, length))
        self.reads += 1
        if self.reads == 1:
            data[length // 2] ^= 1
        return bytes(data)


def test_a_bit_flipped_in_transit_is_read_again(local: Mixture) -> None:
    reader = SourceReader(local.sources[0])
    good = reader.read(0, [0, 1, 2])
    reader.store = FlipsOnce(Path(local.sources[0].manifest.location))
    again = reader.read(0, [0, 1, 2])
    assert reader.store.reads == 2
    assert all(a.batch.equals(b.batch) for a, b in zip(good, again, strict=True))


def test_adjacent_record_batches_take_one_request(local: Mixture) -> None:
    reader = SourceReader(local.sources[0])
    assert reader.runs(0, [5, 1, 2, 6, 0]) == [[0, 1, 2], [5, 6]]


def test_a_missing_shard_is_named(local: Mixture) -> None:
    manifest = local.sources[0].manifest
    Path(manifest.location, manifest.shards[0].key).unlink()
    with Loader(local, 7, **LENGTHS) as loader, pytest.raises(StoreError, match="does not exist"):
        take(loader, 20)


def test_a_batch_that_does_not_fit_the_model_is_refused_where_it_is_collated(
    local: Mixture,
) -> None:
    fitting = ModelConfig(vocab_size=100, image_height=2, image_width=2, text_length=10)
    small = dataclasses.replace(fitting, vocab_size=8)
    with Loader(local, 7, **LENGTHS, model=fitting) as loader:
        take(loader, 4)
    with (
        Loader(local, 7, **LENGTHS, model=small) as loader,
        pytest.raises(
            ValueError, match=r"sample images:\d+ has \d+ in tokens; it lies in 0 \.\.\. 7"
        ),
    ):
        take(loader, 4)


def test_memory_stays_within_its_budget(local: Mixture) -> None:
    with Loader(local, 7, **LENGTHS, cache_bytes=20_000) as loader:
        held = []
        for _ in range(30):
            next(loader)
            held.append(loader._cache._bytes)
        loader._stop()  # otherwise it continues to read between the two
        cached = list(loader._cache._held.values())
        assert max(held) < 60_000
        assert loader._cache._bytes == sum(pending.nbytes for pending in cached)
    with (
        Loader(local, 7, **LENGTHS, cache_bytes=20_000) as small,
        Loader(local, 7, **LENGTHS) as large,
    ):
        pairs = zip(take(small, 30), take(large, 30), strict=True)
        assert all(same(a, b) for a, b in pairs)


def test_threads_end_with_the_loader(local: Mixture) -> None:
    with Loader(local, 7, **LENGTHS) as loader:
        next(loader)
        assert any(t.name == "mdm-prefetch" for t in threading.enumerate())
    assert not any(t.name == "mdm-prefetch" for t in threading.enumerate())
    assert 0 < loader.wait_seconds < 5


@pytest.mark.parametrize(
    ("tokens", "prompt", "length", "expected", "kept"),
    [
        ([5, 6, 2], 0, 4, [5, 6, 2], 0),
        ([5, 6, 7, 8, 2], 0, 4, [5, 6, 7, 2], 0),
        ([3, 5, 6, 4, 7, 2], 4, 5, [5, 6, 4, 7, 2], 3),
        ([3, 5, 4, 6, 7, 8, 9, 2], 3, 4, [4, 6, 7, 2], 1),
        ([3, 5, 6, 4, 7, 2], 4, 6, [3, 5, 6, 4, 7, 2], 4),
    ],
)
def test_fit_keeps_the_reply_and_its_end(tokens, prompt, length, expected, kept) -> None:
    found, left = fit(np.array(tokens, np.uint16), prompt, length)
    assert (found.tolist(), left) == (expected, kept)


def test_captions_have_no_prompt_and_texts_end_in_eos(local: Mixture) -> None:
    with Loader(local, 7, **LENGTHS) as loader:
        for batch in take(loader, 8):
            assert not batch.prompt.any()
            assert ((batch.tokens == EOS).sum(dim=1) >= 1).all()


def config(root: str, **model: int) -> Config:
    sizes = {"vocab_size": 60, "n_classes": 4, "image_height": 2, "image_width": 2} | model
    return Config(
        model=ModelConfig(**sizes),
        data=DataConfig(root, DATA.sources, 24, 2, caption_length=8, dialogue_length=10),
        seed=7,
    )


def test_a_loader_is_built_from_the_configuration(tmp_path: Path) -> None:
    mixture = write(str(tmp_path))
    with (
        build_loader(config(str(tmp_path)), World()) as built,
        Loader(mixture, 7, **LENGTHS) as expected,
    ):
        assert all(same(a, b) for a, b in zip(take(built, 5), take(expected, 5), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 61}, "vocab_size 60, model.vocab_size is 61"),
        ({"image_height": 4}, r"\(2, 2\), .* is \(4, 2\)"),
        ({"n_classes": 3}, "has 4 classes, model.n_classes is 3"),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    write(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        build_loader(config(str(tmp_path), **change), World())


def test_a_batch_that_does_not_fit_the_model_is_refused_when_it_is_collated(local: Mixture) -> None:
    model = config("", vocab_size=9).model
    message = r"sample (images|talk):\d+ has \d+ in tokens; .* 0 \.\.\. 8"
    with (
        Loader(local, 7, **LENGTHS, model=model) as loader,
        pytest.raises(ValueError, match=message),
    ):
        next(loader)


def test_a_source_without_weight_or_rows_is_refused(local: Mixture) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Source("a", local.sources[0].manifest, 0.0)
