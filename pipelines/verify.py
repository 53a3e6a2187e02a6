"""Re-read encoded data sets and check every hash, count and row. Exit code 1 if any is wrong.

`--quarantine` lists instead the records that could not be encoded, one line of JSON each: id,
reason, and origin (the file that holds it).
"""

from mdm.launch.job import job

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from mdm.config import doc
from mdm.data.manifest import Manifest, ManifestError
from mdm.preprocess.verify import repeat_hint, report
from mdm.storage import StoreError
from mdm.utils.command_line import parse_cli


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    data: tuple[str, ...] = field(
        metadata={"help": "URI of an encoded data set; repeat it for each one"}
    )
    discard: bool = doc(
        False, "delete what is damaged or belongs to no data set, so that encode.py writes it again"
    )
    quarantine: bool = doc(False, "list the quarantined records; read nothing else")

    def __post_init__(self) -> None:
        if self.discard and self.quarantine:
            raise ValueError("give either --discard or --quarantine")
        if not self.data:
            raise ValueError("--data is empty; give the URI of an encoded data set")


def checked(uris: Sequence[str], discard_damaged: bool) -> int:
    """Print the verdicts on these data sets and how to repair them; returns the exit code."""
    problems = sum(report(uri, discard_damaged, print) for uri in uris)
    if not problems:
        print("all as the manifest says")
    elif discard_damaged:
        print(f"problems: {problems}; now run encode.py with the same flags as before")
    else:
        print(
            f"problems: {problems}; to repair: verify.py --discard, then encode.py with the same "
            "flags as before"
        )
    return 1 if problems else 0


def listed(uris: Sequence[str]) -> int:
    """Print the quarantined records, one line of JSON each; returns the exit code."""
    for uri in uris:
        try:
            manifest = Manifest.load(uri)
        except ManifestError as error:
            raise ManifestError(f"{error}{repeat_hint(uri)}") from None
        for record in manifest.quarantine:
            print(json.dumps(asdict(record), ensure_ascii=False))
    return 0


@job("verify", ManifestError, StoreError, ValueError)
def main() -> int:
    """Check the data sets, or list their quarantined records."""
    flags = parse_cli(Flags, description=__doc__)
    return listed(flags.data) if flags.quarantine else checked(flags.data, flags.discard)


if __name__ == "__main__":
    sys.exit(main())
