"""The last step of encoding: receipts -> dataset card and manifest; what is superseded goes."""

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
from mdm.preprocess.receipt import TEXT_TOKENS, UNKNOWN_TOKENS, Receipt, CardSample, lowest
from mdm.preprocess.recipe import Recipe
from mdm.storage import MissingObjectError, Store
from mdm.storage.lease import LEASE

MAX_UNKNOWN = 0.01  # of the tokens; above this share, the tokenizer is another language's
# Keys that encoding gives to objects, and names that programs and people leave in any folder.
_OURS = re.compile(
    r"shards/[^/]+\.arrow|parts/[^/]+\.json|work/[^/]+/(group|survey)/\d+\.(json|npz)"
)
_HARMLESS = re.compile(r"(.*/)?([._][^/]*|README[^/]*|Thumbs\.db)", re.DOTALL)
PAGE = "card.html"  # the card for people; nothing reads it
# How the keys begin that an encode job writes; below its output there may be others' data sets.
OWN = ("work/", "parts/", "shards/", MANIFEST, CARD, PAGE)
# What the bytes of images, texts and shards come from.
_LIBRARIES = ("pillow", "numpy", "torch", "diffusers", "sentencepiece", "pyarrow")
# Makes the dataset card's page of what was counted and of samples.
CardPage = Callable[[dict[str, Any], Sequence[CardSample]], str]


def finished(store: Store, recipe: Recipe, *, write: bool = True) -> Manifest | None:
    """The manifest if this recipe was encoded here before; ManifestError for another recipe.

    With `write`, which needs the lease, a job that was killed at its last step is finished.
    """
    try:
        there = Manifest.from_bytes(store.get(MANIFEST), store.uri)
    except MissingObjectError:
        return None
    if there.recipe_hash == recipe.hash:
        if write:
            commit(store, there)
    else:
        raise ManifestError(
            f"{store.uri} already holds {there.dataset}/{there.split} of recipe "
            f"{there.recipe_hash}; these inputs and settings are recipe {recipe.hash}: choose "
            "another --out, or delete that one"
        )
    return there


def finish(
    store: Store,
    recipe: Recipe,
    receipts: Sequence[Receipt],
    class_names: Sequence[str],
    page: CardPage | None = None,
) -> Manifest:
    """Write the card, then commit the manifest. Equal receipts give equal bytes.

    `page` makes the card's HTML of the card and the sample examples.
    """
    counts: Counter[str] = Counter()
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
    facts = _card(recipe, receipts, plain_counts, quarantine, class_names)
    samples = lowest(s for r in receipts for s in r.samples)
    facts["samples"] = [{"id": s.id, "text": s.text} for s in samples]
    if page is not None:
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


def _card(
    recipe: Recipe,
    receipts: Sequence[Receipt],
    counts: dict[str, int],
    quarantine: Sequence[Any],
    class_names: Sequence[str],
) -> dict[str, Any]:
    lengths: Counter[int] = Counter()
    classes: Counter[int] = Counter()
    for receipt in receipts:
        lengths.update({int(k): v for k, v in receipt.token_lengths.items()})
        classes.update({int(k): v for k, v in receipt.classes.items()})
    # The part before the colon is the kind; what follows is about one record.
    reasons = Counter(q.reason.split(":")[0] for q in quarantine)
    named = {
        class_names[k] if 0 <= k < len(class_names) else str(k): v
        for k, v in sorted(classes.items())
    }
    return {
        "dataset": recipe.dataset,
        "split": recipe.split,
        "counts": counts,
        "dropped": {
            k.removeprefix("dropped: "): v for k, v in counts.items() if k.startswith("dropped: ")
        },
        "quarantined": dict(sorted(reasons.items())),
        "unknown_tokens": unknown_share(counts),
        "token_lengths": {str(k): v for k, v in sorted(lengths.items())},
        "classes": named,
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
    """The share of the texts' tokens that the tokenizer has no piece for, by a set's counts."""
    return counts.get(UNKNOWN_TOKENS, 0) / max(1, counts.get(TEXT_TOKENS, 0))


def unknown_warning(share: float) -> str:
    """What to say of this share of unknown tokens; "" where it is small."""
    if share <= MAX_UNKNOWN:
        return ""
    return (
        f"{share:.2%} of the tokens are unknown to the tokenizer, more than {MAX_UNKNOWN:.0%}: "
        "those characters are lost; train a tokenizer on this data set, too"
    )


def missing(store: Store, manifest: Manifest) -> list[str]:
    """Keys that a published data set should hold and does not, or not in their full length.

    Without one of its parts only parts are named: what those list is seen by its receipts.
    """
    there = store.listing()
    lost = [key for key in (CARD, *manifest.parts()) if key not in there]
    if not lost or lost == [CARD]:
        lost += [s.key for s in manifest.shards if there.get(s.key) != s.bytes]
    return lost


def receipts_of(manifest: Manifest) -> str:
    """Where the receipts of a published data set lie."""
    return f"work/{manifest.recipe_hash[:16]}/group/"


def unnamed(manifest: Manifest, sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """What the data set neither names nor keeps to itself: leftovers, and what does no harm.

    Other people's empty objects do none, nor those named as in any folder (README, .DS_Store).
    StoreError where a part of the manifest is lost.
    """
    named, own = set(manifest.objects()), (receipts_of(manifest), CARD.removesuffix(".json"), LEASE)
    leftovers: list[str] = []
    others: list[str] = []
    for key, size in sizes.items():
        if key not in named and not key.startswith(own):
            harmless = not _OURS.fullmatch(key) and (not size or _HARMLESS.fullmatch(key))
            (others if harmless else leftovers).append(key)
    return leftovers, others


def clean(store: Store, manifest: Manifest) -> None:
    """Remove what the published manifest does not name: surveys, and all of dead recipes.

    The receipts of its groups stay: they tell which one gave a shard, should that be lost.
    """
    for folder in ("work/", "parts/", "shards/"):
        for key in unnamed(manifest, store.listing(folder))[0]:
            store.delete(key)
    store.sweep(*OWN)
