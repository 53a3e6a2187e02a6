"""Re-read encoded data sets and check every hash, count and row. Exit code 1 if any is wrong.

`--quarantine true` lists instead the records that could not be encoded, a line of JSON each: id,
reason, and the file in which it lies.
"""

from mdm.launch.job import job

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from tqdm import tqdm

from mdm.config import doc
from mdm.data.manifest import MANIFEST, MANIFEST_SHA256, Manifest, ManifestError
from mdm.preprocess.verify import discard, verify
from mdm.storage import StoreError, open_store
from mdm.storage.lease import hold
from mdm.utils.command_line import parse_cli

NOTES = 10  # objects of other people's that are named


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    data: tuple[str, ...] = field(
        metadata={"help": "URI of an encoded data set; repeat it for each one"}
    )
    discard: bool = doc(
        False, "delete what is damaged or belongs to no data set: encode.py then writes it again"
    )
    quarantine: bool = doc(False, "list the records in quarantine; nothing else is read")

    def __post_init__(self) -> None:
        if self.discard and self.quarantine:
            raise ValueError("give either --discard true or --quarantine true")
        if not self.data:
            raise ValueError("--data is empty; give the URI of an encoded data set")


def several(uri: str) -> str:
    """What to add where no data set is found at `uri`."""
    return " (give several data sets by repeating --data)" if "," in uri else ""


def check(uri: str, discard_damaged: bool = False) -> int:
    """Print the verdicts on one data set; how many problems there were."""
    try:
        manifest = Manifest.load(uri)
    except ManifestError as error:
        print(f"  BAD {error}{several(uri)}")
        if discard_damaged:  # its receipts give the same one again
            with hold(open_store(uri), "verify.py --discard", advice="discard later"):
                for key in (MANIFEST, MANIFEST_SHA256):
                    open_store(uri).delete(key)
        return 1
    print(
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
        print(f"  {'BAD' if verdict.problems else 'ok ':<3} {size}  {verdict.key}")
        for line in (*verdict.problems, *verdict.notes[:NOTES]):
            print(f"      {line}")
        if len(verdict.notes) > NOTES:
            print(f"      {len(verdict.notes) - NOTES} more such objects")
    if discard_damaged:
        with hold(manifest.store(), "verify.py --discard", advice="discard later"):
            for key in discard(manifest, damaged):
                print(f"  deleted {key}")
    return problems


def checked(uris: Sequence[str], discard_damaged: bool) -> int:
    """Print the verdicts on these data sets, and what to do; the exit code."""
    problems = sum(check(uri, discard_damaged) for uri in uris)
    if not problems:
        print("all as the manifest says")
    elif discard_damaged:
        print(f"{problems} problems; now run encode.py with the same flags as before")
    else:
        print(
            f"{problems} problems; to repair: verify.py with --discard true, then encode.py with "
            "the same flags as before"
        )
    return 1 if problems else 0


def listed(uris: Sequence[str]) -> int:
    """Print the records in quarantine, a line of JSON each; the exit code."""
    for uri in uris:
        try:
            manifest = Manifest.load(uri)
        except ManifestError as error:
            raise ManifestError(f"{error}{several(uri)}") from None
        for record in manifest.quarantine:
            print(json.dumps(asdict(record), ensure_ascii=False))
    return 0


@job("verify", ManifestError, StoreError, ValueError)
def main() -> int:
    """Check every data set named, or list what is in quarantine."""
    flags = parse_cli(Flags, description=__doc__)
    return listed(flags.data) if flags.quarantine else checked(flags.data, flags.discard)


if __name__ == "__main__":
    sys.exit(main())
