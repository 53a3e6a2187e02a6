"""Re-read encoded data sets and check every hash, count and row. Exit code 1 if any is wrong."""

import sys
from dataclasses import dataclass, field

from tqdm import tqdm

from mdm.config import fail, parse_cli
from mdm.data.manifest import Manifest, ManifestError
from mdm.data.storage import StoreError
from mdm.data.verify import verify


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    data: str = field(metadata={"help": "URIs of encoded data sets, separated by commas"})


def check(uri: str) -> int:
    """Print the verdicts on one data set; how many problems there were."""
    manifest = Manifest.load(uri)
    print(
        f"{uri}: {manifest.dataset}/{manifest.split}, {manifest.rows} examples, "
        f"{len(manifest.quarantine)} in quarantine, manifest {manifest.sha256[:16]}"
    )
    problems = 0
    total = len(manifest.shards) + 2
    for verdict in tqdm(verify(manifest), "verify", total, unit=" objects", leave=False):
        problems += len(verdict.problems)
        size = f"{verdict.rows:>9} rows {verdict.bytes / 2**20:>9.2f} MiB"
        print(f"  {'BAD' if verdict.problems else 'ok ':<3} {size}  {verdict.key}")
        for problem in verdict.problems:
            print(f"      {problem}")
    return problems


def main() -> int:
    """Check every data set named."""
    flags = parse_cli(Flags, description=__doc__)
    try:
        problems = sum(check(uri) for uri in flags.data.split(",") if uri)
    except (ManifestError, StoreError, ValueError) as error:
        fail(f"verify: {error}")
    print("all as the manifest says" if not problems else f"{problems} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
