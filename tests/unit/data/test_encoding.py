import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mdm import sources
from mdm.data import encoding, publish
from mdm.data.autoencoder import Autoencoder
from mdm.data.encoding import Recipe, decode_group, encode_chunk, write_group
from mdm.data.first_stage import describe
from mdm.data.manifest import Manifest
from mdm.data.mixture import Mixture, Source
from mdm.data.schema import from_bfloat16_bits
from mdm.data.storage import open_store
from mdm.data.survey import DUPLICATE, ID_TAKEN, Survey, plan, survey
from mdm.data.tokenizer import ASSISTANT, EOS, USER, Tokenizer
from mdm.data.trace import find, locate, uses
from mdm.data.verify import verify
from mdm.sources.record import Unit
from tests.data_sets import write_autoencoder, write_imagenet, write_tokenizer, write_ultrachat


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    return Autoencoder.load(write_autoencoder(tmp_path_factory.mktemp("autoencoder")))


def recipe(dataset: str, tokenizer: Tokenizer, **changes: object) -> Recipe:
    pictures = dataset != "ultrachat"
    base = Recipe(
        dataset=dataset,
        split="train",
        inputs_sha256="",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        autoencoder_sha256="a" if pictures else None,
        image_size=16 if pictures else None,
        image_grid=(2, 2) if pictures else None,
        latent_dim=16 if pictures else 0,
        text_length=24,
        min_chars=2,
        shard_rows=16,
        batch_rows=4,
        encode_batch=8,
        encoder_threads=1,
        device="cpu",
    )
    return dataclasses.replace(base, **changes)


def encode(
    root: Path, made: Recipe, tokenizer: Tokenizer, autoencoder: object, out: str
) -> Manifest:
    """The whole job in one process, as the executor runs it in many."""
    units = sources.get(made.dataset).units(root, "train", unit_bytes=4096)
    store = open_store(out)
    groups = plan(units, [survey(u) for u in units], made.shard_rows)
    receipts = [
        write_group(
            store,
            group,
            made,
            [encode_chunk(c, made, autoencoder) for c in decode_group(group, made, tokenizer)],
        )
        for group in groups
    ]
    names = ("one", "two", "three", "four") if made.image_size else ()
    manifest = publish.finish(store, made, receipts, names)
    publish.clean(store, manifest)
    return manifest


def units(n: int) -> list[Unit]:
    return [Unit("s", "train", i, "", "", (), str(i)) for i in range(n)]


def test_of_like_records_the_first_stays_and_the_rest_is_told_apart() -> None:
    surveys = [
        Survey(((0, "a", "x"), (2, "b", "y")), 1),
        Survey(((0, "c", "x"), (1, "a", "z"), (2, "d", "w")), 0),
    ]
    groups = plan(units(2), surveys, 100)
    assert len(groups) == 1
    left_out = {u.index: out for u, out in zip(groups[0].units, groups[0].left_out, strict=True)}
    assert left_out == {0: {}, 1: {0: DUPLICATE, 1: ID_TAKEN}}


def test_groups_hold_every_unit_once_and_enough_records() -> None:
    surveys = [Survey(tuple((p, f"{u}.{p}", f"{u}.{p}") for p in range(7)), 3) for u in range(20)]
    groups = plan(units(20), surveys, 35)
    members = [u.index for g in groups for u in g.units]
    assert sorted(members) == list(range(20))
    assert members != list(range(20))  # neighbours are mixed
    assert [len(g.units) for g in groups] == [4, 4, 4, 4, 4]
    assert plan(units(20), surveys, 35) == groups


def test_pictures_become_rows_and_bad_ones_are_quarantined_with_reasons(
    tmp_path: Path, tokenizer_path: Path, autoencoder: Autoencoder, uri: str
) -> None:
    root = write_imagenet(tmp_path / "raw", 9)
    folder = root / "train" / "n00000000"
    good = (folder / "n00000000_1.JPEG").read_bytes()
    (folder / "n00000000_2.JPEG").write_bytes(good[: len(good) // 2])
    (folder / "n00000000_3.JPEG").write_bytes(b"<html>no picture</html>")
    (folder / "n00000000_4.JPEG").write_bytes(b"")
    (folder / "n00000000_5.JPEG").write_bytes(good)  # again under another name
    tokenizer = Tokenizer(tokenizer_path)
    manifest = encode(root, recipe("imagenet", tokenizer), tokenizer, autoencoder, uri)
    assert manifest.counts["records"] == 36
    assert manifest.counts["dropped: duplicate"] == 1
    reasons = {Path(q.origin).name: q.reason for q in manifest.quarantine}
    assert "truncated" in reasons["n00000000_2.JPEG"].lower()
    assert "not a picture" in reasons["n00000000_3.JPEG"]
    assert "empty" in reasons["n00000000_4.JPEG"]
    assert manifest.rows == 36 - 1 - 3
    assert str(tmp_path) not in manifest.to_bytes().decode()
    assert all(not v.problems for v in verify(Manifest.load(uri)))
    # One record's latents, traced back to its file, are the autoencoder's.
    mixture = Mixture((Source("digits", Manifest.load(uri), 1.0),), global_batch=8)
    record = "imagenet/train/n00000001/n00000001_3.JPEG"
    (sample,) = find(mixture, record)
    (trace,) = locate(mixture, [sample])
    assert (trace.record, trace.origin) == (record, "train/n00000001/n00000001_3.JPEG")
    assert [epoch for _, epoch in uses(mixture, 0, sample, 12)] == [0, 1, 2]


def test_latents_are_the_autoencoders(
    tmp_path: Path, tokenizer_path: Path, autoencoder: Autoencoder
) -> None:
    import torch

    root = write_imagenet(tmp_path / "raw", 3)
    tokenizer = Tokenizer(tokenizer_path)
    made = recipe("imagenet", tokenizer)
    found = sources.get("imagenet").units(root, "train")
    group = plan(found, [survey(u) for u in found], 100)[0]
    chunks = list(decode_group(group, made, tokenizer))
    assert [len(c.examples) for c in chunks] == [8, 4]
    for chunk in chunks:
        latents = encode_chunk(chunk, made, autoencoder).examples.latents
        expected = autoencoder.encode(torch.from_numpy(chunk.pixels)).numpy()
        error = np.abs(from_bfloat16_bits(latents) - expected.reshape(len(latents), -1))
        assert (error <= np.abs(expected.reshape(len(latents), -1)) * 2**-8 + 1e-5).all()


def test_latents_that_are_not_finite_go_to_quarantine(
    tmp_path: Path, tokenizer_path: Path, autoencoder: Autoencoder
) -> None:
    class Overflows:
        def encode(self, pixels):
            latents = autoencoder.encode(pixels).clone()
            latents[1] = float("inf")
            return latents

    tokenizer = Tokenizer(tokenizer_path)
    made = recipe("imagenet", tokenizer)
    found = sources.get("imagenet").units(write_imagenet(tmp_path, 1), "train")
    chunk = next(decode_group(plan(found, [survey(u) for u in found], 9)[0], made, tokenizer))
    done = encode_chunk(chunk, made, Overflows())
    assert len(done.examples) == 3
    assert [(q.id, q.reason) for q in done.quarantine] == [
        (chunk.examples.ids[1], "latents are not finite")
    ]


def test_a_dialogue_gives_one_example_a_reply_and_forgets_its_beginning(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    turns = ["one", "two", "three", "four", "hello", "my friend"]
    root = write_ultrachat(tmp_path, [turns, ["hello", "."], [], ["one"], turns])
    tokenizer = Tokenizer(tokenizer_path)
    made = recipe("ultrachat", tokenizer, text_length=10)
    found = sources.get("ultrachat").units(root, "train")
    group = plan(found, [survey(u) for u in found], 100)[0]
    chunks = list(decode_group(group, made, tokenizer))
    examples = chunks[0].examples
    assert [i.rpartition("/")[2] for i in examples.ids] == ["0#t0", "0#t1", "0#t2"]
    for tokens, prompt, k in zip(examples.tokens, examples.prompt_lengths, range(3), strict=True):
        assert len(tokens) <= 10
        assert tokens[-1] == EOS
        assert tokens[prompt - 1] == ASSISTANT
        assert tokenizer.decode(tokens[prompt:].tolist()) == turns[2 * k + 1]
    assert examples.tokens[0][0] == USER
    counts = chunks[0].counts
    assert counts["dropped: duplicate"] == 1
    assert counts[f"dropped: {encoding.TOO_SHORT}"] == 1
    assert counts["shortened texts"] >= 1
    assert len(chunks[0].quarantine) == 2


def test_the_split_of_work_does_not_change_the_bytes(
    tmp_path: Path, tokenizer_path: Path, autoencoder: Autoencoder
) -> None:
    root = write_imagenet(tmp_path / "raw", 12)
    tokenizer = Tokenizer(tokenizer_path)
    made = recipe("imagenet", tokenizer)
    one = encode(root, made, tokenizer, autoencoder, str(tmp_path / "one"))
    two = encode(root, made, tokenizer, autoencoder, str(tmp_path / "two"))
    assert one.sha256 == two.sha256
    assert len(one.shards) > 1
    moved = root.rename(tmp_path / "moved")
    assert encode(moved, made, tokenizer, autoencoder, str(tmp_path / "3")).sha256 == one.sha256


def test_verify_names_the_damaged_shard(tmp_path: Path, tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    root = write_ultrachat(tmp_path / "raw", [["hello one", f"{n} two"] for n in ("one", "four")])
    manifest = encode(root, recipe("ultrachat", tokenizer), tokenizer, None, str(tmp_path / "out"))
    path = tmp_path / "out" / manifest.shards[0].key
    data = bytearray(path.read_bytes())
    data[manifest.shards[0].batches[0].offset + 40] ^= 1
    path.write_bytes(data)
    (tmp_path / "out" / "shards" / "orphan.arrow").write_bytes(b"")
    problems = {v.key: v.problems for v in verify(manifest) if v.problems}
    assert set(problems) == {manifest.shards[0].key, "the set"}
    assert "sha256" in problems[manifest.shards[0].key][0]
    assert problems["the set"] == ("shards/orphan.arrow belongs to no data set",)


def test_a_set_without_a_readable_record_is_refused() -> None:
    with pytest.raises(ValueError, match="not one record"):
        encoding.has_pictures([])


def test_settings_are_checked(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    with pytest.raises(ValueError, match="batch_rows is 0"):
        recipe("imagenet", tokenizer, batch_rows=0)
    with pytest.raises(ValueError, match="has 70000 pieces"):
        recipe("imagenet", tokenizer, vocab_size=70_000)


def test_an_autoencoder_is_described_without_loading_it(
    tmp_path: Path, autoencoder: Autoencoder
) -> None:
    known = describe(write_autoencoder(tmp_path))
    for name in ("sha256", "image_size", "factor", "grid", "latent_dim"):
        assert getattr(known, name) == getattr(autoencoder, name)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="autoencoder"):
        describe(tmp_path)
