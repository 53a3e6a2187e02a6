"""The last step of encoding: receipts -> dataset card and manifest; superseded objects go."""

import dataclasses
import hashlib
import importlib.metadata
import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mdm.data.manifest import CARD, MANIFEST, Manifest, ManifestError, canonical, commit, publish
from mdm.data.manifest_parts import quarantine_parts, shard_parts
from mdm.preprocess.receipt import TEXT_TOKENS, UNKNOWN_TOKENS, CardSample, Receipt, lowest
from mdm.preprocess.recipe import Recipe
from mdm.storage import MissingObjectError, Store
from mdm.storage.lease import LEASE

MAX_UNKNOWN = 0.01  # share of unknown tokens above which the tokenizer is for another language
# Keys of objects that encoding writes, and names that programs and people leave in any folder.
_OURS = re.compile(
    r"shards/[^/]+\.arrow|parts/[^/]+\.json|work/[^/]+/(group|survey)/\d+\.(json|npz)"
)
_HARMLESS = re.compile(r"(.*/)?([._][^/]*|README[^/]*|Thumbs\.db)", re.DOTALL)
PAGE = "card.html"  # the card for people; no program reads it
# Prefixes of the keys that an encode job writes; other data sets may lie below its output.
OWN = ("work/", "parts/", "shards/", MANIFEST, CARD, PAGE)
# What determines the bytes of images, texts and shards.
_LIBRARIES = ("pillow", "numpy", "torch", "diffusers", "sentencepiece", "pyarrow")
# Renders the dataset card from its facts and samples.
CardPage = Callable[[dict[str, Any], Sequence[CardSample]], str]


def finished(store: Store, recipe: Recipe, *, write: bool = True) -> Manifest | None:
    """The manifest if this recipe was encoded here before; ManifestError for another recipe.

    With `write`, which needs the lease, it completes a job that was killed at its last step.
    """
    try:
        manifest = Manifest.from_bytes(store.get(MANIFEST), store.uri)
    except MissingObjectError:
        return None
    if manifest.recipe_hash != recipe.hash:
        raise ManifestError(
            f"{store.uri} already holds {manifest.dataset}/{manifest.split} of recipe "
            f"{manifest.recipe_hash}; these inputs and settings are recipe {recipe.hash}: choose "
            "another --out, or delete that one"
        )
    if write:
        commit(store, manifest)
    return manifest


def finish(
    store: Store,
    recipe: Recipe,
    receipts: Sequence[Receipt],
    class_names: Sequence[str],
    page: CardPage,
) -> Manifest:
    """Writes the card, then commits the manifest. Equal receipts give equal bytes.

    Raises:
        ManifestError: no sample is left, or another job has published here.
    """
    counts = Counter[str]()
    for receipt in receipts:
        counts.update(receipt.counts)
    quarantine = quarantine_parts((q for r in receipts for q in r.quarantine), store)
    shards = shard_parts((s for r in receipts for s in r.shards), recipe.batch_rows, store)
    counts["examples"] = int(shards.row_start[-1])
    counts["quarantined"] = len(quarantine)
    plain_counts = dict(sorted(counts.items()))
    if counts["examples"] == 0:
        raise ManifestError(
            f"nothing of {recipe.dataset}/{recipe.split} is left to publish: {plain_counts}"
        )
    reasons = (q.reason for q in quarantine)
    facts = _card(recipe, receipts, plain_counts, Counter(map(kind, reasons)), class_names)
    samples = lowest(s for r in receipts for s in r.samples)
    facts["samples"] = [{"id": s.id, "text": s.text} for s in samples]
    store.put(PAGE, page(facts, samples).encode())
    card = canonical(facts)
    store.put(CARD, card)
    manifest = Manifest(
        dataset=recipe.dataset,
        split=recipe.split,
        recipe_hash=recipe.hash,
        tokenizer_sha256=recipe.tokenizer_sha256,
        autoencoder_sha256=recipe.autoencoder_sha256,
        image_grid=recipe.image_grid,
        latent_dim=recipe.latent_dim,
        vocab_size=recipe.vocab_size,
        class_names=tuple(class_names),
        batch_rows=recipe.batch_rows,
        shards=shards,
        quarantine=quarantine,
        counts=plain_counts,
        card_sha256=hashlib.sha256(card).hexdigest(),
    )
    return publish(store, manifest)


def kind(reason: str) -> str:
    """A reason without what follows its colon, which is about one record."""
    return reason.split(":")[0]


def _card(
    recipe: Recipe,
    receipts: Sequence[Receipt],
    counts: dict[str, int],
    reasons: Counter[str],
    class_names: Sequence[str],
) -> dict[str, Any]:
    lengths, classes = Counter[int](), Counter[int]()
    for receipt in receipts:
        lengths.update({int(k): v for k, v in receipt.token_lengths.items()})
        classes.update({int(k): v for k, v in receipt.classes.items()})
    dropped = "dropped: "
    return {
        "dataset": recipe.dataset,
        "split": recipe.split,
        "counts": counts,
        "dropped": {k.removeprefix(dropped): v for k, v in counts.items() if k.startswith(dropped)},
        "quarantined": dict(sorted(reasons.items())),
        "unknown_tokens": unknown_share(counts),
        "token_lengths": {str(k): v for k, v in sorted(lengths.items())},
        "classes": {
            class_names[k] if 0 <= k < len(class_names) else str(k): v
            for k, v in sorted(classes.items())
        },
        "lineage": {
            "recipe_hash": recipe.hash,
            "recipe": dataclasses.asdict(recipe),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _LIBRARIES},
            },
        },
    }


def unknown_share(counts: Mapping[str, int]) -> float:
    """The share of a data set's text tokens that are unknown to the tokenizer."""
    return counts.get(UNKNOWN_TOKENS, 0) / max(1, counts.get(TEXT_TOKENS, 0))


def unknown_warning(share: float) -> str:
    """The warning for this share of unknown tokens; "" if it is small."""
    if share <= MAX_UNKNOWN:
        return ""
    return (
        f"{share:.2%} of the tokens are unknown to the tokenizer, more than {MAX_UNKNOWN:.0%}: "
        "those characters are lost; train a tokenizer on this data set, too"
    )


def missing(store: Store, manifest: Manifest) -> list[str]:
    """Keys of the objects of a published data set that are missing or have another length.

    If a manifest part is missing, only parts are named: the receipts tell what those list.
    """
    sizes = store.listing()
    lost = [key for key in (CARD, *manifest.parts()) if key not in sizes]
    if not lost or lost == [CARD]:
        lost += [s.key for s in manifest.shards if sizes.get(s.key) != s.bytes]
    return lost


def unnamed(manifest: Manifest, sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Keys that do not belong to the data set: leftovers of encoding, and harmless objects.

    Harmless are other people's empty objects, and those with names found in any folder (README,
    .DS_Store).

    Raises:
        StoreError: a manifest part is missing or damaged.
    """
    receipts = f"work/{manifest.recipe_hash[:16]}/group/"
    named, own = set(manifest.objects()), (receipts, CARD.removesuffix(".json"), LEASE)
    leftovers: list[str] = []
    harmless: list[str] = []
    for key, size in sizes.items():
        if key not in named and not key.startswith(own):
            other = not _OURS.fullmatch(key) and (not size or _HARMLESS.fullmatch(key))
            (harmless if other else leftovers).append(key)
    return leftovers, harmless


def clean(store: Store, manifest: Manifest) -> None:
    """Removes what the published manifest does not name: surveys, and all of other recipes.

    The receipts of its groups stay: they tell which group wrote a shard, should it get lost.
    """
    for folder in ("work/", "parts/", "shards/"):
        for key in unnamed(manifest, store.listing(folder))[0]:
            store.delete(key)
    store.sweep(*OWN)
