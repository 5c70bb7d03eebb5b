"""Whose the resources on RDMA devices are: from processes to the pods that have the devices.

Invariant: a resource is a pod's if its process is in that pod's cgroup, or if the process is not to be seen
and the pod alone has the device; else it is the device's, and no pod's.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from driver.execute.engine import EXPECTED
from driver.execute.probe import Host
from driver.execute.resources import Made, made_on_target, word
from driver.lifecycle.book import Book
from driver.lifecycle.metering import Reach, rdma_index
from driver.model import Attachment, AttachmentState, PodUid
from hw.model import RdmaIndex

log = logging.getLogger(__name__)

_POD = re.compile(r"pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})")
"""In a cgroup's path, as kubelet names it: with `_` where systemd has the cgroups."""
_CONTAINER = re.compile(r"([0-9a-f]{64})")

Labels = tuple[str, ...]


def cgroup_of(proc: Path, pid: int) -> str:
    """The path of a process's cgroup; of version 1 the paths of all hierarchies. "" for one that is gone."""
    try:
        return (proc / str(pid) / "cgroup").read_text(errors="surrogateescape")
    except OSError:
        return ""


def pod_in(cgroup: str) -> PodUid | None:
    found = _POD.search(cgroup)
    return PodUid(found[1].replace("_", "-")) if found else None


def container_in(cgroup: str) -> str:
    """The runtime's id of a container; "" for what is in none."""
    found = _CONTAINER.search(cgroup)
    return found[1] if found else ""


def divide(
    made: Made, holders: Sequence[Attachment], pod_of: Callable[[int], PodUid | None]
) -> Counter[tuple[Attachment | None, str]]:
    """Numbers by whose they are and by kind; None: the device's."""
    by_pod = {holder.pod.uid: holder for holder in reversed(holders)}
    alone = holders[0] if len(by_pod) == 1 else None
    found: Counter[tuple[Attachment | None, str]] = Counter()
    for (kind, pid), number in made.items():
        pod = pod_of(pid) if pid else None
        holder = alone if not pid else by_pod.get(pod) if pod is not None else None
        found[holder, word(kind)] += number
    return found


class Resources:
    """What living attachments have on their RDMA devices, as last looked at. Safe on any thread."""

    def __init__(self, book: Book, host: Host, proc: Path) -> None:
        self._book = book
        self._host = host
        self._proc = proc
        self._numbers: Mapping[tuple[Attachment | None, str, str], int] = {}

    def look(self, reach: Reach) -> None:
        found: dict[tuple[Attachment | None, str, str], int] = {}
        for holders in self._by_device().values():
            try:
                made = self._made(holders[0], reach)
            except EXPECTED as error:
                log.warning("the resources of %s: %s", holders[0].preparation.device, error)
                continue
            assert holders[0].rdma is not None
            for (holder, kind), number in divide(made, holders, self._pod_of).items():
                found[holder, holders[0].rdma.name, kind] = number
        self._numbers = found

    def _by_device(self) -> Mapping[RdmaIndex, list[Attachment]]:
        found: dict[RdmaIndex, list[Attachment]] = {}
        for attachment in self._book.attachments():
            preparation = self._book.preparation(attachment.preparation)
            if attachment.state is not AttachmentState.ATTACHED or preparation is None:
                continue
            index = rdma_index(preparation, attachment)
            if index is not None and attachment.rdma is not None:
                found.setdefault(index, []).append(attachment)
        return found

    def _made(self, attachment: Attachment, reach: Reach) -> Made:
        with reach(attachment) as target:
            made = made_on_target(target, self._host) if target is not None else None
            return made or {}

    def _pod_of(self, pid: int) -> PodUid | None:
        return pod_in(cgroup_of(self._proc, pid))

    # --- for a scrape -------------------------------------------------------------------------------

    def of_pods(self) -> Mapping[Labels, float]:
        """By namespace, pod, claim, device, interface, RDMA device and kind."""
        found: dict[Labels, float] = {}
        for (holder, device, kind), number in self._numbers.items():
            preparation = self._book.preparation(holder.preparation) if holder is not None else None
            if holder is None or preparation is None or self._book.attachment(holder.id) is None:
                continue
            interface = preparation.pod_ifname or ""
            owner = (holder.pod.namespace, holder.pod.name, preparation.claim.name)
            found[*owner, preparation.key.device, interface, device, kind] = number
        return found

    def shared(self) -> Mapping[Labels, float]:
        """By RDMA device and kind: what is of no pod that has the device, or of several that nobody can tell
        apart."""
        return {
            (device, kind): number
            for (holder, device, kind), number in self._numbers.items()
            if holder is None
        }
