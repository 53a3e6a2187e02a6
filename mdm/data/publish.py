"""The last step of encoding: receipts -> dataset card and manifest; what is superseded goes."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mdm.data.encoding import Receipt, Recipe
from mdm.data.manifest import CARD, MANIFEST, Manifest, ManifestError, canonical, commit, publish
from mdm.data.storage import MissingObjectError, Store


def finished(store: Store, recipe: Recipe) -> Manifest | None:
    """The manifest if this recipe was encoded here before; ManifestError for another recipe."""
    try:
        there = Manifest.from_bytes(store.get(MANIFEST), store.uri)
    except MissingObjectError:
        return None
    if there.recipe_hash == recipe.hash:
        commit(store, there)  # the last step, in case it was killed there
    else:
        raise ManifestError(
            f"{store.uri} already holds {there.dataset}/{there.split} of recipe "
            f"{there.recipe_hash}; these inputs and settings are recipe {recipe.hash}: choose "
            "another --out, or delete that one"
        )
    return there


def finish(
    store: Store, recipe: Recipe, receipts: Sequence[Receipt], class_names: Sequence[str]
) -> Manifest:
    """Write the card, then commit the manifest. Equal receipts give equal bytes."""
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(receipt.counts)
    quarantine = tuple(
        sorted((q for r in receipts for q in r.quarantine), key=lambda q: (q.id, q.origin))
    )
    shards = tuple(s for r in receipts for s in r.shards)
    counts["examples"] = sum(s.rows for s in shards)
    counts["quarantined"] = len(quarantine)
    plain_counts = dict(sorted(counts.items()))
    if counts["examples"] == 0:
        raise ManifestError(
            f"nothing of {recipe.dataset}/{recipe.split} is left to publish: {plain_counts}"
        )
    card = canonical(_card(recipe, receipts, plain_counts, quarantine, class_names))
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
    try:
        published = publish(store, manifest)
    except ManifestError:  # what this job wrote must not stay among the winner's objects
        clean(store, Manifest.from_bytes(store.get(MANIFEST), store.uri))
        raise
    # Behind the manifest, so that of two jobs the winner's card stays; `missing` sees if it is not.
    store.put(CARD, card)
    return published


def missing(store: Store, manifest: Manifest) -> list[str]:
    """Keys that a published data set should hold and does not, or not in their full length."""
    there = store.listing()
    lost = [s.key for s in manifest.shards if there.get(s.key) != s.bytes]
    return lost if CARD in there else [*lost, CARD]


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
        "token_lengths": {str(k): v for k, v in sorted(lengths.items())},
        "classes": named,
        "lineage": {
            "recipe_hash": recipe.hash,
            "inputs_sha256": recipe.inputs_sha256,
            "tokenizer_sha256": recipe.tokenizer_sha256,
            "autoencoder_sha256": recipe.autoencoder_sha256,
            "code_version": recipe.code_version,
        },
    }


def receipts_of(manifest: Manifest) -> str:
    """Where the receipts of a published data set lie."""
    return f"work/{manifest.recipe_hash[:16]}/group/"


def clean(store: Store, manifest: Manifest) -> None:
    """Remove what the published manifest does not name: surveys, and all of dead recipes.

    The receipts of its groups stay: they tell which one gave a shard, should that be lost.
    """
    named = {s.key for s in manifest.shards}
    receipts = receipts_of(manifest)
    for key in (*store.listing("work/"), *store.listing("shards/")):
        if key not in named and not key.startswith(receipts):
            store.delete(key)
    store.sweep()
