"""What a packet costs in the programs now, of the traffic that pods have: `knd doctor --measure`.

Invariant: nothing stays different. The kernel times BPF programs while this runs, all of the machine's, and
stops when it ends, whatever ends it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from bpf import cost
from bpf.accounting import pinned_counters
from bpf.errors import CallRefused
from driver.errors import DriverError
from driver.journal.store import Journal
from driver.model import Attachment, DeviceName, Preparation
from driver.paths import Paths
from hw.model import Direction, IfName

SECONDS_AT_MOST = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one direction of a device. runs: packets as the kernel hands them over, one of many segments being
    one. nanoseconds: a run, with the timing; None where nothing passed."""

    device: DeviceName
    namespace: str
    pod: str | None
    interface: IfName | None
    direction: Direction
    runs: int
    nanoseconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """timing: how many nanoseconds of each run are the timing's own."""

    timing: float
    rows: tuple[Cost, ...]


def measure(paths: Paths, wait: Callable[[], None]) -> Costs:
    """Until wait returns. DriverError or BpfError, a sentence, if nothing can be measured."""
    holders = _holders(paths)
    try:
        measured = cost.measure(pinned_counters(paths.pins), wait)
    except CallRefused as error:
        if error.errno == errno.EINVAL:
            raise DriverError(f"this kernel times no BPF programs (5.8 does): {error}") from error
        raise
    # Who came or went meanwhile is shown as it was before: its slot is the next one's only after it is gone.
    return Costs(
        timing=measured.timing,
        rows=tuple(
            _cost(*holders[each.place.slot], each) for each in measured.programs if each.place.slot in holders
        ),
    )


def _cost(preparation: Preparation, attachment: Attachment | None, timed: cost.Timed) -> Cost:
    return Cost(
        device=preparation.key.unit,
        namespace=preparation.claim.namespace,
        pod=attachment.pod.name if attachment else None,
        interface=preparation.pod_ifname if attachment else None,
        direction=Direction(timed.place.direction),
        runs=timed.runs,
        nanoseconds=timed.nanoseconds / timed.runs if timed.runs else None,
    )


def _holders(paths: Paths) -> dict[int, tuple[Preparation, Attachment | None]]:
    with Journal.open_read_only(paths.journal) as journal:
        state = journal.state()
    attached = {attachment.preparation: attachment for attachment in state.attachments}
    return {p.slot: (p, attached.get(p.key)) for p in state.preparations}
