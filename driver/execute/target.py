"""One device during one operation: where it may be, and the sockets to reach it there.

Invariant: the device is found by its identity, wherever it is; no socket outlives the operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from driver.errors import DriverError
from driver.model import Attachment, Preparation
from driver.rdma import RdmaInPod
from hw.model import IfIndex, LinkInfo, MacAddress, PciIdentity, is_at_home
from hw.netlink import LinkSocket
from hw.netns import NetnsHandle
from hw.scan import pf_link


class Vanished(DriverError):
    """The device is neither at home nor in its pod: destroyed with the netns, unplugged, or hidden."""


class NotClean(DriverError):
    """At home, but not as it was. problems names each field with what it is and what it should be."""

    def __init__(self, device: str, problems: tuple[str, ...]) -> None:
        self.problems = problems
        super().__init__(f"{device} is not clean: {'; '.join(problems)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One device during one operation. pod is None where the netns is gone or not concerned.

    hint is the ifindex the device had last: it saves a dump of all links, and is verified by identity.
    """

    preparation: Preparation
    attachment: Attachment | None
    home: LinkSocket
    home_netns: NetnsHandle
    pod: LinkSocket | None = None
    pod_netns: NetnsHandle | None = None
    hint: IfIndex | None = None
    given: list[RdmaInPod] = field(default_factory=list)
    """What an act found of the RDMA device in the pod, for its record."""

    @property
    def device(self) -> str:
        """What this node calls it: a share of a device is a thing of its own."""
        return self.preparation.key.unit

    def find_at_home(self) -> LinkInfo | None:
        identity = self.preparation.identity
        if self.hint is not None:
            link = self.home.by_index(self.hint)
            if link is not None and is_at_home(identity, link):
                return link
        return next((link for link in self.home.dump() if is_at_home(identity, link)), None)

    def pf(self) -> LinkInfo | None:
        """The netdev of a VF's PF; None if it is no VF, or its PF is not to be seen."""
        return pf_link(self.preparation.identity, self.home.dump())

    def given_mac(self) -> MacAddress | None:
        """The address the node's admin gave a VF on its PF, which its driver takes up sooner or later and
        no tenant can change; None if there is none to be seen."""
        identity, pf = self.preparation.identity, self.pf()
        if pf is None or not isinstance(identity, PciIdentity) or identity.vf_index is None:
            return None
        told = self.home.vf_settings(pf.ifindex, identity.vf_index)
        return told.mac if told is not None else None

    def find_in_pod(self) -> LinkInfo | None:
        if self.pod is None:
            return None
        identity = self.preparation.identity
        if self.hint is not None:
            # It keeps the index it had at home, unless something in the pod had that before it came.
            link = self.pod.by_index(self.hint)
            if link is not None and identity.matches(link):
                return link
        return next((link for link in self.pod.dump() if identity.matches(link)), None)


@contextmanager
def open_target(
    preparation: Preparation,
    attachment: Attachment | None,
    home_netns: NetnsHandle,
    pod: NetnsHandle | None,
    hint: IfIndex | None = None,
) -> Iterator[Target]:
    """Sockets for one operation, closed at its end: none of ours may outlive a sandbox."""
    with ExitStack() as stack:
        yield Target(
            preparation=preparation,
            attachment=attachment,
            home=stack.enter_context(LinkSocket(None)),
            home_netns=home_netns,
            pod=stack.enter_context(LinkSocket(pod)) if pod is not None else None,
            pod_netns=pod,
            hint=hint,
        )
