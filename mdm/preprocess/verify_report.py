"""What `verify.py` shows about an encoded data set, and what it deletes."""

from collections.abc import Callable

from tqdm import tqdm

from mdm.data.manifest import MANIFEST, MANIFEST_SHA256, Manifest, ManifestError
from mdm.preprocess.verify import discard, verify
from mdm.storage import open_store
from mdm.storage.lease import hold

NOTES = 10  # foreign objects that are named


def repeat_hint(uri: str) -> str:
    """What a message adds where no data set lies at `uri`."""
    return " (give several data sets by repeating --data)" if "," in uri else ""


def report(uri: str, discard_damaged: bool, show: Callable[[str], None]) -> int:
    """Check one data set and return the number of problems.

    Args:
        uri: Folder or s3:// prefix of the data set.
        discard_damaged: Whether to delete what is damaged, and a manifest that cannot be read.
        show: Takes the lines for the user.
    """
    try:
        manifest = Manifest.load(uri)
    except ManifestError as error:
        show(f"  BAD {error}{repeat_hint(uri)}")
        if discard_damaged:  # the receipts give the same manifest again
            with hold(open_store(uri), "verify.py --discard", advice="discard later"):
                for key in (MANIFEST, MANIFEST_SHA256):
                    open_store(uri).delete(key)
        return 1
    show(
        f"{uri}: {manifest.dataset}/{manifest.split}, {manifest.rows} examples, "
        f"{len(manifest.quarantine)} in quarantine, manifest {manifest.sha256[:16]}"
    )
    problems = 0
    damaged = []
    total = len(manifest.shards) + len(manifest.parts()) + 2
    for verdict in tqdm(verify(manifest), "verify", total, unit=" objects", leave=False):
        problems += len(verdict.problems)
        damaged += [verdict] if verdict.problems else []
        size = f"{verdict.rows:>9} rows {verdict.bytes / 2**20:>9.2f} MiB"
        show(f"  {'BAD' if verdict.problems else 'ok ':<3} {size}  {verdict.key}")
        for line in (*verdict.problems, *verdict.notes[:NOTES]):
            show(f"      {line}")
        if len(verdict.notes) > NOTES:
            show(f"      {len(verdict.notes) - NOTES} more such objects")
    if discard_damaged:
        with hold(manifest.store(), "verify.py --discard", advice="discard later"):
            for key in discard(manifest, damaged):
                show(f"  deleted {key}")
    return problems
