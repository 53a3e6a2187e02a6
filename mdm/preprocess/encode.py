"""Encode one split of a published data set: survey, plan, encode on Ray, publish."""

import dataclasses
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mdm import sources
from mdm.data.manifest import Manifest
from mdm.first_stage.folder import describe
from mdm.first_stage.tokenizer import Tokenizer
from mdm.preprocess import forecast, publish, ray_executor
from mdm.preprocess.duplicates import DuplicateIndex
from mdm.preprocess.ray_executor import GroupEncoder, Place
from mdm.preprocess.receipt import CardSample, Receipt, get_sealed, lowest, receipt_key, survey_key
from mdm.preprocess.recipe import Recipe, inputs_sha256
from mdm.preprocess.survey import Group, Survey, plan
from mdm.sources.record import RawRecord, Unit
from mdm.storage import Store, StoreError, StoreOptions, open_store
from mdm.storage.lease import Lease, hold
from mdm.utils.fields import NOT_NEGATIVE, SHARE, check_fields, doc, one_of


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    dataset: str = field(metadata={"help": f"published layout: {', '.join(sources.READERS)}"})
    root: str = field(metadata={"help": "folder of the data set as published"})
    split: str = field(metadata={"help": "train, val, ... as the data set names it"})
    tokenizer: str = field(metadata={"help": "SentencePiece .model file"})
    out: str = field(metadata={"help": "where to write: s3://bucket/prefix or a folder"})
    autoencoder: str = doc("", "folder of the frozen autoencoder; text-only data sets need none")
    plan: bool = doc(False, "predict shards, bytes, requests and hours; write nothing")
    text_length: int = doc(512, "longest text in tokens, EOS included")
    min_chars: int = doc(2, "captions and replies of fewer characters are dropped")
    text_filters: bool = doc(True, "drop low-quality texts")
    near_duplicates: bool = doc(True, "drop near duplicates, not only exact ones")
    shard_rows: int = doc(8192, "about how many samples a shard holds")
    batch_rows: int = doc(64, "samples in a record batch")
    encode_batch: int = doc(64, "images that the autoencoder encodes at once")
    encoders: int = doc(
        0, "autoencoders at a time; 0: cores / encoder_threads, or one a GPU", NOT_NEGATIVE
    )
    encoder_threads: int = doc(1, "threads of an autoencoder")
    device: str = doc("cpu", "where the autoencoder runs", one_of("cpu", "cuda"))
    decoders: int = doc(0, "groups decoded at a time; 0: one a core", NOT_NEGATIVE)
    unit_bytes: int = doc(256 << 20, "about how much input one reader takes")
    max_bad_share: float = doc(0.5, "stop if more than this share of the records is bad", SHARE)
    report: str = doc("", "file for the summary, beside printing it")

    def __post_init__(self) -> None:
        check_fields(self)


def has_images(units: Sequence[Unit]) -> bool:
    """Whether the data set's first readable record has an image; ValueError if none is readable."""
    for unit in units:
        for record in sources.read(unit):
            if isinstance(record, RawRecord):
                return record.image is not None
    raise ValueError("not one record of the data set can be read; is --root the right folder?")


def make_recipe(flags: Flags, units: Sequence[Unit]) -> Recipe:
    """The recipe of these flags and inputs; ValueError names what is missing."""
    tokenizer = Tokenizer(flags.tokenizer)
    autoencoder = None
    if has_images(units):
        if not flags.autoencoder:
            raise ValueError(f"{flags.dataset} has images: --autoencoder is needed")
        autoencoder = describe(flags.autoencoder)
    shared = {f.name for f in dataclasses.fields(Recipe)} & vars(flags).keys()
    return Recipe(
        inputs_sha256=inputs_sha256(units),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        autoencoder_sha256=autoencoder.sha256 if autoencoder else None,
        image_size=autoencoder.image_size if autoencoder else None,
        image_grid=autoencoder.grid if autoencoder else None,
        latent_dim=autoencoder.latent_dim if autoencoder else 0,
        **{name: getattr(flags, name) for name in shared},
    )


def check_bad(bad: Counter[str], total: int, share: float) -> None:
    """ValueError if the records bad for these reasons are more than `share` of `total`."""
    if bad.total() > share * total:
        raise ValueError(
            f"{bad.total()} of {total} records are bad, more than --max_bad_share {share:g} "
            "allows: " + "; ".join(sorted(bad)[:5])
        )


def run(flags: Flags, card_page: publish.CardPage) -> dict[str, Any]:
    """The whole job.

    Args:
        flags: what to encode, how and where to.
        card_page: renders the dataset card from its facts and samples.

    Returns:
        A summary, or with `flags.plan` the forecast.
    """
    began = time.perf_counter()
    reader = sources.get(flags.dataset)
    root = Path(flags.root)
    units = reader.units(root, flags.split, unit_bytes=flags.unit_bytes)
    names: Callable[[Path], tuple[str, ...]] = getattr(reader, "class_names", lambda _: ())
    class_names = names(root)
    recipe = make_recipe(flags, units)
    if flags.plan:
        cores = flags.decoders or os.cpu_count() or 1
        tokenizer = Tokenizer(flags.tokenizer)
        return forecast.predict(units, recipe, tokenizer, flags.autoencoder, cores)
    tell = partial(tqdm.write, file=sys.stderr)
    store = open_store(flags.out)
    publish.finished(store, recipe, write=False)  # refuses the output of another recipe first
    resumed, seconds = 0, dict[str, float]()
    with hold(store, f"recipe {recipe.hash[:16]}") as lease:
        manifest = publish.finished(store, recipe)
        lost = [] if manifest is None else publish.missing(store, manifest)
        if lost:
            tell(f"{flags.out} lacks {len(lost)} objects: writing them again")
        for key in lost:  # a truncated object would count as written
            store.delete(key)
        if manifest is None or lost:
            with ray_executor.cluster():
                receipts, resumed, seconds = _encode(flags, units, store, recipe, lease)
            lease.confirm()
            manifest = publish.finish(store, recipe, receipts, class_names, card_page)
        else:
            tell(f"{flags.out} is already encoded with this recipe")
        publish.clean(store, manifest)
    if warning := publish.unknown_warning(publish.unknown_share(manifest.counts)):
        tell(f"encode: {flags.dataset}/{flags.split}: {warning}")
    return _summary(flags, manifest, resumed, seconds, time.perf_counter() - began)


def _encode(
    flags: Flags, units: Sequence[Unit], store: Store, recipe: Recipe, lease: Lease
) -> tuple[list[Receipt], int, dict[str, float]]:
    """Receipts of all groups in order, how many existed before, and seconds by job stage."""
    cores = max(1, ray_executor.resource("CPU"))
    decoders = flags.decoders or cores
    place = Place(
        flags.out,
        StoreOptions.from_environment(),
        str(Path(flags.tokenizer).absolute()),
        str(Path(flags.autoencoder).absolute()) if flags.autoencoder else "",
    )
    # The first encoder loads its network during the survey.
    start, encoders = None, flags.encoders
    if recipe.image_size is not None:
        start = partial(ray_executor.start_encoder, recipe, place.autoencoder)
        if not encoders and flags.device == "cuda":
            encoders = ray_executor.resource("GPU")
            if not encoders:
                raise ValueError("--device cuda: Ray sees no GPU here; use --device cpu")
        encoders = encoders or max(1, cores // flags.encoder_threads)
    encoder = GroupEncoder(recipe, place, decoders, start, encoders)
    began = time.perf_counter()
    encoder.seconds["survey"] = survey_all(units, store, recipe, place, decoders)
    groups, total, bad = plan_groups(units, store, recipe)
    encoder.seconds["survey on the clock"] = time.perf_counter() - began
    check_bad(Counter({"unreadable": bad}), total, flags.max_bad_share)
    done, samples = load_receipts(store, recipe, groups)
    resumed = len(done)
    todo = [g for g in groups if g.index not in done]
    before = sum(r.counts.get("records", 0) for r in done.values())
    reasons = Counter(publish.kind(q.reason) for r in done.values() for q in r.quarantine)
    title = f"{flags.dataset}/{flags.split}"
    with tqdm(total=total, initial=before, desc=title, unit=" records") as bar:
        for group, receipt in encoder.run(todo, total - before, bar.update):
            lease.check()
            done[group.index] = dataclasses.replace(receipt, samples=())
            samples = lowest([*samples, *receipt.samples])
            reasons.update(publish.kind(q.reason) for q in receipt.quarantine)
            check_bad(reasons, total, flags.max_bad_share)
    done[0] = dataclasses.replace(done[0], samples=samples)
    return [done[g.index] for g in groups], resumed, encoder.seconds


def survey_all(
    units: Sequence[Unit], store: Store, recipe: Recipe, place: Place, decoders: int
) -> float:
    """Surveys the units whose survey is not in the store; returns the core seconds it took."""
    known = store.listing(f"{recipe.work}/survey/")
    keys = [survey_key(recipe, number) for number in range(len(units))]
    todo = [(unit, key) for unit, key in zip(units, keys, strict=True) if key not in known]
    if not todo:
        return 0.0
    seconds = ray_executor.survey_units(todo, place, recipe.near_duplicates, 2 * decoders)
    return math.fsum(tqdm(seconds, "survey", len(todo), unit=" units", leave=False))


def plan_groups(
    units: Sequence[Unit], store: Store, recipe: Recipe
) -> tuple[list[Group], int, int]:
    """The groups of work, and the numbers of records and bad records in all units.

    Surveys are read one at a time and spill to files: memory does not grow with their number.
    """
    sizes, bad = [], 0
    with (
        tempfile.TemporaryDirectory(prefix="mdm-encode-") as folder,
        DuplicateIndex(Path(folder), images=recipe.image_size is not None) as duplicates,
    ):
        for number in range(len(units)):
            key = survey_key(recipe, number)
            data = get_sealed(store, key)
            if data is None:
                store.delete(key)
                raise StoreError(f"{store.uri}/{key} is damaged, and was removed; run it again")
            survey = Survey.from_bytes(data)
            duplicates.add(number, survey)
            sizes.append(len(survey))
            bad += survey.bad
        left_out = duplicates.left_out(len(units))
    return plan(units, sizes, left_out, recipe.shard_rows), sum(sizes), bad


def load_receipts(
    store: Store, recipe: Recipe, groups: Sequence[Group]
) -> tuple[dict[int, Receipt], tuple[CardSample, ...]]:
    """Receipts of finished groups by group index, and the lowest-ranked card samples of all.

    A receipt whose shards are missing is ignored.
    """
    known = store.listing(f"{recipe.work}/group/")
    shards = store.listing("shards/") if known else {}
    receipts: dict[int, Receipt] = {}
    samples: tuple[CardSample, ...] = ()
    for group in groups:
        key = receipt_key(recipe, group.index)
        if key in known and (data := get_sealed(store, key)) is not None:
            receipt = Receipt.from_bytes(data)
            if all(shards.get(s.key) == s.bytes for s in receipt.shards):
                receipts[group.index] = dataclasses.replace(receipt, samples=())
                samples = lowest([*samples, *receipt.samples])  # their images take memory
    return receipts, samples


def _summary(
    flags: Flags, manifest: Manifest, resumed: int, spent: dict[str, float], seconds: float
) -> dict[str, Any]:
    counts = manifest.counts
    return {
        "dataset": manifest.dataset,
        "split": manifest.split,
        "out": flags.out,
        "manifest_sha256": manifest.sha256,
        "recipe_hash": manifest.recipe_hash,
        "examples": manifest.rows,
        "records": counts.get("records", 0),
        "dropped": sum(v for k, v in counts.items() if k.startswith("dropped: ")),
        "quarantined": counts["quarantined"],
        "unknown_tokens": round(publish.unknown_share(counts), 6),
        "shards": len(manifest.shards),
        "bytes": sum(s.bytes for s in manifest.shards),
        "resumed_groups": resumed,
        "seconds": round(seconds, 2),
        "stage_seconds": {k: round(v, 2) for k, v in sorted(spent.items())},
        "samples_per_second": round(manifest.rows / seconds, 1),
    }
