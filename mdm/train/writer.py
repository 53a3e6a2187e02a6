"""One writer a run: rank 0 holds leases of its folder and of its checkpoints, for all ranks.

A second job is refused before it reads or writes anything. If a job's leases are taken over while
it is stopped, or cut off from the store, it commits nothing more and ends.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mdm.checkpoint.checkpoints import uri_of
from mdm.checkpoint.state import RunError
from mdm.config import Config
from mdm.storage import LocalStore, StoreError, open_store
from mdm.storage.lease import Lease, OtherJobError, place_of
from mdm.train.heartbeat import JOB
from mdm.utils.exit_codes import GAVE_UP, MISTAKE
from mdm.utils.ranks import World, from_main

RUN_LEASE = "lease.json"  # in the run's folder and beside its checkpoints


class OtherRunError(RunError):
    """Another job writes to the run; retried if it belongs to the same supervised job."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def _refusal(error: OtherJobError) -> tuple[str, int]:
    """The arguments of the `OtherRunError` that fits."""
    return str(error), GAVE_UP if error.same_job else MISTAKE


@dataclass
class Writer:
    """This job's right to write to a run; ranks other than 0 have no leases and always have it."""

    _leases: list[Lease]

    @property
    def lost(self) -> bool:
        """Whether rank 0 knows that another job has taken over."""
        return any(lease.lost for lease in self._leases)

    def confirm(self) -> None:
        """Check the leases in the stores; OtherRunError if another job has taken over."""
        try:
            for lease in self._leases:
                lease.confirm()
        except OtherJobError as error:
            raise OtherRunError(*_refusal(error)) from None

    def has_folder(self) -> bool:
        """Whether the run's folder still belongs to this job."""
        with suppress(OtherJobError, StoreError):
            for lease in self._leases[-1:]:
                lease.confirm()
        return not self.lost

    def agree(self) -> None:
        """OtherRunError on all ranks if another job has taken over; all must call."""
        refusal = None
        try:
            for lease in () if self.has_folder() else self._leases:
                lease.check()
        except OtherJobError as error:
            refusal = _refusal(error)
        if refusal := from_main(refusal):
            raise OtherRunError(*refusal)


@contextmanager
def only_writer(config: Config, world: World) -> Iterator[Writer]:
    """Hold the right to write to the run of `config` during a block; all ranks must call.

    Raises OtherRunError if another job has it, or one of its places cannot be written to.
    """
    with ExitStack() as exit_stack:
        leases: list[Lease] = []
        refusal = None
        if world.is_main:
            try:
                _take(config, leases, exit_stack)
            except OtherJobError as error:
                refusal = _refusal(error)
            except (StoreError, OSError, ValueError) as error:  # ValueError: an unknown scheme
                advice = "--run_dir and --train.checkpoints must be places that can be written"
                refusal = (f"{error}; {advice}", MISTAKE)
        if refusal := from_main(refusal):
            raise OtherRunError(*refusal)
        yield Writer(leases)


def _take(config: Config, leases: list[Lease], exit_stack: ExitStack) -> None:
    """Take the lease of the checkpoints, then that of the folder, unless they are one place."""
    folder = LocalStore(Path(config.run_dir))
    stores = {place_of(s): s for s in (open_store(uri_of(config)), folder)}.values()
    roots = [store.root for store in stores if isinstance(store, LocalStore)]
    for root in reversed(roots):
        if not root.exists():
            exit_stack.callback(_remove_if_empty, root)
    exit_stack.callback(_release, leases)
    for store in stores:
        lease = Lease(
            store,
            f"run {folder.root}",
            key=RUN_LEASE,
            advice="give another --run_dir and --train.checkpoints",
            job=os.environ.get(JOB, ""),
        )
        lease.take()
        leases.append(lease)


def _release(leases: list[Lease]) -> None:
    """Release all, the folder's last: once that is gone, nothing of the run is held."""
    for lease in leases:
        lease.release()


def _remove_if_empty(folder: Path) -> None:
    """Remove the empty folder of a run that did not start."""
    with suppress(OSError):
        folder.rmdir()
