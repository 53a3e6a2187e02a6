import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image

from mdm import sources
from mdm.data.manifest import Manifest
from mdm.data.mixture import Mixture, Source
from mdm.data.schema import from_bfloat16_bits
from mdm.data.trace import find, locate, uses
from mdm.first_stage.autoencoder import Autoencoder
from mdm.first_stage.folder import describe
from mdm.first_stage.tokenizer import ASSISTANT, EOS, UNK, USER, Tokenizer, train_model
from mdm.preprocess import duplicates, encoding, forecast, publish
from mdm.preprocess import encode as encode_job
from mdm.preprocess.duplicates import DUPLICATE, ID_TAKEN, NEAR_DUPLICATE, DuplicateIndex
from mdm.preprocess.encoding import decode_group, encode_chunk, write_chunks
from mdm.preprocess.receipt import Receipt, get_sealed, put_sealed, receipt_key
from mdm.preprocess.recipe import Recipe
from mdm.preprocess.survey import Group, Survey, plan, survey
from mdm.preprocess.verify import verify
from mdm.report.card import card_page
from mdm.sources.record import RawRecord, Unit
from mdm.storage import open_store
from tests.data_sets import (
    NAMES,
    jpeg,
    write_autoencoder,
    write_imagenet,
    write_tokenizer,
    write_ultrachat,
)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    return Autoencoder.load(write_autoencoder(tmp_path_factory.mktemp("autoencoder")))


def recipe_for(dataset: str, tokenizer: Tokenizer, **changes: object) -> Recipe:
    images = dataset != "ultrachat"
    base = Recipe(
        dataset=dataset,
        split="train",
        inputs_sha256="",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        autoencoder_sha256="a" if images else None,
        image_size=16 if images else None,
        image_grid=(2, 2) if images else None,
        latent_dim=16 if images else 0,
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
    root: Path, recipe: Recipe, tokenizer: Tokenizer, autoencoder: object, out: str
) -> Manifest:
    """The whole job in one process, which the executor distributes over many."""
    units = sources.get(recipe.dataset).units(root, "train", unit_bytes=4096)
    store = open_store(out)
    receipts = [
        write_chunks(
            store,
            group,
            recipe,
            [encode_chunk(c, recipe, autoencoder) for c in decode_group(group, recipe, tokenizer)],
        )
        for group in planned(units, recipe)
    ]
    names = ("one", "two", "three", "four") if recipe.image_size else ()
    manifest = publish.finish(store, recipe, receipts, names, card_page)
    publish.clean(store, manifest)
    return manifest


def left_out(surveys: Sequence[Survey], folder: Path, *, images: bool) -> list[dict[int, str]]:
    with DuplicateIndex(folder, images=images) as index:
        for number, one in enumerate(surveys):
            index.add(number, one)
        return index.left_out(len(surveys))


def planned(units: Sequence[Unit], recipe: Recipe) -> list[Group]:
    surveys = [survey(u, near=recipe.near_duplicates) for u in units]
    with TemporaryDirectory() as folder:
        out = left_out(surveys, Path(folder), images=recipe.image_size is not None)
    return plan(units, [len(s) for s in surveys], out, recipe.shard_rows)


def blank_units(n: int) -> list[Unit]:
    return [Unit("s", "train", i, "", "", (), str(i)) for i in range(n)]


def surveyed(*records: tuple[int, str, str], bad: int = 0) -> Survey:
    """The survey of (position, id, content), both letters; "" is a record without content."""

    def hashes(texts: list[str]) -> np.ndarray:
        return np.array([[ord(t), 7] if t else [0, 0] for t in texts], np.uint64).reshape(-1, 2)

    none = np.zeros(0, np.uint64)
    return Survey(
        np.array([r[0] for r in records], np.uint32),
        hashes([r[1] for r in records]),
        hashes([r[2] for r in records]),
        np.zeros((0, 128), np.uint8),
        none.astype(np.uint32),
        none,
        bad,
    )


def test_the_first_of_equal_records_stays_and_the_others_get_reasons(tmp_path: Path) -> None:
    surveys = [
        surveyed((0, "a", "x"), (2, "b", "y"), bad=1),
        surveyed((0, "c", "x"), (1, "a", "z"), (2, "d", "w"), (3, "d", "w")),
        surveyed((0, "e", ""), (1, "f", ""), (2, "e", "")),
    ]
    out = left_out(surveys, tmp_path, images=True)
    assert out == [{}, {0: DUPLICATE, 1: ID_TAKEN, 3: DUPLICATE}, {2: ID_TAKEN}]
    assert Survey.from_bytes(surveys[0].to_bytes()).ids.tolist() == surveys[0].ids.tolist()


def test_groups_hold_every_unit_once_and_enough_records() -> None:
    groups = plan(blank_units(20), [10] * 20, [{}] * 20, 35)
    members = [u.index for g in groups for u in g.units]
    assert sorted(members) == list(range(20))
    assert members != list(range(20))  # neighbours are mixed
    assert [len(g.units) for g in groups] == [4, 4, 4, 4, 4]
    assert plan(blank_units(20), [10] * 20, [{}] * 20, 35) == groups


def test_images_are_encoded_and_bad_ones_are_quarantined_with_reasons(
    tmp_path: Path, tokenizer_path: Path, autoencoder: Autoencoder, uri: str
) -> None:
    root = write_imagenet(tmp_path / "raw", 9)
    folder = root / "train" / "n00000000"
    good = (folder / "n00000000_1.JPEG").read_bytes()
    (folder / "n00000000_2.JPEG").write_bytes(good[: len(good) // 2])
    (folder / "n00000000_3.JPEG").write_bytes(b"<html>no image</html>")
    (folder / "n00000000_4.JPEG").write_bytes(b"")
    (folder / "n00000000_5.JPEG").write_bytes(good)  # again under another name
    tokenizer = Tokenizer(tokenizer_path)
    manifest = encode(root, recipe_for("imagenet", tokenizer), tokenizer, autoencoder, uri)
    assert manifest.counts["records"] == 36
    assert manifest.counts["dropped: duplicate"] == 1
    reasons = {Path(q.origin).name: q.reason for q in manifest.quarantine}
    assert "truncated" in reasons["n00000000_2.JPEG"].lower()
    assert "not an image" in reasons["n00000000_3.JPEG"]
    assert "empty" in reasons["n00000000_4.JPEG"]
    assert manifest.rows == 36 - 1 - 3
    assert str(tmp_path) not in manifest.to_bytes().decode()
    assert not [q for q in manifest.quarantine if str(tmp_path) in q.origin]
    assert all(not v.problems for v in verify(Manifest.load(uri)))
    # One record's latents, traced back to its file, are the autoencoder's.
    mixture = Mixture((Source("digits", Manifest.load(uri), 1.0),), global_batch=8)
    record = "imagenet/train/n00000001/n00000001_3.JPEG"
    (sample,) = find(mixture, record)
    (trace,) = locate(mixture, [sample])
    assert (trace.record, trace.origin) == (record, "train/n00000001/n00000001_3.JPEG")
    assert [epoch for _, epoch in uses(mixture, 0, sample, 12)] == [0, 1, 2]


def test_latents_are_those_of_the_autoencoder(
    tmp_path: Path, tokenizer_path: Path, autoencoder: Autoencoder
) -> None:
    import torch

    root = write_imagenet(tmp_path / "raw", 3)
    tokenizer = Tokenizer(tokenizer_path)
    recipe = recipe_for("imagenet", tokenizer)
    units = sources.get("imagenet").units(root, "train")
    (group,) = planned(units, dataclasses.replace(recipe, shard_rows=100))
    chunks = list(decode_group(group, recipe, tokenizer))
    assert [len(c.samples) for c in chunks] == [8, 4]
    for chunk in chunks:
        latents = encode_chunk(chunk, recipe, autoencoder).samples.latents
        expected = autoencoder.encode(torch.from_numpy(chunk.pixels)).numpy()
        error = np.abs(from_bfloat16_bits(latents) - expected.reshape(len(latents), -1))
        assert (error <= np.abs(expected.reshape(len(latents), -1)) * 2**-8 + 1e-5).all()


def test_latents_that_are_not_finite_go_to_quarantine(
    tmp_path: Path,
    tokenizer_path: Path,
    autoencoder: Autoencoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = autoencoder.encode

    def overflow(pixels):
        latents = encode(pixels).clone()
        latents[1] = float("inf")
        return latents

    monkeypatch.setattr(autoencoder, "encode", overflow)
    tokenizer = Tokenizer(tokenizer_path)
    recipe = recipe_for("imagenet", tokenizer)
    units = sources.get("imagenet").units(write_imagenet(tmp_path, 1), "train")
    chunk = next(decode_group(planned(units, recipe)[0], recipe, tokenizer))
    done = encode_chunk(chunk, recipe, autoencoder)
    assert len(done.samples) == 3
    assert [(q.id, q.reason) for q in done.quarantine] == [
        (chunk.samples.ids[1], "latents are not finite")
    ]


def test_a_dialogue_gives_one_sample_a_reply_and_drops_its_beginning(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    turns = ["one", "two", "three", "four", "hello", "my friend"]
    root = write_ultrachat(tmp_path, [turns, ["hello", "..!"], [], ["one"], turns])
    tokenizer = Tokenizer(tokenizer_path)
    recipe = recipe_for("ultrachat", tokenizer, text_length=10)
    units = sources.get("ultrachat").units(root, "train")
    (group,) = planned(units, dataclasses.replace(recipe, shard_rows=100))
    chunks = list(decode_group(group, recipe, tokenizer))
    samples = chunks[0].samples
    assert [i.rpartition("/")[2] for i in samples.ids] == ["0#t0", "0#t1", "0#t2"]
    for tokens, prompt, k in zip(samples.tokens, samples.prompt_lengths, range(3), strict=True):
        assert len(tokens) <= 10
        assert tokens[-1] == EOS
        assert tokens[prompt - 1] == ASSISTANT
        assert tokenizer.decode(tokens[prompt:].tolist()) == turns[2 * k + 1]
    assert samples.tokens[0][0] == USER
    counts = chunks[0].counts
    assert counts["dropped: duplicate"] == 1
    assert counts["dropped: low-quality text: no letter or digit"] == 1
    assert counts["shortened texts"] >= 1
    assert len(chunks[0].quarantine) == 2


def test_the_split_of_work_does_not_change_the_bytes(
    tmp_path: Path, tokenizer_path: Path, autoencoder: Autoencoder
) -> None:
    root = write_imagenet(tmp_path / "raw", 12)
    tokenizer = Tokenizer(tokenizer_path)
    recipe = recipe_for("imagenet", tokenizer)
    one = encode(root, recipe, tokenizer, autoencoder, str(tmp_path / "one"))
    two = encode(root, recipe, tokenizer, autoencoder, str(tmp_path / "two"))
    assert one.sha256 == two.sha256
    assert len(one.shards) > 1
    moved = root.rename(tmp_path / "moved")
    assert encode(moved, recipe, tokenizer, autoencoder, str(tmp_path / "3")).sha256 == one.sha256


def test_verify_names_the_damaged_shard(tmp_path: Path, tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    root = write_ultrachat(tmp_path / "raw", [["hello one", f"{n} two"] for n in ("one", "four")])
    manifest = encode(
        root, recipe_for("ultrachat", tokenizer), tokenizer, None, str(tmp_path / "out")
    )
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
        encode_job.has_images([])


def test_settings_are_checked(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    with pytest.raises(ValueError, match="batch_rows is 0"):
        recipe_for("imagenet", tokenizer, batch_rows=0)
    with pytest.raises(ValueError, match="has 70000 pieces"):
        recipe_for("imagenet", tokenizer, vocab_size=70_000)


def test_an_autoencoder_is_described_without_loading_it(
    tmp_path: Path, autoencoder: Autoencoder
) -> None:
    known = describe(write_autoencoder(tmp_path))
    for name in ("sha256", "image_size", "factor", "grid", "latent_dim"):
        assert getattr(known, name) == getattr(autoencoder, name)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="autoencoder"):
        describe(tmp_path)


def saved(image: Image.Image, kind: str, **more: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def landscape(seed: int) -> Image.Image:
    """Smooth, as photographs are, and unlike the image of any other seed."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC)


def test_near_duplicates_of_images_are_found_and_other_images_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "raw" / "train" / "n00000000"
    folder.mkdir(parents=True)
    (tmp_path / "raw" / "LOC_synset_mapping.txt").write_text("n00000000 one\n")
    kept = {f"{seed}.JPEG": saved(landscape(seed), "JPEG", quality=90) for seed in range(12)}
    black = np.zeros((32, 32, 3), np.uint8)
    for i in range(4):  # strokes on an empty ground: alike except for what matters
        page = black.copy()
        page[4 + 5 * i : 8 + 5 * i, 8:24] = 255
        kept[f"stroke{i}.JPEG"] = saved(Image.fromarray(page), "PNG")
    again = {
        "z1.JPEG": saved(landscape(1), "JPEG", quality=40),
        "z2.JPEG": saved(landscape(2).resize((64, 48)), "PNG"),
        "z3.JPEG": saved(landscape(3).resize((160, 120)), "WEBP", quality=80),
    }
    broken = {"b1.JPEG": b"", "b2.JPEG": b"", "b3.JPEG": kept["0.JPEG"][:500]}
    for name, data in (kept | again | broken).items():
        (folder / name).write_bytes(data)
    monkeypatch.setattr(duplicates, "BUCKETS", 3)
    for unit_bytes in (1, 4096, 1 << 30):
        units = sources.get("imagenet").units(tmp_path / "raw", "train", unit_bytes=unit_bytes)
        surveys = [survey(u, near=True) for u in units]
        folder = tmp_path / f"index{unit_bytes}"
        folder.mkdir()
        with DuplicateIndex(folder, images=True) as index:
            for number, one in reversed(list(enumerate(surveys))):  # in any order
                index.add(number, one)
            out = index.left_out(len(units))
        names = {
            Path(record.origin).name: out[number][position]
            for number, unit in enumerate(units)
            for position, record in enumerate(sources.get("imagenet").read(unit))
            if position in out[number]
        }
        # One of each pair is left out: the order of their units decides which.
        pairs = [{f"{i}.JPEG", f"z{i}.JPEG"} for i in (1, 2, 3)]
        assert sorted(len(set(names) & pair) for pair in pairs) == [1, 1, 1], names
        assert len(names) == 3
        assert set(names.values()) == {NEAR_DUPLICATE}


def test_near_duplicates_of_texts_are_found_and_other_texts_are_kept(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = [f"word{i}" for i in range(400)]
    long = [" ".join(random.choice(words, 60)) for _ in range(6)]
    changed = long[0].split()
    changed[30] = "elsewhere"
    dialogues = [[text, "yes indeed"] for text in long]
    dialogues += [[" ".join(changed), "yes indeed"], [long[1].upper() + "!", "Yes, indeed."]]
    dialogues += [["how many are 17", "they are 3"], ["how many are 18", "they are 3"]]
    dialogues += [["How many are 17?", "they are 3"]]
    root = write_ultrachat(tmp_path, dialogues)
    units = sources.get("ultrachat").units(root, "train", unit_bytes=700)
    assert len(units) > 2
    surveys = [survey(u, near=True) for u in units]
    (tmp_path / "index").mkdir()
    out = left_out(surveys, tmp_path / "index", images=False)
    gone = [
        record.id.rpartition("/")[2]
        for number, unit in enumerate(units)
        for position, record in enumerate(sources.get("ultrachat").read(unit))
        if position in out[number]
    ]
    assert gone == ["6", "7", "10"]
    exact = [survey(u, near=False) for u in units]
    (tmp_path / "exact").mkdir()
    assert left_out(exact, tmp_path / "exact", images=False) == [{}] * len(units)


def test_an_image_shared_by_questions_is_decoded_and_encoded_once(
    tmp_path: Path, tokenizer_path: Path, autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    random = np.random.default_rng(0)
    images = [jpeg(random) for _ in range(5)] + [b"broken"]
    records = [
        RawRecord(f"{p}.{q}", "s", "train", "o", image, turns=("one", f"two {q}"))
        for p, image in enumerate(images)
        for q in range(4)
    ]

    class Reader:
        @staticmethod
        def read(unit: Unit) -> list[RawRecord]:
            return records

    monkeypatch.setattr(sources, "get", lambda _: Reader)
    decoded: list[bytes] = []
    real = encoding.decode_image
    monkeypatch.setattr(
        encoding, "decode_image", lambda data, size: decoded.append(data) or real(data, size)
    )
    recipe = recipe_for("imagenet", tokenizer, encode_batch=3)
    group = Group(0, (blank_units(1)[0],), ({},))
    chunks = list(decode_group(group, recipe, tokenizer))
    assert decoded == images
    assert [len(c.pixels) for c in chunks if c.pixels is not None] == [3, 2]
    done = [encode_chunk(c, recipe, autoencoder) for c in chunks]
    assert [len(c.samples) for c in done] == [12, 8]
    for chunk, before in zip(done, chunks, strict=True):
        rows = chunk.samples.latents
        for row, which in zip(rows, before.images, strict=True):
            assert (row == rows[4 * which]).all()
    assert len({row.tobytes() for c in done for row in c.samples.latents}) == 5
    assert [q.id for c in done for q in c.quarantine] == [f"5.{q}" for q in range(4)]


def test_a_card_shows_samples_lengths_drops_and_lineage(
    tmp_path: Path, tokenizer_path: Path, autoencoder: Autoencoder
) -> None:
    root = write_imagenet(tmp_path / "raw", 8)
    folder = root / "train" / "n00000000"
    (folder / "n00000000_1.JPEG").write_bytes(b"<b>")
    (folder / "again.JPEG").write_bytes((folder / "n00000000_2.JPEG").read_bytes())
    tokenizer = Tokenizer(tokenizer_path)
    recipe = recipe_for("imagenet", tokenizer)
    encode(root, recipe, tokenizer, autoencoder, str(tmp_path / "out"))
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["dropped"] == {"duplicate": 1}
    assert card["quarantined"] == {"not an image": 1}
    assert sum(card["token_lengths"].values()) == card["counts"]["examples"] == 31
    assert card["lineage"]["recipe"]["tokenizer_sha256"] == tokenizer.sha256
    assert "pillow" in card["lineage"]["versions"]
    assert len(card["samples"]) == 12
    assert card["unknown_tokens"] == 0
    page = (tmp_path / "out" / "card.html").read_text()
    assert "0.00% of the tokens are unknown to the tokenizer" in page
    assert page.count("data:image/png;base64,") == 12
    assert all(s["id"] in page for s in card["samples"])
    assert "<rect" in page
    assert "not an image" in page
    assert str(tmp_path) not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_damaged_receipt_is_ignored(
    tmp_path: Path, tokenizer_path: Path, autoencoder: Autoencoder
) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    recipe = recipe_for("imagenet", tokenizer)
    store = open_store(str(tmp_path / "out"))
    root = write_imagenet(tmp_path / "raw", 2)
    (group,) = planned(sources.get("imagenet").units(root, "train"), recipe)
    chunks = [encode_chunk(c, recipe, autoencoder) for c in decode_group(group, recipe, tokenizer)]
    receipt = write_chunks(store, group, recipe, chunks)
    key = receipt_key(recipe, 0)
    data = get_sealed(store, key)
    assert data is not None
    assert Receipt.from_bytes(data) == receipt
    sealed = bytearray(store.get(key))
    sealed[-9] ^= 1
    store.put(key, bytes(sealed))
    assert get_sealed(store, key) is None
    put_sealed(store, key, data)
    assert get_sealed(store, key) == data


def test_a_forecast_is_close_to_what_is_written(
    tmp_path: Path, tokenizer_path: Path, autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_imagenet(tmp_path / "raw", 60)
    for i in range(24):  # a tenth of the images is damaged
        (root / "train" / "n00000002" / f"n00000002_{i}.JPEG").write_bytes(b"broken %d" % i)
    tokenizer = Tokenizer(tokenizer_path)
    recipe = recipe_for("imagenet", tokenizer, shard_rows=40)
    units = sources.get("imagenet").units(root, "train", unit_bytes=2048)
    monkeypatch.setattr(forecast, "LEAST_RECORDS", 100)
    predicted = forecast.predict(
        units, recipe, tokenizer, str(write_autoencoder(tmp_path / "ae")), 2
    )
    manifest = encode(root, recipe, tokenizer, autoencoder, str(tmp_path / "out"))
    assert predicted["units_sampled"] < predicted["units"] == len(units)
    # Stated tolerance: a tenth of the bytes and rows, a fifth of the shards (here of five).
    assert predicted["bytes"] == pytest.approx(sum(s.bytes for s in manifest.shards), rel=0.1)
    assert predicted["examples"] == pytest.approx(manifest.rows, rel=0.1)
    assert predicted["shards"] == pytest.approx(len(manifest.shards), rel=0.2)
    assert predicted["requests"] > predicted["shards"]
    assert predicted["hours"] > 0


@pytest.mark.parametrize(("strange", "warned"), [(1, False), (3, True)])
def test_the_card_and_the_job_report_the_share_of_unknown_tokens(
    tmp_path: Path,
    tokenizer_path: Path,
    capsys: pytest.CaptureFixture[str],
    strange: int,
    warned: bool,
) -> None:
    talks = [[f"one {a} two", f"three {b} four"] for a in NAMES for b in NAMES]
    talks += [["one", f"two {character}"] for character in "δεζ"[:strange]]
    root = write_ultrachat(tmp_path / "raw", talks)
    out = tmp_path / "out"
    flags = encode_job.Flags(
        "ultrachat", str(root), "train", str(tokenizer_path), str(out), near_duplicates=False
    )
    units = sources.get("ultrachat").units(root, "train", unit_bytes=flags.unit_bytes)
    tokenizer = Tokenizer(tokenizer_path)
    recipe = encode_job.make_recipe(flags, units)
    manifest = encode(root, recipe, tokenizer, None, str(out))
    rows = [
        row.tolist()
        for chunk in decode_group(planned(units, recipe)[0], recipe, tokenizer)
        for row in chunk.samples.tokens
    ]
    pieces = [token for row in rows for token in row if token not in (EOS, USER, ASSISTANT)]
    share = pieces.count(UNK) / len(pieces)
    assert (share > 0.01) == warned
    assert 0 < share < 0.1
    card = json.loads((out / "card.json").read_text())
    assert card["unknown_tokens"] == pytest.approx(share)
    warning = f"{share:.2%} of the tokens are unknown to the tokenizer, more than 1%"
    assert (warning in (out / "card.html").read_text()) == warned
    capsys.readouterr()
    summary = encode_job.run(flags, card_page)  # encoded already: no Ray is started
    assert summary["manifest_sha256"] == manifest.sha256
    assert summary["unknown_tokens"] == pytest.approx(share, abs=1e-6)
    lines = [line for line in capsys.readouterr().err.splitlines() if "unknown" in line]
    assert lines == ([lines[0]] if warned else [])
    assert not warned or lines[0].startswith(f"encode: ultrachat/train: {warning}")


def test_code_in_a_reply_keeps_its_lines_and_indentation(tmp_path: Path) -> None:
    code = "def f():\n    return 1\n\n\tx"
    path = tmp_path / "tokenizer.model"
    words = [f"{a}{b}{c}" for a in NAMES for b in NAMES for c in NAMES]
    path.write_bytes(train_model([*words, *[" ".join(code.split())] * 9], 50))
    tokenizer = Tokenizer(path)
    root = write_ultrachat(tmp_path / "raw", [["one\r\n  two", code], ["three", " four \n"]])
    recipe = recipe_for("ultrachat", tokenizer, text_length=64)
    (group,) = planned(sources.get("ultrachat").units(root, "train"), recipe)
    (chunk,) = decode_group(group, recipe, tokenizer)
    replies = [
        tokenizer.decode(tokens[prompt:].tolist())
        for tokens, prompt in zip(chunk.samples.tokens, chunk.samples.prompt_lengths, strict=True)
    ]
    assert replies == [code, " four \n"]
    prompt = chunk.samples.tokens[0][: chunk.samples.prompt_lengths[0]]
    assert tokenizer.decode(prompt.tolist()) == "one\n  two"
    assert chunk.card_samples[0].text.endswith(code)
